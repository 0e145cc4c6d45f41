"""Labelled tasks with known answers, from the starter conversations or generated: no network, no annotators.

Each task belongs to a cluster of related ones, as in FLAN (https://arxiv.org/abs/2109.01652, §2.1), so that a whole
kind of task can be held out of training:

| cluster    | tasks                                     | the answer is known because                             |
|------------|-------------------------------------------|---------------------------------------------------------|
| sentiment  | sentiment, more_positive                  | strong VADER scores, which come from a list of words    |
| sentence   | question, word_order                      | the message's last mark is cut off; its words are mixed |
| dialogue   | reply, which_reply                        | one reply is the real one, the other from elsewhere     |
| sorting    | sort_numbers, sort_words                  | sorted here                                             |
| arithmetic | addition, subtraction, larger_number      | calculated here                                         |
| copying    | reverse_words, upper_case, replace_word   | changed here                                            |
| counting   | count_words, count_letter                 | counted here                                            |

Every row has the task's input columns (see `TASKS`), `choices` (the answer options), `label` (the number of the right
one) and `answer` (its text). Tasks whose choices are always the same are ordinary classification data: `text`,
`text_pair` if there are two, and `label` with names. Labels are balanced. Training rows come from the conversations of
the starter's `sft` part, test rows from its `held_out` part, and no test input occurs in training.
"""

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from rlhf.errors import InputError
from rlhf.starter.conversations import starter_pairs
from rlhf.starter.scorer import gold_scores

Pairs = list[tuple[str, str]]  # (message, reply)
Row = dict[str, Any]
STRONG = 0.5  # |VADER compound| from which a message counts as positive or negative; its authors' own threshold is 0.05
SCORED_AT_ONCE = 256
NUM_CHOICES = 4


class StarterTask(NamedTuple):
    """A task: its cluster, its input columns, how its rows are made, and the names of its labels if they are fixed."""

    cluster: str
    columns: tuple[str, ...]
    make: Callable[[Pairs, random.Random], Iterator[Row]]
    label_names: tuple[str, ...] | None = None


def _words(text: str) -> list[str]:
    """Lower-case words without marks, so that neither capitals nor marks give an answer away."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def _short(pairs: Pairs, shortest: int, longest: int) -> Iterator[list[str]]:
    """The first words of each message, between `shortest` and `longest` of them, all different."""
    for message, _ in pairs:
        words = list(dict.fromkeys(_words(message)))[:longest]
        if len(words) >= shortest:
            yield words


def _options(answer: str, wrong: list[str], rng: random.Random) -> Row:
    """`choices` and `label`: the answer among NUM_CHOICES options (fewer if there are fewer), at a random place."""
    others = [option for option in dict.fromkeys(wrong) if option != answer]
    choices = rng.sample(others, min(len(others), NUM_CHOICES - 1))
    label = rng.randrange(len(choices) + 1)
    return {"choices": [*choices[:label], answer, *choices[label:]], "label": label}


# ---------------------------------------------------------------------------------------------- sentiment


@functools.cache
def _scores(group: tuple[str, ...]) -> list[float]:
    return gold_scores(list(group))


def _strong(pairs: Pairs) -> Iterator[tuple[str, int]]:
    """(message, 1 if positive else 0) where the score is strong. Scored in small groups, only as many as are needed."""
    messages = (message for message, _ in pairs)
    while group := tuple(itertools.islice(messages, SCORED_AT_ONCE)):
        for message, score in zip(group, _scores(group), strict=True):
            if abs(score) >= STRONG:
                yield message, int(score > 0)


def _sentiment(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    for message, positive in _strong(pairs):
        yield {"text": message, "label": positive}


def _more_positive(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    waiting: tuple[list[str], list[str]] = ([], [])
    for message, positive in _strong(pairs):
        waiting[positive].append(message)
        if waiting[0] and waiting[1]:
            two = [waiting[0].pop(), waiting[1].pop()]
            label = rng.randrange(2)
            first, second = two[::-1] if label == 0 else two
            yield {"text": first, "text_pair": second, "label": label}


# ---------------------------------------------------------------------------------------------- sentence


def _question(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    for message, _ in pairs:
        text, mark = message.rstrip()[:-1].rstrip(), message.rstrip()[-1]
        if mark in "?." and not re.search(r"[?.!]$|\?", text):
            yield {"text": text, "label": int(mark == "?")}


def _word_order(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    for message, _ in pairs:
        words = _words(message)
        if not 5 <= len(words) <= 14:
            continue
        label = rng.randrange(2)
        mixed = rng.sample(words, len(words))
        if label == 1 or mixed != words:
            yield {"text": " ".join(words if label else mixed), "label": label}


# ---------------------------------------------------------------------------------------------- dialogue


def _with_other_reply(pairs: Pairs, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(message, its reply, a reply from elsewhere with as many words, so that length gives nothing away)."""
    by_length: dict[int, list[str]] = {}
    for _, reply in pairs:
        by_length.setdefault(len(reply.split()), []).append(reply)
    for message, reply in pairs:
        other = rng.choice(by_length[len(reply.split())])
        if len(reply.split()) >= 4 and other.lower() != reply.lower():
            yield message, reply, other


def _reply(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    for message, reply, other in _with_other_reply(pairs, rng):
        label = rng.randrange(2)
        yield {"text": message, "text_pair": reply if label else other, "label": label}


def _which_reply(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    for message, reply, other in _with_other_reply(pairs, rng):
        yield {"text": message, **_options(reply, [other], rng)}


# ---------------------------------------------------------------------------------------------- sorting


def _orders(items: list[str], right: list[str], rng: random.Random) -> Row:
    """The right order among others: backwards, two neighbours exchanged, at random."""
    at = rng.randrange(len(right) - 1)
    exchanged = [*right[:at], right[at + 1], right[at], *right[at + 2 :]]
    wrong = [right[::-1], exchanged, rng.sample(right, len(right)), items]
    return _options(", ".join(right), [", ".join(order) for order in wrong], rng)


def _sort_numbers(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    while True:
        numbers = rng.sample(range(100), 4)
        items, right = [[str(n) for n in order] for order in (numbers, sorted(numbers))]
        if items != right:
            yield {"items": ", ".join(items), **_orders(items, right, rng)}


def _sort_words(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    for words in _short(pairs, 4, 30):
        items = rng.sample(words, 4)
        right = sorted(items)
        if len({word[0] for word in items}) == 4 and items != right:
            yield {"items": ", ".join(items), **_orders(items, right, rng)}


# ---------------------------------------------------------------------------------------------- arithmetic


def _near(result: int) -> list[str]:
    """Wrong results that people get: off by one, by ten, or by a carry."""
    return [str(result + off) for off in (-10, -2, -1, 1, 2, 10) if result + off >= 0]


def _addition(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    while True:
        a, b = rng.randrange(2, 100), rng.randrange(2, 100)
        yield {"a": str(a), "b": str(b), **_options(str(a + b), _near(a + b), rng)}


def _subtraction(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    while True:
        b, a = sorted(rng.sample(range(2, 100), 2))
        yield {"a": str(a), "b": str(b), **_options(str(a - b), _near(a - b), rng)}


def _larger_number(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    while True:
        a, b = rng.sample(range(2, 1000), 2)
        yield {"a": str(a), "b": str(b), "choices": [str(a), str(b)], "label": int(b > a)}


# ---------------------------------------------------------------------------------------------- copying


def _reverse_words(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    for words in _short(pairs, 4, 5):
        right = words[::-1]
        wrong = [words, sorted(words), [right[1], right[0], *right[2:]], [*right[:-2], right[-1], right[-2]]]
        yield {"text": " ".join(words), **_options(" ".join(right), [" ".join(order) for order in wrong], rng)}


def _upper_case(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    for words in _short(pairs, 4, 7):
        text = " ".join(words)
        first, last = [" ".join(w.upper() if n == at else w for n, w in enumerate(words)) for at in (0, len(words) - 1)]
        yield {"text": text, **_options(text.upper(), [text, text.title(), first, last], rng)}


def _replace_word(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    for words, others in itertools.pairwise(_short(pairs, 4, 7)):
        at, elsewhere = rng.sample(range(len(words)), 2)
        new = next((word for word in others if word not in words), None)
        if new is None:
            continue
        right, misplaced = [[*words[:n], new, *words[n + 1 :]] for n in (at, elsewhere)]
        added, left_out = [*words[: at + 1], new, *words[at + 1 :]], [*words[:at], *words[at + 1 :]]
        wrong = [" ".join(option) for option in (words, misplaced, added, left_out)]
        yield {"text": " ".join(words), "old": words[at], "new": new, **_options(" ".join(right), wrong, rng)}


# ---------------------------------------------------------------------------------------------- counting


def _amounts(right: int, rng: random.Random) -> Row:
    """Four neighbouring numbers in order, the right one anywhere among them."""
    first = right - rng.randrange(min(right, NUM_CHOICES - 1) + 1)
    return {"choices": [str(first + n) for n in range(NUM_CHOICES)], "label": right - first}


def _count_words(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    for message, _ in pairs:
        words = _words(message)[: rng.randrange(3, 9)]
        if len(words) >= 3:
            yield {"text": " ".join(words), **_amounts(len(words), rng)}


def _count_letter(pairs: Pairs, rng: random.Random) -> Iterator[Row]:
    for words in _short(pairs, 3, 3):
        text = " ".join(words)
        letter = rng.choice(sorted(set(text) - {" ", "'"}))
        yield {"text": text, "letter": letter, **_amounts(text.count(letter), rng)}


TASKS: dict[str, StarterTask] = {
    "sentiment": StarterTask("sentiment", ("text",), _sentiment, ("negative", "positive")),
    "more_positive": StarterTask("sentiment", ("text", "text_pair"), _more_positive, ("first", "second")),
    "question": StarterTask("sentence", ("text",), _question, ("statement", "question")),
    "word_order": StarterTask("sentence", ("text",), _word_order, ("mixed", "natural")),
    "reply": StarterTask("dialogue", ("text", "text_pair"), _reply, ("no", "yes")),
    "which_reply": StarterTask("dialogue", ("text",), _which_reply),
    "sort_numbers": StarterTask("sorting", ("items",), _sort_numbers),
    "sort_words": StarterTask("sorting", ("items",), _sort_words),
    "addition": StarterTask("arithmetic", ("a", "b"), _addition),
    "subtraction": StarterTask("arithmetic", ("a", "b"), _subtraction),
    "larger_number": StarterTask("arithmetic", ("a", "b"), _larger_number),
    "reverse_words": StarterTask("copying", ("text",), _reverse_words),
    "upper_case": StarterTask("copying", ("text",), _upper_case),
    "replace_word": StarterTask("copying", ("text", "old", "new"), _replace_word),
    "count_words": StarterTask("counting", ("text",), _count_words),
    "count_letter": StarterTask("counting", ("text", "letter"), _count_letter),
}
CLUSTERS: dict[str, tuple[str, ...]] = {
    cluster: tuple(name for name, task in TASKS.items() if task.cluster == cluster)
    for cluster in dict.fromkeys(task.cluster for task in TASKS.values())
}


KEPT_OUT = 400  # test rows whose inputs training never contains, also if fewer test rows are asked for


def _balanced(rows: Iterator[Row], name: str, count: int, seen: set[str]) -> list[Row]:
    """The first `count` rows with equally many of each label; fewer if there aren't enough.

    Rows whose inputs are in `seen` are skipped; the inputs of the chosen rows are added to it.

    Raises:
        InputError: if `count` is below the number of labels.
    """
    task = TASKS[name]
    by_label: dict[int, list[Row]] = {}
    share = None
    for row in rows:
        choices = list(task.label_names) if task.label_names else row["choices"]
        share = count // len(choices) if share is None else share
        if share < 1:
            raise InputError(
                f"starter task {name!r}: {count} rows are too few for one of each of its {len(choices)} labels. Give "
                f"at least {len(choices)} (--limit, --max_examples_per_task or --max_test_examples_per_task)."
            )
        key = " | ".join(row[column].lower() for column in task.columns)
        chosen = by_label.setdefault(row["label"], [])
        if len(chosen) < share and key not in seen:
            seen.add(key)
            label = row.pop("label")
            chosen.append({**row, "choices": choices, "label": label, "answer": choices[label]})
        if len(by_label) == len(choices) and all(len(chosen) == share for chosen in by_label.values()):
            break
    least = min(len(chosen) for chosen in by_label.values())
    return [row for chosen in by_label.values() for row in chosen[:least]]


def starter_task(name: str, max_train: int = 2000, max_test: int = 400, seed: int = 0) -> DatasetDict:
    """One task as splits `train` and `test`, each balanced over the labels.

    Args:
        name: one of `TASKS`.
        max_train, max_test: largest number of rows per split; their number is a multiple of the number of labels.
        seed: of numbers, wrong options and the order of the rows.

    Returns:
        columns: the task's inputs (strings), `choices` (list of strings), `label` (int64, index of the right choice; a
        ClassLabel where choices are always the same) and `answer` (string).

    Raises:
        InputError: if there is no such task, or a split would have fewer rows than there are labels.
    """
    if name not in TASKS:
        raise InputError(f"no starter task {name!r}. There are {', '.join(TASKS)}.")
    task, splits = TASKS[name], {}
    seen: set[str] = set()
    label = ClassLabel(names=list(task.label_names)) if task.label_names else Value("int64")
    text = {column: Value("string") for column in task.columns}
    features = Features({**text, "choices": List(Value("string")), "label": label, "answer": Value("string")})
    for split, part, count in (("test", "held_out", max_test), ("train", "sft", max_train)):
        rng = random.Random(f"{seed} {name} {split}")
        rows = _balanced(task.make(starter_pairs(part), rng), name, count, seen)
        if split == "test":  # the test rows of a call with a larger max_test are kept out of training, too
            _balanced(task.make(starter_pairs(part), random.Random(f"{seed} {name} {split}")), name, KEPT_OUT, seen)
        rng.shuffle(rows)
        splits[split] = Dataset.from_list(rows, features=features)
    return DatasetDict({"train": splits["train"], "test": splits["test"]})
