"""The `evaluate` modules of this folder by name, and how their values are written."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.stats.intervals import Interval, JsonObject

if TYPE_CHECKING:
    from evaluate import EvaluationModule

HERE = Path(__file__).parent
# The order of the comparison's table, and how a value is written. A judge's are win_rate/<judge>, rating/<judge>.
FORMATS = {
    "gold_score": ".3f",
    "reward_score": ".3f",
    "win_rate": ".1%",
    "length_controlled_win_rate": ".1%",
    "rating": ".2f",
    "kl": ".2f",
    "reply_length": ".1f",
    "distinct_2": ".3f",
    "repetition": ".3f",
    "perplexity": ".1f",
    "human_loss": ".3f",
    "human_bits_per_byte": ".3f",
}


def metric(name: str, **inputs: Any) -> Interval:
    """The mean that the `evaluate` module eval/metrics/<name> computes, with its interval."""
    return Interval.from_json(metric_results(name, **inputs))


def metric_results(name: str, **inputs: Any) -> JsonObject:
    """All that the `evaluate` module eval/metrics/<name> returns; its card lists the keys."""
    return _module(name).compute(**inputs)


@functools.cache
def _module(name: str) -> "EvaluationModule":
    import evaluate  # reports of training only need the table

    return evaluate.load(str(HERE / name))


def table_rows(results: JsonObject) -> tuple[list[str], list[list[str]]]:
    """Model names, and rows of the table: metric, then `mean [low, high]` of each model; empty where it has none.

    Args:
        results: the content of a comparison's results.json.
    """
    models, order = results["models"], list(FORMATS)
    metrics = {metric for cells in models.values() for metric in cells}
    rows = []
    for name in sorted(metrics, key=lambda name: (order.index(name.split("/")[0]), name)):  # judges beside each other
        style = FORMATS[name.split("/")[0]]
        cells = [model.get(name) for model in models.values()]
        rows.append([name, *(f"{Interval.from_json(cell):{style}}" if cell else "" for cell in cells)])
    return list(models), rows
