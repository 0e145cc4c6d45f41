"""Loss by position in the context: how much a model gains from what it has read so far.

A Transformer keeps gaining where an LSTM of equal size has forgotten: Kaplan et al. 2020, figure 7
(https://arxiv.org/abs/2001.08361).
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from eval.stats.intervals import JsonObject, interval
from rlhf.pretraining.config import PretrainingConfig
from rlhf.pretraining.rows import packed_rows


def packed_blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> torch.Tensor:
    """(blocks, block_size) int64: texts as recipes/pretrain.py packs them."""
    args = PretrainingConfig(output_dir="unused", block_size=block_size, report_to="none", use_cpu=True)
    return torch.tensor(packed_rows(texts, tokenizer, args, "test")["input_ids"][:])


@torch.no_grad()
def position_losses(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 32) -> np.ndarray:
    """Loss of each token given those before it in its block.

    Args:
        blocks: (blocks, length) int64, packed text.

    Returns:
        (blocks, length - 1) float64, nats; column c is the token with c + 1 tokens of context.
    """
    model.eval()
    losses = []
    for part in blocks.split(batch_size):
        logits = model(input_ids=part).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    return torch.cat(losses).double().numpy()


def position_bins(length: int) -> list[tuple[int, int]]:
    """Ranges [first, last] of the number of context tokens, each twice as wide as the one before, up to `length`.

    A last range that would be too short is added to the one before it.

    >>> position_bins(9)
    [(1, 1), (2, 3), (4, 9)]
    """
    firsts = [1]
    while 2 * firsts[-1] + firsts[-1] // 2 <= length:
        firsts.append(2 * firsts[-1])
    return list(zip(firsts, [*(first - 1 for first in firsts[1:]), length], strict=True))


def compare_positions(folders: dict[str, Path], blocks: torch.Tensor, seed: int = 0) -> JsonObject:
    """Loss by position of several models on the same text, with 95% bootstrap intervals over blocks.

    Args:
        folders: of the models, by name; the others are compared with the first.
        blocks: (blocks, length) int64, packed held-out text.

    Returns:
        `bins`, a list with `first` and `last` (tokens of context) and the cells {mean, low, high} of each model's loss,
        nats per token; for the others `<name>_minus_<first>`, paired by block.
    """
    losses = {
        name: position_losses(
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True), blocks
        )
        for name, folder in folders.items()
    }
    base = next(iter(losses))
    bins = []
    for first, last in position_bins(blocks.shape[1] - 1):
        cells = {name: interval(of.T[first - 1 : last].mean(0).tolist(), seed=seed) for name, of in losses.items()}
        entry: JsonObject = {"first": first, "last": last}
        for name, cell in cells.items():
            entry[name] = dataclasses.replace(cell, n=None).to_json()
            if name != base:
                entry[f"{name}_minus_{base}"] = cell.minus(cells[base], seed).to_json()
        bins.append(entry)
    return {"models": list(folders), "blocks": len(blocks), "bins": bins}
