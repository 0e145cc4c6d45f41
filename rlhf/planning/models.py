"""The models of a run, built from their configs on the meta device: shapes and dtypes without weights."""

import copy
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from trl import ModelConfig, get_peft_config

from rlhf.errors import InputError
from rlhf.models.adapters import REFERENCE, fits_beside, new_adapter, next_reward_name
from rlhf.models.attention import group_attention
from rlhf.models.loading import score_labels
from rlhf.models.sources import Source, base_config, is_decoder, language_model_class, saved_rows

Model: TypeAlias = PreTrainedModel | PeftModel


def check_plannable(source: Source, model_args: ModelConfig) -> None:
    """Refuse what no plan is made for.

    Raises:
        InputError: for quantized weights, models other than decoders, and adapters other than LoRA.
    """
    config = base_config(source)
    if model_args.load_in_4bit or model_args.load_in_8bit or getattr(config, "quantization_config", None):
        raise InputError(f"--plan: {source.name} would be quantized, and only plain weights are planned. Leave one of "
                         "them out.")  # fmt: skip
    if config.is_encoder_decoder or not is_decoder(config):
        raise InputError(
            f"--plan: {source.name} is a {config.model_type}; only decoders are planned. Leave --plan out."
        )
    if source.peft_config is not None and not isinstance(source.peft_config, LoraConfig):
        raise InputError(f"--plan: {source.name} is an adapter of type {source.peft_config.peft_type.value}; only LoRA "
                         "is planned. Leave --plan out.")  # fmt: skip


def language_model(
    source: Source, model_args: ModelConfig, on_cpu: bool, layers: int | None = None, trainable: bool = True
) -> Model:
    """The model that `load_causal_lm` would load.

    Args:
        on_cpu: with the attention that the recipes choose on a CPU.
        layers: with so many layers instead of all.
    """
    check_plannable(source, model_args)
    model = _base(source, language_model_class(source), model_args, on_cpu, layers)
    if source.adapter is not None:
        return _adapted(model, source.peft_config, trainable)
    if trainable and model_args.use_peft:
        lora = get_peft_config(model_args)
        lora.task_type = TaskType.CAUSAL_LM
        return new_adapter(model, lora)
    return model


def reward_model(
    source: Source, model_args: ModelConfig, on_cpu: bool, layers: int | None = None, trainable: bool = True
) -> Model:
    """The model that `load_reward_model` would load."""
    check_plannable(source, model_args)
    labels = 1 if trainable else score_labels(source)
    model = _base(source, AutoModelForSequenceClassification, model_args, on_cpu, layers, num_labels=labels)
    if source.adapter is not None:
        return _adapted(model, source.peft_config, trainable, TaskType.SEQ_CLS)
    if trainable and model_args.use_peft:
        lora = get_peft_config(model_args)
        lora.task_type = TaskType.SEQ_CLS
        return new_adapter(model, lora)
    return model


def policy_model(
    source: Source, start: Source, model_args: ModelConfig, on_cpu: bool, layers: int | None = None
) -> Model:
    """The model that `load_policy` would load: of an adapter also a frozen copy, the reference."""
    policy = language_model(start, model_args, on_cpu, layers)
    if source.adapter is not None:
        add_frozen(policy, REFERENCE, source.peft_config, keep_dtype=True)
    return policy


def scoring_model(
    policy: Model, source: Source, model_args: ModelConfig, on_cpu: bool, layers: int | None = None
) -> Model | str:
    """The reward model beside the policy; the adapter's name if it becomes one of the policy's own base."""
    if isinstance(policy, PeftModel) and fits_beside(policy, source):
        name = next_reward_name(policy)
        add_frozen(policy, name, source.peft_config)
        return name
    return reward_model(source, model_args, on_cpu, layers, trainable=False).requires_grad_(False)


def add_frozen(policy: PeftModel, name: str, config: PeftConfig | None, keep_dtype: bool = False) -> None:
    """Put a frozen adapter beside the policy's own.

    Args:
        keep_dtype: PEFT's float32; else the dtype of the base.
    """
    trained = {parameter_name for parameter_name, parameter in policy.named_parameters() if parameter.requires_grad}
    own = copy.deepcopy(config)
    assert own is not None  # the source is an adapter
    own.task_type, own.modules_to_save, own.inference_mode = TaskType.CAUSAL_LM, None, True
    policy.add_adapter(name, own)
    for parameter_name, parameter in policy.named_parameters():
        parameter.requires_grad_(parameter_name in trained)
        if f".{name}." in parameter_name and not keep_dtype:
            parameter.data = parameter.data.to(policy.dtype)


def _base(
    source: Source, auto_class: Any, model_args: ModelConfig, on_cpu: bool, layers: int | None, **options: int
) -> PreTrainedModel:
    config = base_config(source, **options)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = min(layers, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
    named = model_args.dtype if model_args.dtype not in ("auto", None) else None
    dtype = getattr(torch, named) if named else config.dtype or torch.float32
    with torch.device("meta"):
        model = auto_class.from_config(
            config,
            dtype=dtype,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=source.trust_remote_code,
        )
        rows = saved_rows(source)
        if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
    model.config.pad_token_id = model.config.pad_token_id or 0  # a classifier needs one
    if model_args.attn_implementation is None and on_cpu:
        group_attention(model)
    return model


def _adapted(
    model: PreTrainedModel, config: PeftConfig | None, trainable: bool, task: TaskType = TaskType.CAUSAL_LM
) -> PeftModel:
    own = copy.deepcopy(config)
    assert own is not None  # the source is an adapter
    own.task_type, own.inference_mode = task, not trainable
    adapted = new_adapter(model, own)
    return adapted if trainable else adapted.requires_grad_(False)


def parameters(*models: nn.Module) -> tuple[int, int]:
    """All parameters of models, and the trained ones. Weights that are tied or shared count once."""
    every = {id(parameter): parameter for model in models for parameter in model.parameters()}.values()
    return sum(p.numel() for p in every), sum(p.numel() for p in every if p.requires_grad)


def like_layers(model: nn.Module) -> int:
    """The number of a model's layers if they are all alike, else 0."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config()
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    layers = next((found for found in lists if len(found) == getattr(config, "num_hidden_layers", None)), None)
    if layers is None or len({*(getattr(config, "layer_types", None) or ["one"])}) > 1:
        return 0
    shapes = {str([(name, parameter.shape) for name, parameter in layer.named_parameters()]) for layer in layers}
    return len(layers) if len(shapes) == 1 else 0
