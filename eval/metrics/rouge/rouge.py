"""Overlap of words with a reference text: the package rouge-score, offline, with an interval."""

import datasets
import evaluate
from rouge_score import rouge_scorer

from eval.stats.intervals import interval

DESCRIPTION = """F-measure of common unigrams (rouge1), bigrams (rouge2) and of the longest common subsequence (rougeL),
averaged over texts. Source: Lin 2004 (https://aclanthology.org/W04-1013), as the package rouge-score computes it."""
TYPES = ("rouge1", "rouge2", "rougeL")


class Rouge(evaluate.Metric):
    """Overlap of words with a reference text: the package rouge-score, offline, with an interval."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions, references: texts; the interval is that of rougeL",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references) -> dict:
        scorer = rouge_scorer.RougeScorer(TYPES, use_stemmer=False)
        rows = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
        means = {name: sum(row[name].fmeasure for row in rows) / max(1, len(rows)) for name in TYPES}
        return {**means, **interval([row["rougeL"].fmeasure for row in rows]).to_result()}
