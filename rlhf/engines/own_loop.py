"""The project's own decoding loop: the default engine, whose samples depend on the seed alone."""

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from rlhf.engines.seam import Completions, Decoding
from rlhf.models.generation import generate, left_pad
from rlhf.models.precision import mixed_precision


class OwnLoop:
    """Sampling with rlhf/models/generation.py, in the process that trains.

    Args:
        batch_size: number of rows to sample at once.
        accelerator: whose mixed precision the passes have; None: the model's own.
    """

    exact, own_weights, advice = True, False, ""

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.policy, self.tokenizer, self.batch_size, self.accelerator = policy, tokenizer, batch_size, accelerator

    def sync(self) -> None:
        """Nothing to do: the weights are the policy's."""

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], decoding: Decoding, uniforms: torch.Tensor) -> Completions:
        """See `Engine`."""
        tokenizer, device, rows, length = self.tokenizer, uniforms.device, len(prompts), decoding.response_length
        config = GenerationConfig(
            max_new_tokens=length, do_sample=True, temperature=decoding.temperature, top_k=0, top_p=1.0,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=decoding.stop_token_ids or None,
        )  # fmt: skip
        strings = decoding.stop_strings
        stops = StoppingCriteriaList([StopStringCriteria(tokenizer, strings)] if strings else [])
        padded = left_pad(tokenizer, prompts).to(device)
        width = padded["input_ids"].shape[1]
        tokens = torch.full((rows, length), tokenizer.pad_token_id, device=device)
        logprobs = torch.zeros(rows, length, device=device)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        with self._precision():
            for start in range(0, rows, self.batch_size):
                part = slice(start, start + self.batch_size)
                mask = padded["attention_mask"][part]
                batch = {"input_ids": padded["input_ids"][part].masked_fill(mask == 0, 0), "attention_mask": mask}
                samples = generate(self.policy, batch, config, stopping_criteria=stops, uniforms=uniforms[part])
                tokens[part, : samples.sequences.shape[1] - width] = samples.sequences[:, width:]
                logprobs[part, : samples.logprobs.shape[1]] = samples.logprobs
                lengths[part], ended[part] = samples.lengths, samples.ended
        longest = int(lengths.max())
        return Completions(tokens[:, :longest], logprobs[:, :longest], lengths, ended)

    def _precision(self) -> AbstractContextManager[None]:
        return nullcontext() if self.accelerator is None else mixed_precision(self.accelerator, self.policy)
