"""Tags of words: F1 over entities (B-, I-, O) or over words with any tag but O, with an interval over sentences."""

import datasets
import evaluate

from eval.stats.intervals import interval

DESCRIPTION = """F1 = 2 · found and right / (found + true), over all entities of all sentences (micro-average). An
entity is right if its words and its type are. Tags that begin with B- and I- make entities of several words, as in
CoNLL; every other tag but O is an entity of one word."""
CITATION = """@inproceedings{tjong2003conll, title={Introduction to the CoNLL-2003 Shared Task},
author={Tjong Kim Sang, Erik F. and De Meulder, Fien}, booktitle={CoNLL}, year={2003}}"""


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """(type, first word, last word) of each entity. An I- with nothing of its type before it begins one.

    >>> sorted(entities(["B-PER", "I-PER", "O", "LOC"]))
    [('LOC', 3, 3), ('PER', 0, 1)]
    """
    found: list[tuple[str, int, int]] = []
    before = "O"
    for number, tag in enumerate(tags):
        prefix, dash, kind = tag.partition("-")
        if dash and prefix == "I" and before in (f"B-{kind}", f"I-{kind}"):
            found[-1] = (kind, found[-1][1], number)
        elif tag not in ("O", ""):
            found.append((kind if dash and prefix in ("B", "I") else tag, number, number))
        before = tag
    return set(found)


class TagF1(evaluate.Metric):
    """Tags of words: F1 over entities (B-, I-, O) or over words with any tag but O, with an interval over sentences."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description="predictions, references: the tags of each sentence; '' where nothing was predicted",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions, references) -> dict:
        pairs = [(entities(found), entities(true)) for found, true in zip(predictions, references, strict=True)]
        pairs = [(found, true) for found, true in pairs if found or true]  # the others have no entity
        if not pairs:
            return interval([0.0]).to_result()
        right = [2.0 * len(found & true) for found, true in pairs]
        return interval(right, [float(len(found) + len(true)) for found, true in pairs]).to_result()
