"""Weights: language models, reward models and the policy that PPO trains."""

import copy
import os
import warnings

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.reward_trainer import suppress_seqcls_warning

from rlhf.errors import InputError
from rlhf.models.adapters import REFERENCE, new_adapter
from rlhf.models.attention import group_attention
from rlhf.models.checks import check_adapter, check_loaded, loading
from rlhf.models.sources import Source, base_config, base_revision, saved_rows, saved_shapes
from rlhf.models.tokenizers import end_ids

# weights that a language model lacks and a sequence classifier of its architecture has
HEADS = ("score.", "classifier.", "classification_head.", "pre_classifier.", "pooler.", "head.")


def _load_base(
    source: Source,
    model_args: ModelConfig,
    auto_class: type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification],
    new: tuple[str, ...] = (),
    **options: int,
) -> PreTrainedModel:
    """The base, with the embeddings of the size that the adapter was saved with.

    Args:
        new: see `check_loaded`.
        options: see `base_config`.
    """
    dtype = model_args.dtype if model_args.dtype in ("auto", None) else getattr(torch, model_args.dtype)
    config = base_config(source, **options)
    with loading(source.flag, source.name, "the model"):
        model, info = auto_class.from_pretrained(
            source.base,
            config=config,
            revision=base_revision(source),
            dtype=dtype,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=source.trust_remote_code,
            quantization_config=get_quantization_config(model_args),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
        )
    check_loaded(model, info, source.flag, source.name, new)
    rows = saved_rows(source)
    if rows not in (None, model.get_input_embeddings().weight.shape[0]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    if model_args.attn_implementation is None:
        group_attention(model)
    return model


def _with_adapter(source: Source, model: PreTrainedModel, trainable: bool) -> PeftModel:
    """The base with the adapter of `source`."""
    with loading(source.flag, source.name, "the adapter"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # check_adapter refuses them
        adapted = PeftModel.from_pretrained(model, source.adapter, revision=source.revision, is_trainable=trainable)
    check_adapter(adapted, "default", saved_shapes(source), source.flag, source.name)
    return adapted


def load_causal_lm(
    source: Source, model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, trainable: bool = True
) -> PreTrainedModel | PeftModel:
    """A language model to train or to sample from.

    Training continues an adapter's own weights. With `model_args.use_peft` a full model gets a new LoRA adapter;
    without, all its weights are trained.

    Raises:
        InputError: if the model can't be loaded, a part of it is missing, its weights are NaN, `source` is a reward
            adapter, or an adapter and `use_peft` is off.
    """
    if source.is_reward_adapter:
        raise InputError(f"{source.flag} {source.name}: is a reward adapter; a language model is needed here.")
    if trainable:
        _refuse_full_training_of_an_adapter(source, model_args)
    model = _load_base(source, model_args, AutoModelForCausalLM)
    model.generation_config.eos_token_id = end_ids(model, tokenizer)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    # With a frozen head, torch multiplies a slice of the hidden states row by row and copies the head for each row. A
    # forward of 64 x 50 tokens took 5.3 s on 2 cores, and 1.2 s with contiguous inputs.
    model.get_output_embeddings().register_forward_pre_hook(lambda _head, inputs: (inputs[0].contiguous(),))
    if source.adapter is not None:
        dtype = model.dtype
        model = _with_adapter(source, model, trainable)
        if not trainable:  # a frozen adapter needs no more precision than its base: 1.5 times as fast
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(dtype)
            model = place(model)
        return model
    if not trainable:
        return place(model)
    if model_args.use_peft:
        return new_adapter(model, _lora_config(model_args, TaskType.CAUSAL_LM))
    return model


def place(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Move a model to this process's accelerator, where no Trainer does it. Quantized models are there already."""
    if not torch.accelerator.is_available() or getattr(model, "is_quantized", False):
        return model
    kind = torch.accelerator.current_accelerator().type
    return model.to(torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))))


def _refuse_full_training_of_an_adapter(source: Source, model_args: ModelConfig) -> None:
    if source.adapter is not None and not model_args.use_peft:
        raise InputError(
            f"--use_peft false: {source.name} is an adapter, and full fine-tuning needs a full model. Give its base, "
            "or merge it (merge_and_unload), or leave --use_peft true to continue training the adapter."
        )


def _lora_config(model_args: ModelConfig, task_type: TaskType) -> LoraConfig:
    config = get_peft_config(model_args)
    config.task_type = task_type
    return config


def load_reward_model(
    source: Source,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trainable: bool = True,
    seed: int = 0,
) -> PreTrainedModel | PeftModel:
    """A sequence classifier with one output, the score.

    A reward adapter or a full classifier keeps its head. A language model or its adapter gets a new one.

    Args:
        seed: of a new head.

    Raises:
        InputError: if the model can't be loaded, its body is incomplete or NaN, or it is an adapter without weights in
            the layers (prompt tuning), from which no reward adapter can start.
    """
    if source.peft_config is not None and source.peft_config.is_prompt_learning:
        raise InputError(
            f"{source.flag} {source.name}: is a {source.peft_config.peft_type.value} adapter, which has no weights in "
            "the layers to start a reward model from. Give its base or a LoRA adapter."
        )
    if trainable:
        _refuse_full_training_of_an_adapter(source, model_args)
    with suppress_seqcls_warning():  # the warning says that the head is new; it is drawn or loaded below
        model = _load_base(source, model_args, AutoModelForSequenceClassification, HEADS, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    if source.is_reward_adapter:
        return _with_adapter(source, model, trainable)
    if source.adapter is not None:
        draw_score_head(model.score, seed)
        return _reward_adapter_from(source, model)
    if not _is_classifier(model):
        draw_score_head(model.score, seed)
    if trainable and model_args.use_peft:
        return new_adapter(model, _lora_config(model_args, TaskType.SEQ_CLS))
    return model


def _is_classifier(model: PreTrainedModel) -> bool:
    """Whether the weights were saved as those of a sequence classifier, with a head."""
    return "SequenceClassification" in (model.config.architectures or [""])[0]


def draw_score_head(head: nn.Linear, seed: int) -> None:
    """Draw a score head's weight (1, d) from a normal distribution with standard deviation 1/sqrt(d + 1).

    Source: Stiennon et al. (https://arxiv.org/abs/2009.01325) and
    https://github.com/vwxyzjn/summarize_from_feedback_details.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
    head.weight.data.copy_(weight.to(head.weight.device, head.weight.dtype))


def _reward_adapter_from(source: Source, classifier: PreTrainedModel) -> PeftModel:
    """A new adapter with the LoRA weights of a language model's adapter and the classifier's score head.

    Its task type is SEQ_CLS: under CAUSAL_LM, PEFT would neither train the head nor save it.
    """
    assert source.peft_config is not None
    config = copy.deepcopy(source.peft_config)
    if config.is_prompt_learning:
        raise InputError(
            f"{source.flag} {source.name}: is an adapter of virtual tokens ({config.peft_type.value}), which can't become "
            "a reward model. Give its base, a LoRA adapter or a full model."
        )
    config.task_type, config.inference_mode = TaskType.SEQ_CLS, False
    head = classifier.score.weight.detach().clone()
    model = new_adapter(classifier, config)
    with loading(source.flag, source.name, "the adapter"):
        weights = load_peft_weights(source.adapter, device="cpu", revision=source.revision)
    weights["base_model.model.score.weight"] = head
    with loading(source.flag, source.name, "the adapter"):
        set_peft_model_state_dict(model, weights)
    check_adapter(
        model, "default", {key: tuple(weight.shape) for key, weight in weights.items()}, source.flag, source.name
    )
    return model


def load_policy(
    source: Source,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    start: Source | None = None,
) -> PreTrainedModel | PeftModel:
    """The model that PPO trains. An adapter is loaded twice: a trainable copy, and a frozen one named `reference`.

    Args:
        start: the adapter to copy, if it is not that of `source`.
    """
    policy = load_causal_lm(start or source, model_args, tokenizer)
    if source.adapter is not None:
        with loading(source.flag, source.name, "the adapter"):
            policy.load_adapter(source.adapter, REFERENCE, revision=source.revision, is_trainable=False)
        check_adapter(policy, REFERENCE, saved_shapes(source), source.flag, source.name)
    return policy
