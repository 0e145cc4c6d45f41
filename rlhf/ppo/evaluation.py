"""Evaluation during PPO: which prompts a process takes, and which step is the best."""

import math

from rlhf.errors import InputError
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.upstream import OnlineTrainerState
from rlhf.run.checkpoints import checkpoint_folder


def evaluation_rows(count: int, processes: int, rank: int) -> range:
    """This process's row numbers of `count` evaluation prompts, to be taken modulo `count`.

    Every process gets the same number of rows, so the last one may get some of the first rows again.

    >>> [list(evaluation_rows(3, processes=2, rank=rank)) for rank in range(2)]
    [[0, 1], [2, 3]]
    """
    share = math.ceil(count / processes)
    return range(rank * share, (rank + 1) * share)


def best_metric(args: PPOConfig, metrics: dict[str, float]) -> str | None:
    """The name of the metric that `args.metric_for_best_model` means, or None.

    Raises:
        InputError: if there is no such metric.
    """
    name = args.metric_for_best_model
    if name is None:
        return None
    key = name if name.startswith("eval_") else f"eval_{name}"
    if key not in metrics:
        raise InputError(f"--metric_for_best_model {name}: not among {sorted(metrics)}.")
    return key


def note_best(args: PPOConfig, state: OnlineTrainerState, metrics: dict[str, float]) -> bool:
    """Remember this step in `state` if its `args.metric_for_best_model` is the best so far; returns whether it is.

    An evaluation before the first update (`eval_on_start`) doesn't count, since it has no checkpoint.

    Raises:
        InputError: if there is no such metric.
    """
    key = best_metric(args, metrics)
    if key is None or state.global_step == 0:
        return False
    sign = -1.0 if args.greater_is_better is False else 1.0
    if state.best_metric is not None and sign * metrics[key] <= sign * state.best_metric:
        return False
    state.best_metric, state.best_global_step = metrics[key], state.global_step
    state.best_model_checkpoint = str(checkpoint_folder(args, state.global_step))
    return True
