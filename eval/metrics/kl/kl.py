"""KL divergence from a reference model, estimated on the model's own replies."""

import datasets
import evaluate

from eval.stats.intervals import interval

DESCRIPTION = """Mean over prompts of log p(reply) - log p_reference(reply), in nats per reply: an unbiased estimate of
the KL divergence, http://joschu.net/blog/kl-approx.html (k1)."""


class KL(evaluate.Metric):
    """KL divergence from a reference model, estimated on the model's own replies."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions, references: log-probability of each reply under model and reference",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references) -> dict:
        return interval([a - b for a, b in zip(predictions, references, strict=True)]).to_result()
