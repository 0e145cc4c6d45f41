"""What all rows of a batch begin with is computed once.

Chats begin with the same system prompt: 24 of the starter's 46 prompt tokens. `forward_sharing_prefix` runs them as one
row, repeats the key-value cache for the others and goes on from there. Results and gradients are those of the plain
forward, up to rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

# Below this many saved tokens, the extra call costs more than it saves.
WORTH_IT = 64


class Computed(NamedTuple):
    """What `forward_sharing_prefix` returns. B rows; R of their L tokens were not shared."""

    output: Any  # of the model, for the last R positions of each row
    cache: Cache | None  # filled, if the prefix was shared or a cache was given
    attention_mask: torch.Tensor  # (B, S + R) of what is in the cache, S the shared tokens
    position_ids: torch.Tensor  # (B, R)


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, L) that don't count padding, so that a row means the same however it is padded."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def shared_length(input_ids: torch.Tensor, attention_mask: torch.Tensor, limits: torch.Tensor) -> int:
    """How many tokens all rows begin with.

    Args:
        input_ids, attention_mask: (B, L), left-padded.
        limits: (B,) most tokens of each row that may count.
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
    model: Callable[..., Any],
    config: PreTrainedConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    prompt_lengths: torch.Tensor,
    *,
    share: bool = True,
    cache: Cache | None = None,
    **settings: Any,
) -> Computed:
    """Run a model on left-padded rows, what they all begin with only once.

    Args:
        model: a language model or the trunk of one.
        input_ids, attention_mask: (B, L).
        prompt_lengths: (B,) tokens of each row that are prompt; of them the last is never shared, since its output is
            needed.
        share: False computes every row whole, as activation checkpointing needs it, which allows no cache.
        cache: an empty one to fill.
        settings: handed to the model.
    """
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
    # a row's prefix becomes padding, unless it is cut off
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
    """Whether all layers keep plain keys and values: no sliding window, no recurrent state."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
