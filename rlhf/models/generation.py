"""Sampling replies. `sample` is a decoding loop for `model.generate(custom_generate=sample)`.

Unlike transformers' own loop, it draws one uniform number per row and inverts the cumulative distribution
(torch.multinomial draws one exponential per vocabulary entry), keeps the log-probability of the drawn token instead of
all scores, and drops finished rows from the cache. Logits processors, stopping criteria and the generation config have
the same effect as in `generate`.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import BatchEncoding, GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

from rlhf.errors import InputError
from rlhf.models.lstm import LSTMConfig
from rlhf.models.precision import exact
from rlhf.models.prefix import forward_sharing_prefix, rows_of_prompts


class Samples(NamedTuple):
    """Sampled completions. B rows, P prompt tokens (left-padded), T completion tokens (right-padded)."""

    sequences: torch.Tensor  # (B, P + T) int64
    logprobs: torch.Tensor  # (B, T) float32: log-probability each completion token was drawn with; 0 on padding
    lengths: torch.Tensor  # (B,) int64: completion tokens, the stop token included
    ended: torch.Tensor  # (B,) bool: a stop token or stop string was drawn; False at the length limit


def draw_tokens(
    logits: torch.Tensor, do_sample: bool = True, uniform: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverse-CDF sampling, or take the most likely one.

    Args:
        logits: (B, V) float32, after all processing.
        uniform: (B,) numbers in [0, 1) to draw with; default: torch's generator.

    Returns:
        tokens (B,) int64 and their log-probabilities (B,) float32.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    if do_sample:
        # in float32 the rounding of a long sum, not the logits, would decide between neighbours
        cumulative = exact(logprobs.exp()).cumsum(-1)
        uniform = torch.rand(logits.shape[0], device=logits.device) if uniform is None else uniform
        # scaled by the last entry, which rounding leaves slightly off 1: the draw must not lie beyond it
        points = exact(uniform)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, points, right=True).clamp_(max=logits.shape[-1] - 1)
    else:
        tokens = logprobs.argmax(-1, keepdim=True)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def sample(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    uniforms: torch.Tensor | None = None,
    **model_kwargs,
) -> Samples:
    """Decoding loop for `generate(custom_generate=sample)`.

    Args:
        input_ids: (B, P) int64, left-padded.
        uniforms: (B, T) numbers in [0, 1) to draw with, so that a row's tokens don't depend on the other rows; default:
            torch's generator.
        model_kwargs: `attention_mask` (B, P), 0 on padding or None, and the other arguments that `generate` passes to a
            decoding loop.
    """
    rows, room = len(input_ids), generation_config.max_length - input_ids.shape[1]
    completions = torch.full((rows, room), generation_config.pad_token_id, device=input_ids.device)
    logprobs = torch.zeros(rows, room, device=input_ids.device)
    active = torch.arange(rows, device=input_ids.device)  # which row of the batch each row of the cache belongs to
    going = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
    lengths = torch.full((rows,), room, device=input_ids.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
    stops = StoppingCriteriaList(rule for rule in stopping_criteria if not isinstance(rule, MaxLengthCriteria))
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask  # generate drops a mask that hides nothing
    sequences, cache = input_ids, model_kwargs.get("past_key_values")
    output, _, mask, positions = forward_sharing_prefix(
        model, model.config.get_text_config(), rows_of_prompts(input_ids, mask), cache=cache, logits_to_keep=1
    )
    cache = output.past_key_values
    step = 0
    while True:
        logits = logits_processor(sequences, output.logits[:, -1].float())
        uniform = None if uniforms is None else uniforms[active, step]
        tokens, logprob = draw_tokens(logits, generation_config.do_sample, uniform)
        completions[active[going], step], logprobs[active[going], step] = tokens[going], logprob[going]
        sequences = torch.cat([sequences, tokens[:, None]], 1)
        step += 1
        stopped = going & stops(sequences, None)
        ended[active[stopped]], lengths[active[stopped]] = True, step
        going = going & ~stopped
        if step == room or not going.any():
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
        # drop finished rows once half are finished: the CPU's kernels need a set-up for every new batch size
        if going.sum() <= len(going) // 2:
            keep = going.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            active, sequences, mask, positions = active[keep], sequences[keep], mask[keep], positions[keep]
            going = going[keep]
        output = model(
            input_ids=sequences[:, -1:], attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
    return Samples(torch.cat([input_ids, completions[:, :step]], 1), logprobs[:, :step], lengths.clamp(max=step), ended)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block and restore its generators afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def need_cache(model: PreTrainedModel | PeftModel) -> None:
    """Refuse a model without a key-value cache, which sampling and ranking need.

    Raises:
        InputError: for an LSTM (rlhf/models/lstm.py).
    """
    if isinstance(model.config, LSTMConfig):
        raise InputError(
            f"--model_name_or_path {Path(model.name_or_path).name}: an LSTM keeps no key-value cache to sample with. "
            "Give a Transformer; eval/compression.py can read an LSTM, and so can transformers' own generate."
        )


def generate(
    model: PreTrainedModel | PeftModel,
    batch: dict[str, torch.Tensor],
    config: GenerationConfig,
    *,
    stopping_criteria: StoppingCriteriaList | None = None,
    uniforms: torch.Tensor | None = None,
) -> Samples:
    """Sample with `config` alone: the model's own generation_config, a repetition penalty for example, has no effect.

    Args:
        batch: `input_ids` and `attention_mask` (B, P), left-padded.
        stopping_criteria: in addition to those of `config`, for example a StopStringCriteria, which `generate` makes
            only for its own decoding loop.
        uniforms: see `sample`.
    """
    need_cache(model)
    owners = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    saved = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = config
        loop = functools.partial(sample, uniforms=uniforms)
        return model.generate(
            **batch, generation_config=config, custom_generate=loop, stopping_criteria=stopping_criteria
        )
    finally:
        for owner, own in zip(owners, saved, strict=True):
            owner.generation_config = own


def left_pad(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> BatchEncoding:
    """`input_ids` and `attention_mask` (B, P) of prompts padded on the left."""
    return tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")


class Sampling(NamedTuple):
    """How completions are sampled: from the model's whole distribution, without top-k and top-p."""

    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 64  # completions sampled at once
    seed: int = 0


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    do_sample: bool = True,
    num_return_sequences: int = 1,
    description: str = "Sampling",
) -> list[list[list[int]]]:
    """Token ids of `num_return_sequences` completions per prompt, ending with the stop token where one was drawn.

    Args:
        prompts: token ids; prompts of similar length are batched together.
        do_sample: False takes the most likely tokens.
        description: of the progress bar.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    completions: list[list[list[int]]] = [[] for _ in prompts]
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=do_sample,
        **({"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if do_sample else {}),
        num_return_sequences=num_return_sequences,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id,
    )
    per_batch = max(1, sampling.batch_size // num_return_sequences)
    count = len(prompts) * num_return_sequences
    with seeded(sampling.seed), tqdm(total=count, desc=description, unit="reply") as progress:
        for start in range(0, len(order), per_batch):
            numbers = order[start : start + per_batch]
            batch = left_pad(tokenizer, [prompts[number] for number in numbers]).to(model.device)
            new = generate(model, batch, config).sequences[:, batch["input_ids"].shape[1] :].tolist()
            for row, ids in enumerate(new):
                while ids and ids[-1] == tokenizer.pad_token_id:
                    ids.pop()
                completions[numbers[row // num_return_sequences]].append(ids)
            progress.update(len(new))
    return completions
