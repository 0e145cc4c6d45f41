"""What a run will need: its phases, their memory and operations, and the largest batches that fit."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from rlhf.planning.launch import Launch
from rlhf.planning.trace import Memory

GIB = 2**30
MOST = 2**20  # rows; more are not looked for
FEW, MORE = 4, 8  # layers from which a model of many like layers is extrapolated


@dataclass(frozen=True)
class Need:
    """Bytes by role on each GPU, and operations of one GPU."""

    memory: Memory
    operations: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on a GPU at the peak."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Phase:
    """A phase of an update.

    Args:
        flag: sets how many rows are computed at once.
        rows: what it is set to.
        need: of a number of rows.
        operations: of one GPU in an update.
        at_rows: `need(rows)`.
    """

    name: str
    flag: str
    rows: int
    need: Callable[[int], Need]
    operations: float
    at_rows: Need

    @classmethod
    def of(cls, name: str, flag: str, rows: int, need: Callable[[int], Need], operations: float) -> "Phase":
        """A phase, tried at its number of rows."""
        return cls(name, flag, rows, need, operations, need(rows))


@dataclass(frozen=True)
class Plan:
    """What a recipe needs.

    Args:
        rows: what the dataset's rows are like.
        parameters: all and trained, by model.
        tokens: of an update, on all GPUs.
        step: what is called an update.
        fits: the largest number of rows by flag, where a GPU's memory is given.
    """

    recipe: str
    launch: Launch
    rows: list[str]
    parameters: dict[str, tuple[int, int]]
    phases: list[Phase]
    tokens: float
    step: str
    memory: float | None = None  # GiB of a GPU
    fits: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> Phase:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.at_rows.total)

    def fitted(self, memory: float | None, share: float = 0.0) -> "Plan":
        """The plan with the largest batches that fit into so many GiB of a GPU, a share of which is taken already."""
        if memory is None:
            return self
        fits: dict[str, int] = {}
        for phase in self.phases:
            start = max(2, phase.rows)
            most = largest_batch(functools.partial(_total, phase), memory * (1 - share) * GIB, start)
            fits[phase.flag] = min(most, fits.get(phase.flag, MOST))
        return dataclasses.replace(self, memory=memory, fits=fits)


def over_layers(layers: int, need: Callable[[int | None], Need]) -> Need:
    """What a model of `layers` like layers needs, from models of few layers; 0: from the model itself.

    Memory and operations are sums over layers, so that two models of few layers tell those of many.
    """
    if layers <= MORE:
        return need(None)
    few, more = need(FEW), need(MORE)

    def line(low: float, high: float) -> float:
        return low + (high - low) * (layers - FEW) / (MORE - FEW)

    roles = {*few.memory, *more.memory}
    return Need(
        {role: line(few.memory.get(role, 0.0), more.memory.get(role, 0.0)) for role in roles},
        line(few.operations, more.operations),
    )


def _total(phase: Phase, rows: int) -> float:
    return phase.need(rows).total


def largest_batch(total: Callable[[int], float], limit: float, start: int = 2) -> int:
    """The largest number of rows whose peak is at most `limit` bytes; 0 if one row is too much.

    The peak is the largest of several sums that grow with the rows. So a line through two points lies above it between
    them, and below it beyond: where the line meets the limit, no more rows fit.

    >>> largest_batch(lambda rows: max(10 + 2 * rows, 3 * rows), 59)
    19

    Args:
        total: bytes at the peak, of a number of rows.
        start: the first number of rows to try.
    """
    total = functools.cache(total)
    if total(1) > limit:
        return 0
    before, low, high, tried = 1, 1, MOST, max(2, start)
    while high - low > 1:
        if total(tried) > limit:
            high = tried
        else:
            before, low = low, tried
        one, other = (low, high) if high < MOST else (before, low)
        slope = (total(other) - total(one)) / max(1, other - one)
        meets = one + math.floor((limit - total(one)) / slope) if slope > 0 else MOST
        if high == MOST:
            high = min(MOST, meets + 1)
        tried = min(max(meets, low + 1), high - 1)
        if tried == MOST - 1:
            return MOST
    return low
