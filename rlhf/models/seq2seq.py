"""Encoder-decoder models (T5, BART, ...): the prompt goes through the encoder, the completion through the decoder.

Everywhere else a row is a prompt with its completion behind it (`Rows` of prefix.py). Here such rows become the inputs
of an encoder-decoder model. Both parts are padded on the right, because learned positions count from the left.
"""

import copy
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationConfig, PreTrainedModel

from rlhf.errors import InputError
from rlhf.models.prefix import Rows


class DecoderOutputs(NamedTuple):
    """What the decoder computes before each completion token. B rows, T of the longest completion, N tokens in all."""

    logits: torch.Tensor  # (N, V), row by row
    hidden: torch.Tensor  # (B, T, d), the last layer's


def decoder_prefix(model: PreTrainedModel | PeftModel) -> list[int]:
    """Tokens that the decoder begins with, in front of every completion.

    They are the start token and, if generation_config forces a first token (BART's bos, the target language of NLLB and
    mBART-50), that token.

    Raises:
        InputError: if neither generation_config nor config names a start token.
    """
    config = model.generation_config
    named = (config.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None), config.bos_token_id)
    start = next((token for token in named if token is not None), None)
    if start is None:
        raise InputError(
            f"{model.name_or_path}: its decoder has no token to start from. Set decoder_start_token_id in config.json "
            "and generation_config.json (T5: the pad token's id)."
        )
    starts = start if isinstance(start, list) else [start]
    forced = config.forced_bos_token_id
    return [*starts, *([] if forced is None or forced == starts[-1] else [forced])]


def seq2seq_inputs(rows: Rows, prefix: list[int], pad: int) -> dict[str, torch.Tensor]:
    """Inputs of an encoder-decoder model for prompts with completions; the decoder gets all but the last token.

    Args:
        prefix: see `decoder_prefix`.
        pad: the pad token's id, from which some models read their positions.
    """
    ids, lengths = rows.input_ids, rows.lengths
    prompt_lengths = rows.attention_mask.sum(1) - lengths
    width, length = int(prompt_lengths.max()), int(lengths.max())
    mask = torch.arange(width, device=ids.device) < prompt_lengths[:, None]
    columns = torch.arange(max(0, length - 1), device=ids.device)
    seen = ids.gather(1, (prompt_lengths[:, None] + columns).clamp(max=ids.shape[1] - 1))
    starts = torch.tensor(prefix, device=ids.device).expand(len(ids), -1)
    return {
        "input_ids": ids[:, :width].masked_fill(~mask, pad),
        "attention_mask": mask.long(),
        "decoder_input_ids": torch.cat([starts, seen.masked_fill(columns >= lengths[:, None], pad)], 1),
    }


def decoder_outputs(model: Any, rows: Rows) -> DecoderOutputs:
    """Logits and hidden states before each completion token.

    Args:
        model: an encoder-decoder model, a PeftModel of one, or either in DDP's wrapper.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    inputs = seq2seq_inputs(rows, decoder_prefix(bare), bare.config.pad_token_id or 0)
    output = model(**inputs, use_cache=False, output_hidden_states=True)
    length = int(rows.lengths.max())
    exists = torch.arange(length, device=rows.lengths.device) < rows.lengths[:, None]
    first = output.logits.shape[1] - length
    return DecoderOutputs(output.logits[:, first:][exists], output.decoder_hidden_states[-1][:, first:])


def generation_inputs(
    model: PreTrainedModel | PeftModel, batch: dict[str, torch.Tensor], config: GenerationConfig
) -> tuple[dict[str, torch.Tensor], GenerationConfig]:
    """What `generate` takes, from left-padded prompts: the prompts padded on the right, and the decoder's beginning."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    prefix = decoder_prefix(model)
    nothing = torch.zeros_like(mask[:, 0])
    columns = torch.arange(mask.shape[1], device=mask.device) + (mask == 0).sum(1, keepdim=True)
    rows = Rows(ids.gather(1, columns.clamp(max=mask.shape[1] - 1)), mask, nothing)
    config = copy.deepcopy(config)
    config.decoder_start_token_id = prefix[0]
    return seq2seq_inputs(rows, prefix, model.config.pad_token_id or 0), config
