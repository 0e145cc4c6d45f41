"""Means with 95% bootstrap intervals, and paired differences of them."""

from typing import Any

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 5000


def _statistic(transform: str):
    def weighted_mean(values: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
        mean = values.sum(axis=axis) / weights.sum(axis=axis)
        return np.exp(mean) if transform == "exp" else mean

    return weighted_mean


def _bootstrap(statistic: Any, columns: list[np.ndarray], seed: int) -> dict[str, float]:
    point = float(statistic(*columns, axis=-1))
    if len(columns[0]) < 2:
        return {"mean": point, "low": point, "high": point, "n": len(columns[0])}
    result = bootstrap(
        columns, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=500, method="percentile",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = result.confidence_interval
    return {"mean": point, "low": float(low), "high": float(high), "n": len(columns[0])}


def interval(
    values: list[float], weights: list[float] | None = None, transform: str = "none", seed: int = 0
) -> dict[str, Any]:
    """Mean of per-prompt values with its 95% percentile-bootstrap interval over prompts.

    With `weights` the mean is sum(values) / sum(weights), and with `transform="exp"` its exponential: per-token
    log-losses summed per prompt, weighted by tokens, give a perplexity.

    Returns:
        `mean`, `low`, `high`, `n`, and what a paired difference needs: `values`, `weights`, `transform`.
    """
    weights = [1.0] * len(values) if weights is None else weights
    columns = [np.asarray(values, dtype=float), np.asarray(weights, dtype=float)]
    kept = {"values": list(values), "weights": list(weights), "transform": transform}
    return {**_bootstrap(_statistic(transform), columns, seed), **kept}


def difference(first: dict[str, Any], second: dict[str, Any], seed: int = 0) -> dict[str, float]:
    """`first` minus `second`, two results of `interval` over the same prompts, resampled together."""
    of_first, of_second = _statistic(first["transform"]), _statistic(second["transform"])

    def statistic(a, u, b, v, axis=-1):
        return of_first(a, u, axis=axis) - of_second(b, v, axis=axis)

    columns = [np.asarray(part[key], dtype=float) for part in (first, second) for key in ("values", "weights")]
    return _bootstrap(statistic, columns, seed)
