"""transformers' continuous batching: rows join and leave a batch at any step, over a paged cache.

The weights are the policy's own, so there is nothing to send. The passes run in a thread of transformers, without the
trainer's autocast: they have the precision of the weights.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import ContinuousBatchingConfig

from rlhf.engines.arguments import CONTINUOUS_BATCHING
from rlhf.engines.seam import Completions, Decoding, Stops, completions_of
from rlhf.errors import InputError
from rlhf.models.attention import NAME

PAGE = 128  # tokens of a page of the cache
TOKENS_AT_ONCE = 512  # of one pass, unless more rows than that are decoded at once
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}  # nats; other dtypes: a tenth


class ContinuousBatching:
    """Sampling with `generate_batch`, in the process that trains.

    Args:
        batch_size: number of rows to sample at once.
        options: fields of ContinuousBatchingConfig that replace those chosen here.

    Raises:
        InputError: if transformers can't do it for this model.
    """

    exact, own_weights, advice = False, False, f"Leave {CONTINUOUS_BATCHING} out."

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.model = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        self.tokenizer, self.batch_size, self.options = tokenizer, batch_size, options or {}
        self._try()

    def sync(self) -> None:
        """Nothing to do: the weights are the policy's."""

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], decoding: Decoding, uniforms: torch.Tensor) -> Completions:
        """See `Engine`. transformers knows no stop strings here: what follows one is sampled, and dropped."""
        seed = int(uniforms[0, 0].double() * 2**31)
        tokens, logprobs = self._generate(prompts, decoding, seed)
        rule = Stops(decoding, self.tokenizer)
        stops = [rule.first(*pair) for pair in zip(prompts, tokens, strict=True)]
        return completions_of(
            [row[:stop] for row, stop in zip(tokens, stops, strict=True)],
            [row[:stop] for row, stop in zip(logprobs, stops, strict=True)],
            [stop is not None for stop in stops],
            self.tokenizer.pad_token_id,
            uniforms.device,
        )

    def _generate(
        self, prompts: list[list[int]], decoding: Decoding, seed: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        config = GenerationConfig(
            max_new_tokens=decoding.response_length, **_draws(decoding.temperature),
            pad_token_id=self.tokenizer.pad_token_id, eos_token_id=decoding.stop_token_ids or -1,
        )  # fmt: skip
        longest = max(len(prompt) for prompt in prompts) + decoding.response_length
        rows = min(self.batch_size, len(prompts))
        page = self.options.get("page_size", self.options.get("block_size", PAGE))
        settings = {
            "page_size": page,
            "num_blocks": rows * (math.ceil(longest / page) + 1),
            "max_batch_tokens": max(TOKENS_AT_ONCE, rows),
            "max_requests_per_batch": rows,
            "auto_switch_to_flash": False,  # it would take a kernel from the Hub
            "seed": seed,
            **self.options,
            "return_logprobs": True,
        }
        with _known_attention(self.model), _quiet():
            outputs = self.model.generate_batch(
                prompts, config, ContinuousBatchingConfig(**settings), progress_bar=False
            )
        found = list(outputs.values())
        errors = [output.error for output in found if output.error]
        if errors or len(found) != len(prompts):
            reason = " ".join(str(errors[0]).split())[:200] if errors else "it doesn't say why"
            raise InputError(
                f"{CONTINUOUS_BATCHING}: transformers sampled {len(found) - len(errors)} of {len(prompts)} completions "
                f"({reason}). Leave it out, or give it other settings (--transformers_continuous_batching_config)."
            )
        return [output.generated_tokens for output in found], [output.logprobs for output in found]

    @torch.no_grad()
    def _try(self) -> None:
        """Refuse a model whose log-probabilities come out different, on two short rows."""
        name = self.model.config.model_type
        lowest = self.tokenizer.eos_token_id or 0
        prompts = [[lowest + 1 + number for number in range(length)] for length in (3, 7)]
        prompts = [[token % self.model.config.get_text_config().vocab_size for token in row] for row in prompts]
        try:
            tokens, logprobs = self._generate(prompts, Decoding(3, 1.0, [], []), seed=0)
        except (
            InputError,
            ValueError,
            RuntimeError,
            AttributeError,
            KeyError,
            TypeError,
            NotImplementedError,
            MemoryError,
        ) as error:
            with_what = f" with {self.options}" if self.options else ""
            raise InputError(
                f"{CONTINUOUS_BATCHING}: transformers can't do it for {name}{with_what} "
                f"({' '.join(str(error).split())[:200]}). Leave it out."
            ) from error
        for prompt, row, found in zip(prompts, tokens, logprobs, strict=True):
            logits = self.model(torch.tensor([prompt + row], device=self.model.device)).logits[0, len(prompt) - 1 : -1]
            right = logits.float().log_softmax(-1).gather(1, torch.tensor(row, device=logits.device)[:, None])[:, 0]
            worst = (right.cpu() - torch.tensor(found)).abs().max()
            if not worst <= ROUNDING.get(self.model.dtype, 0.1):
                raise InputError(
                    f"{CONTINUOUS_BATCHING}: for {name} its log-probabilities differ from the model's by "
                    f"{float(worst):.2g}. Leave it out."
                )


def _draws(temperature: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


@contextmanager
def _known_attention(model: PreTrainedModel) -> Iterator[None]:
    """Torch's attention in place of the project's, whose name transformers doesn't know here."""
    ours = model.config._attn_implementation == NAME
    if ours:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if ours:
            model.set_attn_implementation(NAME)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' log, which has a traceback for what is refused here in a line."""
    log = logging.getLogger("ContinuousBatchingLogger")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)
