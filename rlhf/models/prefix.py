"""A forward pass that computes the common prefix of a batch once.

Chats begin with the same system prompt: 24 of the starter's 46 prompt tokens. `forward_sharing_prefix` runs the prefix
as one row, repeats its key-value cache for the other rows and continues from there. Results and gradients are those of
the plain forward pass, up to rounding.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

# Below this number of saved tokens, the extra call costs more than it saves.
WORTH_IT = 64


class Rows(NamedTuple):
    """Prompts with their completions, padded on the left: B rows of L tokens."""

    input_ids: torch.Tensor  # (B, L) int64
    attention_mask: torch.Tensor  # (B, L) int64: 0 on padding
    lengths: torch.Tensor  # (B,) int64: completion tokens at the end of each row


def rows_of_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Rows:
    """Rows without completions, from left-padded prompts (B, L)."""
    return Rows(input_ids, attention_mask, torch.zeros_like(attention_mask[:, 0]))


class Computed(NamedTuple):
    """What `forward_sharing_prefix` returns. B rows; S tokens of the prefix were shared, R positions were not."""

    output: ModelOutput  # for the last R positions of each row
    cache: Cache | None  # filled if the prefix was shared or a cache was given
    attention_mask: torch.Tensor  # (B, S + R) of the tokens in the cache
    position_ids: torch.Tensor  # (B, R)


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, L) that don't count padding, so that padding changes nothing in a row."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def shared_length(input_ids: torch.Tensor, attention_mask: torch.Tensor, limits: torch.Tensor) -> int:
    """Number of tokens in the common prefix of all rows.

    Args:
        input_ids, attention_mask: (B, L), left-padded.
        limits: (B,) largest length of the prefix in each row.
    """
    starts = input_ids.shape[1] - attention_mask.sum(1)
    most = int(limits.min())
    if most < 1 or len(input_ids) < 2:
        return 0
    columns = starts[:, None] + torch.arange(most, device=input_ids.device)
    heads = input_ids.gather(1, columns)
    same = (heads == heads[:1]).all(0)
    return int(same.long().cumprod(0).sum())


def forward_sharing_prefix(
    model: nn.Module,
    config: PreTrainedConfig,
    rows: Rows,
    *,
    share: bool = True,
    cache: Cache | None = None,
    **settings: int,
) -> Computed:
    """Run a model on left-padded rows, and on their common prefix only once.

    Args:
        model: a language model or the trunk of one.
        rows: only prompts are shared, without their last token, whose output is needed.
        share: False computes every row in full. Activation checkpointing needs that, since it allows no cache.
        cache: an empty cache to fill.
        settings: passed to the model.
    """
    input_ids, attention_mask, lengths = rows
    prompt_lengths = attention_mask.sum(1) - lengths
    shared = shared_length(input_ids, attention_mask, prompt_lengths - 1) if share else 0
    empty = DynamicCache(config=config) if cache is None else cache
    if shared * (len(input_ids) - 1) < WORTH_IT or not _repeatable(empty):
        positions = positions_of(attention_mask)
        output = model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, past_key_values=cache,
            use_cache=cache is not None, **settings,
        )  # fmt: skip
        return Computed(output, cache, attention_mask, positions)
    cache = empty
    start = int(input_ids.shape[1] - attention_mask[0].sum())
    prefix = input_ids[:1, start : start + shared]
    model(
        input_ids=prefix, attention_mask=torch.ones_like(prefix), past_key_values=cache, use_cache=True,
        position_ids=torch.arange(shared, device=prefix.device)[None], **settings,
    )  # fmt: skip
    cache.batch_repeat_interleave(len(input_ids))
    width = int(attention_mask.sum(1).max()) - shared
    # the prefix of a row becomes padding where it is not cut off
    rest_mask = attention_mask * (attention_mask.long().cumsum(1) > shared)
    rest, rest_mask = input_ids[:, -width:], rest_mask[:, -width:]
    mask = torch.cat([torch.ones_like(rest_mask[:, :1]).expand(-1, shared), rest_mask], 1)
    positions = positions_of(mask)[:, shared:]
    output = model(
        input_ids=rest.masked_fill(rest_mask == 0, 0), attention_mask=mask, position_ids=positions,
        past_key_values=cache, use_cache=True, **settings,
    )  # fmt: skip
    return Computed(output, cache, mask, positions)


def _repeatable(cache: Cache) -> bool:
    """Whether all layers cache plain keys and values: no sliding window, no recurrent state."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
