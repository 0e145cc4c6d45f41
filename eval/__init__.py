"""Evaluation: `evaluate.Metric` modules, one folder each, and the runner that compares models (eval/compare.py).

`import eval` would shadow the builtin; import members by name.
"""
