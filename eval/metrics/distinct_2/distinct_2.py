"""Share of distinct word pairs among the replies: near 0 when a model says the same thing everywhere."""

import itertools

import datasets
import evaluate

from eval.stats.intervals import interval

DESCRIPTION = """Distinct bigrams / all bigrams (Li et al. 2016, https://arxiv.org/abs/1510.03055),
within groups of 20 replies, averaged: the share falls as
the text grows, so only equally many replies compare, and groups are what the bootstrap resamples."""
GROUP = 20


def distinct_share(replies: list[str]) -> float:
    """Distinct bigrams of lower-cased words / all of them, over some replies; 1.0 if there are none.

    >>> distinct_share(["a b a b"])
    0.6666666666666666
    """
    pairs = []
    for reply in replies:
        words = reply.lower().split()
        pairs += list(itertools.pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


class Distinct2(evaluate.Metric):
    """Share of distinct word pairs among the replies: near 0 when a model says the same thing everywhere."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: replies as text, in the same order of prompts for every model",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions) -> dict:
        groups = [predictions[start : start + GROUP] for start in range(0, len(predictions), GROUP)]
        return interval([distinct_share(group) for group in groups]).to_result()
