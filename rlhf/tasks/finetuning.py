"""Discriminative fine-tuning: labelled data → token ids, a pretrained body with a new head, and the loss.

The kind of task is read off the columns:

| columns                          | task                  | head                                |
|----------------------------------|-----------------------|-------------------------------------|
| `text`, `label`                  | single sentences      | AutoModelForSequenceClassification  |
| `text`, `text_pair`, `label`     | sentence pairs        | AutoModelForSequenceClassification  |
| `tokens`, `tags`                 | a tag for each word   | AutoModelForTokenClassification     |
| `question`, `context`, `answers` | answer spans (SQuAD)  | AutoModelForQuestionAnswering       |

A decoder reads the class at the last token, which has seen the whole text: the eos token, put there by the tokenizer
itself, so that the saved tokenizer does the same in `pipeline`. Between the two texts of a pair stands a newline.
Encoders keep their own [CLS] and [SEP].
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset
from peft import PeftModel, TaskType, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy, linear
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from rlhf.data.datasets import need_columns
from rlhf.errors import InputError
from rlhf.models.attention import group_attention
from rlhf.models.sources import Source, base_revision, is_decoder, usable_context
from rlhf.models.tokenizers import set_pad_token
from rlhf.run.processes import main_process

PLAIN = {"split_special_tokens": True}  # a control token that somebody wrote stays text
STRIDE = 64  # tokens that two windows of a long context share
MAX_ANSWER_LENGTH = 30  # tokens of a predicted span, as in transformers' run_qa.py


@dataclass
class FinetuneArguments:
    """What is trained of the model, on how much."""

    from_scratch: bool = field(
        default=False, metadata={"help": "The same network with fresh random weights: what pretraining is worth."}
    )
    freeze_body: bool = field(
        default=False, metadata={"help": "Train the head only, on the features of the pretrained body."}
    )
    lm_coef: float = field(
        default=0.0,
        metadata={"help": "λ of GPT-1's auxiliary objective: loss + λ · language model loss on the same texts."},
    )
    max_length: int = field(default=256, metadata={"help": "Tokens; longer texts are cut, contexts read in windows."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many rows, drawn with --seed; None: all."}
    )
    pad_token: str | None = field(default=None, metadata={"help": "Pad token, if the tokenizer's can't be used."})


class Kind(NamedTuple):
    """A kind of task."""

    columns: frozenset[str]
    auto_class: Any
    task_type: TaskType


KINDS = {
    "tags": Kind(frozenset({"tokens", "tags"}), AutoModelForTokenClassification, TaskType.TOKEN_CLS),
    "spans": Kind(frozenset({"question", "context", "answers"}), AutoModelForQuestionAnswering, TaskType.QUESTION_ANS),
    "pairs": Kind(frozenset({"text", "text_pair", "label"}), AutoModelForSequenceClassification, TaskType.SEQ_CLS),
    "sentences": Kind(frozenset({"text", "label"}), AutoModelForSequenceClassification, TaskType.SEQ_CLS),
}
LABEL_COLUMNS = {"tags": "tags", "pairs": "label", "sentences": "label"}


class Task(NamedTuple):
    """Labelled data whose labels are names."""

    kind: str  # a key of KINDS
    labels: list[str]  # the label set, from the training split; empty for spans
    train: Dataset
    test: Dataset


# ---------------------------------------------------------------------------------------------- labelled data


def read_task(train: Dataset, test: Dataset, name: str) -> Task:
    """Find the kind of task and its label set, and check every row.

    Args:
        name: of the dataset, for messages.

    Raises:
        InputError: on missing columns, an empty text, a row without label, labels that are no names or integers, fewer
            than two labels, test labels that training doesn't have, tags that don't match their tokens, or an answer
            that isn't in its context where it says.
    """
    columns = need_columns(train, name, [set(kind.columns) for kind in KINDS.values()])
    kind = next(key for key, entry in KINDS.items() if entry.columns == columns)
    need_columns(test, name, [columns])
    if kind == "spans":
        for split in (train, test):
            _check_spans(split, name)
        return Task(kind, [], train, test)
    column = LABEL_COLUMNS[kind]
    feature = _class_label(train, column)
    train, test = (_with_names(split, column, name) for split in (train, test))
    for split in (train, test):
        _check_texts(split, kind, name)
    known = set(feature.names if feature else _flat(train[column]))
    if unknown := sorted(set(_flat(test[column])) - known):
        raise InputError(
            f"--dataset_name {name}: test has the label {unknown[0]!r}, which no training row has; found "
            f"{sorted(known)[:10]}. Train on rows with it, or remove the test rows."
        )
    labels = list(feature.names) if feature else sorted(known)
    if len(labels) < 2:
        raise InputError(f"--dataset_name {name}: column {column!r} needs at least 2 different labels; found {labels}.")
    return Task(kind, labels, train, test)


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, list):
            yield from value
        else:
            yield value


def _class_label(dataset: Dataset, column: str) -> ClassLabel | None:
    feature = dataset.features[column]
    feature = getattr(feature, "feature", feature)  # of a list: its items'
    return feature if isinstance(feature, ClassLabel) else None


def _with_names(dataset: Dataset, column: str, name: str) -> Dataset:
    """The labels as text: the names of a ClassLabel, integers as they are written."""
    feature = _class_label(dataset, column)

    def named(label: Any, row: int) -> str:
        if label is None or label == "" or not isinstance(label, str | int) or (feature and label == -1):
            raise InputError(
                f"--dataset_name {name}: column {column!r}, row {row}: a label is a name or an integer; found "
                f"{label!r}. Fill it in or remove the row."
            )
        return feature.int2str(label) if feature and isinstance(label, int) else str(label)

    values = [
        [named(label, row) for label in value] if isinstance(value, list) else named(value, row)
        for row, value in enumerate(dataset[column])
    ]
    return dataset.remove_columns(column).add_column(column, values)


def _check_texts(dataset: Dataset, kind: str, name: str) -> None:
    for column in sorted(KINDS[kind].columns & {"text", "text_pair"}):
        for number, text in enumerate(dataset[column]):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"--dataset_name {name}: column {column!r}, row {number} is empty. Remove it.")
    if kind != "tags":
        return
    for number, (tokens, tags) in enumerate(zip(dataset["tokens"], dataset["tags"], strict=True)):
        where = f"--dataset_name {name}: row {number}"
        if not tokens or len(tokens) != len(tags):
            raise InputError(f"{where} has {len(tokens or [])} tokens and {len(tags or [])} tags; one tag a token.")
        if bad := [token for token in tokens if not isinstance(token, str) or not token.strip()]:
            raise InputError(f"{where}: {bad[0]!r} is no word. Remove such tokens and their tags.")


def _check_spans(dataset: Dataset, name: str) -> None:
    for number, row in enumerate(dataset):
        where, answers = f"--dataset_name {name}: row {number}", row["answers"]
        for column in ("question", "context"):
            if not isinstance(row[column], str) or not row[column].strip():
                raise InputError(f"{where}: column {column!r} is text; found {row[column]!r}. Remove or complete it.")
        if not isinstance(answers, dict) or not answers.get("text") or not answers.get("answer_start"):
            raise InputError(
                f"{where}: 'answers' is {{'text': [...], 'answer_start': [...]}} with at least one answer, as in "
                f"SQuAD 1.1; found {str(answers)[:80]}."
            )
        for text, start in zip(answers["text"], answers["answer_start"], strict=False):
            if not text.strip() or row["context"][start : start + len(text)] != text:
                raise InputError(
                    f"{where}: the answer {text!r} is not at character {start} of the context. Correct answer_start."
                )


# ---------------------------------------------------------------------------------------------- checks of the flags


def finetuning_config(source: Source, task: Task) -> PretrainedConfig:
    """The model's config with the label names and the head's kind of problem.

    Raises:
        InputError: if the model is an adapter, or has both an encoder and a decoder.
    """
    if source.adapter is not None:
        raise InputError(
            f"--model_name_or_path {source.name}: is an adapter. Merge it into its base first (merge_and_unload), or "
            "give the base."
        )
    config = AutoConfig.from_pretrained(source.base, revision=source.revision)
    if config.is_encoder_decoder:
        raise InputError(
            f"--model_name_or_path {source.name}: {config.model_type} has an encoder and a decoder; this recipe takes "
            "one or the other. Teach it tasks as text instead."
        )
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: number for number, label in enumerate(task.labels)}
    if task.kind in ("sentences", "pairs"):
        config.problem_type = "single_label_classification"
    return config


def check_arguments(
    args: FinetuneArguments, use_peft: bool, source: Source, config: PretrainedConfig, task: Task
) -> None:
    """Refuse flags that can't work together, with this model or on this task.

    Raises:
        InputError: with the flag and what to do.
    """
    text = config.get_text_config()
    if args.lm_coef < 0:
        raise InputError(f"--lm_coef {args.lm_coef}: must be at least 0.")
    if args.lm_coef and not is_decoder(config):
        raise InputError(
            f"--lm_coef {args.lm_coef}: {config.model_type} is an encoder, which has no next token to predict. Leave "
            "it 0, or take a decoder."
        )
    if args.lm_coef and task.kind not in ("sentences", "pairs"):
        raise InputError(f"--lm_coef {args.lm_coef}: is for sentences and pairs of them; this dataset has {task.kind}.")
    if args.lm_coef and args.freeze_body:
        raise InputError(f"--lm_coef {args.lm_coef}: changes the body alone; --freeze_body true keeps it. Drop one.")
    if args.freeze_body and use_peft:
        raise InputError("--freeze_body true trains the head alone, --use_peft true adapters in the body. Drop one.")
    if args.from_scratch and (use_peft or args.freeze_body):
        other = "--use_peft true" if use_peft else "--freeze_body true"
        raise InputError(f"--from_scratch true: with {other} random weights would stay as they are. Drop one.")
    if args.from_scratch and args.lm_coef and not text.tie_word_embeddings:
        raise InputError(
            "--from_scratch true: --lm_coef needs a model whose input and output embeddings are one; in "
            f"{source.name} they differ. Leave --lm_coef 0."
        )
    rows, context = len(task.train), usable_context(text)
    if args.max_train_samples is not None and not 1 <= args.max_train_samples <= rows:
        raise InputError(f"--max_train_samples {args.max_train_samples}: there are {rows} rows. Take 1 to that.")
    if not 8 <= args.max_length <= (context or args.max_length):
        raise InputError(f"--max_length {args.max_length}: from 8 to the model's context of {context} tokens.")


# ---------------------------------------------------------------------------------------------- token ids


def load_reading_tokenizer(source: Source, config: PretrainedConfig, pad_token: str | None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right; a decoder's puts eos behind the text, a newline between two texts.

    Raises:
        InputError: if the tokenizer isn't a fast one (offsets are needed), or has no eos or pad token.
    """
    tokenizer = AutoTokenizer.from_pretrained(source.base, revision=source.revision)
    if not tokenizer.is_fast:
        raise InputError(
            f"The tokenizer of {source.name} is not one of the tokenizers library (tokenizer.json). Convert it."
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if not is_decoder(config):
        if tokenizer.pad_token_id is None:
            raise InputError(
                f"The tokenizer of {source.name} has no pad token. Set pad_token in tokenizer_config.json."
            )
        return tokenizer
    if tokenizer.eos_token is None:
        raise InputError(f"The tokenizer of {source.name} has no eos_token, at which the class is read. Set one.")
    set_pad_token(tokenizer, source, pad_token)
    starts_with_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    bos = [tokenizer.bos_token] if starts_with_bos else []
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*bos, "$A", tokenizer.eos_token],
        pair=[*bos, "$A", "newline", "$B:1", f"{tokenizer.eos_token}:1"],
        special_tokens=[
            *((token, tokenizer.convert_tokens_to_ids(token)) for token in {*bos, tokenizer.eos_token}),
            {"id": "newline", "ids": newline, "tokens": tokenizer.convert_ids_to_tokens(newline)},
        ],
    )
    return tokenizer


def finetuning_rows(
    rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, what: str
) -> Dataset:
    """Rows for the Trainer: `input_ids`, `attention_mask` and what the head learns.

    - sentences, pairs: `labels`, the label's number. Longer texts are cut; how many is printed.
    - tags: `labels` of the tokens, -100 but for the first token of each word, and `first_tokens`, the number of that
      token for each word (-1 if the word was cut off).
    - spans: one row per window of the context; `start_positions` and `end_positions` are tokens of the first answer, or
      of [CLS] (encoders) or eos (decoders) if the window hasn't got all of it; `example` is the number of its row and
      `offsets` the characters of each of its context tokens, [-1, -1] for all other tokens.

    Args:
        what: name of the split, for the message.
    """
    numbers = {label: number for number, label in enumerate(task.labels)}
    if task.kind == "spans":
        encode, options = _encode_spans(tokenizer, max_length), {"with_indices": True}
    elif task.kind == "tags":
        encode, options = _encode_tags(tokenizer, max_length, numbers), {}
    else:
        encode, options = _encode_texts(tokenizer, max_length, numbers), {}
    encoded = rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {what}", **options)
    if "cut" in encoded.column_names:
        if (cut := sum(encoded["cut"])) and main_process():
            print(f"{what}: {cut} of {len(encoded)} texts are longer than --max_length {max_length} and were cut.")
        encoded = encoded.remove_columns("cut")
    return encoded


def _encode_texts(tokenizer: PreTrainedTokenizerBase, max_length: int, numbers: dict[str, int]):
    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length, **PLAIN)
        cut = [bool(encoding.overflowing) for encoding in encoded.encodings]
        return {**encoded, "labels": [numbers[label] for label in batch["label"]], "cut": cut}

    return encode


def _encode_tags(tokenizer: PreTrainedTokenizerBase, max_length: int, numbers: dict[str, int]):
    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(
            [" ".join(tokens) for tokens in batch["tokens"]], truncation=True, max_length=max_length, **PLAIN
        )
        labels, firsts = [], []
        for row, (tokens, tags) in enumerate(zip(batch["tokens"], batch["tags"], strict=True)):
            starts = np.cumsum([0, *(len(token) + 1 for token in tokens[:-1])]).tolist()
            found = [encoded.char_to_token(row, start) for start in starts]
            firsts.append([-1 if token is None else token for token in found])
            labels.append([-100] * len(encoded["input_ids"][row]))
            for token, tag in zip(found, tags, strict=True):
                if token is not None:
                    labels[-1][token] = numbers[tag]
        return {**encoded, "labels": labels, "first_tokens": firsts, "cut": [-1 in first for first in firsts]}

    return encode


def _encode_spans(tokenizer: PreTrainedTokenizerBase, max_length: int):
    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        longest = max(len(ids) for ids in tokenizer(batch["question"], **PLAIN)["input_ids"])
        if longest > max_length // 2:
            raise InputError(
                f"--max_length {max_length}: a question has {longest} tokens, more than half. Raise --max_length."
            )
        encoded = tokenizer(
            batch["question"], batch["context"], truncation="only_second", max_length=max_length,
            stride=min(STRIDE, max_length // 4), return_overflowing_tokens=True, return_offsets_mapping=True, **PLAIN,
        )  # fmt: skip
        examples, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        starts, ends, kept = [], [], []
        for window, example in enumerate(examples):
            kept.append([
                list(span) if sequence == 1 else [-1, -1]
                for span, sequence in zip(offsets[window], encoded.sequence_ids(window), strict=True)
            ])  # fmt: skip
            answers = batch["answers"][example]
            text = answers["text"][0]  # some of SQuAD's begin or end with a space, which no token of BERT's covers
            first = answers["answer_start"][0] + len(text) - len(text.lstrip())
            span = _token_span(kept[-1], first, first + len(text.strip()))
            if span is None:
                ids = encoded["input_ids"][window]
                nowhere = 0 if tokenizer.cls_token_id == ids[0] else len(ids) - 1
                span = (nowhere, nowhere)
            starts.append(span[0])
            ends.append(span[1])
        positions = {"start_positions": starts, "end_positions": ends}
        return {**encoded, **positions, "offsets": kept, "example": [indices[example] for example in examples]}

    return encode


def _token_span(offsets: list[list[int]], start: int, end: int) -> tuple[int, int] | None:
    """First and last token that share a character with [start, end), or None if not all of it is in the window."""
    inside = [number for number, (first, last) in enumerate(offsets) if first < end and last > start and first >= 0]
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return None
    return inside[0], inside[-1]


# ---------------------------------------------------------------------------------------------- model


def load_finetuning_model(
    source: Source,
    config: PretrainedConfig,
    task: Task,
    args: FinetuneArguments,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel | PeftModel:
    """The pretrained body with a new head; what is trained of it is what `args` and `--use_peft` say.

    The head, and whatever else the checkpoint lacks (BERT's pooler, if it was pretrained without pairs), is always
    trained, and saved with the adapter.

    Raises:
        InputError: if the architecture has no such head, or its body isn't in the checkpoint.
    """
    kind = KINDS[task.kind]
    head_class = kind.auto_class._model_mapping.get(type(config), None)
    if head_class is None:
        raise InputError(f"--model_name_or_path {source.name}: {config.model_type} has no {kind.auto_class.__name__}.")
    config.pad_token_id = tokenizer.pad_token_id
    common = {
        "dtype": model_args.dtype if model_args.dtype in ("auto", None) else getattr(torch, model_args.dtype),
        "attn_implementation": model_args.attn_implementation,
    }
    missing: set[str] = set()
    if args.from_scratch:
        model = kind.auto_class.from_config(config, **common)
    else:
        model, loading = kind.auto_class.from_pretrained(
            source.base, config=config, revision=base_revision(source), use_safetensors=True, output_loading_info=True,
            quantization_config=get_quantization_config(model_args), key_mapping=body_names(config, head_class),
            ignore_mismatched_sizes=True, **common,
        )  # fmt: skip
        missing = set(loading["missing_keys"]) | {key for key, *_ in loading["mismatched_keys"]}
        embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        if f"{embeddings}.weight" in missing:
            raise InputError(f"--model_name_or_path {source.name}: {head_class.__name__} finds no body in it.")
    if model_args.attn_implementation is None:
        group_attention(model)
    return _choose_trainable(model, missing, kind, args, model_args)


def body_names(config: PretrainedConfig, head_class: type[PreTrainedModel]) -> dict[str, str] | None:
    """`key_mapping` for from_pretrained where the head's class calls the body otherwise than the checkpoint does.

    LlamaForQuestionAnswering and its relatives say `transformer` where LlamaForCausalLM says `model`: without this they
    would start from random weights, with nothing but a warning.
    """
    saved = getattr(transformers, (config.architectures or [head_class.__name__])[0], head_class)
    before, after = saved.base_model_prefix, head_class.base_model_prefix
    return None if before == after else {rf"^{before}\.": f"{after}."}


def load_options(task: Task, config: PretrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` of the base has to be told before an adapter fits on it."""
    head_class = KINDS[task.kind].auto_class._model_mapping[type(config)]
    names = {"id2label": dict(enumerate(task.labels)), "key_mapping": body_names(config, head_class)}
    return {name: value for name, value in names.items() if value}


def _choose_trainable(
    model: PreTrainedModel, missing: set[str], kind: Kind, args: FinetuneArguments, model_args: ModelConfig
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
    # PEFT guards these against LoRA only if it is told of them before; the names it adds itself come too late for tags
    heads = {name.split(".")[0] for name in new if not name.startswith(body)}
    inner = {name.rpartition(".")[0] for name in new if name.startswith(body)}
    lora.modules_to_save = sorted({*heads, *inner, *(lora.modules_to_save or [])})
    return in_float32(get_peft_model(model, lora))


def in_float32(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """The model with float32 where it is trained: in bfloat16 small steps would be rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def language_model_head(source: Source, config: PretrainedConfig, model: torch.nn.Module) -> torch.Tensor:
    """The matrix (vocabulary, hidden size) that predicts the next token from a hidden state.

    The input embeddings where the model ties the two, as GPT-1 did; else the base's own output embeddings, frozen.
    """
    if config.get_text_config().tie_word_embeddings:
        return model.get_input_embeddings().weight
    whole = AutoModelForCausalLM.from_pretrained(
        source.base, revision=base_revision(source), dtype=model.dtype, use_safetensors=True
    )
    return whole.get_output_embeddings().weight.detach()


# ---------------------------------------------------------------------------------------------- loss


def language_model_loss(
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


class FinetuningTrainer(Trainer):
    """transformers' Trainer with GPT-1's auxiliary objective, L3 = L2 + λ · L1 (eq. 5), in training.

    Evaluation reports L2 alone, so that runs with different λ can be compared. With λ, the log has `lm_loss`, L1.
    """

    def __init__(self, *args: Any, lm_coef: float = 0.0, lm_head: torch.Tensor | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lm_coef, self.lm_head = lm_coef, lm_head
        self.lm_losses: list[torch.Tensor] = []
        # some heads take the number of items and some ignore it; a mean per batch is right for all of them
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.lm_coef or not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        outputs = model(**inputs, output_hidden_states=True)
        auxiliary = language_model_loss(
            outputs.hidden_states[-1], self.lm_head, inputs["input_ids"], inputs["attention_mask"]
        )
        self.lm_losses.append(auxiliary.detach())
        loss = outputs.loss + self.lm_coef * auxiliary
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.lm_losses and "loss" in logs:
            logs["lm_loss"] = torch.stack(self.lm_losses).mean().item()
            self.lm_losses.clear()
        super().log(logs, *args, **kwargs)


def data_collator(task: Task, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Pads a batch on the right, tags with -100."""
    collator = DataCollatorForTokenClassification if task.kind == "tags" else DataCollatorWithPadding
    return collator(tokenizer)


def share_right(prediction: Any) -> dict[str, float]:
    """`compute_metrics`: share of labels that are right (of the tagged words, or of spans with both ends right)."""
    if isinstance(prediction.predictions, tuple):
        found, right = zip(prediction.predictions, prediction.label_ids, strict=True), []
        right = [logits.argmax(-1) == position for logits, position in found]
        return {"accuracy": float(np.mean(right[0] & right[1]))}
    labelled = prediction.label_ids != -100
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1)[labelled] == prediction.label_ids[labelled]))}


# ---------------------------------------------------------------------------------------------- predictions


def predicted(task: Task, rows: Dataset, logits: Any) -> list[Any]:
    """What the model says about each test row.

    Args:
        rows: of `finetuning_rows` of the test split.
        logits: as Trainer.predict gives them: (N, L) for sentences and pairs, (N, T, L) for tags, a pair of (N, T) for
            spans, padded with -100.

    Returns:
        a label, a list of tags (None for a word that was cut off), or the text of a span, for each row of `task.test`.
    """
    if task.kind == "spans":
        return _predicted_spans(task.test["context"], rows, *logits[:2])
    numbers = logits.argmax(-1)
    if task.kind != "tags":
        return [task.labels[number] for number in numbers]
    return [
        [None if token < 0 else task.labels[numbers[row][token]] for token in firsts]
        for row, firsts in enumerate(rows["first_tokens"])
    ]


def _predicted_spans(contexts: list[str], rows: Dataset, starts: np.ndarray, ends: np.ndarray) -> list[str]:
    """The span of the context, in any of its windows, with the highest sum of start and end logit."""
    best: dict[int, tuple[float, str]] = {}
    for window, (example, offsets) in enumerate(zip(rows["example"], rows["offsets"], strict=True)):
        context = np.array([number for number, (first, _) in enumerate(offsets) if first >= 0])
        if not len(context):
            continue
        scores = starts[window][context][:, None] + ends[window][context][None, :]
        allowed = np.tril(np.triu(np.ones_like(scores)), MAX_ANSWER_LENGTH - 1) > 0
        scores = np.where(allowed, scores, -np.inf)
        first, last = np.unravel_index(scores.argmax(), scores.shape)
        if example not in best or scores[first, last] > best[example][0]:
            text = contexts[example][offsets[context[first]][0] : offsets[context[last]][1]]
            best[example] = (float(scores[first, last]), text.strip())
    return [best[number][1] if number in best else "" for number in range(len(contexts))]
