"""Problems with a known answer: generated ones for the starter, what a prompt to solve them looks like, and the answer
that a solution ends with.

A dataset of problems has `prompt` (text or messages), mostly `answer`, and perhaps `solution`, a worked one. Where
`answer` is missing or empty it is unknown.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict

from rlhf.comparisons import Messages
from rlhf.errors import InputError

SEED = 20
SIZES = {"small": (512, 200), "full": (2048, 200)}  # (train, test) problems of the starter
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Emma", "Leo", "Nora", "Paul", "Ida")
THINGS = ("apples", "books", "coins", "stickers", "marbles", "pencils", "shells", "cards")
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
SENTENCE_END = re.compile(r"[.!?]\s+(?=[A-Z])")
# GSM8K ends its solutions with `#### 18`; models and the starter's solutions say `The answer is 18.`
MARK = re.compile(r"####|answer is:?", re.IGNORECASE)


class Kind(NamedTuple):
    """A kind of word problem: its numbers, its wordings, its steps and its answer."""

    ranges: tuple[range, ...]
    sensible: Callable[..., bool]
    wordings: tuple[str, ...]  # {n}: a name, {t}: things, {0} {1} {2}: the numbers
    steps: str  # also {x}, {y}: results of the first and second step
    results: Callable[..., tuple[int, ...]]


KINDS = (
    Kind((range(2, 10), range(2, 8), range(2, 10)), lambda a, b, c: c < a + b,
         ("{n} has {0} {t}. {n} gets {1} more {t} and gives away {2} {t}. How many {t} does {n} have now?",
          "{n} finds {0} {t}, buys {1} {t} and loses {2} {t}. How many {t} does {n} have?"),
         "{n} first has {0} + {1} = {x} {t}, then {x} - {2} = {y} {t}.", lambda a, b, c: (a + b, a + b - c)),
    Kind((range(2, 8), range(2, 8), range(2, 8)), lambda a, b, c: True,
         ("{n} has {0} {t}. {n} gets {1} {t} on Monday and {2} {t} on Friday. How many {t} does {n} have now?",
          "{n} finds {0} {t}, buys {1} {t} and is given {2} {t}. How many {t} does {n} have?"),
         "{n} first has {0} + {1} = {x} {t}, then {x} + {2} = {y} {t}.", lambda a, b, c: (a + b, a + b + c)),
    Kind((range(2, 6), range(2, 6), range(2, 10)), lambda a, b, c: True,
         ("{n} has {0} boxes with {1} {t} in each. {n} gets {2} more {t}. How many {t} does {n} have now?",
          "{n} buys {0} bags with {1} {t} each and finds {2} {t}. How many {t} does {n} have?"),
         "{n} first has {0} * {1} = {x} {t}, then {x} + {2} = {y} {t}.", lambda a, b, c: (a * b, a * b + c)),
    Kind((range(2, 6), range(2, 6), range(2, 10)), lambda a, b, c: c < a * b,
         ("{n} has {0} boxes with {1} {t} in each. {n} gives away {2} {t}. How many {t} does {n} have left?",
          "{n} buys {0} bags with {1} {t} each and loses {2} {t}. How many {t} does {n} have?"),
         "{n} first has {0} * {1} = {x} {t}, then {x} - {2} = {y} {t}.", lambda a, b, c: (a * b, a * b - c)),
)  # fmt: skip


def starter_problems(config: str | None = None) -> DatasetDict:
    """Word problems of two steps, as rows {`prompt`, `answer`, `solution`} with splits `train` and `test`.

    Kinds take turns, so the first rows show one of each. A kind's numbers occur in one split only: what is held out
    can't be answered from memory.

    Args:
        config: `small` (the default: what a laptop trains on in minutes) or `full`.

    Raises:
        InputError: if `config` is unknown.
    """
    if config not in (None, *SIZES):
        raise InputError(f"--dataset_config of 'starter' is 'small' or 'full', found {config!r}.")
    sizes = dict(zip(("train", "test"), SIZES[config or "small"], strict=True))
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    numbers = [[found for found in itertools.product(*kind.ranges) if kind.sensible(*found)] for kind in KINDS]
    for found in numbers:
        random.Random(SEED).shuffle(found)
    for split, size in sizes.items():
        # a third of a kind's numbers is held out, whatever the sizes
        own = [found[len(found) // 3 :] if split == "train" else found[: len(found) // 3] for found in numbers]
        rng = random.Random(f"{SEED} {split}")
        seen: set[str] = set()
        while len(rows[split]) < size:
            turn = len(rows[split])
            which = turn % len(KINDS)
            row = _word(KINDS[which], own[which][turn // len(KINDS) % len(own[which])], rng)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows[split].append(row)
    return DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()})


def _word(kind: Kind, numbers: tuple[int, ...], rng: random.Random) -> dict[str, str]:
    """One problem in words, with its answer and solution."""
    results = kind.results(*numbers)
    words = {"n": rng.choice(NAMES), "t": rng.choice(THINGS), "x": results[0], "y": results[-1]}
    prompt = rng.choice(kind.wordings).format(*numbers, **words)
    return {"prompt": prompt, "answer": str(results[-1]), "solution": kind.steps.format(*numbers, **words)}


# ---------------------------------------------------------------------------------------------- answers


def plain_answer(text: str) -> str:
    """An answer in the form that is compared: a number without commas or trailing zeros, or lower-case words.

    It is a number if there is one only: 3/4 and 10:30 stay as they are. Of an equation it is the right side.
    """
    text = text.rpartition("=")[2].strip() or text
    first = SENTENCE_END.split(text)[0]  # models go on talking: `The answer is 7. Tom has 3 more.`
    text = first if NUMBER.search(first) else text
    found = NUMBER.search(text)
    if found is None or re.search(r"\d", text[: found.start()] + text[found.end() :]):
        return " ".join(text.split()).strip(" .,:;!?()*\"'$").casefold()
    try:
        number = Decimal(found.group().replace(",", ""))
    except InvalidOperation:  # digits of another script
        return found.group()
    return "0" if number == 0 else f"{number.normalize():f}"


def final_answer(text: str) -> str | None:
    """The answer that a solution ends with: what follows the last `####` or `answer is`, else the last number."""
    marks = list(MARK.finditer(text))
    if marks:
        lines = text[marks[-1].end() :].strip().splitlines()
        return plain_answer(lines[0]) or None if lines else None
    numbers = NUMBER.findall(text)
    return plain_answer(numbers[-1]) if numbers else None


def known_answer(row: dict[str, Any]) -> str | None:
    """The answer that a row of a dataset gives, in the form that is compared, or None."""
    answer = row.get("answer")
    return None if answer is None or not str(answer).strip() else final_answer(f"#### {answer}")


def majority(answers: Sequence[str | None]) -> str | None:
    """The most common answer, the one seen first among equals; None if there is no answer at all.

    Self-consistency: Wang et al. 2022, https://arxiv.org/abs/2203.11171; as a label: Huang et al. 2022,
    https://arxiv.org/abs/2210.11610, section 3.1.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


# ---------------------------------------------------------------------------------------------- prompts


def question(prompt: str | Messages, answer: str | None = None) -> Messages:
    """A problem as messages; with `answer` as the hint of STaR's rationalization."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if answer is None:
        return messages
    return [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']} (The answer is {answer}.)"}]


def solved(row: dict[str, Any], hint: bool = False) -> Messages:
    """An example for the prompt: the problem and its worked solution, which ends with the answer."""
    # GSM8K's solutions have calculator annotations, <<16-3-4=9>>, which nobody says
    solution = re.sub(r"<<.*?>>", "", row["solution"]).split("####")[0].strip()
    text = f"{solution} The answer is {row['answer']}."
    return [*question(row["prompt"], row["answer"] if hint else None), {"role": "assistant", "content": text}]


def few_shot(examples: list[dict[str, Any]], row: dict[str, Any], hint: bool = False) -> Messages:
    """The conversation that asks for a solution: worked examples as earlier turns, then the problem.

    Args:
        hint: tell the answer, in the examples too.
    """
    shown = [message for example in examples for message in solved(example, hint)]
    return [*shown, *question(row["prompt"], row["answer"] if hint else None)]
