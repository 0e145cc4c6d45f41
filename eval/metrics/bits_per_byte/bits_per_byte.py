"""How many bits a model needs per byte of text: comparable between models with different tokenizers."""

import math

import datasets
import evaluate

from eval.stats.intervals import interval

DESCRIPTION = """Negative log-probability in bits / length of the text in UTF-8 bytes, over all texts together."""


class BitsPerByte(evaluate.Metric):
    """How many bits a model needs per byte of text: comparable between models with different tokenizers."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: log-probability of each text, in nats; references: its length in bytes",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references) -> dict:
        return interval([-logprob / math.log(2) for logprob in predictions], weights=references).to_result()
