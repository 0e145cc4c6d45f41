"""Bits per byte of text: of language models, of xz, of n-grams.

A model that gives a text the probability p can store it in -log2(p) bits. So prediction is compression, and tokenizers
don't matter. Every byte counts, including the first token of a text and its end.
"""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.metrics import metric
from eval.stats.intervals import Interval, interval
from eval.stats.ngrams import KneserNey
from rlhf.pretraining.tokenization import boundary, encode_texts, tokens_and_bytes

T = TypeVar("T")


def bytes_per_token(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Interval:
    """UTF-8 bytes per token over all texts together, with its interval over texts."""
    tokens, sizes = tokens_and_bytes(tokenizer, texts)
    return interval([float(size) for size in sizes], [float(count) for count in tokens])


@torch.no_grad()
def text_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, batch_size: int = 16
) -> list[float]:
    """Log-probability of each whole text and of its end, in nats, under a causal model.

    The end-of-text token stands before every text, so that its first token is predicted too. A text longer than
    `max_length` tokens is read in windows that overlap by half: all tokens but those of the first window have at least
    half a window of context.
    """
    mark, stride = boundary(tokenizer), max(1, max_length // 2)
    windows = []  # (number of the text, ids, how many of them at the beginning are context only)
    for number, ids in enumerate(encode_texts(tokenizer, texts)):
        whole = [mark, *ids, mark]
        start, context = 0, 1
        while True:
            windows.append((number, whole[start : start + max_length], context))
            if start + max_length >= len(whole):
                break
            start, context = start + stride, max_length - stride
    windows.sort(key=lambda window: len(window[1]))
    sums = [0.0] * len(texts)
    model.eval()
    device = next(model.parameters()).device
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        longest = max(len(ids) for _, ids, _ in batch)
        padded = torch.tensor([ids + [mark] * (longest - len(ids)) for _, ids, _ in batch], device=device)
        seen = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for _, ids, _ in batch], device=device)
        logits = model(input_ids=padded, attention_mask=seen, use_cache=False).logits[:, :-1]
        following = padded[:, 1:]
        losses = cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="none").view_as(following)
        for (number, ids, context), row in zip(batch, losses, strict=True):
            sums[number] -= row[context - 1 : len(ids) - 1].cpu().double().sum().item()
    return sums


def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, batch_size: int = 16
) -> Interval:
    """The metric bits_per_byte of a causal model on whole texts; see `text_logprobs`."""
    logprobs = text_logprobs(model, tokenizer, texts, max_length, batch_size)
    return metric("bits_per_byte", predictions=logprobs, references=[float(len(text.encode())) for text in texts])


def xz_bits(texts: list[str], before: list[str], groups: int) -> list[float]:
    """The growth in bits of the output of `xz -9` with each group of texts; a byte of end mark follows each text.

    Args:
        before: texts that are compressed before them and not counted.
    """
    parts = ["".join(text + "\0" for text in group) for group in (before, *in_groups(texts, groups)) if group]
    child = subprocess.run(
        [sys.executable, "-I", Path(__file__).with_name("xz.py")],
        input=json.dumps(parts),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    sizes = json.loads(child.stdout)
    return [8.0 * (after - earlier) for earlier, after in itertools.pairwise(sizes if before else [0, *sizes])]


def in_groups(values: list[T], groups: int) -> list[list[T]]:
    """A list cut into at most `groups` pieces; the first ones may be longer by one.

    >>> in_groups([1, 2, 3, 4, 5], 3)
    [[1, 2], [3, 4], [5]]
    """
    size, more = divmod(len(values), min(groups, len(values)))
    ends = [size * number + min(number, more) for number in range(min(groups, len(values)) + 1)]
    return [values[start:end] for start, end in itertools.pairwise(ends)]


def ngram_bits(
    tokenizer: PreTrainedTokenizerBase, train: list[str], texts: list[str], order: int
) -> tuple[list[float], int]:
    """Bits of each text and its end under an n-gram model of the training texts; and its number of n-grams."""
    mark = boundary(tokenizer)
    model = KneserNey(order, len(tokenizer)).fit(([*ids, mark] for ids in encode_texts(tokenizer, train)), mark)
    bits = [-model.logprobs([*ids, mark], mark).sum() / math.log(2) for ids in encode_texts(tokenizer, texts)]
    return [float(value) for value in bits], len(model.orders[-1].grams)
