"""Several datasets as one: which rows are drawn for training, and which are held out.

Each dataset is read and encoded by itself, so their formats may differ, and errors name the file and the row.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets

from rlhf.data.datasets import SPLIT_SEED, DatasetArguments, load_splits, part_of, prompts_of_rows
from rlhf.errors import InputError
from rlhf.starter.model import STARTER

Stopping = Literal["first_exhausted", "all_exhausted"]


@dataclass
class MixtureArguments(DatasetArguments):
    """DatasetArguments with several datasets.

    Args:
        dataset_name: one dataset, or several.
        dataset_probs: the share of each dataset in the training rows, as `probabilities` of
            `datasets.interleave_datasets`; they are divided by their sum. None: all rows of all datasets.
        stopping_strategy: see `draw`; the words are those of `datasets.interleave_datasets`.

    Raises:
        InputError: if the numbers of names and shares differ, a share is not above 0, a name stands twice, or a setting
            has no effect.
    """

    dataset_name: list[str] | None | str = field(  # type: ignore[assignment] # noqa: RUF036 - parsed by the first
        default=None, metadata={"help": "Dataset: Hub id, folder, file, or 'starter'. Several are mixed."}
    )
    dataset_probs: list[float] | None = field(
        default=None, metadata={"help": "Share of each dataset in training. Default: all rows of all datasets."}
    )
    stopping_strategy: Stopping = field(
        default="first_exhausted",
        metadata={
            "help": "With dataset_probs: no row twice, until the first dataset has no more (first_exhausted), or "
            "smaller datasets again, until every row was drawn (all_exhausted)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names, probs = dataset_names(self), self.dataset_probs
        if len(names) == 1:
            self.dataset_name = names[0]
        if probs is not None and len(probs) != len(names):
            raise InputError(f"--dataset_probs: {len(probs)} shares for {len(names)} datasets. Give one for each.")
        if probs is not None and len(names) == 1:
            raise InputError(f"--dataset_probs: shares are of several datasets; found {names[0]} alone. Leave it out.")
        if probs is None and self.stopping_strategy != MixtureArguments.stopping_strategy:
            raise InputError(f"--stopping_strategy {self.stopping_strategy}: has no effect without --dataset_probs. "
                             "Give both or neither.")  # fmt: skip
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"--dataset_name {twice[0]}: is given twice. Give it once, and its share as "
                             "--dataset_probs.")  # fmt: skip
        if len(names) > 1 and self.dataset_config is not None:
            raise InputError(f"--dataset_config {self.dataset_config}: belongs to one dataset, and here are "
                             f"{len(names)}. Leave it out.")  # fmt: skip


def dataset_names(args: MixtureArguments) -> list[str]:
    """The names behind --dataset_name."""
    given = args.dataset_name
    return given if isinstance(given, list) else [given or STARTER]


class Splits(NamedTuple):
    """A dataset's rows, as they were read."""

    name: str
    train: Dataset
    test: Dataset


def load_mixture(args: MixtureArguments, part: str) -> list[Splits]:
    """The splits of each dataset of --dataset_name; see `load_splits`.

    Of several, no training row shares its prompt with a held-out row of any.

    Raises:
        InputError: see `load_splits`; or if that leaves no training row of a dataset.
    """
    found = []
    for name in dataset_names(args):
        one = copy.copy(args)
        one.dataset_name = name
        found.append(Splits(name, *load_splits(one, part)))
    return found if len(found) == 1 else _without_held_out(found)


def _without_held_out(found: list[Splits]) -> list[Splits]:
    held_out = {prompt for splits in found for prompt in _prompts(splits.test)}
    kept = []
    for name, train, test in found:
        rows = [number for number, prompt in enumerate(_prompts(train)) if prompt is None or prompt not in held_out]
        if len(rows) < len(train):
            print(f"{name}: left out {len(train) - len(rows)} of {len(train)} training rows, whose prompts are held "
                  "out.")  # fmt: skip
        if not rows:
            raise InputError(
                f"--dataset_name {name}: the prompts of all its training rows are held out, here or in another dataset."
                " Leave it out, or give it more rows."
            )
        kept.append(Splits(name, part_of(train, np.asarray(rows)), test))
    return kept


def _prompts(rows: Dataset) -> list[str | None]:
    """Each row's prompt, to be compared; a text is the same as one message of it. None: a row without a prompt."""
    prompts: list[str | None] = []
    for prompt in prompts_of_rows(rows):
        message = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else None
        words = message.get("content") if isinstance(message, dict) else prompt
        prompts.append(None if isinstance(prompt, int) else json.dumps(words, default=str))
    return prompts


def draw(sizes: list[int], probs: list[float], stopping: Stopping) -> list[np.ndarray]:
    """The numbers of the rows that are drawn of each dataset, in random order, the same every time.

    With `first_exhausted` no row is drawn twice, and the dataset that is smallest for its share gives all of its rows.
    With `all_exhausted` every row is drawn, and the rows of a dataset that is too small for its share are drawn again,
    each as often as the others or once more.

    >>> [len(rows) for rows in draw([10, 4], [1, 1], "first_exhausted")]
    [4, 4]
    >>> [len(rows) for rows in draw([10, 4], [1, 1], "all_exhausted")]
    [10, 10]
    """
    shares = np.asarray(probs) / sum(probs)
    totals = np.asarray(sizes) / shares
    total = totals.min() if stopping == "first_exhausted" else totals.max()
    random = np.random.default_rng(SPLIT_SEED)
    counts = [max(1, round(total * share)) for share in shares]
    return [np.resize(random.permutation(size), count) for size, count in zip(sizes, counts, strict=True)]


def mix(
    args: MixtureArguments, found: list[Splits], encode: Callable[[Dataset, str], Dataset]
) -> tuple[Dataset, Dataset]:
    """The training rows, drawn as `args` says, and all held-out rows of all datasets.

    Args:
        encode: the rows and the name of a dataset → rows for a trainer.

    Raises:
        InputError: if the rows of two datasets have different columns.
    """
    trains, tests = ([encode(rows, splits.name) for splits, rows in zip(found, part, strict=True)]
                     for part in zip(*[splits[1:] for splits in found], strict=True))  # fmt: skip
    if len(found) == 1:
        return trains[0], tests[0]
    names = [splits.name for splits in found]
    for name, *both in zip(names, trains, tests, strict=True):
        differ = {column for rows in both for column in {*rows.column_names} ^ {*trains[0].column_names}}
        if differ:
            raise InputError(
                f"--dataset_name {names[0]} {name}: one of them has {', '.join(sorted(differ))} and the other has not. "
                "Give both the same columns."
            )
    whole = concatenate_datasets(trains)
    if args.dataset_probs is not None:
        drawn = draw([len(rows) for rows in trains], args.dataset_probs, args.stopping_strategy)
        for name, own, rows in zip(names, drawn, trains, strict=True):
            print(f"{name}: {len(own)} training rows, drawn from {len(rows)}.")
        starts = np.cumsum([0, *map(len, trains[:-1])])
        rows = np.concatenate([own + start for own, start in zip(drawn, starts, strict=True)])
        whole = whole.select(np.random.default_rng(SPLIT_SEED).permutation(rows))
    return whole, concatenate_datasets(tests)
