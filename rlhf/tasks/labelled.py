"""Labelled data: the columns determine the kind of task, and every row is checked.

| columns                          | task                  | head                                |
|----------------------------------|-----------------------|-------------------------------------|
| `text`, `label`                  | single sentences      | AutoModelForSequenceClassification  |
| `text`, `text_pair`, `label`     | sentence pairs        | AutoModelForSequenceClassification  |
| `tokens`, `tags`                 | a tag for each word   | AutoModelForTokenClassification     |
| `question`, `context`, `answers` | answer spans (SQuAD)  | AutoModelForQuestionAnswering       |
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset
from peft import TaskType
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from rlhf.data.datasets import need_columns
from rlhf.errors import InputError


class LabelKind(NamedTuple):
    """A kind of task."""

    columns: frozenset[str]
    auto_class: Any  # transformers' AutoModel class with the head
    task_type: TaskType  # PEFT's name of the head


LABEL_KINDS = {
    "tags": LabelKind(frozenset({"tokens", "tags"}), AutoModelForTokenClassification, TaskType.TOKEN_CLS),
    "spans": LabelKind(
        frozenset({"question", "context", "answers"}), AutoModelForQuestionAnswering, TaskType.QUESTION_ANS
    ),
    "pairs": LabelKind(frozenset({"text", "text_pair", "label"}), AutoModelForSequenceClassification, TaskType.SEQ_CLS),
    "sentences": LabelKind(frozenset({"text", "label"}), AutoModelForSequenceClassification, TaskType.SEQ_CLS),
}
LABEL_COLUMNS = {"tags": "tags", "pairs": "label", "sentences": "label"}


class LabelledTask(NamedTuple):
    """Labelled data whose labels are names."""

    kind: str  # a key of LABEL_KINDS
    labels: list[str]  # the label set, from the training split; empty for spans
    train: Dataset
    test: Dataset


def read_task(train: Dataset, test: Dataset, name: str) -> LabelledTask:
    """Find the kind of task and its label set, and check every row.

    Args:
        name: of the dataset, for messages.

    Raises:
        InputError: for missing columns, an empty text, a row without label, labels that are neither names nor integers,
            fewer than two labels, test labels that training lacks, tags that don't match their tokens, or an answer
            that is not at its `answer_start`.
    """
    columns = need_columns(train, name, [set(kind.columns) for kind in LABEL_KINDS.values()])
    kind = next(key for key, entry in LABEL_KINDS.items() if entry.columns == columns)
    need_columns(test, name, [columns])
    if kind == "spans":
        for split in (train, test):
            _check_spans(split, name)
        return LabelledTask(kind, [], train, test)
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
    return LabelledTask(kind, labels, train, test)


def _flat(values: Iterable[str | list[str]]) -> Iterator[str]:
    for value in values:
        if isinstance(value, list):
            yield from value
        else:
            yield value


def _class_label(dataset: Dataset, column: str) -> ClassLabel | None:
    feature = dataset.features[column]
    feature = getattr(feature, "feature", feature)  # of a list, its items' feature
    return feature if isinstance(feature, ClassLabel) else None


def _with_names(dataset: Dataset, column: str, name: str) -> Dataset:
    """The labels as text: names of a ClassLabel, integers in decimal."""
    feature = _class_label(dataset, column)

    def label_name(label: object, row: int) -> str:
        if label is None or label == "" or not isinstance(label, str | int) or (feature and label == -1):
            raise InputError(
                f"--dataset_name {name}: column {column!r}, row {row}: a label must be a name or an integer; "
                f"found {label!r}. Correct it or remove the row."
            )
        return feature.int2str(label) if feature and isinstance(label, int) else str(label)

    values = [
        [label_name(label, row) for label in value] if isinstance(value, list) else label_name(value, row)
        for row, value in enumerate(dataset[column])
    ]
    return dataset.remove_columns(column).add_column(column, values)


def _check_texts(dataset: Dataset, kind: str, name: str) -> None:
    for column in sorted(LABEL_KINDS[kind].columns & {"text", "text_pair"}):
        for number, text in enumerate(dataset[column]):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"--dataset_name {name}: column {column!r}, row {number} is empty. Remove it.")
    if kind != "tags":
        return
    for number, (tokens, tags) in enumerate(zip(dataset["tokens"], dataset["tags"], strict=True)):
        where = f"--dataset_name {name}: row {number}"
        if not tokens or len(tokens) != len(tags):
            raise InputError(
                f"{where} has {len(tokens or [])} tokens and {len(tags or [])} tags. Give one tag for each token."
            )
        if bad := [token for token in tokens if not isinstance(token, str) or not token.strip()]:
            raise InputError(f"{where}: {bad[0]!r} is not a word. Remove such tokens and their tags.")


def _check_spans(dataset: Dataset, name: str) -> None:
    for number, row in enumerate(dataset):
        where, answers = f"--dataset_name {name}: row {number}", row["answers"]
        for column in ("question", "context"):
            if not isinstance(row[column], str) or not row[column].strip():
                raise InputError(
                    f"{where}: column {column!r} must be text; found {row[column]!r}. Correct or remove the row."
                )
        if not isinstance(answers, dict) or not answers.get("text") or not answers.get("answer_start"):
            raise InputError(
                f"{where}: 'answers' must be {{'text': [...], 'answer_start': [...]}} with at least one answer, as "
                f"in SQuAD 1.1; found {str(answers)[:80]}."
            )
        for text, start in zip(answers["text"], answers["answer_start"], strict=False):
            if not text.strip() or row["context"][start : start + len(text)] != text:
                raise InputError(
                    f"{where}: the answer {text!r} is not at character {start} of the context. Correct answer_start."
                )
