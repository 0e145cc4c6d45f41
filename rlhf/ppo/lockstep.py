"""Layers that are gathered one at a time, by processes that make different numbers of passes.

FSDP2 gathers a layer by a call that all processes make together. While they sample and score, one may need more passes
than another: its completions are longer, or its prompts share a beginning.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule


@contextmanager
def in_lockstep(layers: list[FSDPModule], timeout: timedelta) -> Iterator[None]:
    """Within it, all processes gather the same layer at a time; one that doesn't need it gathers it and gives it up.

    Before each layer a process asks for its number, and the lowest one that any process asks for comes first. All
    processes enter and leave together, with the same layers.

    Args:
        timeout: how long a process may let the others wait, for a reward function for example.
    """

    def ask(number: int) -> int:
        asked = torch.tensor(number)
        distributed.all_reduce(asked, distributed.ReduceOp.MIN, group=_cpu_group(timeout))
        return int(asked)

    def wait(number: int) -> None:
        while (turn := ask(number)) != number:
            layers[turn].unshard()
            layers[turn].reshard()

    def before(number: int) -> Callable[..., None]:
        return lambda *_: wait(number)

    # in front of FSDP2's own hook, which gathers
    hooks = [layer.register_forward_pre_hook(before(number), prepend=True) for number, layer in enumerate(layers)]
    try:
        yield
        wait(len(layers))
    finally:
        for hook in hooks:
            hook.remove()


@functools.cache
def _cpu_group(timeout: timedelta) -> distributed.ProcessGroup:
    """All processes, asked on the CPU: a question to the GPU would wait for its work."""
    return distributed.new_group(backend="gloo", timeout=timeout)
