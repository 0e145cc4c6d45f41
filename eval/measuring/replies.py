"""Replies of a model to held-out prompts, and log-probabilities of replies under a model."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.models.generation import left_pad
from rlhf.models.loading import load_causal_lm
from rlhf.models.prefix import Rows, forward_sharing_prefix
from rlhf.models.sources import Source
from rlhf.models.tokenizers import load_tokenizer


class Replies(NamedTuple):
    """Replies to N prompts."""

    ids: list[list[int]]  # token ids, ending with the stop token where one was drawn
    texts: list[str]


class LogProbs(NamedTuple):
    """Log-probability of each of N replies under a model, and their numbers of tokens."""

    sums: list[float]
    tokens: list[int]


@contextmanager
def loaded_model(source: Source, model_args: ModelConfig) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """A model and its tokenizer, freed afterwards."""
    tokenizer = load_tokenizer(source)
    model = load_causal_lm(source, model_args, tokenizer, trainable=False).eval()
    try:
        yield model, tokenizer
    finally:
        del model
        gc.collect()


@torch.no_grad()
def reply_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    replies: list[list[int]],
    batch_size: int = 32,
    description: str = "Log-probabilities",
) -> LogProbs:
    """Log-probability of each reply given its prompt, at temperature 1, summed over its tokens, in nats."""
    sums = [0.0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]) + len(replies[number]))
    for start in tqdm(range(0, len(order), batch_size), desc=description, unit="batch"):
        numbers = order[start : start + batch_size]
        batch = left_pad(tokenizer, [prompts[number] + replies[number] for number in numbers]).to(model.device)
        longest = max(len(replies[number]) for number in numbers)
        lengths = torch.tensor([len(replies[number]) for number in numbers], device=model.device)
        rows = Rows(batch["input_ids"], batch["attention_mask"], lengths)
        config = model.config.get_text_config()
        run = forward_sharing_prefix(model, config, rows, logits_to_keep=longest + 1)
        logits = run.output.logits[:, -longest - 1 : -1]
        targets = batch["input_ids"][:, -longest:]
        logprobs = -torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        for row, number in enumerate(numbers):
            length = len(replies[number])
            sums[number] = float(logprobs[row, longest - length :].sum()) if length else 0.0
    return LogProbs(sums, [len(reply) for reply in replies])
