"""The SFT loss of TRL 1.15 and later, which never has all logits at once."""

from collections.abc import Iterator
from typing import Any

import torch
from trl.trainer import utils

from rlhf.planning.models import Model

TOKENS, WORDS = 4096, 32768  # of a tile of the logits: all that exists of them at a time


def fused_loss(model: Model, inputs: dict[str, torch.Tensor], learned: int, on_cpu: bool) -> torch.Tensor:
    """The loss of a batch as TRL's fused head computes it.

    On a CPU this is TRL's own function. On a GPU its kernels can't be traced, so `FusedHead` stands for them.

    Args:
        inputs: `input_ids` and `attention_mask` (B, T) int64.
        learned: tokens of the batch that have a label.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    if on_cpu:
        if "forward" not in vars(base):
            utils.add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer has it
        return model(**inputs, labels=inputs["input_ids"], fused_lm_head=True).loss
    hidden = base.base_model(**inputs, use_cache=False)[0][:, :-1].flatten(0, 1)[:learned].clone()
    return FusedHead.apply(hidden, base.get_output_embeddings().weight).sum()


class FusedHead(torch.autograd.Function):
    """Memory and operations of TRL's fused head on a GPU; its values are not computed.

    The logits are computed a tile at a time, and again in the backward pass, which sums gradients in float32.
    https://github.com/huggingface/trl/blob/v1.16.0/trl/kernels/chunked_logprob.py
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        for _ in _tiles(hidden, weight, ctx.dtype):
            pass
        return torch.zeros(len(hidden))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        to_hidden, to_weight = (torch.zeros(part.shape) if asked else None for part, asked in needed)
        for tile, tokens, words in _tiles(hidden, weight, ctx.dtype):
            if to_hidden is not None:
                to_hidden[tokens] += tile @ weight[words].to(ctx.dtype)
            if to_weight is not None:
                to_weight[words] += tile.t() @ hidden[tokens].to(ctx.dtype)
        found = zip((to_hidden, to_weight), (hidden, weight), strict=True)
        return tuple(None if grad is None else grad.to(part.dtype) for grad, part in found)


def _tiles(
    hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, slice, slice]]:
    """Tiles of the logits, with their tokens and words, in one buffer."""
    buffer = torch.empty(min(len(hidden), TOKENS), WORDS, dtype=dtype)
    for first in range(0, len(hidden), TOKENS):
        rows = hidden[first : first + TOKENS].to(dtype)
        for word in range(0, len(weight), WORDS):
            words = weight[word : word + WORDS].to(dtype)
            tile = buffer[: len(rows), : len(words)]
            torch.mm(rows, words.t(), out=tile)
            yield tile, slice(first, first + TOKENS), slice(word, word + WORDS)
