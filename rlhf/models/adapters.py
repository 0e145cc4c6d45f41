"""Several adapters over one base in memory: policy, reference, reward model, value function."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, transformers_weight_conversion
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import disable_dropout_in_model

from rlhf.errors import InputError
from rlhf.models.checks import check_finite, loading
from rlhf.models.fused_lora import fuse
from rlhf.models.sources import Source, saved_rows

# Names of the adapters beside the policy's, over one base in memory. More reward adapters are reward_2, reward_3, ...
REFERENCE, REWARD, VALUE = "reference", "reward", "value"
# what LoRA may begin with and leave its base as it is; PEFT begins anew each time that the adapter is loaded
HARMLESS_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")


def _unless_named_alike(convert: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
    """PEFT's conversion of adapters from transformers 4, left out where the names are the model's own already.

    It would rename some of these a second time (Laguna's `shared_experts`). PEFT then leaves them at their random
    beginning without a word, also where a Trainer resumes.
    """

    @functools.wraps(convert)
    def converted(
        model: Any, peft_config: PeftConfig, adapter_state_dict: dict[str, torch.Tensor], adapter_name: str = "default"
    ) -> dict[str, torch.Tensor]:
        own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        shapes = {key: weight.shape for key, weight in own.items()}
        if all(shapes.get(key) == weight.shape for key, weight in adapter_state_dict.items() if ".lora_" in key):
            return adapter_state_dict
        return convert(model, peft_config, adapter_state_dict, adapter_name)

    return converted


transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers = _unless_named_alike(
    transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers
)


def why_alone(config: PeftConfig) -> str | None:
    """Why no other role can use the base of such an adapter: it changes the base's own weights or layers, or None.

    PiSSA, OLoRA, CorDA and LoftQ take from the base's weights what they begin with, each time that they are loaded.
    """
    start, bias = getattr(config, "init_lora_weights", True), getattr(config, "bias", "none")
    advice = "Merge it into a full model (merge_and_unload), or give an adapter that leaves its base as it is."
    if str(start).lower() not in HARMLESS_STARTS:
        return f"its init_lora_weights {start!r} changes the weights of the base, which other roles use too. {advice}"
    if bias != "none":
        return f"its bias {bias!r} changes the biases of the base, which other roles use too. {advice}"
    if getattr(config, "layer_replication", None):
        return "its layer_replication changes the layers of the base, which other roles use too. Give another adapter."
    return None


@contextmanager
def active_adapter(model: PreTrainedModel | PeftModel, name: str | None) -> Iterator[None]:
    """Inside the block the model runs with adapter `name`, or with none.

    `requires_grad` is unchanged. `PeftModel.set_adapter` freezes the other adapters, and a later backward through
    them gives no gradient, without a warning.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [name] if name else [], name is None
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def recompute_with_same_adapter(
    model: PeftModel,
) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """`context_fn` for torch's activation checkpointing: recompute a layer with the adapter that it ran with.

    Recomputation happens in the backward pass, when another adapter may be active.
    """

    def context() -> tuple[AbstractContextManager, AbstractContextManager]:
        layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
        name = layer.active_adapters[0] if layer.active_adapters and not layer.disable_adapters else None
        return nullcontext(), active_adapter(model, name)

    return context


def new_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The model with a new adapter.

    `all-linear` leaves out the output projections of Mamba layers, whose kernels read the weights past the adapter
    (PEFT refuses them), and routers that return more than a projection.

    Raises:
        InputError: for a shape that PEFT can't give this model.
    """
    if getattr(config, "target_modules", None) == "all-linear":
        passed_by = {
            f"{name.rpartition('.')[2]}.out_proj" for name, module in model.named_modules()
            if all(hasattr(module, part) for part in ("conv1d", "out_proj", "A_log", "D"))
        }  # fmt: skip
        passed_by |= {
            name.rpartition(".")[2] for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and type(module).__module__.startswith("transformers.models")
            and not _projects(module)
        }  # fmt: skip
        if passed_by:
            config.exclude_modules = sorted({*(config.exclude_modules or []), *passed_by})
    try:
        return fuse(get_peft_model(model, config))
    except (ValueError, TypeError) as error:  # TypeError: a module to save that gets an adapter too
        raise InputError(
            f"--lora_target_modules: PEFT can't give {model.config.model_type} such an adapter "
            f"({' '.join(str(error).split())[:200]}). Name other modules, or train in full (--use_peft false)."
        ) from error


def _projects(module: nn.Linear) -> bool:
    """Whether a layer of a class of its own still maps (1, in) to (1, out), as an adapter beside it does."""
    with torch.no_grad():
        try:
            output = module(module.weight.new_zeros(1, module.in_features))
        except (RuntimeError, ValueError):  # projections in groups
            return False
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)


def refuse_prompt_learning(model: PreTrainedModel | PeftModel, what: str) -> None:
    """Raise InputError for an adapter of virtual tokens (prompt tuning, prefix tuning, P-tuning)."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise InputError(
            f"{what}: is an adapter of virtual tokens ({model.active_peft_config.peft_type.value}), which can't be "
            "sampled or scored here. Give a LoRA adapter, or a full model."
        )


def next_reward_name(policy: PeftModel) -> str:
    """The name of the next reward adapter beside the policy's own."""
    names = (REWARD, *(f"{REWARD}_{number}" for number in range(2, len(policy.peft_config) + 2)))
    return next(name for name in names if name not in policy.peft_config)


def fits_beside(policy: PeftModel, source: Source) -> bool:
    """Whether `add_frozen_adapter` can put a model beside the policy's own adapter.

    It must be a plain adapter of the policy's kind over the policy's base.
    """
    config = source.peft_config
    alone = ("trainable_token_indices", "target_parameters")  # PEFT wraps those for adapters that all have them
    return (
        config is not None
        and not any(
            why_alone(each) or any(getattr(each, setting, None) for setting in alone)
            for each in (config, *policy.peft_config.values())
        )
        and config.peft_type == policy.peft_type
        and source.base == policy.get_base_model().name_or_path
        and config.revision == policy.peft_config[policy.active_adapter].revision
        and saved_rows(source) is None  # they would replace the policy's embeddings
        and set(config.modules_to_save or []) <= {"score", "classifier"}
    )


def add_frozen_adapter(policy: PeftModel, source: Source, name: str) -> torch.nn.Linear:
    """Put a reward adapter beside the policy's own, over the same base.

    Returns:
        its score head, float32, frozen, from hidden states (…, d) to a score (…, 1).
    """
    assert source.peft_config is not None
    with loading(source.flag, source.name, "the adapter"):
        weights = load_peft_weights(source.adapter, device="cpu", revision=source.revision)
    heads = [key for key in weights if key.endswith("score.weight")]
    head = torch.nn.Linear(weights[heads[0]].shape[1], 1, bias=False, device=policy.device, dtype=torch.float32)
    head.weight.data.copy_(weights.pop(heads[0]))
    config = copy.deepcopy(source.peft_config)
    # both kinds of model have the same trunk, and the adapter belongs to its layers; the head is kept apart
    config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, True
    _add_adapter(policy, name, config, weights)
    check_finite(policy, source.flag, source.name)
    for parameter_name, parameter in policy.named_parameters():
        if f".{name}." in parameter_name:  # it is never trained, so it needs no more precision than its base
            parameter.data = parameter.data.to(policy.dtype)
    return head.requires_grad_(False)


def add_value_adapter(policy: PeftModel, origin: str) -> None:
    """Add a trainable adapter `value`: a copy of the adapter `origin`."""
    config = copy.deepcopy(policy.peft_config[origin])
    config.inference_mode, config.modules_to_save = False, None
    weights = get_peft_model_state_dict(policy, adapter_name=origin)
    _add_adapter(policy, VALUE, config, {key: value.float() for key, value in weights.items()})
    for name, parameter in policy.named_parameters():
        if f".{VALUE}." in name:
            parameter.requires_grad_(True)


def _add_adapter(policy: PeftModel, name: str, config: PeftConfig, weights: dict[str, torch.Tensor]) -> None:
    trainable = {parameter_name for parameter_name, p in policy.named_parameters() if p.requires_grad}
    policy.add_adapter(name, config)
    fuse(policy)  # layers that no adapter had before
    if not any(weight.is_meta for weight in weights.values()):  # those of a plan (rlhf/planning) hold nothing
        found = set_peft_model_state_dict(policy, weights, adapter_name=name)
        if found.unexpected_keys:
            raise InputError(f"The {name} adapter has weights that its base lacks: {found.unexpected_keys[:2]}.")
    for parameter_name, parameter in policy.named_parameters():
        parameter.requires_grad_(parameter_name in trainable)


def trunk(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformer without its head, with its adapters."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    return whole.base_model


def disable_dropout(module: nn.Module) -> None:
    """Disable all dropout, so that the ratio of new to old probabilities starts at 1."""
    disable_dropout_in_model(module)
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):  # functional dropout reads it on every forward
                setattr(part, name, 0.0)
