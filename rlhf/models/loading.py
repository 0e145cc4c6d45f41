"""Weights: language models, reward models and the policy that PPO trains."""

import copy
import inspect
import math
import os
import warnings
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.reward_trainer import suppress_seqcls_warning

from rlhf.errors import InputError
from rlhf.models.adapters import REFERENCE, new_adapter, why_alone
from rlhf.models.architecture import check_architecture
from rlhf.models.attention import group_attention
from rlhf.models.causality import need_causal
from rlhf.models.checks import check_adapter, check_loaded, loading, made_whole
from rlhf.models.fused_lora import fuse
from rlhf.models.generation import seeded
from rlhf.models.padding import Layout, pad_neutrally, reads_the_last_token
from rlhf.models.seq2seq import decoder_prefix
from rlhf.models.sources import (
    Source,
    base_config,
    base_revision,
    is_half,
    language_model_class,
    saved_rows,
    saved_shapes,
)
from rlhf.models.tokenizers import end_ids


def _load_base(
    source: Source,
    model_args: ModelConfig,
    auto_class: Any,
    *,
    new_head: bool = False,
    **options: int,
) -> tuple[PreTrainedModel, set[str]]:
    """The base, with the embeddings of the size that the adapter was saved with.

    Args:
        new_head: see `check_loaded`.
        options: see `base_config`.

    Returns:
        the model, and the names of weights that are new.
    """
    dtype = model_args.dtype if model_args.dtype in ("auto", None) else getattr(torch, model_args.dtype)
    config = base_config(source, **options)
    if getattr(config, "attention_type", None) == "block_sparse":
        # BigBird's sparse attention depends on the padding of a batch, and a short batch switches it off for good
        config.attention_type = "original_full"
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
    check_loaded(model, info, source.flag, source.name, new_head=new_head)
    for module in model.modules():
        # bitsandbytes would pack 4-bit weights at the first forward pass without gradients, and have none ever after
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    rows = saved_rows(source)
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if model_args.attn_implementation is None:
        group_attention(model)
    return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


def _with_adapter(source: Source, model: PreTrainedModel, trainable: bool) -> PeftModel:
    """The base with the adapter of `source`."""
    with loading(source.flag, source.name, "the adapter"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # check_adapter refuses them
        adapted = PeftModel.from_pretrained(model, source.adapter, revision=source.revision, is_trainable=trainable)
    check_adapter(adapted, "default", saved_shapes(source), source.flag, source.name)
    return fuse(adapted)


@made_whole()
def load_causal_lm(
    source: Source, model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, trainable: bool = True
) -> PreTrainedModel | PeftModel:
    """A language model to train or to sample from: a causal one, or an encoder-decoder.

    Training continues an adapter's own weights. With `model_args.use_peft` a full model gets a new LoRA adapter;
    without, all its weights are trained.

    Raises:
        InputError: if the model can't be loaded, a part of it is missing, its weights are NaN, `source` is a reward
            adapter, an adapter and `use_peft` is off, or a model to train looks ahead.
    """
    if source.is_reward_adapter:
        raise InputError(f"{source.flag} {source.name}: is a reward adapter; a language model is needed here.")
    if trainable:
        _refuse_full_training_of_an_adapter(source, model_args)
    new = trainable and model_args.use_peft and source.adapter is None
    task = TaskType.SEQ_2_SEQ_LM if base_config(source).is_encoder_decoder else TaskType.CAUSAL_LM
    lora = _lora_config(model_args, task) if new else None
    check_architecture(source, language_model_class(source), model_args.attn_implementation, lora)
    model, _ = _load_base(source, model_args, language_model_class(source))
    if model.config.is_encoder_decoder:
        decoder_prefix(model)  # refuses a model without a start token
    model.generation_config.eos_token_id = end_ids(model, tokenizer)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    if _loading_zeroes_padding(model):
        _keep_padding_zero(model.get_input_embeddings(), tokenizer.pad_token_id)
    # With a frozen head, torch multiplies a slice of the hidden states row by row and copies the head for each row. A
    # forward of 64 x 50 tokens took 5.3 s on 2 cores, and 1.2 s with contiguous inputs.
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(lambda _head, inputs: (inputs[0].contiguous(),))
    if trainable and not model.config.is_encoder_decoder:  # PPO and RLOO try these
        need_causal(model, f"{source.flag} {source.name}")
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
        return new_adapter(model, _lora_config(model_args, task))
    return model


def _loading_zeroes_padding(model: PreTrainedModel) -> bool:
    """Whether transformers sets the pad token's embedding to zero in weights that it has just loaded (Youtu)."""
    embeddings = nn.Embedding(2, 4, padding_idx=0)
    nn.init.ones_(embeddings.weight)
    embeddings.weight._is_hf_initialized = True
    try:
        model._initialize_weights(embeddings, model.is_custom_code())
    except AttributeError:  # xLSTM initializes no layer but its own
        return False
    if bool(embeddings.weight[0].any()):
        return False
    with torch.device("meta"):  # with a pad token in its config, as it will be saved
        built = type(model)(copy.deepcopy(model.config))
    return getattr(built.get_input_embeddings(), "padding_idx", None) is not None


def _keep_padding_zero(embeddings: nn.Embedding, pad: int) -> None:
    """Set the pad token's embedding to zero and never train it.

    As the head's row, it would be trained and saved, and zero after the next loading: the saved model would not be the
    trained one.
    """

    def drop(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, torch.tensor([pad], device=gradient.device), 0.0)

    with torch.no_grad():
        embeddings.weight[pad] = 0.0
    if embeddings.weight.requires_grad:
        embeddings.weight.register_hook(drop)


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
    if model_args.lora_task_type not in ("CAUSAL_LM", task_type):  # the first is TRL's default
        raise InputError(
            f"--lora_task_type {model_args.lora_task_type}: the adapter that is trained here is of type "
            f"{task_type.value}. Leave the flag out."
        )
    config = get_peft_config(model_args)
    config.task_type = task_type
    return config


@made_whole()
def load_reward_model(
    source: Source,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trainable: bool = True,
    seed: int = 0,
) -> PreTrainedModel | PeftModel:
    """A sequence classifier with one output, the score; or with two labels (`one_score` of rlhf/rewards/model.py).

    A reward adapter or a full classifier keeps its head. Other models and adapters get a new one, and so does a
    classifier with another number of labels, if it is to be trained.

    Args:
        seed: of a new head.

    Raises:
        InputError: if the model can't be loaded, its body is incomplete or NaN, or it is an adapter without weights in
            the layers (prompt tuning), from which no reward adapter can start.
    """
    config = source.peft_config
    if config is not None and (config.is_prompt_learning or not hasattr(config, "modules_to_save")):
        raise InputError(
            f"{source.flag} {source.name}: is a {config.peft_type.value} adapter, which has no weights in "
            "the layers to start a reward model from. Give its base or a LoRA adapter."
        )
    if trainable:
        _refuse_full_training_of_an_adapter(source, model_args)
    _refuse_without_classifier(source, base_config(source), trainable)
    fresh = trainable and model_args.use_peft and source.adapter is None
    tried = _lora_config(model_args, TaskType.SEQ_CLS) if fresh else None
    check_architecture(source, AutoModelForSequenceClassification, model_args.attn_implementation, tried)
    labels = 1 if trainable else score_labels(source)
    new_head = trainable or source.is_reward_adapter
    with suppress_seqcls_warning(), seeded(seed):  # the warning says that the head is new
        model, new = _load_base(
            source, model_args, AutoModelForSequenceClassification, new_head=new_head, num_labels=labels
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    if source.is_reward_adapter:
        model = _with_adapter(source, model, trainable)
    else:
        if isinstance(getattr(model, "score", None), nn.Linear) and "score.weight" in new:
            draw_score_head(model.score, seed)
        if source.adapter is not None:
            model = _reward_adapter_from(source, model, new)
        elif trainable and model_args.use_peft:
            lora = _lora_config(model_args, TaskType.SEQ_CLS)
            lora.modules_to_save = _head_modules(model, new, lora.modules_to_save)
            model = new_adapter(model, lora)
    _take_what_is_known(model)
    return model


def _refuse_without_classifier(source: Source, config: PreTrainedConfig, trainable: bool) -> None:
    if type(config) not in AutoModelForSequenceClassification._model_mapping and "auto_map" not in vars(config):
        raise InputError(
            f"{source.flag} {source.name}: transformers has no sequence classifier of type {config.model_type}. Give "
            "another model."
        )
    if (config.architectures or [""])[0].endswith("ForCausalLM") and is_half(config):
        raise InputError(
            f"{source.flag} {source.name}: is the decoder of a {config.model_type} model, whose sequence classifier "
            "needs the encoder too. Give the whole model."
        )
    if trainable and getattr(config, "axial_pos_embds", False):
        raise InputError(
            f"{source.flag} {source.name}: {config.model_type} with axial positions trains only on rows of exactly "
            f"{math.prod(config.axial_pos_shape)} tokens. Give another model."
        )


def score_labels(source: Source) -> int:
    """The number of outputs of a classifier that was saved, full or as an adapter."""
    heads = [shape[0] for key, shape in saved_shapes(source).items() if ".lora_" not in key and len(shape) == 2]
    return min(heads, default=1) if source.is_reward_adapter else base_config(source).num_labels


def _head_modules(model: PreTrainedModel, new: set[str], named: list[str] | None) -> list[str] | None:
    """Modules that are trained whole and saved with an adapter: the head, and a pooler that the checkpoint lacks.

    PEFT itself adds `score` and `classifier`, but knows no other names. LoRA must not be put on them.
    """
    body = f"{model.base_model_prefix}."
    heads = {name.split(".")[0] for name, _ in model.named_parameters() if not name.startswith(body)}
    inner = {name.rpartition(".")[0] for name in new if name.startswith(body)}
    return named if heads | inner <= {"score"} else sorted({*heads, *inner, *(named or [])})


def _take_what_is_known(model: PreTrainedModel | PeftModel) -> None:
    """Let a classifier be called with arguments that it has not: TRL's RewardTrainer always passes `use_cache`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not reads_the_last_token(base) and pad_neutrally(base) is not Layout.RIGHT:
        return  # what reads the rows leaves such arguments out
    unknown = {"use_cache", "attention_mask", "token_type_ids"} - {*inspect.signature(base.forward).parameters}

    def drop(_model: nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, {name: value for name, value in settings.items() if name not in unknown}

    if unknown:
        model.register_forward_pre_hook(drop, with_kwargs=True)


def draw_score_head(head: nn.Linear, seed: int) -> None:
    """Draw a score head's weight (1, d) from a normal distribution with standard deviation 1/sqrt(d + 1).

    Source: Stiennon et al. (https://arxiv.org/abs/2009.01325) and
    https://github.com/vwxyzjn/summarize_from_feedback_details.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
    head.weight.data.copy_(weight.to(head.weight.device, head.weight.dtype))


def _reward_adapter_from(source: Source, classifier: PreTrainedModel, new: set[str]) -> PeftModel:
    """A new adapter with the weights of a language model's adapter and the classifier's score head.

    What the adapter trained of the language model's head is left out. The task type is SEQ_CLS: under CAUSAL_LM, PEFT
    would neither train the score head nor save it.

    Args:
        new: names of the weights that the base's checkpoint lacks.
    """
    assert source.peft_config is not None
    with loading(source.flag, source.name, "the adapter"):
        saved = load_peft_weights(source.adapter, device="cpu", revision=source.revision)
    body, outer = f"base_model.model.{classifier.base_model_prefix}.", "base_model.model."
    weights, left_out = {}, set()
    for key, weight in saved.items():
        part = key.removeprefix(outer).split(".")[0]
        if key.startswith(body) or not key.startswith(outer):  # what layers share is outside of the model (VB-LoRA)
            weights[key] = weight
        elif hasattr(classifier.base_model, part):
            # the classifiers of T5 and its relatives have the layers one level deeper than the language models
            weights[key.replace(outer, body, 1)] = weight
        else:
            left_out.add(part)
    if not weights:
        raise InputError(
            f"{source.flag} {source.name}: the adapter changes {' and '.join(sorted(left_out))} only, and a reward "
            f"model has no such layer. Give its base ({source.base}), or an adapter of other layers."
        )
    if left_out:
        print(f"{source.name}: its {' and '.join(sorted(left_out))} is left out; a reward model has no such layer.")
    config = copy.deepcopy(source.peft_config)
    config.task_type, config.inference_mode = TaskType.SEQ_CLS, False
    kept = [name for name in config.modules_to_save or [] if name not in left_out]
    config.modules_to_save = _head_modules(classifier, new, kept or None)
    model = new_adapter(classifier, config)
    own = get_peft_model_state_dict(model)
    weights = {key: own[key] for key in own if not key.startswith(body) or ".pooler." in key} | weights
    with loading(source.flag, source.name, "the adapter"):
        set_peft_model_state_dict(model, weights)
    check_adapter(
        model, "default", {key: tuple(weight.shape) for key, weight in weights.items()}, source.flag, source.name
    )
    return model


@made_whole()
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

    Raises:
        InputError: see `load_causal_lm`; or if an adapter changes the base, which the reference uses too.
    """
    for one in (source, start or source):
        if one.peft_config is not None and (why := why_alone(one.peft_config)):
            raise InputError(f"{one.flag} {one.name}: {why}")
    policy = load_causal_lm(start or source, model_args, tokenizer)
    if source.adapter is not None:
        with loading(source.flag, source.name, "the adapter"):
            policy.load_adapter(source.adapter, REFERENCE, revision=source.revision, is_trainable=False)
        check_adapter(policy, REFERENCE, saved_shapes(source), source.flag, source.name)
    return policy
