"""Harmonic mean of precision and recall: scikit-learn's, offline, with an interval."""

import datasets
import evaluate
import numpy as np
from scipy.stats import bootstrap
from sklearn.metrics import f1_score

DESCRIPTION = """F1 = 2 / (1 / precision + 1 / recall). `average` is scikit-learn's: binary, macro, micro, weighted."""
RESAMPLES = 500


class F1(evaluate.Metric):
    """Harmonic mean of precision and recall: scikit-learn's, offline, with an interval."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions, references: labels as integers; average: how labels are combined",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, average="binary") -> dict:
        def score(predicted, true):
            return f1_score(true, predicted, average=average, zero_division=0)

        value = float(score(predictions, references))
        low = high = value
        if len(predictions) > 1:
            low, high = bootstrap(
                (np.asarray(predictions), np.asarray(references)), score, paired=True, vectorized=False,
                n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0),
            ).confidence_interval  # fmt: skip
        return {"f1": value, "mean": value, "low": float(low), "high": float(high), "n": len(predictions)}
