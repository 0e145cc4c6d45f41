"""How often a reward model orders a pair as the labeler did, and whether its probabilities are calibrated."""

import datasets
import evaluate
import numpy as np

from eval.stats.intervals import interval

DESCRIPTION = """Share of pairs whose chosen reply scores higher (a tie counts half). A reward model is a Bradley-Terry
model: P(chosen) = 1 / (1 + exp(-(score difference))), so its calibration can be checked. The expected calibration error
(Guo et al. 2017, https://arxiv.org/abs/1706.04599) is the mean gap between confidence and accuracy, over bins of
confidence from 0.5 to 1."""
BINS = 10


def reliability(margins: np.ndarray) -> list[dict[str, float]]:
    """Per bin of confidence: `confidence` (mean), `accuracy`, `n`. Empty bins are left out.

    >>> reliability(np.array([0.0, 1000.0]))
    [{'confidence': 0.5, 'accuracy': 0.5, 'n': 1}, {'confidence': 1.0, 'accuracy': 1.0, 'n': 1}]

    Args:
        margins: (N,) score of the chosen reply minus that of the rejected one.
    """
    confidence = 1 / (1 + np.exp(-np.abs(np.clip(margins, -500, 500))))
    right = 0.5 + 0.5 * np.sign(margins)
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidence[bins == number].mean()),
            "accuracy": float(right[bins == number].mean()),
            "n": int((bins == number).sum()),
        }
        for number in sorted(set(bins.tolist()))
    ]


def by_length(margins: np.ndarray, differences: np.ndarray, groups: np.ndarray) -> list[dict[str, float]]:
    """Accuracy in each quarter of the pairs, by the chosen reply's length minus the rejected one's.

    Equal differences stay together, so that there may be fewer than four.
    """
    edges = np.unique(np.quantile(differences, (0.25, 0.5, 0.75), method="inverted_cdf"))
    numbers = np.searchsorted(edges, differences)
    quarters = [numbers == number for number in np.unique(numbers)]
    return [
        {
            "shortest": float(differences[quarter].min()),
            "longest": float(differences[quarter].max()),
            **accuracy(margins[quarter], groups[quarter]),
        }
        for quarter in quarters
    ]


def accuracy(margins: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """`mean` with its interval over groups, and `n`, the number of pairs."""
    right = 0.5 + 0.5 * np.sign(margins)
    _, index = np.unique(groups, return_inverse=True)
    result = interval(np.bincount(index, right).tolist(), np.bincount(index).astype(float).tolist())
    return {**result.to_json(), "n": len(margins)}


class RewardAccuracy(evaluate.Metric):
    """How often a reward model orders a pair as the labeler did, and whether its probabilities are calibrated."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: scores of the chosen replies; references: of the rejected ones; "
            "length_differences: chosen less rejected length; groups: which pairs share a prompt",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references, length_differences=None, groups=None) -> dict:
        margins = np.asarray(predictions, dtype=float) - np.asarray(references, dtype=float)
        groups = np.arange(len(margins)) if groups is None else np.asarray(groups)
        bins = reliability(margins)
        result = {
            **accuracy(margins, groups),
            "margin": float(margins.mean()),
            "log_loss": float(np.logaddexp(0, -margins).mean()),
            "calibration_error": sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(margins),
            "reliability": bins,
        }
        if length_differences is not None:
            result["by_length_difference"] = by_length(margins, np.asarray(length_differences, dtype=float), groups)
        return result
