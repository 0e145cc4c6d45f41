"""Answer spans: F1 over words and exact match, as SQuAD defines them, with intervals."""

import collections
import re
import string

import datasets
import evaluate

from eval.stats.intervals import interval

DESCRIPTION = """Words that a predicted span and the answer share, as F1; and the share of spans that are the answer.
Lower case, without punctuation and the articles a, an, the. With several answers the best one counts."""
CITATION = """@inproceedings{rajpurkar2016squad, title={SQuAD: 100,000+ Questions for Machine Comprehension of Text},
author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy}, booktitle={EMNLP}, year={2016},
note={section 6.1}}"""


def words_of(text: str) -> list[str]:
    """The words that count: lower case, without ASCII punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def word_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the shares of shared words. If one of the two has no word: 1 if both have none, else 0.

    >>> word_f1("in the old house", "an old house")
    0.8
    """
    predicted, true = words_of(prediction), words_of(reference)
    if not predicted or not true:
        return float(predicted == true)
    shared = sum((collections.Counter(predicted) & collections.Counter(true)).values())
    return 2 * shared / (len(predicted) + len(true))


class SpanF1(evaluate.Metric):
    """Answer spans: F1 over words and exact match, as SQuAD defines them, with intervals."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description="predictions: text of each span; references: the right answers of each, a list of texts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references) -> dict:
        pairs = list(zip(predictions, references, strict=True))
        scores = [max(word_f1(found, answer) for answer in answers) for found, answers in pairs]
        exact = [float(any(words_of(found) == words_of(answer) for answer in answers)) for found, answers in pairs]
        return {**interval(scores).to_result(), "exact_match": interval(exact).to_result()}
