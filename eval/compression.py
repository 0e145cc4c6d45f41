"""Compression: how many bits a language model needs per byte of held-out text."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.intervals import interval
from eval.metrics import metric
from rlhf.data import control_ids
from rlhf.tokenization import END, encode_texts, tokens_and_bytes


def bytes_per_token(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Any]:
    """UTF-8 bytes per token over all texts together, with its interval over texts; a result of `interval`."""
    tokens, sizes = tokens_and_bytes(tokenizer, texts)
    return interval([float(size) for size in sizes], [float(count) for count in tokens])


def boundary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that stands between texts in pretraining."""
    number = tokenizer.convert_tokens_to_ids(END)
    return number if number in control_ids(tokenizer) else tokenizer.eos_token_id


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
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), padded[:, 1:], reduction="none")
        for (number, ids, context), row in zip(batch, losses, strict=True):
            sums[number] -= row[context - 1 : len(ids) - 1].double().sum().item()
    return sums


def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, batch_size: int = 16
) -> dict[str, Any]:
    """Result of the metric bits_per_byte for a causal model on whole texts; see `text_logprobs`."""
    logprobs = text_logprobs(model, tokenizer, texts, max_length, batch_size)
    return metric("bits_per_byte", predictions=logprobs, references=[float(len(text.encode())) for text in texts])
