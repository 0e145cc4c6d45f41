"""`log_metric` and `log_extra`: what reward functions add to the log and to the tables of samples, as in TRL's GRPO."""

import math
from collections.abc import Iterable
from typing import Any

from accelerate.utils import gather_object

from rlhf.errors import InputError
from rlhf.rewards.answers import RewardError, as_number

TRAINERS_OWN = ("step", "epoch")  # what Trainer adds to every entry of the log
TABLES_OWN = ("prompt", "completion", "score", "advantage", "step")  # columns of the tables of samples


class RewardLog:
    """What the reward functions log about one batch of completions."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Log a number. Several of one name are averaged; NaN doesn't count.

        Raises:
            TypeError, ValueError: if it is not a number.
        """
        number = math.nan if value != value else as_number(value)
        self.metrics.setdefault(str(name), []).append(number)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Add a column to the tables of samples, with one value for each completion of the batch.

        Raises:
            InputError: if the tables have a column of this name.
        """
        if column in TABLES_OWN:
            raise InputError(f"log_extra({column!r}, ...): the tables have this column already. Choose another name.")
        self.extra.setdefault(str(column), []).extend(values)

    def check(self, count: int) -> None:
        """Raise RewardError if a column has another number of values than the batch has completions."""
        for column, values in self.extra.items():
            if len(values) != count:
                raise RewardError(
                    f"log_extra({column!r}, ...) of a reward function: {len(values)} values for {count} completions. "
                    "Give one for each."
                )

    def means(self) -> dict[str, float]:
        """The mean of each metric on this process; NaN if only NaN was logged."""
        kept = {name: [value for value in values if value == value] for name, values in self.metrics.items()}
        return {name: sum(values) / len(values) if values else math.nan for name, values in kept.items()}

    def gathered_extra(self, count: int) -> dict[str, list[Any]]:
        """The columns over all processes in their order, each of which has `count` rows; None where one is missing."""
        everywhere = gather_object([self.extra])
        names = sorted({name for extra in everywhere for name in extra})
        return {name: [value for extra in everywhere for value in extra.get(name, [None] * count)] for name in names}


def gathered_means(own: dict[str, float]) -> dict[str, float]:
    """The mean over the processes of each metric's mean. A metric may be missing on some processes."""
    everywhere = gather_object([own])
    names = sorted({name for means in everywhere for name in means})
    by_name = {name: [means[name] for means in everywhere if not math.isnan(means.get(name, math.nan))]
               for name in names}  # fmt: skip
    return {name: sum(values) / len(values) for name, values in by_name.items() if values}


def with_own(metrics: dict[str, float], own: dict[str, float] | None) -> dict[str, float]:
    """The trainer's metrics, and what reward functions logged.

    Raises:
        InputError: if a reward function logs a name of the trainer's, which would hide one of the two.
    """
    for name in own or {}:
        if name in (*metrics, *TRAINERS_OWN):
            raise InputError(f"log_metric({name!r}, ...): the trainer logs this name itself. Choose another one.")
    return {**metrics, **(own or {})}
