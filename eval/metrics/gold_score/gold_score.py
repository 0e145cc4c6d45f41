"""The starter's hidden truth: VADER sentiment of each reply."""

import datasets
import evaluate

from eval.stats.intervals import interval
from rlhf.starter.scorer import gold_scores

DESCRIPTION = """Mean VADER compound sentiment of the replies, in [-1, 1]."""


class GoldScore(evaluate.Metric):
    """The starter's hidden truth: VADER sentiment of each reply."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: replies as text",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions) -> dict:
        return interval(gold_scores(predictions)).to_result()
