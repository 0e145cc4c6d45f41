"""Starter data for recipes/finetune.py: `--dataset_name starter --dataset_config NAME`, with no network.

Sentences and pairs are the tasks of rlhf/starter/tasks.py with fixed labels. Two more kinds of labels are made here,
from the messages of the starter's `sft` part (training) and `held_out` part (test):

- `tags`: which words people wrote with a capital; the text has neither case nor punctuation (truecasing, Lita et al.
  2003, https://aclanthology.org/P03-1020).
- `spans`: facts about two people stand among real sentences, and a question asks for one of them (made like the tasks
  of Weston et al. 2015, https://arxiv.org/abs/1502.05698). No name, place or thing occurs both in training and in test.
"""

import itertools
import random
import re
from collections.abc import Iterator

from datasets import Dataset, DatasetDict

from rlhf.errors import InputError
from rlhf.starter.conversations import starter_pairs
from rlhf.starter.tasks import TASKS, Row, starter_task

# (statement, question) with {name} and {thing}; the thing is the answer
FACTS = {
    "place": ("{name} lives in {thing}.", "Where does {name} live?"),
    "pet": ("{name} has {thing}.", "Which animal does {name} have?"),
    "food": ("{name} likes {thing} best.", "What does {name} like to eat?"),
    "job": ("{name} works as {thing}.", "What is the job of {name}?"),
}
# the first half is for training, the second for the test
THINGS = {
    "place": ["Lima", "Oslo", "Cape Town", "Dublin", "New Delhi", "Quito", "Turin", "Nairobi", "San Diego", "Kyoto",
              "Hanoi", "Porto", "Buenos Aires", "Vienna", "Accra", "Tel Aviv", "Boston", "Prague", "Salt Lake City",
              "Lyon"],
    "pet": ["a grey cat", "two goats", "an old dog", "a parrot", "three hens", "a white pony", "a hamster", "a turtle",
            "six rabbits", "a small snake"],
    "food": ["pepper soup", "fried rice", "apple pie", "noodles", "black beans", "pizza", "lentil stew", "pancakes",
             "fish tacos", "mushrooms"],
    "job": ["a nurse", "a bus driver", "a painter", "an engineer", "a cook", "a teacher", "a train driver", "a farmer",
            "an editor", "a watchmaker"],
}  # fmt: skip
NAMES = ["Anna", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leo", "Mona",
         "Nils", "Olga", "Pablo", "Rosa", "Samir", "Tara", "Victor"]  # fmt: skip
MIN_WORDS = 5


def finetuning_names() -> list[str]:
    """The values of `--dataset_config`."""
    return [name for name, task in TASKS.items() if task.label_names] + ["tags", "spans"]


def finetuning_dataset(config: str | None, max_train: int = 1000, max_test: int = 400) -> DatasetDict:
    """Labelled starter data with splits `train` and `test`; no text of the test occurs in training.

    Args:
        config: one of `finetuning_names()`; None is `reply`.

    Raises:
        InputError: if there is no such data, or a package of the starter is missing.
    """
    name = config or "reply"
    if name not in finetuning_names():
        raise InputError(f"--dataset_config {name}: the starter has {', '.join(finetuning_names())}.")
    if name not in ("tags", "spans"):
        return starter_task(name, max_train, max_test).remove_columns(["choices", "answer"])
    splits = {}
    for split, part, count in (("train", "sft", max_train), ("test", "held_out", max_test)):
        messages = [message for message, _ in starter_pairs(part)]
        rows = _tagged(messages) if name == "tags" else _spans(messages, random.Random(f"spans {split}"), split)
        splits[split] = Dataset.from_list(list(itertools.islice(rows, count)))
    return DatasetDict(splits)


def _tagged(messages: list[str]) -> Iterator[Row]:
    """Rows of `tokens`, lower-case words, and `tags`: CAPITAL or O. Messages without any case are left out."""
    for message in messages:
        words = re.findall(r"[A-Za-z]+(?:'[A-Za-z]+)?", message)
        tags = ["CAPITAL" if word[0].isupper() else "O" for word in words]
        if len(words) >= MIN_WORDS and tags[0] == "CAPITAL" and "O" in tags and not message.isupper():
            yield {"tokens": [word.lower() for word in words], "tags": tags}


def _half(words: list[str], split: str) -> list[str]:
    middle = len(words) // 2
    return words[:middle] if split == "train" else words[middle:]


def _spans(messages: list[str], rng: random.Random, split: str) -> Iterator[Row]:
    """Rows of `context`, `question` and `answers` as in SQuAD: four facts in random order, each after a sentence."""
    for message in messages:
        sentences = re.split(r"(?<=[.!?])\s+", message)
        kinds, names = rng.sample(sorted(FACTS), 2), rng.sample(_half(NAMES, split), 2)
        facts = [(kind, name, thing) for kind in kinds
                 for name, thing in zip(names, rng.sample(_half(THINGS[kind], split), 2), strict=True)]  # fmt: skip
        asked = rng.choice(facts)
        rng.shuffle(facts)
        context, start = "", 0
        for number, (kind, name, thing) in enumerate(facts):
            context += f"{sentences[number]} " if number < len(sentences) else ""
            if (kind, name, thing) == asked:
                start = len(context) + FACTS[kind][0].format(name=name, thing="{").index("{")
            context += FACTS[kind][0].format(name=name, thing=thing) + " "
        kind, name, thing = asked
        yield {
            "question": FACTS[kind][1].format(name=name),
            "context": context.strip(),
            "answers": {"text": [thing], "answer_start": [start]},
        }
