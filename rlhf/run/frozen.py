"""Imported last by a fork server: its forks leave what it has loaded out of garbage collection.

Else each collection in a fork reads some million objects of torch and transformers, and copies their memory by marking
them (https://docs.python.org/3/library/gc.html#gc.freeze). A recipe with a tiny model takes 3.5 s of a core in place of
5.2 s.
"""

import gc

gc.collect()
gc.freeze()
