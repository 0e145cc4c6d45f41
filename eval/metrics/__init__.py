"""The `evaluate` modules of this folder by name, and how their values are shown."""

import functools
from pathlib import Path
from typing import Any

import evaluate

HERE = Path(__file__).parent
# The order of the comparison's table, and how a value is shown. One of a judge's is win_rate/<judge>.
FORMATS = {
    "gold_score": ".3f",
    "reward_score": ".3f",
    "win_rate": ".1%",
    "length_controlled_win_rate": ".1%",
    "kl": ".2f",
    "reply_length": ".1f",
    "distinct_2": ".3f",
    "repetition": ".3f",
    "perplexity": ".1f",
    "human_loss": ".3f",
    "human_bits_per_byte": ".3f",
}


def metric(name: str, **inputs: Any) -> dict[str, Any]:
    """Compute the `evaluate` module eval/<name>."""
    return _module(name).compute(**inputs)


@functools.cache
def _module(name: str) -> evaluate.EvaluationModule:
    return evaluate.load(str(HERE / name))


def in_order(names: set[str]) -> list[str]:
    """Metrics in the order of the table; those of several judges beside each other."""
    order = list(FORMATS)
    return sorted(names, key=lambda name: (order.index(name.split("/")[0]), name))


def shown(name: str, cell: dict[str, Any] | None) -> str:
    """`mean [low, high]` of a metric; empty where there is none."""
    if cell is None:
        return ""
    style = FORMATS[name.split("/")[0]]
    return f"{cell['mean']:{style}} [{cell['low']:{style}}, {cell['high']:{style}}]"


def table_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Model names, and rows of the table: metric, then `mean [low, high]` of each model.

    Args:
        results: the content of a comparison's results.json.
    """
    names = list(results["models"])
    metrics = in_order({metric for model in results["models"].values() for metric in model})
    return names, [[name, *(shown(name, results["models"][model].get(name)) for model in names)] for name in metrics]
