"""Share of word quadruples that repeat an earlier one of the same reply: rises when a model loops."""

import datasets
import evaluate

from eval.stats.intervals import interval

DESCRIPTION = """1 - distinct 4-grams / all 4-grams of words within a reply, averaged over replies
(seq-rep-4 of Welleck et al. 2019, https://arxiv.org/abs/1908.04319). A reply of fewer than four words repeats none."""


def repeated_share(reply: str) -> float:
    """Share of a reply's 4-grams of lower-cased words that occurred before in it.

    >>> repeated_share("a b c d a b c d")
    0.19999999999999996
    """
    words = reply.lower().split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Repetition(evaluate.Metric):
    """Share of word quadruples that repeat an earlier one of the same reply: rises when a model loops."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: replies as text",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions) -> dict:
        return interval([repeated_share(reply) for reply in predictions]).to_result()
