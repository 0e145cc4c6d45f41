"""Length of the replies in tokens, the stop token included."""

import datasets
import evaluate

from eval.stats.intervals import interval

DESCRIPTION = """Mean number of tokens per reply."""


class ReplyLength(evaluate.Metric):
    """Length of the replies in tokens, the stop token included."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: one token count per reply",
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions) -> dict:
        return interval(predictions).to_result()
