"""What a reward function may return: one score for each completion, or one reward for each of its tokens."""

import math
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Any

import torch

from rlhf.comparisons import Messages
from rlhf.errors import InputError

Completion = str | Messages
Score = float | list[float] | None  # of the whole completion, of each token, or no opinion
LARGEST = torch.finfo(torch.float32).max  # scores are added up as float32


class RewardError(InputError):
    """A reward function raised, or returned something that is not a score. The message names the function."""

    of_one_process = True


def completion_text(completion: Completion) -> str:
    """The text of a completion in either form.

    >>> completion_text([{"role": "assistant", "content": "Hello."}])
    'Hello.'
    """
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def check_scores(
    name: str, answer: object, completions: list[Completion], completion_ids: list[list[int]] | None = None
) -> list[Score]:
    """The answer of a reward function as floats, lists of floats (rewards per token) or None (no opinion).

    Any iterable of real numbers counts: lists, tuples, generators, tensors and arrays, also of shape (B, 1). So do
    booleans, as 0 and 1.

    Args:
        name: of the function, for errors.

    Raises:
        RewardError: if the number of scores is not that of the completions, or a score is not a finite number of the
            range of float32.
    """
    scores = _as_list(name, answer, len(completions))
    checked: list[Score] = []
    for number, (score, completion) in enumerate(zip(scores, completions, strict=True)):
        score = _plain(score, of_one_completion=True)
        where = f"for the completion {completion_text(completion)[:200]!r} (number {number} of the batch)"
        if score is None:
            checked.append(None)
            continue
        try:
            values = [as_number(value) for value in (score if isinstance(score, list | tuple) else [score])]
        except (TypeError, ValueError, OverflowError) as error:
            raise RewardError(
                f"Reward function {name!r} returned {_short(score)} {where}. A score is a finite number, or None."
            ) from error
        if not isinstance(score, list | tuple):
            checked.append(values[0])
            continue
        if completion_ids is not None and len(values) != len(completion_ids[number]):
            raise RewardError(
                f"Reward function {name!r} returned {len(values)} rewards for the {len(completion_ids[number])} tokens "
                f"of the completion {completion_text(completion)[:200]!r} (number {number} of the batch)."
            )
        checked.append(values)
    return checked


def as_number(value: Any) -> float:
    """A real number as a float.

    Raises:
        TypeError, ValueError, OverflowError: if it is a text, not a number, not finite, or beyond float32.
    """
    if isinstance(value, str | bytes):
        raise TypeError(f"{value!r} is a text")
    number = float(value)
    if not abs(number) <= LARGEST:  # NaN fails too
        raise ValueError(f"{number} is not a finite number of the range of float32")
    return number


def _as_list(name: str, answer: object, count: int) -> list[Any]:
    """The scores of `count` completions."""
    plain = _plain(answer)
    wrong_kind = isinstance(plain, str | bytes | Mapping | AbstractSet) or not isinstance(plain, Iterable)
    if wrong_kind:
        raise RewardError(
            f"Reward function {name!r} returned {_short(plain)} instead of a list of {count} scores, one for each "
            "completion."
        )
    scores = list(islice(plain, count + 1))  # a generator may have no end
    if len(scores) != count:
        found = len(scores) if len(scores) < count else f"more than {count}"
        raise RewardError(f"Reward function {name!r} returned {found} scores for {count} completions.")
    return scores


def _plain(value: Any, of_one_completion: bool = False) -> Any:
    """Tensors, arrays and their scalars as lists and numbers.

    Args:
        of_one_completion: one number in an array is a number. Otherwise, an array of shape (B, 1) is B numbers.
    """
    shape = getattr(value, "shape", None)
    if shape is None or not hasattr(value, "tolist"):
        return value
    if of_one_completion and math.prod(shape) == 1:
        return value.item()
    return (value[:, 0] if len(shape) == 2 and shape[1] == 1 else value).tolist()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
