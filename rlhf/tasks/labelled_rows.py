"""Labelled data → token ids, and a model's logits → labels, tags or spans.

A decoder reads the class at the last token, which has seen the whole text. This is the eos token. The tokenizer itself
adds it, so the saved tokenizer does the same in `pipeline`. A newline separates the two texts of a pair. Encoders keep
their own [CLS] and [SEP].
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from rlhf.errors import InputError
from rlhf.models.sources import Source, is_decoder
from rlhf.models.tokenizers import need_embeddings, read_tokenizer, set_pad_token
from rlhf.run.processes import main_process
from rlhf.tasks.labelled import LabelledTask

Batch = dict[str, list[Any]]  # columns of several rows
PLAIN = {"split_special_tokens": True}  # a control token inside a text stays text
STRIDE = 64  # tokens that two windows of a long context share
MAX_ANSWER_LENGTH = 30  # tokens of a predicted span, as in transformers' run_qa.py


def load_reading_tokenizer(source: Source, config: PretrainedConfig, pad_token: str | None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right. A decoder's adds eos after the text and a newline between two.

    Raises:
        InputError: if the tokenizer isn't a fast one (offsets are needed), or has no eos or pad token.
    """
    tokenizer = read_tokenizer(source)
    if not tokenizer.is_fast:
        raise InputError(f"The tokenizer of {source.name} has no fast version (tokenizer.json). Convert it.")
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
    need_embeddings(tokenizer, source)
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
    rows: Dataset, task: LabelledTask, tokenizer: PreTrainedTokenizerBase, max_length: int, what: str
) -> Dataset:
    """Rows for the Trainer: `input_ids`, `attention_mask` and the head's targets.

    - sentences, pairs: `labels`, the label's number. Longer texts are cut; their number is printed.
    - tags: `labels` of the tokens, -100 except at the first token of each word, and `first_tokens`, the number of that
      token for each word (-1 if the word was cut off).
    - spans: one row per window of the context. `start_positions` and `end_positions` are the first and last token of
      the first answer, or [CLS] (encoders) or eos (decoders) if it is not wholly in the window. `example` is the number
      of the row, and `offsets` are the characters of each context token, [-1, -1] for all other tokens.

    Args:
        what: name of the split, for the message.
    """
    numbers = {label: number for number, label in enumerate(task.labels)}
    encode: Callable[..., Batch]
    if task.kind == "spans":
        encode = _encode_spans(tokenizer, max_length)
    elif task.kind == "tags":
        encode = _encode_tags(tokenizer, max_length, numbers)
    else:
        encode = _encode_texts(tokenizer, max_length, numbers)
    encoded = rows.map(
        encode, batched=True, with_indices=task.kind == "spans", remove_columns=rows.column_names,
        desc=f"Tokenizing {what}",
    )  # fmt: skip
    if "cut" in encoded.column_names:
        if (cut := sum(encoded["cut"])) and main_process():
            print(f"{what}: {cut} of {len(encoded)} texts are longer than --max_length {max_length} and were cut.")
        encoded = encoded.remove_columns("cut")
    return encoded


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase, max_length: int, numbers: dict[str, int]
) -> Callable[[Batch], Batch]:
    def encode(batch: Batch) -> Batch:
        encoded = tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length, **PLAIN)
        cut = [bool(encoding.overflowing) for encoding in encoded.encodings]
        return {**encoded, "labels": [numbers[label] for label in batch["label"]], "cut": cut}

    return encode


def _encode_tags(
    tokenizer: PreTrainedTokenizerBase, max_length: int, numbers: dict[str, int]
) -> Callable[[Batch], Batch]:
    def encode(batch: Batch) -> Batch:
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


def _encode_spans(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Batch, list[int]], Batch]:
    def encode(batch: Batch, indices: list[int]) -> Batch:
        longest = max(len(ids) for ids in tokenizer(batch["question"], **PLAIN)["input_ids"])
        if longest > max_length // 2:
            raise InputError(
                f"--max_length {max_length}: a question has {longest} tokens, more than half of it. Raise it."
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
            text = answers["text"][
                0
            ]  # no token of BERT's covers the space that some of SQuAD's answers begin or end with
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
    """First and last token of the characters [start, end), or None if the window lacks some of them.

    Args:
        offsets: characters of each token of the window, [-1, -1] outside the context.

    >>> _token_span([[-1, -1], [0, 3], [4, 9]], 1, 9), _token_span([[-1, -1], [0, 3]], 1, 9)
    ((1, 2), None)
    """
    inside = [number for number, (first, last) in enumerate(offsets) if first < end and last > start and first >= 0]
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return None
    return inside[0], inside[-1]


def data_collator(
    task: LabelledTask, tokenizer: PreTrainedTokenizerBase
) -> DataCollatorForTokenClassification | DataCollatorWithPadding:
    """Pads a batch on the right, tags with -100."""
    collator = DataCollatorForTokenClassification if task.kind == "tags" else DataCollatorWithPadding
    return collator(tokenizer)


def predict_labels(
    task: LabelledTask, rows: Dataset, logits: np.ndarray | tuple[np.ndarray, ...]
) -> list[str] | list[list[str | None]]:
    """The model's prediction for each test row.

    Args:
        rows: from `finetuning_rows` of the test split.
        logits: from Trainer.predict: (N, L) for sentences and pairs, (N, T, L) for tags padded with -100, a pair of
            (N, T) for spans padded with -100.

    Returns:
        a label, a list of tags (None for a word that was cut off), or the text of a span, for each row of `task.test`.
    """
    if isinstance(logits, tuple):
        return _predict_spans(task.test["context"], rows, *logits[:2])
    numbers = logits.argmax(-1)
    if task.kind != "tags":
        return [task.labels[number] for number in numbers]
    return [
        [None if token < 0 else task.labels[numbers[row][token]] for token in firsts]
        for row, firsts in enumerate(rows["first_tokens"])
    ]


def _predict_spans(contexts: list[str], rows: Dataset, starts: np.ndarray, ends: np.ndarray) -> list[str]:
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
