"""Padding that leaves the score of a row alone, for classifiers that pool in a way of their own.

Not every encoder masks padding out. XLNet reads its score at the last token, CANINE and Funnel pool neighbouring
tokens, and FNet mixes all. Which layout of a batch gives each row the score that it has alone is tried once. Training
and scoring then read rows in this layout. Funnel alone reads no row of fewer than five tokens, CANINE none of fewer
than four: these are padded to five.
"""

import functools
import inspect
from collections.abc import Callable
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf.models.checks import agreed
from rlhf.models.prefix import CANNOT, reraise_out_of_memory, same

TRIED = (1, 2, 3, 5, 8, 13, 21)  # tokens of the rows that are tried
SHORTEST = 5  # Funnel pools four tokens beside the first one


class Layout(Enum):
    """How a batch of rows is read."""

    RIGHT = "padded on the right"
    LEFT = "padded on the left"
    BY_LENGTH = "rows of equal length together, without padding"
    AT_LEAST = "by length, and shorter rows padded on the right to SHORTEST"


_LAYOUTS: WeakKeyDictionary[PreTrainedModel, Layout] = WeakKeyDictionary()


def reads_the_last_token(model: PreTrainedModel) -> bool:
    """Whether a classifier reads its score at the last token, as decoders do. An encoder pools in its own way."""
    score = getattr(model, "score", None)
    return isinstance(getattr(score, "original_module", score), nn.Linear)  # PEFT's wrapper has one


def pad_neutrally(model: PreTrainedModel) -> Layout:
    """Let a classifier read rows in the first layout that gives a row in a batch its score alone. Tried once."""
    if model not in _LAYOUTS:
        forward, training = model.forward, model.training
        model.eval()
        for layout in Layout:
            if layout is not Layout.RIGHT:
                model.forward = functools.wraps(forward)(functools.partial(_read, model, forward, layout))
            if agreed(_is_neutral(model)):
                break
        else:
            model.forward, layout = forward, Layout.RIGHT
        model.train(training)
        _LAYOUTS[model] = layout
    return _LAYOUTS[model]


@torch.no_grad()
def _is_neutral(model: PreTrainedModel) -> bool:
    """Whether rows of different lengths have the scores together that they have alone."""
    config = model.config.get_text_config()
    fill, end = _fill(model), getattr(config, "eos_token_id", None)
    size = getattr(config, "vocab_size", 256)  # CANINE has none: it reads any code point
    every = [number for number in range(min(size, 64)) if number not in (fill, end)]
    rows = [(every[length:] + every)[:length] for length in TRIED]
    if isinstance(end, int):  # BART reads its score there
        rows = [[*row[1:], end] for row in rows]
    width = max(TRIED)
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    try:
        together = model(input_ids=ids, attention_mask=mask).logits
        alone = [model(input_ids=ids[row : row + 1, :length], attention_mask=mask[row : row + 1, :length]).logits[0]
                 for row, length in enumerate(TRIED)]  # fmt: skip
    except CANNOT as error:
        reraise_out_of_memory(error)
        return False
    return same(together.T, torch.stack(alone).T)


def _fill(model: PreTrainedModel) -> int:
    """The id that stands for padding."""
    return getattr(model.config.get_text_config(), "pad_token_id", None) or 0


def _is_spread(model: PreTrainedModel) -> bool:
    """Whether no process has all weights: under FSDP2 or ZeRO-3."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def _read(
    model: PreTrainedModel,
    forward: Callable[..., Any],
    layout: Layout,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    **settings: Any,
) -> Any:
    """The classifier's output for rows (B, L) padded on the right. Arguments that it has not are dropped."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    lengths = mask.sum(1)
    columns = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": token_type_ids}
    taken = inspect.signature(forward).parameters
    columns = {name: rows for name, rows in columns.items() if name in taken and rows is not None}
    settings = {name: value for name, value in settings.items() if name in taken}
    if layout is Layout.LEFT:
        width = input_ids.shape[1]
        source = (torch.arange(width, device=lengths.device) - (width - lengths)[:, None]) % width
        return forward(**{name: rows.gather(1, source) for name, rows in columns.items()}, **settings)
    fill = {"input_ids": _fill(model)}
    logits: dict[int, torch.Tensor] = {}
    if _is_spread(model):  # processes have to make the same passes: one for each row
        groups = list(torch.arange(len(lengths), device=lengths.device).split(1))
    else:
        groups = [(lengths == length).nonzero().squeeze(1) for length in lengths.unique()]
    for group in groups:
        length = int(lengths[group[0]])
        own = {name: rows[group, :length] for name, rows in columns.items()}
        if layout is Layout.AT_LEAST and length < SHORTEST:
            own = {name: pad(rows, (0, SHORTEST - length), value=fill.get(name, 0)) for name, rows in own.items()}
        found = forward(**own, **settings).logits
        logits |= zip(group.tolist(), found, strict=True)
    return SequenceClassifierOutput(logits=torch.stack([logits[row] for row in range(len(lengths))]))
