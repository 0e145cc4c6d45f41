"""Mean and variance of many numbers over the processes of a run."""

from typing import NamedTuple

import torch

from rlhf.models.precision import exact
from rlhf.ppo.processes import ONE_PROCESS, Processes


class Moments(NamedTuple):
    """Over the last dimension of some values, on all processes. Shape of the other dimensions, dtype of `exact`."""

    count: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor  # biased: divided by `count`


def moments(values: torch.Tensor, mask: torch.Tensor | None = None, processes: Processes = ONE_PROCESS) -> Moments:
    """Count, mean and variance of values (..., N) along the last dimension; NaN where nothing counts.

    >>> count, mean, variance = moments(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False]))
    >>> float(count), float(mean), float(variance)
    (2.0, 2.0, 1.0)

    Args:
        mask: (..., N) bool, which values count; default: all.
    """
    counted = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    kept = exact(values).masked_fill(~counted, 0)
    count, total, squares = processes.sum(torch.stack([exact(counted).sum(-1), kept.sum(-1), (kept**2).sum(-1)]))
    mean = total / count
    return Moments(count, mean, (squares / count - mean**2).clamp(min=0))
