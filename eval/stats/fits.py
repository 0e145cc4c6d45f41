"""Over-optimization in numbers: best-of-n from one set of replies, the curves of Gao et al., the checkpoint to keep."""

import math
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import comb

from eval.stats.intervals import Interval, JsonObject, mean_difference

CurveKind = Literal["best_of_n", "ppo"]
RESAMPLES = 2000
KEEP_RULE = "the lowest KL of those not significantly worse than the best"  # of `to_keep`


class ScoredPoint(NamedTuple):
    """A policy, or best-of-n: its distance from the model that training started from, and its scores."""

    name: str
    kl: Interval  # to the start, nats per reply
    gold: Interval  # the truth; `over_known` of one reply to each prompt
    proxy: Interval  # the training reward, likewise

    @property
    def sqrt_kl(self) -> float:
        return math.sqrt(max(0.0, self.kl.mean))

    def to_json(self) -> JsonObject:
        cells = {"kl": self.kl.to_json(), "gold": self.gold.to_json(), "proxy": self.proxy.to_json()}
        return {"name": self.name, "sqrt_kl": self.sqrt_kl, **cells}


class CurveFit(NamedTuple):
    """A fit of `curve`."""

    alpha: Interval
    beta: Interval
    r2: float  # share of the points' variance around 0 that the curve explains
    peak: float | None  # the distance at which the curve turns down; None where it doesn't

    def to_json(self) -> JsonObject:
        return {"alpha": self.alpha.to_json(), "beta": self.beta.to_json(), "r2": self.r2, "peak": self.peak}


def best_of_n(proxy: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Expected value of the best of n replies by the proxy, from M >= n replies to each of N prompts.

    Averages over all subsets of n replies: the reply of rank i (from 0, worst first) is the best of C(i, n - 1) of the
    C(M, n) subsets. Source: Nakano et al. 2021, WebGPT, appendix I (https://arxiv.org/abs/2112.09332). A reply without
    a score is as if it had not been sampled.

    Args:
        proxy: (N, M) scores that choose; NaN: none.
        values: (N, M) scores that are averaged; NaN: none.

    Returns:
        (N,) one expectation per prompt; NaN for prompts with fewer than n scored replies.

    >>> best_of_n(np.array([[1.0, 2.0]]), np.array([[0.0, 1.0]]), 1).tolist()
    [0.5]
    >>> best_of_n(np.array([[1.0, 2.0]]), np.array([[0.0, 1.0]]), 2).tolist()
    [1.0]
    """
    known = ~np.isnan(proxy + values)
    order = np.argsort(np.where(known, proxy, np.inf), axis=1, kind="stable")
    ranked = np.take_along_axis(np.where(known, values, 0.0), order, axis=1)
    rank, count = np.arange(proxy.shape[1]), known.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # 0 / 0 where count < n
        weights = np.where(rank < count, comb(rank, n - 1), 0.0) / comb(count, n)
    return (ranked * weights).sum(axis=1)


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to the model sampled from, log n - (n - 1) / n nats; an upper bound where replies repeat.

    Source: Stiennon et al. 2020, appendix G.3; Beirami et al. 2024 (https://arxiv.org/abs/2401.01879).
    """
    return math.log(n) - (n - 1) / n


def _design(distance: np.ndarray, kind: CurveKind) -> np.ndarray:
    """(P, 2) factors of alpha and beta at each of P distances."""
    second = distance**2 if kind == "best_of_n" else distance * np.log(np.maximum(distance, 1e-12))
    return np.stack([distance, -second], -1)


def curve(distance: np.ndarray, alpha: float, beta: float, kind: CurveKind) -> np.ndarray:
    """Gao et al. 2022, equation 1 (https://arxiv.org/abs/2210.10760), in the distance d = sqrt(KL):
    d (alpha - beta d) for best-of-n, d (alpha - beta log d) for reinforcement learning."""
    return _design(distance, kind) @ np.asarray([alpha, beta])


def fit_curve(distance: np.ndarray, gains: np.ndarray, kind: CurveKind, seed: int = 0) -> CurveFit | None:
    """Least-squares alpha and beta of `curve`, with 95% intervals from resampling prompts.

    Args:
        distance: (P,) sqrt(KL) of each point, above 0.
        gains: (P, N) gain of each prompt over the model that training started from, at each point; NaN: unknown.

    Returns:
        None with fewer than 3 points that have gains.
    """
    has_gains = ~np.isnan(gains).all(axis=1)
    distance, gains = distance[has_gains], gains[has_gains]
    if len(distance) < 3:
        return None
    solve = np.linalg.pinv(_design(distance, kind))
    means = np.nanmean(gains, axis=1)
    alpha, beta = solve @ means
    prompts = np.random.default_rng(seed).integers(0, gains.shape[1], (RESAMPLES, gains.shape[1]))
    resampled = np.stack([solve @ np.nanmean(gains[:, chosen], axis=1) for chosen in prompts])
    low, high = np.nanquantile(resampled, (0.025, 0.975), axis=0)
    rest = means - curve(distance, alpha, beta, kind)
    peak = None
    if beta > 1e-9 and alpha > 0:  # rounding alone makes no peak
        peak = alpha / (2 * beta) if kind == "best_of_n" else math.exp(min(50.0, alpha / beta - 1))
    return CurveFit(
        Interval(float(alpha), float(low[0]), float(high[0])),
        Interval(float(beta), float(low[1]), float(high[1])),
        float(1 - (rest**2).sum() / (means**2).sum()) if (means**2).sum() > 0 else 1.0,
        peak,
    )


def to_keep(points: list[ScoredPoint]) -> tuple[int, int]:
    """The checkpoint to keep: the one with the lowest KL that is not significantly worse than the best.

    Significantly worse: the 95% interval of the difference in gold score, paired by prompt, lies below 0. Prompts count
    where both replies have a score.

    Args:
        points: their gold scores are over the same prompts.

    Returns:
        indices of the point with the best mean, and of the one to keep.
    """
    best = max(range(len(points)), key=lambda number: points[number].gold.mean)
    for number in sorted(range(len(points)), key=lambda number: points[number].kl.mean):
        gap = mean_difference(_scores(points[number].gold), _scores(points[best].gold))
        if number == best or gap is None or gap.high >= 0:
            return best, number
    return best, best


def _scores(cell: Interval) -> list[float]:
    assert cell.sample is not None
    return cell.sample.values
