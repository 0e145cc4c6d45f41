"""How far labelers agree with each other and with themselves."""

import math
from collections import defaultdict
from typing import NamedTuple

import krippendorff

from rlhf.feedback.votes import Vote

SCALE = {"first": 0, "tie": 1, "second": 2}  # ordinal


class Agreement(NamedTuple):
    """Agreement between labelers and of each labeler with themselves; the content of agreement.json."""

    alpha: float | None  # Krippendorff's alpha: 1 is perfect, 0 is chance; None if no pair was compared twice
    pairs: int  # pairs of replies that at least two labelers compared
    repeats: float | None  # share of strict preferences that a labeler repeated when asked again; None without repeats
    repeated_pairs: int  # strict preferences that were asked again
    labelers: int
    votes: int


def measure_agreement(votes: list[Vote]) -> Agreement:
    """Krippendorff's alpha on the ordinal scale first < tie < second, and the share of repeated answers that are equal.

    Source: Krippendorff, Content Analysis (2004), ch. 11, as computed by the package krippendorff.
    """
    answers: dict[tuple[str, bool], dict[tuple[str, int, int], int]] = defaultdict(dict)
    for vote in votes:
        for pair in vote.comparisons():
            answers[vote.labeler, vote.repeat][vote.task, pair.first, pair.second] = SCALE[pair.preferred]
    first_answers = [given for (_, repeat), given in answers.items() if not repeat]
    units = sorted({unit for given in first_answers for unit in given})
    units = [unit for unit in units if sum(unit in given for given in first_answers) > 1]
    table = [[given.get(unit, math.nan) for unit in units] for given in first_answers]
    values = {value for row in table for value in row if not math.isnan(value)}
    alpha = None
    if units:  # if all answers are equal, alpha is 0/0 and agreement is perfect
        alpha = 1.0 if len(values) == 1 else float(krippendorff.alpha(table, level_of_measurement="ordinal"))
    same = [
        answers[labeler, False][unit] == value
        for (labeler, repeat), given in list(answers.items())
        if repeat
        for unit, value in given.items()
        if value != SCALE["tie"] and answers[labeler, False].get(unit, SCALE["tie"]) != SCALE["tie"]
    ]
    return Agreement(
        alpha=alpha,
        pairs=len(units),
        repeats=sum(same) / len(same) if same else None,
        repeated_pairs=len(same),
        labelers=len({vote.labeler for vote in votes}),
        votes=len(votes),
    )
