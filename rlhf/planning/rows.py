"""The lengths of a dataset's rows: the longest, which memory depends on, and those of typical batches."""

import itertools
import random
from collections.abc import Sequence


def padded_length(lengths: Sequence[int], rows: int) -> float:
    """The mean length to which a batch of random rows is padded.

    >>> padded_length([7, 7, 7], 2)
    7.0
    """
    draw = random.Random(0)
    batches = [max(draw.choices(lengths, k=rows)) for _ in range(500)]
    return sum(batches) / len(batches)


def words_for(lengths: Sequence[int], what: str) -> str:
    """The sentence on lengths.

    >>> words_for([4, 8], "prompts")
    'prompts of 6 tokens in the mean, 8 at most'
    """
    return f"{what} of {sum(lengths) / len(lengths):.0f} tokens in the mean, {max(lengths)} at most"


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """The number of tokens with which all rows begin, less the last of the shortest row, whose output is needed.

    >>> shared_prefix([[1, 2, 3, 4], [1, 2, 5]])
    2
    """
    columns = zip(*rows, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda tokens: len({*tokens}) == 1, columns))
    return min(same, min(map(len, rows)) - 1)
