"""The range of every number among the flags.

A field of ours says its range in its type: `max_prompts: PositiveInt`, `dropout: Annotated[float, Range(0, below=1)]`.
Fields inherited from transformers, TRL and PEFT have theirs in `LIBRARY_RANGES`. NaN and infinity are in no range.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from rlhf.errors import InputError

LARGEST = 2**63  # integers of torch and of tokenizers end there


class Range(NamedTuple):
    """Which numbers a flag takes. None, where a flag has it, passes.

    Args:
        low, high: smallest and largest value.
        above, below: bounds that are out of the range themselves.
        also: one value outside of the bounds, such as -1 for "no limit".
    """

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    also: float | None = None

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not abs(value) < LARGEST:  # nor is NaN
            return False
        within = self.low <= value <= self.high and self.above < value < self.below
        return within or value == self.also

    def __str__(self) -> str:
        """The range in words.

        >>> [str(Range(**bounds)) for bounds in ({"low": 1}, {"low": 0, "below": 1}, {"above": 0, "high": 1}, {})]
        ['at least 1', 'at least 0 and below 1', 'above 0 and at most 1', 'a finite number']
        """
        if self.low > -math.inf and self.high < math.inf:
            words = [f"from {self.low} to {self.high}"]
        else:
            bounds = (("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
            words = [f"{word} {bound}" for word, bound in bounds if math.isfinite(bound)]
        return (" and ".join(words) or "a finite number") + ("" if self.also is None else f", or {self.also}")


LEARNING_RATE = Range(low=0, high=100)  # far above any that trains; 1e30 would train NaN
TEMPERATURE = Range(low=0.001)  # logits are divided by it

PositiveInt = Annotated[int, Range(low=1)]
AtLeastTwo = Annotated[int, Range(low=2)]
NonNegativeInt = Annotated[int, Range(low=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(low=0)]
FiniteFloat = Annotated[float, Range()]
Share = Annotated[float, Range(low=0, high=1)]
LearningRate = Annotated[float, LEARNING_RATE]
Temperature = Annotated[float, TEMPERATURE]
Seed = Annotated[int, Range(low=0, high=2**32 - 1)]  # what numpy takes
Port = Annotated[int, Range(low=1, high=65535)]

LIBRARY_RANGES = {
    **dict.fromkeys(
        (
            "dataloader_prefetch_factor", "dataset_num_proc", "ddp_bucket_cap_mb", "ddp_timeout",
            "eval_accumulation_steps", "generation_batch_size", "gradient_accumulation_steps",
            "local_rollout_forward_batch_size", "lora_alpha", "lora_r", "max_completion_length", "max_length",
            "num_generations_eval", "num_iterations", "num_mini_batches", "num_ppo_epochs", "pad_to_multiple_of",
            "per_device_eval_batch_size", "per_device_train_batch_size", "ref_model_sync_steps", "response_length",
            "save_total_limit", "steps_per_generation", "torch_empty_cache_steps", "total_episodes",
            "vllm_max_model_length", "vllm_tensor_parallel_size",
        ),
        Range(low=1),
    ),
    **dict.fromkeys(
        (
            "adam_epsilon", "beta", "center_rewards_coefficient", "dataloader_num_workers", "eval_delay", "kl_coef",
            "max_grad_norm", "missing_eos_penalty", "neftune_noise_alpha", "num_completions_to_print",
            "num_sample_generations", "router_aux_loss_coef", "top_k", "vf_coef", "warmup_steps", "weight_decay",
        ),
        Range(low=0),
    ),
    **dict.fromkeys(
        (
            "cliprange", "cliprange_value", "dataset_probs", "epsilon", "epsilon_high", "eval_steps", "logging_steps",
            "num_train_epochs", "repetition_penalty", "save_steps", "vllm_server_timeout",
        ),
        Range(above=0),
    ),
    **dict.fromkeys(("gamma", "lam", "min_p", "ref_model_mixup_alpha"), Range(low=0, high=1)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor", "lora_dropout"), Range(low=0, below=1)),
    **dict.fromkeys(("top_p", "vllm_gpu_memory_utilization"), Range(above=0, high=1)),
    **dict.fromkeys(("seed", "data_seed"), Range(low=0, high=2**32 - 1)),
    **dict.fromkeys(("vllm_server_port", "vllm_group_port"), Range(low=1, high=65535)),
    "learning_rate": LEARNING_RATE,
    "local_rank": Range(low=-1),
    "max_steps": Range(low=1, also=-1),
    "num_generations": Range(low=2),
    "reward_weights": Range(),
    "temperature": TEMPERATURE,
}  # fmt: skip


def ranges_of(arguments: type) -> dict[str, Range]:
    """The ranges of a dataclass's numbers, by field."""
    hints = get_type_hints(arguments, include_extras=True)
    ranges = {}
    for field in dataclasses.fields(arguments):
        parts = list(_parts(hints[field.name]))
        own = [part for part in parts if isinstance(part, Range)]
        if own or (field.name in LIBRARY_RANGES and (int in parts or float in parts)):
            ranges[field.name] = own[0] if own else LIBRARY_RANGES[field.name]
    return ranges


def _parts(hint: Any) -> Iterator[Any]:
    """What a type is made of.

    >>> list(_parts(list[Annotated[int, "small"]]))[1:]
    [typing.Annotated[int, 'small'], <class 'int'>, 'small']
    """
    yield hint
    for part in get_args(hint):
        yield from _parts(part)


def check_range(flag: str, value: Any, allowed: Range) -> None:
    """Refuse a number outside its range, or a list with such a number.

    Args:
        flag: its name as the error shows it.

    Raises:
        InputError: naming the flag and the range.
    """
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, int | float) and number not in allowed:
            limit = "" if abs(number) < LARGEST else ", and a number below 2^63"
            raise InputError(f"{flag} {number}: must be {allowed}{limit}.")


def check_ranges(*arguments: Any) -> None:
    """Refuse the first number of dataclasses that is outside its range. The parser does the same before.

    Raises:
        InputError: naming the flag.
    """
    for part in arguments:
        for name, allowed in ranges_of(type(part)).items():
            check_range(f"--{name}", getattr(part, name), allowed)
