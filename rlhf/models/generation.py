"""Sampling replies. `sample` is a decoding loop for `model.generate(custom_generate=sample)`.

Unlike transformers' own loop, it draws one uniform number per row and inverts the cumulative distribution
(torch.multinomial draws one exponential per vocabulary entry), keeps the log-probability of the drawn token instead of
all scores, and drops finished rows from the cache. Logits processors, stopping criteria and the generation config have
the same effect as in `generate`.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch.nn.functional import pad
from tqdm.auto import tqdm
from transformers import (
    BatchEncoding,
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import ModelOutput

from rlhf.models.adapters import refuse_prompt_learning
from rlhf.models.fused_lora import weights_stay
from rlhf.models.precision import exact, running_sums
from rlhf.models.prefix import CANNOT, logits_at, prefill, reraise_out_of_memory, same
from rlhf.models.seq2seq import generation_inputs
from rlhf.models.tokenizers import end_ids

# tokens whose probabilities are added up at once
BLOCK = 128


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
        uniform = torch.rand(logits.shape[0], device=logits.device) if uniform is None else uniform
        tokens = invert(logprobs.exp(), uniform)
    else:
        tokens = logprobs.argmax(-1, keepdim=True)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def invert(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token (B, 1) of each row up to which probabilities (B, V) add up to more than a share (B,) of all.

    First the block of tokens is found, then the token in it: running sums over a whole vocabulary took a tenth of the
    time of sampling on a CPU. They are in float64, as in float32 the rounding of a long sum, not the logits, would
    decide between neighbours.
    """
    size = probabilities.shape[1]
    cut = size - size % BLOCK
    blocks = exact(probabilities[:, :cut].unflatten(1, (-1, BLOCK))).sum(-1)
    sums = running_sums(torch.cat([blocks, exact(probabilities[:, cut:]).sum(-1, keepdim=True)], 1))
    shares = _below(exact(uniform)[:, None] * sums[:, -1:], sums)
    block = torch.searchsorted(sums, shares, right=True)
    columns = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = running_sums(probabilities.gather(1, columns.clamp(max=size - 1)) * (columns < size))
    before = pad(sums, (1, 0)).gather(1, block)
    return block * BLOCK + torch.searchsorted(inside, _below(shares - before, inside), right=True)


def _below(shares: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """The shares, but below the last sum, beyond which rounding may put them: no token lies there."""
    return torch.minimum(shares, torch.nextafter(sums[:, -1:], torch.zeros_like(shares)))


class Way(Enum):
    """How rows of different lengths are decoded side by side; `way_to_decode` finds the first that is right."""

    TOGETHER = "padded on the left"
    BY_LENGTH = "rows of equal length together, without padding"
    UNCACHED = "without a cache: every step reads the whole rows"


class _Cached:
    """Next-token logits by the model's own cache, prepared as transformers' `generate` prepares it."""

    def __init__(self, model: PreTrainedModel, start: int, model_kwargs: dict[str, Any]) -> None:
        self.model, self.start, self.kwargs, self.began = model, start, model_kwargs, False

    def next_logits(self, sequences: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) behind sequences (B, L), whose first `start` columns are padding."""
        ids, cache = sequences[:, self.start :], self.kwargs.get("past_key_values")
        if self.began:
            inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=1, **self.kwargs)
            output = self.model(**inputs, return_dict=True)
        else:
            self.began = True
            inputs = self.model.prepare_inputs_for_generation(ids, is_first_iteration=True, **self.kwargs)
            shares = self.start == 0 and type(cache) is DynamicCache and "input_ids" in inputs
            run = functools.partial(prefill, self.model) if shares else self.model
            output = run(**inputs, return_dict=True)
        self.kwargs = self.model._update_model_kwargs_for_generation(
            output, self.kwargs, is_encoder_decoder=self.model.config.is_encoder_decoder
        )
        return output.logits[:, -1]

    def keep(self, rows: torch.Tensor) -> bool:
        """Drop all other rows; False if the cache can't."""
        caches = [self.kwargs[name] for name in ALL_CACHE_NAMES if self.kwargs.get(name) is not None]
        if not all(isinstance(cache, Cache) for cache in caches):
            return False
        for cache in caches:
            cache.reorder_cache(rows)  # of layers of every kind: keys and values, windows, recurrent states
        self.kwargs = _select(self.kwargs, rows)
        return True


class _Uncached:
    """Next-token logits by reading the whole rows, padded on the right."""

    def __init__(self, model: PreTrainedModel, starts: torch.Tensor) -> None:
        self.model, self.starts = model, starts

    def next_logits(self, sequences: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) behind sequences (B, L), padded on the left."""
        columns = torch.arange(sequences.shape[1], device=sequences.device) + self.starts[:, None]
        inside = columns < sequences.shape[1]
        ids = sequences.gather(1, columns.clamp(max=sequences.shape[1] - 1)).masked_fill(~inside, 0)
        last = inside.sum(1, keepdim=True) - 1
        inputs = {"input_ids": ids, "attention_mask": inside.long(), "use_cache": False}
        return logits_at(self.model, last, **inputs).logits[:, 0]

    def keep(self, rows: torch.Tensor) -> bool:
        """Drop all other rows."""
        self.starts = self.starts[rows]
        return True


def _select(kwargs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Some rows of everything that has one entry per row, but for the cache."""
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.ndim > 1
        else type(value)(**_select(dict(value), rows)) if isinstance(value, ModelOutput)
        else value
        for name, value in kwargs.items()
    }  # fmt: skip


def sample(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    uniforms: torch.Tensor | None = None,
    way: Way = Way.TOGETHER,
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
    rows, width = input_ids.shape
    room = generation_config.max_length - width
    device = input_ids.device
    completions = torch.full((rows, room), generation_config.pad_token_id, device=device)
    drawn = Samples(
        torch.cat([input_ids, completions], 1), torch.zeros(rows, room, device=device),
        torch.full((rows,), room, device=device), torch.zeros(rows, dtype=torch.bool, device=device),
    )  # fmt: skip
    rules = StoppingCriteriaList(rule for rule in stopping_criteria if not isinstance(rule, MaxLengthCriteria))
    if not model.config.is_encoder_decoder and model_kwargs.get("attention_mask") is None:
        model_kwargs["attention_mask"] = torch.ones_like(input_ids)  # generate drops a mask that hides nothing
    for group, decoder in _decoders(model, input_ids, model_kwargs, way):
        _decode(decoder, group, input_ids[group], logits_processor, rules, generation_config, uniforms, drawn)
    steps = int(drawn.lengths.max())
    return Samples(drawn.sequences[:, : width + steps], drawn.logprobs[:, :steps], drawn.lengths, drawn.ended)


def _decoders(
    model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: dict[str, Any], way: Way
) -> Iterator[tuple[torch.Tensor, "_Cached | _Uncached"]]:
    """Groups of rows to decode side by side: their numbers (G,), and what reads them."""
    every = torch.arange(len(input_ids), device=input_ids.device)
    if way is Way.TOGETHER:
        yield every, _Cached(model, 0, model_kwargs)
        return
    mask = model_kwargs["attention_mask"]
    starts = (mask == 0).sum(1)
    if way is Way.UNCACHED:
        yield every, _Uncached(model, starts)
        return
    model_kwargs.pop("position_ids", None)  # without padding, the model's own are right
    for start in starts.unique().tolist():
        group = (starts == start).nonzero().squeeze(1)
        own = {**_select(model_kwargs, group), "attention_mask": mask[group, start:]}
        yield group, _Cached(model, start, copy.deepcopy(own))  # with a cache of its own


def _decode(
    decoder: _Cached | _Uncached,
    active: torch.Tensor,
    sequences: torch.Tensor,
    logits_processor: LogitsProcessorList,
    rules: StoppingCriteriaList,
    generation_config: GenerationConfig,
    uniforms: torch.Tensor | None,
    drawn: Samples,
) -> None:
    """Draw tokens for some rows until all have ended, and write them to `drawn`.

    Args:
        active: (G,) numbers of the rows in `drawn`.
        sequences: (G, P) their prompts, left-padded.
    """
    room, width = drawn.logprobs.shape[1], sequences.shape[1]
    going = torch.ones_like(active, dtype=torch.bool)
    for step in range(room):
        logits = logits_processor(sequences, decoder.next_logits(sequences).float())
        uniform = None if uniforms is None else uniforms[active, step]
        tokens, logprob = draw_tokens(logits, generation_config.do_sample, uniform)
        drawn.sequences[active[going], width + step] = tokens[going]
        drawn.logprobs[active[going], step] = logprob[going]
        sequences = torch.cat([sequences, tokens[:, None]], 1)
        stopped = going & rules(sequences, None)
        drawn.ended[active[stopped]], drawn.lengths[active[stopped]] = True, step + 1
        going = going & ~stopped
        if not going.any():
            break
        # drop finished rows once half are finished: the CPU's kernels need a set-up for every new batch size
        if step + 1 < room and going.sum() <= len(going) // 2:
            kept = going.nonzero().squeeze(1)
            if decoder.keep(kept):
                active, sequences, going = active[kept], sequences[kept], going[kept]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block and restore its generators afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


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

    Raises:
        InputError: for an adapter of virtual tokens.
    """
    refuse_prompt_learning(model, "--model_name_or_path")
    loop = functools.partial(sample, uniforms=uniforms, way=way_to_decode(model, batch))
    if not model.config.is_encoder_decoder:
        return _generate(model, batch, config, loop, stopping_criteria=stopping_criteria)
    inputs, config = generation_inputs(model, batch, config)
    samples = _generate(model, inputs, config, loop, stopping_criteria=stopping_criteria)
    each = batch["input_ids"].repeat_interleave(len(samples.lengths) // len(batch["input_ids"]), 0)
    replies = samples.sequences[:, inputs["decoder_input_ids"].shape[1] :]
    return samples._replace(sequences=torch.cat([each, replies], 1))


def _generate(
    model: PreTrainedModel | PeftModel,
    batch: dict[str, torch.Tensor],
    config: GenerationConfig,
    loop: functools.partial[Samples],
    **settings: Any,
) -> Samples:
    owners = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    saved = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = config
        if loop.keywords["way"] is Way.UNCACHED:
            settings["use_cache"] = False  # else generate makes one, which fails for BLT
        with _without_plans(), weights_stay():
            return model.generate(**batch, generation_config=config, custom_generate=loop, **settings)
    finally:
        for owner, own in zip(owners, saved, strict=True):
            owner.generation_config = own


@contextmanager
def _without_plans() -> Iterator[None]:
    """Attention without cuDNN, which plans anew for each length of the cache.

    Sampling 30 tokens for 64 prompts of a new length took 1.9 s with it and 0.56 s without (benchmarks/gpu.json).
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


_WAYS: WeakKeyDictionary[PreTrainedModel, Way] = WeakKeyDictionary()


def way_to_decode(model: PreTrainedModel | PeftModel, batch: dict[str, torch.Tensor]) -> Way:
    """The fastest way to decode this model that gives a row alone, unpadded and without a cache, its own logits.

    It is tried once, on a few tokens of the batch. Some recurrent models read padding, some models count padding as
    positions, some have no cache or one that loses something.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.config.is_encoder_decoder:
        return Way.TOGETHER  # replies begin together, and the encoder's mask hides padding
    if base not in _WAYS:
        cached = (Way.TOGETHER, Way.BY_LENGTH)
        _WAYS[base] = next((way for way in cached if _is_right(model, batch["input_ids"], way)), Way.UNCACHED)
    return _WAYS[base]


class _Watch:
    """Keeps the logits of every step. Half of the rows read together stop after the first token, and are dropped."""

    def __init__(self, width: int) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.width = width  # of the prompts

    def processor(self, sequences: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.seen += zip(sequences, logits, strict=True)
        return logits

    def stop(self, sequences: torch.Tensor, _scores: None) -> torch.Tensor:
        first = sequences.shape[1] == self.width + 1
        return torch.arange(len(sequences), device=sequences.device) < (len(sequences) // 2 if first else 0)


@torch.no_grad()
def _is_right(model: PreTrainedModel | PeftModel, input_ids: torch.Tensor, way: Way) -> bool:
    """Whether this way of decoding gives the logits of the plain forward pass."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    tokens = input_ids[input_ids != 0].repeat(9)[:9]  # 0 marks padding here
    if len(tokens) < 9:
        tokens = torch.arange(1, 10, device=input_ids.device)
    rows = torch.stack([tokens.roll(number) for number in range(6)])
    # one token is a case of its own: some models take it for the next one, and go on from what they read before
    for row, padding in zip(rows, (0, 5, 8, 0, 5, 8), strict=True):
        row[:padding] = 0
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    watch = _Watch(rows.shape[1])
    try:
        _generate(
            model, {"input_ids": rows, "attention_mask": (rows != 0).long()}, config,
            functools.partial(sample, way=way),
            logits_processor=LogitsProcessorList([watch.processor]),
            stopping_criteria=StoppingCriteriaList([watch.stop]),
        )  # fmt: skip
    except CANNOT as error:
        reraise_out_of_memory(error)
        return False
    alone = [row[int((row != 0).long().argmax()) :][None] for row, _ in watch.seen]
    expected = [base(input_ids=row).logits[0, -1] for row in alone]
    return same(torch.stack([logits for _, logits in watch.seen]), torch.stack(expected))


def left_pad(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> BatchEncoding:
    """`input_ids` and `attention_mask` (B, P) of prompts padded on the left."""
    return tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")


class Sampling(NamedTuple):
    """How completions are sampled: from the model's whole distribution, without top-k and top-p."""

    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 64  # completions sampled at once
    seed: int = 0
    engine: Callable[..., list[list[list[int]]]] | None = None  # samples in place of the loop below


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
    if sampling.engine is not None:
        return sampling.engine(model, tokenizer, prompts, sampling, do_sample, num_return_sequences)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    completions: list[list[list[int]]] = [[] for _ in prompts]
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=do_sample,
        **({"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if do_sample else {}),
        num_return_sequences=num_return_sequences,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_ids(model, tokenizer),
    )
    per_batch = max(1, sampling.batch_size // num_return_sequences)
    count = len(prompts) * num_return_sequences
    with seeded(sampling.seed), tqdm(total=count, desc=description, unit="reply") as progress:
        for start in range(0, len(order), per_batch):
            numbers = order[start : start + per_batch]
            batch = left_pad(tokenizer, [prompts[number] for number in numbers]).to(model.device)
            samples = generate(model, batch, config)
            new = samples.sequences[:, batch["input_ids"].shape[1] :].tolist()
            for row, (ids, length) in enumerate(zip(new, samples.lengths.tolist(), strict=True)):
                completions[numbers[row // num_return_sequences]].append(ids[:length])
            progress.update(len(new))
    return completions
