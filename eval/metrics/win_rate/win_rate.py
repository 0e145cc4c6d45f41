"""Share of prompts on which one model's reply is judged better than another's; a tie counts half."""

import datasets
import evaluate

from eval.stats.intervals import interval

DESCRIPTION = """Share of prompts on which the prediction's score is above the reference's; a tie counts half."""


class WinRate(evaluate.Metric):
    """Share of prompts on which one model's reply is judged better than another's; a tie counts half."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions, references: one score per prompt, of the model and of its opponent",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references) -> dict:
        outcomes = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(predictions, references, strict=True)]
        return {**interval(outcomes).to_result(), "ties": outcomes.count(0.5) / max(1, len(outcomes))}
