"""Discriminative fine-tuning: a pretrained body with a new head, and GPT-1's loss."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch.nn.functional import cross_entropy, linear
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from rlhf.errors import InputError
from rlhf.models.adapters import new_adapter
from rlhf.models.architecture import check_architecture
from rlhf.models.attention import group_attention
from rlhf.models.checks import check_finite, check_layers, loading, made_whole
from rlhf.models.sources import Source, base_config, base_revision, is_decoder, usable_context
from rlhf.run.ranges import NonNegativeFloat, PositiveInt, Range, check_ranges
from rlhf.run.trainers import WholeCheckpoints
from rlhf.tasks.labelled import LABEL_KINDS, LabelKind, LabelledTask


@dataclass
class FinetuneArguments:
    """Which part of the model is trained, and on how much data."""

    from_scratch: bool = field(
        default=False, metadata={"help": "Train the same network from random weights, to compare with pretraining."}
    )
    freeze_body: bool = field(
        default=False, metadata={"help": "Train the head only, on the features of the pretrained body."}
    )
    lm_coef: NonNegativeFloat = field(
        default=0.0,
        metadata={"help": "λ of GPT-1's auxiliary objective: loss + λ · language model loss on the same texts."},
    )
    max_length: Annotated[int, Range(low=8)] = field(
        default=256, metadata={"help": "Longest text in tokens; longer texts are cut, contexts read in windows."}
    )
    max_train_samples: PositiveInt | None = field(
        default=None, metadata={"help": "Train on this many rows, drawn with --seed; None: all."}
    )
    pad_token: str | None = field(default=None, metadata={"help": "Pad token, if the tokenizer's can't be used."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})


# ---------------------------------------------------------------------------------------------- checks of the flags


def finetuning_config(source: Source, task: LabelledTask) -> PretrainedConfig:
    """The model's config with the label names and the head's problem type.

    Raises:
        InputError: if the model is an adapter or an encoder-decoder.
    """
    if source.adapter is not None:
        raise InputError(
            f"--model_name_or_path {source.name}: is an adapter. Merge it into its base (merge_and_unload), or give "
            "the base."
        )
    config = base_config(source)
    if config.is_encoder_decoder:
        raise InputError(
            f"--model_name_or_path {source.name}: {config.model_type} is an encoder-decoder, which this recipe does "
            "not train. Give an encoder or a decoder, or teach it tasks as text with recipes/sft.py."
        )
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: number for number, label in enumerate(task.labels)}
    if task.kind in ("sentences", "pairs"):
        config.problem_type = "single_label_classification"
    return config


def check_arguments(
    args: FinetuneArguments, use_peft: bool, source: Source, config: PretrainedConfig, task: LabelledTask
) -> None:
    """Refuse flags that contradict each other, this model or this task.

    Raises:
        InputError: naming the flag.
    """
    text = config.get_text_config()
    check_ranges(args)
    if args.lm_coef and not is_decoder(config):
        raise InputError(
            f"--lm_coef {args.lm_coef}: {config.model_type} is an encoder, which predicts no next token. Leave it 0, "
            "or give a decoder."
        )
    if args.lm_coef and task.kind not in ("sentences", "pairs"):
        raise InputError(
            f"--lm_coef {args.lm_coef}: needs sentences or pairs of them; this dataset has {task.kind}. Leave it 0."
        )
    if args.lm_coef and args.freeze_body:
        raise InputError(f"--lm_coef {args.lm_coef}: trains the body only, which --freeze_body true freezes. Drop one.")
    if args.freeze_body and use_peft:
        raise InputError("--freeze_body true trains the head only, --use_peft true adapters in the body. Drop one.")
    if args.from_scratch and (use_peft or args.freeze_body):
        other = "--use_peft true" if use_peft else "--freeze_body true"
        raise InputError(f"--from_scratch true: with {other} the random weights would never be trained. Drop one.")
    if args.from_scratch and args.lm_coef and not text.tie_word_embeddings:
        raise InputError(
            "--from_scratch true: --lm_coef needs a model that ties input and output embeddings, which "
            f"{source.name} does not. Leave --lm_coef 0."
        )
    rows, context = len(task.train), usable_context(text)
    if args.max_train_samples is not None and args.max_train_samples > rows:
        raise InputError(f"--max_train_samples {args.max_train_samples}: there are {rows} rows. Give 1 to {rows}.")
    if context is not None and args.max_length > context:
        raise InputError(f"--max_length {args.max_length}: must be from 8 to the model's context of {context} tokens.")


# ---------------------------------------------------------------------------------------------- model


@made_whole()
def load_finetuning_model(
    source: Source,
    config: PretrainedConfig,
    task: LabelledTask,
    args: FinetuneArguments,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel | PeftModel:
    """The pretrained body with a new head. `args` and `--use_peft` choose the trained parameters.

    The head is always trained and saved with the adapter, and so is any other weight that the checkpoint lacks (BERT's
    pooler, if it was pretrained without pairs).

    Raises:
        InputError: if the architecture has no such head, or the checkpoint has no body for it.
    """
    kind = LABEL_KINDS[task.kind]
    head_class = kind.auto_class._model_mapping.get(type(config), None)
    if head_class is None:
        raise InputError(f"--model_name_or_path {source.name}: {config.model_type} has no {kind.auto_class.__name__}.")
    lora = get_peft_config(model_args) if model_args.use_peft else None
    check_architecture(source, kind.auto_class, model_args.attn_implementation, lora)
    config.pad_token_id = tokenizer.pad_token_id
    common = {
        "dtype": model_args.dtype if model_args.dtype in ("auto", None) else getattr(torch, model_args.dtype),
        "attn_implementation": model_args.attn_implementation,
        "trust_remote_code": source.trust_remote_code,
    }
    missing: set[str] = set()
    if args.from_scratch:
        with loading(source.flag, source.name, "the model"):
            model = kind.auto_class.from_config(config, **common)
    else:
        with loading(source.flag, source.name, "the model"):
            model, info = kind.auto_class.from_pretrained(
                source.base, config=config, revision=base_revision(source), use_safetensors=True,
                output_loading_info=True, quantization_config=get_quantization_config(model_args),
                key_mapping=body_names(config, head_class), ignore_mismatched_sizes=True, **common,
            )  # fmt: skip
        missing = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
        embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        if f"{embeddings}.weight" in missing:
            raise InputError(f"--model_name_or_path {source.name}: {head_class.__name__} finds no body in it.")
        check_layers(model, info, source.flag, source.name)
        check_finite(model, source.flag, source.name)
    if model_args.attn_implementation is None:
        group_attention(model)
    return _choose_trainable(model, missing, kind, args, model_args)


def body_names(config: PretrainedConfig, head_class: type[PreTrainedModel]) -> dict[str, str] | None:
    """`key_mapping` for from_pretrained if the head's class and the checkpoint name the body differently.

    LlamaForQuestionAnswering and its relatives name it `transformer`, LlamaForCausalLM names it `model`. Without the
    mapping they would start from random weights, with nothing but a warning.
    """
    saved = getattr(transformers, (config.architectures or [head_class.__name__])[0], head_class)
    before, after = saved.base_model_prefix, head_class.base_model_prefix
    return None if before == after else {rf"^{before}\.": f"{after}."}


def load_options(task: LabelledTask, config: PretrainedConfig) -> dict[str, object]:
    """Arguments of the base's `from_pretrained` that make the adapter fit, for the card."""
    head_class = LABEL_KINDS[task.kind].auto_class._model_mapping[type(config)]
    names = {"id2label": dict(enumerate(task.labels)), "key_mapping": body_names(config, head_class)}
    return {name: value for name, value in names.items() if value}


def _choose_trainable(
    model: PreTrainedModel, missing: set[str], kind: LabelKind, args: FinetuneArguments, model_args: ModelConfig
) -> PreTrainedModel | PeftModel:
    body = model.base_model_prefix + "."
    new = {name for name, _ in model.named_parameters() if not name.startswith(body) or name in missing}
    if args.freeze_body:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in new)
        return in_float32(model)
    if not model_args.use_peft:
        return in_float32(model)
    lora = get_peft_config(model_args)
    lora.task_type = kind.task_type
    # named here, or PEFT would put LoRA on them: the names it adds itself come too late for tags
    heads = {name.split(".")[0] for name in new if not name.startswith(body)}
    inner = {name.rpartition(".")[0] for name in new if name.startswith(body)}
    lora.modules_to_save = sorted({*heads, *inner, *(lora.modules_to_save or [])})
    return in_float32(new_adapter(model, lora))


def in_float32(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """The model with its trained parameters in float32: bfloat16 would round small steps away."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


@made_whole()
def language_model_head(source: Source, config: PretrainedConfig, model: torch.nn.Module) -> torch.Tensor:
    """The matrix (vocabulary, hidden size) that predicts the next token from a hidden state.

    If the model ties the two, as GPT-1 did, it is the input embeddings; else the base's output embeddings, frozen.
    """
    if config.get_text_config().tie_word_embeddings:
        return model.get_input_embeddings().weight
    with loading(source.flag, source.name, "the model"):
        whole = AutoModelForCausalLM.from_pretrained(
            source.base, config=base_config(source), revision=base_revision(source), dtype=model.dtype,
            use_safetensors=True, trust_remote_code=source.trust_remote_code,
        )  # fmt: skip
    return whole.get_output_embeddings().weight.detach()


# ---------------------------------------------------------------------------------------------- loss


def auxiliary_loss(
    hidden: torch.Tensor, head: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """L1 of GPT-1: the mean loss per predicted token of each text, averaged over the texts.

    Source: Radford et al. (2018), "Improving Language Understanding by Generative Pre-Training", eq. 1, averaged as in
    `model` of https://github.com/openai/finetune-transformer-lm/blob/ae7e86b55254339eba3929f786b04e82602cd51d/train.py

    Args:
        hidden: (B, T, d), the body's last hidden states.
        head: (V, d).
        input_ids: (B, T), int64; padded on the right.
        attention_mask: (B, T); 0 at padding.
    """
    predicted = attention_mask[:, 1:].bool()
    losses = cross_entropy(
        linear(hidden[:, :-1][predicted], head.to(hidden)).float(), input_ids[:, 1:][predicted], reduction="none"
    )
    weights = predicted / predicted.sum(dim=1, keepdim=True).clamp(min=1) / len(predicted)
    return (losses * weights[predicted]).sum()


class FinetuningTrainer(WholeCheckpoints):
    """transformers' Trainer with GPT-1's auxiliary objective, L3 = L2 + λ · L1 (eq. 5), in training.

    Evaluation reports L2 only, so that runs with different λ can be compared. With λ, the log has `lm_loss`, L1.
    """

    def __init__(self, *args: Any, lm_coef: float = 0.0, lm_head: torch.Tensor | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None and "start_positions" in self.train_dataset.column_names:
            raise InputError("--label_smoothing_factor: has no effect on spans. Leave it out.")
        self.lm_coef, self.lm_head = lm_coef, lm_head
        self._noted: dict[str, list[torch.Tensor | float]] = {}
        # some heads use the number of items and some ignore it; the mean per batch is right for all
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.lm_coef or not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        outputs = model(**inputs, output_hidden_states=True)
        auxiliary = auxiliary_loss(
            outputs.hidden_states[-1], self.lm_head, inputs["input_ids"], inputs["attention_mask"]
        )
        self._noted.setdefault("lm_loss", []).append(auxiliary.detach())
        loss = outputs.loss + self.lm_coef * auxiliary
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._noted and "loss" in logs:
            losses = self._noted.pop("lm_loss")
            logs["lm_loss"] = float(sum(losses)) / len(losses)
        super().log(logs, *args, **kwargs)


def share_right(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics`: `accuracy`, the share of right labels, tagged words, or spans with both ends right."""
    if isinstance(prediction.predictions, tuple):
        found, right = zip(prediction.predictions, prediction.label_ids, strict=True), []
        right = [logits.argmax(-1) == position for logits, position in found]
        return {"accuracy": float(np.mean(right[0] & right[1]))}
    labelled = prediction.label_ids != -100
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1)[labelled] == prediction.label_ids[labelled]))}
