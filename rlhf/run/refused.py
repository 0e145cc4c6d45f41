"""Flags of transformers and TRL that a recipe would ignore, or with which it would fail once the model is loaded.

A recipe has all flags of its trainer's config. `REFUSED` names those that no recipe with that config can honour.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig
from transformers.generation import GenerationMode

from rlhf.errors import InputError

EVERY = ("SFTConfig", "RewardConfig", "PretrainingConfig", "TrainingArguments", "RLOOConfig", "PPOConfig")
WITH_MODEL = ("SFTConfig", "RewardConfig", "RLOOConfig")  # PPO's can't be typed, and PPOTrainer checks it
NO_EFFECT = "has no effect in this recipe"
# flags, the configs of the recipes that refuse another value than the default (TrainingArguments: fine-tuning), and why
REFUSED: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("label_smoothing_factor",), ("SFTConfig", "PretrainingConfig"), "the loss that is reported would be smoothed"),
    (("label_smoothing_factor",), ("RewardConfig", "RLOOConfig"), NO_EFFECT),
    (("label_names",), EVERY, "the recipe knows its labels"),
    (("do_predict",), EVERY, "there is nothing to predict; the held-out rows are evaluated at the end"),
    (("prediction_loss_only", "batch_eval_metrics", "eval_do_concat_batches"),
     ("PretrainingConfig", "TrainingArguments"), "the evaluation needs all predictions together"),
    (("model_init_kwargs",), WITH_MODEL, f"{NO_EFFECT}: --dtype, --model_revision and others load the model"),
    (("train_sampling_strategy",), ("RLOOConfig", "PPOConfig"), f"{NO_EFFECT}: prompts are shuffled"),
    (("vllm_model_impl", "vllm_structured_outputs_regex", "vllm_group_port", "vllm_gpu_memory_utilization",
      "vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode"), ("RLOOConfig",),
     f"{NO_EFFECT}: a vLLM server has them"),
    (("debug", "skip_memory_metrics", "save_only_model", "ignore_data_skip", "torch_empty_cache_steps"),
     ("PPOConfig",), NO_EFFECT),
)  # fmt: skip


def check_refused(parsed: Sequence[Any]) -> None:
    """Refuse what `REFUSED` names, and flags that contradict each other across a recipe's dataclasses.

    Args:
        parsed: a recipe's dataclasses of flags.

    Raises:
        InputError: naming the flag.
    """
    for arguments in parsed:
        defaults = {field.name: field.default for field in dataclasses.fields(arguments)}
        for flags, configs, reason in REFUSED:
            for flag in flags if type(arguments).__name__ in configs else ():
                value = getattr(arguments, flag)
                if value != defaults[flag] and (value or defaults[flag]):  # debug: "" becomes []
                    raise InputError(f"--{flag} {_typed(value)}: {reason}. Leave it out.")
    values = {name: value for arguments in parsed for name, value in vars(arguments).items()}
    if values.get("sync_ref_model") and (values.get("use_peft") or not values.get("beta")):
        other = "--use_peft true" if values.get("use_peft") else "--beta 0"
        raise InputError(f"--sync_ref_model true: there is no reference model of its own with {other}. Leave it off.")
    if "optim" in values:
        _check_training(parsed, values)
    if values.get("padding_free") and not values.get("packing") and values.get("max_length") is not None:
        raise InputError("--padding_free true: TRL needs --packing true with it, or 'max_length: null' in --config.")
    if values.get("lm_coef") and values.get("label_smoothing_factor"):
        raise InputError("--label_smoothing_factor: has no effect with --lm_coef. Leave one of them out.")
    _check_sampling(values)


def _check_training(parsed: Sequence[Any], values: dict[str, Any]) -> None:
    """Refuse weights and optimizers that can't be trained as they are launched.

    Raises:
        InputError: naming the flag.
    """
    kwargs = getattr(values.get("accelerator_config"), "gradient_accumulation_kwargs", None)
    if not isinstance(kwargs or {}, dict):
        raise InputError(f"--accelerator_config: 'gradient_accumulation_kwargs' must be an object, found {kwargs!r}.")
    for flag in ("load_in_4bit", "load_in_8bit"):
        if values.get(flag) and not (values.get("use_peft") or values.get("freeze_body")):
            raise InputError(
                f"--{flag} true: quantized weights can't be trained. Give --use_peft true, or leave it out."
            )
    fsdp, zero = (os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "DEEPSPEED"))
    optim = str(getattr(values["optim"], "value", values["optim"]))
    if fsdp and ("bnb" in optim or "8bit" in optim):
        raise InputError(f"--optim {optim}: bitsandbytes does not know FSDP2's weights. Give --optim adamw_torch.")
    ppo = any(type(arguments).__name__ == "PPOConfig" for arguments in parsed)
    if zero and ppo and not values.get("use_peft") and values.get("dtype") != "float32" and not values.get("plan"):
        raise InputError(
            f"--dtype {values.get('dtype')}: under DeepSpeed PPO trains whole models in float32. Give --dtype float32 "
            "--bf16 true."
        )


def _typed(value: Any) -> str:
    """A value as it is typed.

    >>> _typed(True), _typed(["a", "b"]), _typed(0.5)
    ('true', 'a b', '0.5')
    """
    words = [str(getattr(word, "value", word)) for word in (value if isinstance(value, list) else [value])]
    return " ".join(word.lower() if isinstance(value, bool) else word for word in words)


def _check_sampling(values: dict[str, Any]) -> None:
    """Refuse settings of transformers' generation, as RLOO has them, that it doesn't know or that don't sample.

    Raises:
        InputError: naming the flag.
    """
    given, known = values.get("generation_kwargs") or {}, vars(GenerationConfig())
    cache = {"cache_implementation": values.get("cache_implementation")}
    if values.get("use_vllm"):  # has settings of its own
        return
    for flag, settings in (("cache_implementation", cache), ("generation_kwargs", given)):
        try:
            mode = GenerationConfig(**{"do_sample": True, **settings}).get_generation_mode()
        except (ValueError, TypeError) as error:
            raise InputError(f"--{flag}: {' '.join(str(error).split())}") from error
        if unknown := sorted(set(settings) - set(known)):
            raise InputError(f"--{flag}: {unknown[0]!r} is no setting of transformers' GenerationConfig. Leave it out.")
        if mode != GenerationMode.SAMPLE or settings.get("num_return_sequences", 1) != 1:
            raise InputError(f"--{flag} {settings}: RLOO samples, one completion of each row. Leave out what searches.")
