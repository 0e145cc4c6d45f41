"""What the pieces of the GPU check share: their command line, a clock that waits for the GPU, a model with random
weights."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"


def answer(measure: Callable[[bool, Callable[[dict[str, Any]], None]], None]) -> None:
    """Run `measure(tiny, keep)`; `keep` adds numbers to the output file, also those of a piece that fails later."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output_file", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}

    def keep(numbers: dict[str, Any]) -> None:
        found.update(numbers)
        arguments.output_file.write_text(json.dumps(found))

    measure(arguments.tiny, keep)


def peak_gib() -> float:
    """The most memory that tensors have taken on the GPU; 0 on a CPU."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if DEVICE == "cuda" else 0.0


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `words` words, three of which are special."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, words)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT,
        padding_side="left",
    )  # fmt: skip


def save_random(config: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> str:
    """Save a model with random weights and a tokenizer; returns the folder."""
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)
    return str(folder)
