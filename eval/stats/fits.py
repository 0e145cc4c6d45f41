"""Over-optimization in numbers: best-of-n from one set of replies, the curves of Gao et al., what to keep."""

import math
from typing import Any, Literal

import numpy as np
from scipy.special import comb

from eval.stats.intervals import difference

CurveKind = Literal["best_of_n", "ppo"]
RESAMPLES = 2000


def best_of_n(proxy: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Expected value of the reply that the proxy likes best of n, from M >= n replies to each of N prompts.

    Averages over all subsets of n replies: the reply of rank i (from 0, worst first) is the best of C(i, n - 1) of the
    C(M, n) subsets. Source: Nakano et al. 2021, WebGPT, appendix I (https://arxiv.org/abs/2112.09332).

    Args:
        proxy: (N, M) what chooses.
        values: (N, M) what is averaged.

    Returns:
        (N,) one expectation per prompt.
    """
    replies = proxy.shape[1]
    weights = comb(np.arange(replies), n - 1) / comb(replies, n)
    return np.take_along_axis(values, np.argsort(proxy, axis=1, kind="stable"), axis=1) @ weights


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: KL of best-of-n to the model sampled from, in nats; an upper bound where replies repeat.

    Source: Stiennon et al. 2020, appendix G.3; Beirami et al. 2024 (https://arxiv.org/abs/2401.01879).
    """
    return math.log(n) - (n - 1) / n


def _design(distance: np.ndarray, kind: CurveKind) -> np.ndarray:
    """What alpha and beta are multiplied with at each distance."""
    second = distance**2 if kind == "best_of_n" else distance * np.log(np.maximum(distance, 1e-12))
    return np.stack([distance, -second], -1)


def curve(distance: np.ndarray, alpha: float, beta: float, kind: CurveKind) -> np.ndarray:
    """Gao et al. 2022, equation 1 (https://arxiv.org/abs/2210.10760), in the distance d = sqrt(KL):
    d (alpha - beta d) for best-of-n, d (alpha - beta log d) for reinforcement learning."""
    return _design(distance, kind) @ np.asarray([alpha, beta])


def fit(distance: np.ndarray, gains: np.ndarray, kind: CurveKind, seed: int = 0) -> dict[str, Any] | None:
    """Least-squares alpha and beta of `curve`, with 95% intervals from resampling prompts.

    Args:
        distance: (P,) sqrt(KL) of each point, above 0.
        gains: (P, N) what each prompt gained over the model that training started from, at each point.

    Returns:
        `alpha` and `beta` as {mean, low, high}; `r2`, the share of the points' variance around 0 that the curve
        explains; `peak`, the distance at which it turns down, or None where it doesn't. None with fewer than 3 points.
    """
    if len(distance) < 3:
        return None
    solve = np.linalg.pinv(_design(distance, kind))
    means = gains.mean(1)
    alpha, beta = solve @ means
    prompts = np.random.default_rng(seed).integers(0, gains.shape[1], (RESAMPLES, gains.shape[1]))
    resampled = np.stack([solve @ gains[:, chosen].mean(1) for chosen in prompts])
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    rest = means - curve(distance, alpha, beta, kind)
    peak = None
    if beta > 1e-9 and alpha > 0:  # rounding alone makes no peak
        peak = alpha / (2 * beta) if kind == "best_of_n" else math.exp(min(50.0, alpha / beta - 1))
    return {
        "alpha": {"mean": float(alpha), "low": float(low[0]), "high": float(high[0])},
        "beta": {"mean": float(beta), "low": float(low[1]), "high": float(high[1])},
        "r2": float(1 - (rest**2).sum() / (means**2).sum()) if (means**2).sum() > 0 else 1.0,
        "peak": peak,
    }


def to_keep(points: list[dict[str, Any]]) -> tuple[int, int]:
    """Which point to keep: the nearest to the start whose true score is not below the best one's beyond doubt.

    Args:
        points: with `kl` and `gold` (results of eval.stats.intervals.interval over the same prompts).

    Returns:
        indices of the point with the best mean, and of the one to keep.
    """
    best = max(range(len(points)), key=lambda number: points[number]["gold"]["mean"])
    for number in sorted(range(len(points)), key=lambda number: points[number]["kl"]["mean"]):
        if number == best or difference(points[number]["gold"], points[best]["gold"])["high"] >= 0:
            return best, number
    return best, best
