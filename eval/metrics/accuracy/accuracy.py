"""Share of labels that are right: scikit-learn's, offline, with an interval."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score

from eval.stats.intervals import interval

DESCRIPTION = """Share of predicted labels that equal the reference."""


class Accuracy(evaluate.Metric):
    """Share of labels that are right: scikit-learn's, offline, with an interval."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions, references: labels as integers",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references) -> dict:
        right = [float(a == b) for a, b in zip(predictions, references, strict=True)]
        return {"accuracy": float(accuracy_score(references, predictions)), **interval(right).to_result()}
