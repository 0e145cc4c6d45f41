"""Win rate as it would be if both models' replies were equally long."""

import datasets
import evaluate
import numpy as np
from scipy.stats import bootstrap
from sklearn.linear_model import LogisticRegression

DESCRIPTION = """Win rate at equal length: P(win) is fitted as a logistic function of a constant and of
tanh(length difference / its standard deviation), and read off where the difference is 0. Source: Dubois et al. 2024,
Length-Controlled AlpacaEval (https://arxiv.org/abs/2404.04475), equation 2. Its third term, the difficulty of each
instruction, can only be estimated from many models and is left out. A tie counts half."""
RESAMPLES = 500


def at_equal_length(outcomes: np.ndarray, differences: np.ndarray) -> float:
    """The fitted P(win) at length difference 0.

    Args:
        outcomes: (N,) 1 for a win, 0.5 for a tie, 0 for a loss.
        differences: (N,) length of the model's reply minus its opponent's.
    """
    spread = differences.std()
    if spread == 0 or outcomes.min() == outcomes.max():
        return float(outcomes.mean())  # length can't explain anything
    feature = np.tanh(differences / spread)[:, None]
    # a tie is half a win and half a loss
    fit = LogisticRegression(C=10.0, solver="newton-cholesky").fit(
        np.concatenate([feature, feature]),
        np.repeat([1, 0], len(outcomes)),
        sample_weight=np.concatenate([outcomes, 1 - outcomes]),
    )
    return float(fit.predict_proba([[0.0]])[0, 1])


class LengthControlledWinRate(evaluate.Metric):
    """Win rate as it would be if both models' replies were equally long."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions, references: one score per prompt, of the model and of its opponent; "
            "prediction_lengths, reference_lengths: how long their replies are",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references, prediction_lengths, reference_lengths, seed=0) -> dict:
        outcomes = 0.5 + 0.5 * np.sign(np.asarray(predictions) - np.asarray(references))
        differences = np.asarray(prediction_lengths, dtype=float) - np.asarray(reference_lengths, dtype=float)
        rate = at_equal_length(outcomes, differences)
        low = high = rate
        if len(outcomes) > 1 and outcomes.min() < outcomes.max():
            low, high = bootstrap(
                (outcomes, differences), at_equal_length, paired=True, vectorized=False, n_resamples=RESAMPLES,
                method="percentile", rng=np.random.default_rng(seed),
            ).confidence_interval  # fmt: skip
        return {"mean": rate, "low": float(low), "high": float(high), "n": len(outcomes)}
