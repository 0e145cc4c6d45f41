"""A forward pass that computes the common prefix of a batch once.

Chats begin with the same system prompt: 24 of the starter's 46 prompt tokens. The prefix runs as one row, its keys and
values are repeated for the other rows, and the rest continues from there. Results and gradients are those of the plain
forward pass, up to rounding. Models whose cache holds more than plain keys and values get the plain forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

# Below this number of saved tokens, the extra call costs more than it saves.
WORTH_IT = 64
# what a model can't do shows as one of these
CANNOT = (
    AssertionError,
    AttributeError,
    TypeError,
    ValueError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
)


class Rows(NamedTuple):
    """Prompts with their completions, padded on the right: B rows of L tokens.

    Nothing reaches a token from behind, so padding on the right changes no result of a causal model, whatever it makes
    of positions, masks, windows or recurrent states.
    """

    input_ids: torch.Tensor  # (B, L) int64
    attention_mask: torch.Tensor  # (B, L) int64: 0 on padding
    lengths: torch.Tensor  # (B,) int64: completion tokens at the end of each row


def rows_of(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, L) of token ids, padded on the right with 0."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(width, device=device) < lengths[:, None]).long()


def without_gaps(input_ids: torch.Tensor, attention_mask: torch.Tensor, lengths: torch.Tensor) -> Rows:
    """Rows of tokens (B, L) with any padding, also between prompt and completion, without a gap."""
    mask = attention_mask.bool()
    totals = mask.sum(1)
    width = int(totals.max())
    packed = torch.zeros(len(mask), width, dtype=torch.long, device=mask.device)
    kept = torch.arange(width, device=mask.device) < totals[:, None]
    # 0 stands for padding: a pad token may lie outside of the embeddings, and no masked token matters
    packed[kept] = input_ids[mask]
    return Rows(packed, kept.long(), lengths)


class Computed(NamedTuple):
    """What `forward_sharing_prefix` returns."""

    output: ModelOutput  # for the positions of each row from `start` on
    start: int

    def at(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The entries (B, T, ...) of the output's `states` at positions (B, T) of the rows."""
        return take(states, positions - self.start)


def take(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The entries (B, T, d) of states (B, L, d) at columns (B, T)."""
    return states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, L) that don't count padding."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def shared_length(input_ids: torch.Tensor, starts: torch.Tensor, limits: torch.Tensor) -> int:
    """Number of tokens in the common prefix of all rows.

    Args:
        input_ids: (B, L).
        starts: (B,) where the rows begin.
        limits: (B,) largest length of the prefix in each row.
    """
    most = int(limits.min())
    if most < 1 or len(input_ids) < 2:
        return 0
    heads = input_ids.gather(1, starts[:, None] + torch.arange(most, device=input_ids.device))
    same = (heads == heads[:1]).all(0)
    return int(same.long().cumprod(0).sum())


def forward_sharing_prefix(
    model: nn.Module, config: PreTrainedConfig, rows: Rows, *, share: bool = True, body: nn.Module | None = None
) -> Computed:
    """Run a model on rows padded on the right, and on their common prefix only once.

    Args:
        model: a causal language model or the trunk of one.
        rows: only prompts are shared, without their last token, whose output is needed.
        share: False computes every row in full. Activation checkpointing needs that, since it allows no cache.
        body: its trunk, on which sharing is tried, if `model` has hooks that expect these rows.
    """
    input_ids, attention_mask, lengths = rows
    limits = attention_mask.sum(1) - lengths - 1
    shared = shared_length(input_ids, torch.zeros_like(limits), limits) if share else 0
    if shared * (len(input_ids) - 1) < WORTH_IT or not can_continue(body or model, config, input_ids[0, :shared]):
        return Computed(model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False), 0)
    return Computed(forward_behind_prefix(model, config, input_ids, attention_mask, shared), shared)


def forward_behind_prefix(
    model: nn.Module, config: PreTrainedConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor, shared: int
) -> ModelOutput:
    """The output behind the first `shared` tokens, which all rows (B, L) share."""
    cache = DynamicCache(config=config)
    prefix = input_ids[:1, :shared]
    model(input_ids=prefix, attention_mask=torch.ones_like(prefix), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(input_ids))
    return model(input_ids=input_ids[:, shared:], attention_mask=attention_mask, past_key_values=cache, use_cache=True)


def prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    past_key_values: DynamicCache,
    position_ids: torch.Tensor | None = None,
    **settings: Any,
) -> ModelOutput:
    """Fill an empty cache with rows padded on the left, and with their common prefix only once.

    The columns that hold nothing but padding and prefix are copied from the prefix's keys and values; the other columns
    run as in the plain forward pass. So the cache is laid out as the plain forward pass would lay it out.

    Args:
        input_ids, attention_mask, position_ids: (B, P).
        settings: passed to the model.

    Returns:
        the output for the last columns, one at least.
    """
    starts = (attention_mask == 0).sum(1)
    shared = shared_length(input_ids, starts, input_ids.shape[1] - starts - 1)
    settings |= {"past_key_values": past_key_values, "use_cache": True}
    start = int(starts[0])
    pays = shared * (len(input_ids) - 1) >= WORTH_IT
    if pays and can_prefill(model, input_ids[0, start : start + shared], position_ids is not None):
        return _prefilled(model, input_ids, attention_mask, shared, position_ids, settings)
    placed = {} if position_ids is None else {"position_ids": position_ids}
    return model(input_ids=input_ids, attention_mask=attention_mask, **placed, **settings)


def _prefilled(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    shared: int,
    position_ids: torch.Tensor | None,
    settings: dict[str, Any],
) -> ModelOutput:
    """The output for the columns (B, P) behind those that hold nothing but padding and `shared` tokens."""
    starts = (attention_mask == 0).sum(1)
    start = int(starts[0])
    prefix = input_ids[:1, start : start + shared]
    model(input_ids=prefix, attention_mask=torch.ones_like(prefix), **settings)
    columns = int(starts.min()) + shared
    source = (torch.arange(columns, device=starts.device) - starts[:, None]).clamp(min=0)
    for layer in settings["past_key_values"].layers:
        if layer.is_initialized:
            layer.keys = layer.keys[0][:, source].transpose(0, 1).contiguous()
            layer.values = layer.values[0][:, source].transpose(0, 1).contiguous()
    placed = {} if position_ids is None else {"position_ids": position_ids[:, columns:]}
    return model(input_ids=input_ids[:, columns:], attention_mask=attention_mask, **placed, **settings)


@contextmanager
def before_head(model: Any, choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside the block the language model's head gets `choose(hidden states (B, L, d))`.

    A head that takes something else (ProphetNet's, several predictions at once) gets it unchanged.
    """

    def hook(_head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return (choose(inputs[0]),) if inputs[0].ndim == 3 else None

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def logits_at(
    model: Any, columns: torch.Tensor, run: Callable[..., ModelOutput] | None = None, **inputs: Any
) -> ModelOutput:
    """The model's output with logits (B, T, V) at columns (B, T) alone: no other goes through the head.

    Args:
        run: the model, perhaps wrapped by DDP; default: `model`, which has the head.
        inputs: of the model.
    """
    chosen = []

    def choose(hidden: torch.Tensor) -> torch.Tensor:
        chosen.append(True)
        return take(hidden, columns)

    with before_head(model, choose):
        output = (run or model)(**inputs)
    if not chosen:
        output.logits = take(output.logits, columns)
    return output


_CONTINUES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def can_continue(model: nn.Module, config: PreTrainedConfig, tokens: torch.Tensor) -> bool:
    """Whether rows that go on from the repeated cache of a prefix give the plain forward's outputs.

    All layers must cache plain keys and values: no sliding window, no recurrent state. Whether the model then continues
    rightly is tried once, on `tokens`.
    """
    if model not in _CONTINUES:
        ids = tokens.repeat(12)[:12].repeat(2, 1)
        ids[1, -3:] = ids[0, :3]
        mask = torch.ones_like(ids)
        mask[1, -1:] = 0
        try:
            _CONTINUES[model] = _plain(config) and _goes_on_rightly(model, config, ids, mask)
        except CANNOT as error:  # for BLT, transformers can't even make the cache
            reraise_out_of_memory(error)
            _CONTINUES[model] = False
    return _CONTINUES[model]


def _plain(config: PreTrainedConfig) -> bool:
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def _goes_on_rightly(
    model: nn.Module, config: PreTrainedConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> bool:
    """Whether the outputs for the last three tokens are those of the plain forward pass."""
    plain = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
    found = forward_behind_prefix(model, config, input_ids, attention_mask, input_ids.shape[1] - 3)[0]
    kept = attention_mask[:, -3:].bool()
    return same(found[kept], plain[:, -3:][kept])


_PREFILLS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def can_prefill(model: PreTrainedModel, tokens: torch.Tensor, placed: bool) -> bool:
    """Whether a prefix's keys and values serve rows with different padding in front of them.

    That needs positions that don't count padding: MOSS and RoFormer take no `position_ids` and give every column its
    own rotation, so a row whose padding ends within the copied columns would have a gap. Tried once, on `tokens`.

    Args:
        placed: whether the model is given position ids.
    """
    config = model.config.get_text_config(decoder=True)
    if not can_continue(model, config, tokens):
        return False
    if model not in _PREFILLS:
        prefix = tokens.repeat(8)[:8]
        ids = torch.stack([torch.cat([prefix, prefix[:4]]), torch.cat([prefix[:3], prefix, prefix[3:4]])])
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        positions = positions_of(mask) if placed else None
        try:
            settings = {"past_key_values": DynamicCache(config=config), "use_cache": True}
            found = _prefilled(model, ids, mask, len(prefix), positions, settings)[0][:, -1]
            plain = [model(input_ids=row[kept.bool()][None], use_cache=False)[0][0, -1]
                     for row, kept in zip(ids, mask, strict=True)]  # fmt: skip
            _PREFILLS[model] = same(found, torch.stack(plain))
        except CANNOT as error:
            reraise_out_of_memory(error)
            _PREFILLS[model] = False
    return _PREFILLS[model]


def same(found: torch.Tensor, expected: torch.Tensor, half_tolerance: float = 0.1) -> bool:
    """Whether two ways to compute the outputs (N, d) of N tokens differ by no more than rounding.

    In float32 every number counts. In half precision it is the middle token's mean error, compared with the spread of
    its outputs, as rounding may send single tokens to other experts.
    """
    half = torch.is_autocast_enabled(found.device.type) or torch.finfo(expected.dtype).eps > 1e-6
    found, expected = found.float(), expected.float()
    spread = expected.std(-1).clamp(min=1e-6)
    if half:
        return bool(((found - expected).abs().mean(-1) / spread).median() < half_tolerance)
    return bool(((found - expected).abs().amax(-1) / spread).max() < 1e-3)


def reraise_out_of_memory(error: BaseException) -> None:
    """A lack of memory says nothing about what a model can do."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
