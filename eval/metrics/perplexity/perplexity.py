"""Perplexity of the replies under the base model: high for nonsense, even if the nonsense scores well."""

import datasets
import evaluate

from eval.stats.intervals import interval

DESCRIPTION = """exp of the mean negative log-probability per reply token under the base model."""


class Perplexity(evaluate.Metric):
    """Perplexity of the replies under the base model: high for nonsense, even if the nonsense scores well."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: log-probability of each whole reply; references: its number of tokens",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references) -> dict:
        return interval([-logprob for logprob in predictions], weights=references, transform="exp").to_result()
