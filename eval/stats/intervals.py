"""Means with 95% intervals: `Interval`, the bootstraps that make one, and paired differences.

`interval` resamples prompts. `over_rows_and_seeds` resamples prompts (or rows of a task) and training runs together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

RESAMPLES = 5000

JsonObject = dict[str, Any]  # an object of a JSON file
Scores = Sequence[float | None]  # of one reply to each prompt; None or NaN: it has none
Transform = Literal["none", "exp"]  # of the weighted mean


class Sample(NamedTuple):
    """The values behind a mean; a paired difference resamples those of two means together."""

    values: list[float]
    weights: list[float]
    transform: Transform


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval.

    A format specification applies to all three numbers:

    >>> f"{Interval(0.5, 0.25, 0.75, 8):.1%}"
    '50.0% [25.0%, 75.0%]'
    >>> f"{Interval(2.0, 1.5, math.inf, 8):+.2f}"
    '+2.00 [+1.50, -]'
    """

    mean: float
    low: float  # -math.inf where the data don't bound it; null in JSON
    high: float  # math.inf likewise
    n: int | None = None  # how many values were resampled; None where a file doesn't say
    sample: Sample | None = field(default=None, repr=False, compare=False)  # None for one read from a file

    def __format__(self, style: str) -> str:
        low, high = (_signless_zero(end, style) if math.isfinite(end) else "-" for end in (self.low, self.high))
        return f"{_signless_zero(self.mean, style)} [{low}, {high}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval.

        >>> Interval(0.5, 0.25, 0.75).excludes_zero, Interval(0.5, -0.25, 1.25).excludes_zero
        (True, False)
        """
        return self.low > 0 or self.high < 0

    def is_paired_with(self, other: "Interval") -> bool:
        """Whether both have samples of equal size, so that `minus` works."""
        return self.sample is not None and other.sample is not None and self.n == other.n

    def minus(self, other: "Interval", seed: int = 0) -> "Interval":
        """The paired difference: both samples are over the same prompts and are resampled together.

        Raises:
            ValueError: if one has no sample, or the two differ in size.
        """
        if self.sample is None or other.sample is None or self.n != other.n:
            raise ValueError(f"A paired difference needs two samples of one size; found {self!r} and {other!r}.")
        of_first, of_second = _statistic(self.sample.transform), _statistic(other.sample.transform)

        def statistic(a: np.ndarray, u: np.ndarray, b: np.ndarray, v: np.ndarray, axis: int = -1) -> np.ndarray:
            return of_first(a, u, axis=axis) - of_second(b, v, axis=axis)

        return _bootstrap(statistic, [*self.sample[:2], *other.sample[:2]], seed)

    def to_json(self) -> JsonObject:
        """`mean`, `low`, `high`, and `n` if it is known.

        >>> Interval(2.0, 1.5, math.inf, 8).to_json()
        {'mean': 2.0, 'low': 1.5, 'high': None, 'n': 8}
        """
        ends = {
            "low": None if self.low == -math.inf else self.low,
            "high": None if self.high == math.inf else self.high,
        }
        return {"mean": self.mean, **ends, **({} if self.n is None else {"n": self.n})}

    @classmethod
    def from_json(cls, cell: Mapping[str, Any]) -> "Interval":
        """The inverse of `to_json`. Also reads a metric module's result, with its sample. Other keys are ignored."""
        sample = Sample(cell["values"], cell["weights"], cell["transform"]) if "values" in cell else None
        low = -math.inf if cell["low"] is None else cell["low"]
        return cls(cell["mean"], low, math.inf if cell["high"] is None else cell["high"], cell.get("n"), sample)

    def to_result(self) -> JsonObject:
        """What metric modules return: `mean`, `low`, `high`, `n`, and the sample's `values`, `weights`, `transform`."""
        numbers = {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}
        return {**numbers, **(self.sample._asdict() if self.sample else {})}


def _signless_zero(value: float, style: str) -> str:
    """A number as text, never -0.00.

    >>> _signless_zero(-0.001, ".2f"), _signless_zero(-0.01, "+.1%")
    ('0.00', '-1.0%')
    """
    text = format(value, style)
    return text.lstrip("-") if float(text.rstrip("%")) == 0 else text


def _statistic(transform: Transform) -> Callable[..., np.ndarray]:
    def weighted_mean(values: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
        mean = values.sum(axis=axis) / weights.sum(axis=axis)
        return np.exp(mean) if transform == "exp" else mean

    return weighted_mean


def _bootstrap(
    statistic: Callable[..., np.ndarray], columns: Sequence[Sequence[float]], seed: int, sample: Sample | None = None
) -> Interval:
    """The statistic of the columns, whose rows are resampled together."""
    arrays = [np.asarray(column, dtype=float) for column in columns]
    point, n = float(statistic(*arrays, axis=-1)), len(arrays[0])
    if n < 2:
        return Interval(point, point, point, n, sample)
    from scipy.stats import bootstrap  # 0.8 s of a core, and training only reads intervals

    result = bootstrap(
        arrays, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=500, method="percentile",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = result.confidence_interval
    return Interval(point, float(low), float(high), n, sample)


def interval(
    values: Sequence[float], weights: Sequence[float] | None = None, transform: Transform = "none", seed: int = 0
) -> Interval:
    """Mean of per-prompt values with its 95% percentile-bootstrap interval over prompts.

    With `weights` the mean is sum(values) / sum(weights), and with `transform="exp"` its exponential: per-token
    log-losses summed per prompt, weighted by tokens, give a perplexity.
    """
    sample = Sample(list(values), [1.0] * len(values) if weights is None else list(weights), transform)
    return _bootstrap(_statistic(transform), sample[:2], seed, sample)


def over_known(scores: Scores) -> Interval:
    """`interval` of the scores that are there. Its sample has all of them, in their places, for `mean_difference`.

    >>> print(over_known([1.0, math.nan, 1.0]))
    Interval(mean=1.0, low=1.0, high=1.0, n=2)

    Args:
        scores: at least one is there.
    """
    known = interval([score for score in scores if score is not None and not math.isnan(score)])
    values = [math.nan if score is None else score for score in scores]
    return replace(known, sample=Sample(values, [1.0] * len(values), "none"))


def mean_difference(scores: Scores, others: Scores) -> Interval | None:
    """The mean of score - other score, paired, over the rows in which both are there; None if there is none.

    >>> print(mean_difference([1.0, None, 3.0], [0.0, 5.0, 2.0]))
    Interval(mean=1.0, low=1.0, high=1.0, n=2)
    """
    pairs = [
        (a, b) for a, b in zip(scores, others, strict=True) if a is not None and b is not None and not math.isnan(a - b)
    ]
    return interval([a for a, _ in pairs]).minus(interval([b for _, b in pairs])) if pairs else None


class SeedScores(NamedTuple):
    """The scores of one way of training."""

    cell: Interval  # over rows and seeds; n is the number of rows
    seeds: list[float]  # mean of each seed

    def to_json(self) -> JsonObject:
        return {**self.cell.to_json(), "seeds": self.seeds}


def over_rows_and_seeds(scores: np.ndarray, weights: np.ndarray, seed: int) -> SeedScores:
    """Mean of scores (S seeds, R rows) with its 95% percentile-bootstrap interval, seeds and rows drawn independently.

    Each row counts by its weight: its number of words or tokens, or 0 where a seed has no score of it.

    This is the two-way bootstrap of Owen (2007), "The pigeonhole bootstrap". Its interval errs on the wide side, except
    that few seeds say little about how much seeds differ.

    Args:
        scores: (S, R) float64.
        weights: (R,) or (S, R), not negative.
    """
    weights = np.broadcast_to(weights, scores.shape)
    low, high = np.nanpercentile(_means_of_resamples(scores, weights, seed), [2.5, 97.5])
    mean = float((scores * weights).sum() / weights.sum())
    by_seed = ((scores * weights).sum(axis=1) / weights.sum(axis=1)).tolist()
    return SeedScores(Interval(mean, float(low), float(high), scores.shape[1]), by_seed)


def _means_of_resamples(scores: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """Weighted means (RESAMPLES,) of scores (S, R), seeds and rows drawn with replacement.

    Equal shapes and seeds draw the same seeds and rows.
    """
    count, rows = scores.shape
    rng = np.random.default_rng(seed)
    seed_weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
    row_weights = rng.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    total = ((seed_weights @ weights) * row_weights).sum(axis=1)
    return ((seed_weights @ (scores * weights)) * row_weights).sum(axis=1) / np.where(total > 0, total, np.nan)


def share_repaired(tax: np.ndarray, repaired: np.ndarray, weights: np.ndarray, seed: int) -> Interval | None:
    """How much of a loss is made good: mean of `repaired` / mean of `tax`, rows and seeds resampled together.

    Args:
        tax: (S, R) how much worse each row became; paired by seed and row with `repaired`.
        repaired: (S, R) how much of that is gone.
        weights: (R,) of the rows.

    Returns:
        None if the interval of the mean tax is not above 0: then there is nothing to make good.
    """
    weights = np.broadcast_to(weights, tax.shape)
    if over_rows_and_seeds(tax, weights, seed).cell.low <= 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # of few rows, some resamples have no tax
        shares = _means_of_resamples(repaired, weights, seed) / _means_of_resamples(tax, weights, seed)
    low, high = np.nanpercentile(shares, [2.5, 97.5])
    return Interval(float((repaired * weights).sum() / (tax * weights).sum()), float(low), float(high), tax.shape[1])
