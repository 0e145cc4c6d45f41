"""Flags against a model's architecture, before its weights are read: it is built without any memory for them."""

import copy
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from rlhf.errors import InputError
from rlhf.models.adapters import new_adapter
from rlhf.models.sources import Source, base_config


def check_architecture(source: Source, auto_class: Any, attention: str | None, lora: LoraConfig | None) -> None:
    """Refuse an attention that the architecture lacks, and an adapter that would fit none of its layers.

    A model that can't be built this way passes: its loading says why.

    Args:
        auto_class: of transformers, such as AutoModelForCausalLM.
        attention: of --attn_implementation.
        lora: a new adapter.

    Raises:
        InputError: naming the flag.
    """
    if attention is None and lora is None:
        return
    try:
        model = _empty_model(source, auto_class, None)
    except Exception:
        return
    if attention is not None:
        try:
            _empty_model(source, auto_class, attention)
        except (ValueError, ImportError) as error:
            raise InputError(
                f"--attn_implementation {attention}: {source.name} can't be computed with it. {error}"
            ) from error
    if lora is not None:
        _check_adapter(source, model, lora)


def _check_adapter(source: Source, model: PreTrainedModel, lora: LoraConfig) -> None:
    names, weights = ([name for name, _ in each] for each in (model.named_modules(), model.named_parameters()))
    ends = sorted({".".join(name.split(".")[-2:]) for name in weights})
    for flag, wanted, there, advice in (
        ("target_modules", lora.target_modules, names, f"layer. {_layers(model)}"),
        ("modules_to_save", lora.modules_to_save, names, f"layer. {_layers(model)}"),
        ("target_parameters", lora.target_parameters, weights, f"parameter. Those it has end in {', '.join(ends)}."),
    ):
        listed = [] if wanted is None or isinstance(wanted, str) else wanted
        # PEFT refuses a list of which nothing fits, and passes over single names
        gone = [word for word in listed if not any(name == word or name.endswith(f".{word}") for name in there)]
        if gone:
            raise InputError(f"--lora_{flag} {gone[0]}: {source.name} has no such {advice}")
    plain = copy.copy(lora)
    plain.task_type = None  # PEFT would save a classifier's head, which who loads the model names
    new_adapter(model, plain)


def _layers(model: PreTrainedModel) -> str:
    """The sentence that names the layers which an adapter may be beside."""
    matrices = {
        name.removesuffix(".weight").rpartition(".")[2]
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and "emb" not in name and not name.endswith("wte.weight")
    }
    layers = ", ".join(sorted(matrices))
    return f"It has {layers}; 'all-linear' takes all but the output layer."


def _empty_model(source: Source, auto_class: Any, attention: str | None) -> PreTrainedModel:
    with torch.device("meta"):
        return auto_class.from_config(
            base_config(source), attn_implementation=attention, trust_remote_code=source.trust_remote_code
        )
