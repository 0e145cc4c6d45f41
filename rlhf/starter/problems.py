"""Word problems of two steps with known answers, generated for the starter."""

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

from datasets import Dataset, DatasetDict

from rlhf.errors import InputError

SEED = 20
SIZES = {"small": (512, 200), "full": (2048, 200)}  # (train, test) problems of the starter
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Emma", "Leo", "Nora", "Paul", "Ida")
THINGS = ("apples", "books", "coins", "stickers", "marbles", "pencils", "shells", "cards")


class ProblemKind(NamedTuple):
    """A kind of word problem: its numbers, its wordings, its steps and its answer."""

    ranges: tuple[range, ...]
    sensible: Callable[..., bool]
    wordings: tuple[str, ...]  # {n}: a name, {t}: things, {0} {1} {2}: the numbers
    steps: str  # also {x}, {y}: results of the first and second step
    results: Callable[..., tuple[int, ...]]


PROBLEM_KINDS = (
    ProblemKind((range(2, 10), range(2, 8), range(2, 10)), lambda a, b, c: c < a + b,
         ("{n} has {0} {t}. {n} gets {1} more {t} and gives away {2} {t}. How many {t} does {n} have now?",
          "{n} finds {0} {t}, buys {1} {t} and loses {2} {t}. How many {t} does {n} have?"),
         "{n} first has {0} + {1} = {x} {t}, then {x} - {2} = {y} {t}.", lambda a, b, c: (a + b, a + b - c)),
    ProblemKind((range(2, 8), range(2, 8), range(2, 8)), lambda a, b, c: True,
         ("{n} has {0} {t}. {n} gets {1} {t} on Monday and {2} {t} on Friday. How many {t} does {n} have now?",
          "{n} finds {0} {t}, buys {1} {t} and is given {2} {t}. How many {t} does {n} have?"),
         "{n} first has {0} + {1} = {x} {t}, then {x} + {2} = {y} {t}.", lambda a, b, c: (a + b, a + b + c)),
    ProblemKind((range(2, 6), range(2, 6), range(2, 10)), lambda a, b, c: True,
         ("{n} has {0} boxes with {1} {t} in each. {n} gets {2} more {t}. How many {t} does {n} have now?",
          "{n} buys {0} bags with {1} {t} each and finds {2} {t}. How many {t} does {n} have?"),
         "{n} first has {0} * {1} = {x} {t}, then {x} + {2} = {y} {t}.", lambda a, b, c: (a * b, a * b + c)),
    ProblemKind((range(2, 6), range(2, 6), range(2, 10)), lambda a, b, c: c < a * b,
         ("{n} has {0} boxes with {1} {t} in each. {n} gives away {2} {t}. How many {t} does {n} have left?",
          "{n} buys {0} bags with {1} {t} each and loses {2} {t}. How many {t} does {n} have?"),
         "{n} first has {0} * {1} = {x} {t}, then {x} - {2} = {y} {t}.", lambda a, b, c: (a * b, a * b - c)),
)  # fmt: skip


def starter_problems(config: str | None = None) -> DatasetDict:
    """Word problems of two steps, as rows {`prompt`, `answer`, `solution`} with splits `train` and `test`.

    Kinds take turns, so the first rows show one of each. A kind's numbers occur in one split only, so no test answer
    can be memorized.

    Args:
        config: `small` (the default; a laptop trains on it in minutes) or `full`.

    Raises:
        InputError: if `config` is unknown.
    """
    if config not in (None, *SIZES):
        raise InputError(f"--dataset_config of 'starter' is 'small' or 'full', found {config!r}.")
    sizes = dict(zip(("train", "test"), SIZES[config or "small"], strict=True))
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    numbers = [[found for found in itertools.product(*kind.ranges) if kind.sensible(*found)] for kind in PROBLEM_KINDS]
    for found in numbers:
        random.Random(SEED).shuffle(found)
    for split, size in sizes.items():
        # a third of a kind's numbers is held out, whatever the sizes
        own = [found[len(found) // 3 :] if split == "train" else found[: len(found) // 3] for found in numbers]
        rng = random.Random(f"{SEED} {split}")
        seen: set[str] = set()
        while len(rows[split]) < size:
            turn = len(rows[split])
            which = turn % len(PROBLEM_KINDS)
            row = _word(PROBLEM_KINDS[which], own[which][turn // len(PROBLEM_KINDS) % len(own[which])], rng)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows[split].append(row)
    return DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()})


def _word(kind: ProblemKind, numbers: tuple[int, ...], rng: random.Random) -> dict[str, str]:
    """One problem in words, with its answer and solution."""
    results = kind.results(*numbers)
    words = {"n": rng.choice(NAMES), "t": rng.choice(THINGS), "x": results[0], "y": results[-1]}
    prompt = rng.choice(kind.wordings).format(*numbers, **words)
    return {"prompt": prompt, "answer": str(results[-1]), "solution": kind.steps.format(*numbers, **words)}
