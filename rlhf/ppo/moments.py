"""Sums of many numbers over the processes of a run, in float64 where there is one."""

from collections.abc import Callable

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]


def exact(values: torch.Tensor) -> torch.Tensor:
    """In float64, for sums of many; in float32 on Apple's GPUs, which have no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)
