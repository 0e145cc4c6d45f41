"""The reward model's score of each reply."""

import datasets
import evaluate

from eval.stats.intervals import interval

DESCRIPTION = (
    """Mean reward-model score of the replies. It is what PPO was trained on, so a rise alone proves little."""
)


class RewardScore(evaluate.Metric):
    """The reward model's score of each reply."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: one score per reply",
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions) -> dict:
        return interval(predictions).to_result()
