"""What vLLM as a server and vLLM in this process share: settings, where completions end, the policy as files."""

import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel, PeftType
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf.engines.seam import Decoding, Stops
from rlhf.errors import InputError

FILES = "vllm_adapters"  # the folder in the output folder


def sampling_settings(decoding: Decoding) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams, which are also fields of a request.

    They say everything that vLLM would else take from the model's generation_config.json.
    """
    return {
        "n": 1, "max_tokens": decoding.response_length, "temperature": decoding.temperature, "top_p": 1.0, "top_k": 0,
        "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0,
        # ends are our stop tokens alone: without ignore_eos, the model's own eos tokens would join them
        "ignore_eos": True, "stop_token_ids": decoding.stop_token_ids, "stop": decoding.stop_strings,
        "skip_special_tokens": False, "include_stop_str_in_output": True, "logprobs": 0,
    }  # fmt: skip


def seeds_of(uniforms: torch.Tensor) -> list[int]:
    """A seed for each row of random numbers (B, T)."""
    digits = (uniforms[:, :2].double().cpu() * 2**24).long()
    return [int(row[0]) * 2**24 + int(row[-1]) for row in digits]


def ended_at(
    prompt: list[int], tokens: Sequence[int], logprobs: Sequence[float | None], finish_reason: str | None, stops: Stops
) -> tuple[list[int], list[float], bool]:
    """Tokens and log-probabilities up to the first stop, and whether the completion ended.

    Args:
        logprobs: of each token; None becomes NaN.
        finish_reason: vLLM's.
    """
    stop = stops.first(prompt, list(tokens))
    given = [float("nan") if logprob is None else logprob for logprob in logprobs]
    if stop is None:  # it may still have ended where vLLM's text has a stop string and ours has none
        return list(tokens), given, finish_reason == "stop"
    return list(tokens[:stop]), given[:stop], True


def need_renewal(config: PreTrainedConfig, device: torch.device) -> None:
    """Refuse a whole model that vLLM would renew in part only.

    Raises:
        InputError: on a CPU, for a head that is tied to the embeddings: vLLM 0.32 packs the head once there, and would
            take new embeddings and the old head.
    """
    if config.get_text_config().tie_word_embeddings and device.type == "cpu":
        raise InputError(
            "--use_vllm true --use_peft false: on a CPU, vLLM does not renew a head that is tied to the embeddings, as "
            f"that of {config._name_or_path}. Give --use_peft true, or leave --use_vllm out."
        )


class PolicyFiles:
    """The policy as files for vLLM, under names that were never used before: its adapter, or the whole model.

    Args:
        policy: a LoRA model, or one that is trained as a whole.
        adapter: the name of the policy's adapter, if it has any.
        folder: where the files go.
        state: of the processes that sample together.
        weights: gives the trained tensors by name where each process holds a share of them, else None. All processes
            call it together.

    Raises:
        InputError: for an adapter other than LoRA, and a whole model that vLLM would not renew as a whole.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        adapter: str,
        folder: Path,
        state: Accelerator | PartialState,
        weights: Callable[[], dict[str, torch.Tensor] | None] = lambda: None,
    ) -> None:
        self.policy, self.adapter, self.folder, self.weights = policy, adapter, folder, weights
        self.is_adapter = isinstance(policy, PeftModel)
        self.base, self.rank = policy.config._name_or_path, 0
        if isinstance(policy, PeftModel):
            config = policy.peft_config[adapter]
            if config.peft_type != PeftType.LORA:
                raise InputError(
                    f"--use_vllm true: vLLM takes LoRA adapters, and this one is {config.peft_type.value}."
                )
            self.base, self.rank = str(config.base_model_name_or_path), int(config.r)
        else:
            need_renewal(policy.config, policy.device)
        self.run, self.number = broadcast_object_list([secrets.token_hex(4)])[0], 0  # several runs may share a server
        self.name = ""

    def sends(self, model: PreTrainedModel | PeftModel) -> bool:
        """Whether these are the files of a model as it is used now, with the adapter that is active."""
        return model is self.policy and (not self.is_adapter or model.active_adapter == self.adapter)

    def renew(self, writes: bool) -> Path:
        """Write the policy as it is now under the next name, and give the folder. All processes call it together.

        Args:
            writes: whether this process writes.
        """
        self.number += 1
        self.name = f"ppo-{self.run}-{self.number}"
        settings = {"selected_adapters": [self.adapter]} if self.is_adapter else {}
        place, state_dict = self.folder / self.name, self.weights()
        if writes:
            self.policy.save_pretrained(str(place), **settings, state_dict=state_dict)
        if not self.is_adapter or self.adapter == "default":
            return place.resolve()
        return (place / self.adapter).resolve()

    def remove(self) -> bool:
        """Remove the files of the last name, if there are any."""
        if not self.number or not (self.folder / self.name).exists():
            return False
        shutil.rmtree(self.folder / self.name, ignore_errors=True)
        with suppress(OSError):  # another run's may be in it
            self.folder.rmdir()
        return True
