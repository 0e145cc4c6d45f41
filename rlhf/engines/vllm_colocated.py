"""vLLM in the process that trains, on its device, with a copy of the base of its own.

Each process samples for itself, so each GPU holds one vLLM. https://docs.vllm.ai/en/latest/features/lora.html
"""

import atexit
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from rlhf.engines.arguments import EngineArguments
from rlhf.engines.seam import Completions, Decoding, Stops, completions_of
from rlhf.engines.vllm_sampling import PolicyFiles, ended_at, sampling_settings, seeds_of
from rlhf.errors import InputError


class ColocatedVLLM:
    """Sampling by vLLM in the same process.

    Args:
        files: the policy.
        longest: tokens of the longest prompt and its completion.
        batch_size: rows at once.

    Raises:
        InputError: if vLLM can't sample this model.
    """

    exact, own_weights = False, True
    advice = "vLLM has other weights than the policy's base. Give --vllm_mode server, or leave --use_vllm out."

    def __init__(
        self,
        args: EngineArguments,
        files: PolicyFiles,
        tokenizer: PreTrainedTokenizerBase,
        state: Accelerator,
        longest: int,
        batch_size: int,
    ) -> None:
        context = args.vllm_max_model_length or longest
        if context < longest:
            raise InputError(
                f"--vllm_max_model_length {context}: the longest prompt and --response_length are {longest} tokens. "
                "Give as many, or leave it out."
            )
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process
        self.files, self.state, self.tokenizer = files, state, tokenizer
        files.run += f"-{state.process_index - state.local_process_index}"  # one process of each machine writes
        self.sleeps, self.asleep, self.request = args.vllm_enable_sleep_mode, False, None
        options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": max(8, files.rank)} if files.is_adapter else {}
        if state.num_processes > 1:  # as TRL has it: vLLM joins the processes that accelerate started
            options["distributed_executor_backend"] = "external_launcher"
        try:
            with _same_randomness():
                from vllm import LLM

                self.llm = LLM(
                    model=files.base, revision=getattr(files.policy.config, "_commit_hash", None),
                    skip_tokenizer_init=True, dtype=files.policy.dtype, seed=0, max_num_seqs=batch_size,
                    max_model_len=context, generation_config="vllm",
                    gpu_memory_utilization=args.vllm_gpu_memory_utilization, enable_sleep_mode=self.sleeps,
                    logprobs_mode="processed_logprobs", trust_remote_code=False, **options,
                )  # fmt: skip
        except (ImportError, RuntimeError, TypeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(
                f"--vllm_mode colocate: vLLM can't take {files.base} ({reason}). Give --vllm_mode server, or "
                "leave --use_vllm out."
            ) from error
        if state.is_local_main_process:
            atexit.register(files.remove)

    def sync(self) -> None:
        """See `Engine`."""
        files, writes = self.files, self.state.is_local_main_process
        self._wake()
        if files.is_adapter and files.number:
            self.llm.llm_engine.remove_lora(files.number)
        if writes:
            files.remove()
        place = files.renew(writes)
        self.state.wait_for_everyone()
        if files.is_adapter:
            from vllm.lora.request import LoRARequest

            self.request = LoRARequest(files.name, files.number, str(place))
            return
        with _same_randomness():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(place)})
        self.llm.reset_prefix_cache()  # keys and values of the old weights

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def sample(self, prompts: list[list[int]], decoding: Decoding, uniforms: torch.Tensor) -> Completions:
        """See `Engine`. Each row has a seed of its own."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        fixed = sampling_settings(decoding) | {"stop": [], "detokenize": False}  # texts are read here, afterwards
        settings = [SamplingParams(seed=seed, **fixed) for seed in seeds_of(uniforms)]
        self._wake()
        with _same_randomness():
            outputs = self.llm.generate(
                [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], settings, use_tqdm=False,
                lora_request=self.request,
            )  # fmt: skip
        if self.sleeps:
            self.llm.sleep(level=1)  # its weights go to the CPU's memory
            self.asleep = True
        rule, found = Stops(decoding, self.tokenizer), []
        for prompt, output in zip(prompts, outputs, strict=True):
            (completion,) = output.outputs
            given = [at[token].logprob for token, at in zip(completion.token_ids, completion.logprobs, strict=True)]
            found.append(ended_at(prompt, completion.token_ids, given, completion.finish_reason, rule))
        tokens, logprobs, ended = (list(part) for part in zip(*found, strict=True))
        return completions_of(tokens, logprobs, ended, self.tokenizer.pad_token_id, uniforms.device)


@contextmanager
def _same_randomness() -> Iterator[None]:
    """vLLM seeds the generators of this process anew: give the run back its own."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
