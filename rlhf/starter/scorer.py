"""The starter's gold score: VADER sentiment."""

import functools
from typing import Any

from rlhf.errors import InputError


def gold_scores(completions: list[str]) -> list[float]:
    """The starter's scorer: VADER's compound sentiment in [-1, 1], one per completion ("prefers upbeat replies").

    Source: Hutto & Gilbert, "VADER", ICWSM 2014, as the package `vaderSentiment` (MIT) implements it.
    """
    return [_analyzer().polarity_scores(completion)["compound"] for completion in completions]


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise InputError(
            "The starter's scorer needs vaderSentiment. Install it with: pip install vaderSentiment"
        ) from None
    return SentimentIntensityAnalyzer()  # it reads its lexicon, which takes as long as to score 100 replies
