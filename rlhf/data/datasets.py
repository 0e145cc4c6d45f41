"""Any dataset → its splits, with columns and rows checked.

A dataset is a Hub id, a folder saved by `datasets`, a .jsonl/.json/.csv/.parquet file, or the word `starter`. Columns
are TRL's own formats (https://huggingface.co/docs/trl/dataset_formats):

- conversations: `messages`, or `prompt` + `completion`, or `text`
- prompts: `prompt` (text or messages); other columns are kept
- preference pairs: `chosen` and `rejected` (text or messages), and optionally `prompt`
- problems: `prompt`, and optionally `answer` and `solution` (see rlhf/tasks/problems.py)

With messages, the columns `tools` and `chat_template_kwargs` go to the chat template. Messages may be written as JSON
text, for example in a CSV file. Errors name a row as `datasets` counts them: the first is row 0, without the header.
In a folder of .jsonl, .json or .csv files they name the file too.
"""

import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    Json,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from pyarrow.parquet import ParquetFile
from trl import ScriptArguments
from trl.data_utils import get_dataset_column_names

from rlhf.comparisons import Prompt
from rlhf.data.files import read_rows
from rlhf.data.paths import DATA_FILES, need_dataset
from rlhf.errors import InputError
from rlhf.starter.model import STARTER
from rlhf.starter.splits import starter_splits

Row = dict[str, Any]  # a dataset's row, by column
SPLIT_SEED = 20
OWN_FILES = (".jsonl", ".json", ".csv")
CHAT_COLUMNS = {"messages", "prompt", "completion", "chosen", "rejected"}
ROLES = ("system", "user", "assistant", "tool")
TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of the parts of a content


@dataclass
class DatasetArguments(ScriptArguments):
    """TRL's ScriptArguments; without `dataset_name` the dataset is the starter."""

    def __post_init__(self) -> None:
        self.dataset_name: str = self.dataset_name or STARTER


def load_splits(script_args: ScriptArguments, part: str) -> tuple[Dataset, Dataset]:
    """The (train, test) splits of `--dataset_name`, or of the starter without it.

    The test split is `test`, or else `validation`, or else 10% of train: at most 500 rows, or 500 prompts where rows
    share prompts. Those rows don't depend on any seed, so no stage trains on what another stage evaluates on.

    Args:
        part: which part of the starter to take (see rlhf/starter/conversations.py); ignored for other datasets.

    Raises:
        InputError: if the dataset can't be found or read, is empty, or lacks the split.
    """
    splits = _checked_splits(script_args, part, need_train=True)
    return splits[script_args.dataset_train_split], splits[script_args.dataset_test_split]


def load_test_split(script_args: ScriptArguments) -> Dataset:
    """The test split alone, as `load_splits` gives it; the starter's is its part `held_out`.

    Raises:
        InputError: see `load_splits`; a dataset with a test split needs no train split.
    """
    return _checked_splits(script_args, "held_out", need_train=False)[script_args.dataset_test_split]


def load_first_split(script_args: ScriptArguments, names: Sequence[str]) -> Dataset:
    """All rows of the first of these splits that a dataset has.

    Raises:
        InputError: if the dataset can't be found or read, has none of the splits, or no rows.
    """
    name = script_args.dataset_name or STARTER
    splits = _read(name, "preference_pairs", script_args.dataset_config)
    found = next((splits[split] for split in names if split in splits), None)
    if not found:
        raise InputError(f"--dataset_name {name}: has no rows in a split {' or '.join(names)}; found "
                         f"{', '.join(splits) or 'nothing'}. Name one as --dataset_test_split.")  # fmt: skip
    return found


def _checked_splits(script_args: ScriptArguments, part: str, need_train: bool) -> dict[str, Dataset]:
    """All splits. The test split is always among them; without `need_train` the train split may be missing."""
    name = script_args.dataset_name or STARTER
    train_split, test_split = script_args.dataset_train_split, script_args.dataset_test_split
    if script_args.dataset_streaming:
        raise InputError("--dataset_streaming: these recipes check every row before they start. Leave it off.")
    splits = _read(name, part, script_args.dataset_config)
    if not splits:
        raise InputError(f"--dataset_name {name}: found no data in it.")
    if train_split not in splits and (need_train or test_split not in splits):
        raise InputError(
            f"--dataset_train_split {train_split}: {name} has no such split; found {sorted(splits)}. Name one of them."
        )
    if test_split == "test" and "test" not in splits and "validation" in splits:
        splits = {**splits, "test": splits["validation"]}
    if test_split not in splits:
        if test_split != "test":
            raise InputError(f"--dataset_test_split {test_split}: {name} has no such split; found {sorted(splits)}.")
        splits[train_split], splits["test"] = _halves(splits[train_split], name)
    for split in (train_split, test_split):
        if split in splits and len(splits[split]) == 0:
            raise InputError(f"--dataset_name {name}: split {split!r} is empty. Give a dataset with at least one row.")
    return splits


def _halves(whole: Dataset, name: str) -> tuple[Dataset, Dataset]:
    """Nine tenths of the rows, and a tenth. Rows with the same prompt, such as four replies' pairs, stay together."""
    if len(whole) < 2:
        print(f"{name}: has one row, so the evaluation is on the row that is trained on.")
        return whole, whole
    prompts = [json.dumps(prompt, default=str) for prompt in prompts_of_rows(whole)]
    count = len(set(prompts))
    if count in (1, len(whole)):
        size = min(500, max(1, len(whole) // 10))
        order = np.random.default_rng(SPLIT_SEED).permutation(len(whole))  # as in Dataset.train_test_split
        return part_of(whole, order[size:]), part_of(whole, order[:size])
    from sklearn.model_selection import GroupShuffleSplit  # takes as long to import as the command line to read

    by_prompt = GroupShuffleSplit(n_splits=1, test_size=min(500, max(1, count // 10)), random_state=SPLIT_SEED)
    train, test = next(by_prompt.split(prompts, groups=prompts))
    return part_of(whole, train), part_of(whole, test)


def part_of(whole: Dataset, rows: np.ndarray) -> Dataset:
    """Some rows. `Dataset.select` drops the index of rows that follow each other, and `place_of` needs it."""
    return whole._select_with_indices_mapping(rows)


def prompts_of_rows(rows: Dataset) -> list[Prompt | int]:
    """What each row's reply answers; the row's number where there is no prompt."""
    known = [column for column in ("prompt", "chosen", "messages") if column in rows.column_names]
    if not known:
        return [*range(len(rows))]
    return [_prompt_of(row, number) for number, row in enumerate(rows.select_columns(known))]


def _prompt_of(row: Row, number: int) -> Prompt | int:
    """What a row's reply answers: its prompt, or what stands before the first reply; without any, the row's number."""
    if row.get("prompt"):
        return row["prompt"]
    chosen, messages = row.get("chosen"), row.get("messages")
    if isinstance(chosen, list) and len(chosen) > 1:
        return chosen[:-1]
    if isinstance(messages, list):
        before = itertools.takewhile(lambda message: not _is_reply(message), messages)
        return list(before) or number
    return number


def _is_reply(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"  # rows aren't checked yet


def _read(name: str, part: str, config: str | None) -> dict[str, Dataset]:
    if name == STARTER:
        return starter_splits(part, config)
    path = Path(name).expanduser()
    try:
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            loaded = _from_disk(path, name)
        elif path.is_file():
            if path.suffix not in DATA_FILES:
                raise InputError(f"--dataset_name {name}: files end in {', '.join(DATA_FILES)}; found {path.suffix!r}.")
            if path.stat().st_size == 0:
                raise InputError(f"--dataset_name {name}: the file is empty.")
            own = path.suffix in OWN_FILES
            if not own:
                _check_parquet([path], name)
            loaded = read_rows(path, name) if own else load_dataset("parquet", data_files=str(path))
        elif config is None and (files := _files_by_split(path)):
            loaded = DatasetDict({split: _from_files(found, path, name) for split, found in files.items()})
        else:
            need_dataset(name)
            loaded = load_dataset(name, config)
    except InputError:
        raise
    except Exception as error:  # datasets raises many classes of exceptions for unreadable data
        cause = error.__cause__ or error
        raise InputError(
            f"--dataset_name {name}: can't be read ({type(cause).__name__}: {str(cause)[:200]}). Give a Hub id "
            f"(needs the network), a folder saved by datasets, a {'/'.join(DATA_FILES)} file, or 'starter'."
        ) from error
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    # a saved dataset may hide columns, or give tensors
    return {split: _with_parsed_chats(rows.with_format(None), name) for split, rows in splits.items()}


def _check_parquet(files: list[Path], name: str) -> None:
    """Refuse files of one split with a column twice or without rows, on which `datasets` fails."""
    count = 0
    for file in files:
        where = f"--dataset_name {name}" + ("" if str(file) == name else f": {file.name}")
        with ParquetFile(file) as found:
            names, facts = found.schema_arrow.names, found.metadata
        count += facts.num_rows
        if twice := [column for column in names if names.count(column) > 1]:
            raise InputError(f"{where}: has the column {twice[0]!r} twice. Rename one.")
        # `datasets` reads a file without row groups if another has rows
        if (facts.num_row_groups and not facts.num_rows) or (file == files[-1] and not count):
            raise InputError(f"{where}: has no rows. Remove it, or fill it.")


def _from_disk(folder: Path, name: str) -> Dataset | DatasetDict:
    try:
        return load_from_disk(str(folder))
    except IndexError as error:  # what `datasets` raises for a split without rows
        raise InputError(f"--dataset_name {name}: a split in it has no rows. Save it without that split.") from error


@dataclass
class FilesInfo(DatasetInfo):
    """What `datasets` knows of a dataset, and the number of rows of each file that it was read from, in their order."""

    files: dict[str, int] = field(default_factory=dict)


def _from_files(files: list[Path], folder: Path, name: str) -> Dataset:
    parts = {os.path.relpath(file, folder.resolve()): read_rows(file, name) for file in files}
    info = FilesInfo(files={file: len(rows) for file, rows in parts.items()})
    return concatenate_datasets([*parts.values()], info=info)


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The .jsonl, .json and .csv files of a folder by split, as `datasets` finds them; none if it has others.

    Raises:
        InputError: if it has both, of which `datasets` would read one kind.
    """
    if not folder.is_dir() or "configs:" in _card(folder):
        return {}
    try:
        patterns = get_data_patterns(str(folder.resolve()))
    except EmptyDatasetError:
        return {}
    found = DataFilesDict.from_patterns(patterns, base_path=str(folder.resolve()))
    files = {str(split): [Path(file) for file in files] for split, files in found.items()}
    files = {split: [file for file in named if file.suffix in DATA_FILES] for split, named in files.items()}
    files = {split: named for split, named in files.items() if named}
    read = [file for named in files.values() for file in named]
    kinds = sorted({file.suffix for file in read})
    if ".parquet" in kinds and len(kinds) > 1:
        raise InputError(f"--dataset_name {folder}: has {' and '.join(kinds)} files, of which one kind would be read. "
                         "Give one file, or a folder of one kind.")  # fmt: skip
    for named in files.values() if kinds == [".parquet"] else ():
        _check_parquet(named, str(folder))
    _say_unread(folder, read)
    return files if ".parquet" not in kinds else {}


def _say_unread(folder: Path, read: list[Path]) -> None:
    """Name the files that `datasets` passes over, as their names give no split. A run's own files are no rows."""
    names = {file.resolve() for file in read}
    others = [file.name for file in sorted(folder.rglob("[!.]*.*")) if
              file.suffix in (".jsonl", ".csv", ".parquet") and file.resolve() not in names
              and not any(part.startswith(".") for part in file.relative_to(folder).parts)]  # fmt: skip
    if others and not (folder / "run.json").exists():
        print(f"{folder}: not read, as their names give no split: {', '.join(others[:5])}.")


def _card(folder: Path) -> str:
    card = folder / "README.md"
    return card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0] if card.is_file() else ""


def _with_parsed_chats(dataset: Dataset, name: str) -> Dataset:
    """Columns of messages that arrive as JSON text, such as those of a CSV file, as messages."""
    for column in CHAT_COLUMNS & set(dataset.column_names):
        is_text = dataset.features[column] in (Value("string"), Value("large_string"))
        if not is_text or not len(dataset) or not _is_chat_text(dataset[0][column]):
            continue

        def parse(row: Row, number: int, column: str = column, dataset: Dataset = dataset) -> Row:
            try:
                return {column: json.loads(row[column] or "null")}
            except ValueError as error:
                place = f"--dataset_name {name}: column {column!r}, {place_of(dataset, number)}"
                raise InputError(f"{place}: messages written as text must be JSON ({error}).") from error

        features = Features({**dataset.features, column: Json()})
        dataset = dataset.map(parse, with_indices=True, features=features, desc=f"Reading {column}")
    return dataset


def _is_chat_text(value: object) -> bool:
    """Whether a text is a list of messages, or one, as JSON or nearly so (as Python writes it)."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return False
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return re.match(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:", value) is not None
    messages = parsed if isinstance(parsed, list) else [parsed]
    return bool(messages) and all(isinstance(message, dict) and message.get("role") in ROLES for message in messages)


def place_of(dataset: Dataset, number: int) -> str:
    """Where a row stands in the file or split that it was read from. `datasets` keeps that in its index."""
    index = dataset._indices
    row = number if index is None else index.column(0)[number].as_py()
    for file, count in getattr(dataset.info, "files", {}).items():
        if row < count:
            return f"row {row} of {file}"
        row -= count
    split = str(dataset.split or "train")
    return f"row {row}" if split == "train" else f"row {row} of split {split!r}"


def need_columns(dataset: Dataset, name: str, choices: list[set[str]]) -> set[str]:
    """The first of `choices` whose columns the dataset has.

    Raises:
        InputError: if it has none of them; the message lists the columns found.
    """
    found = set(get_dataset_column_names(dataset))
    for choice in choices:
        if choice <= found:
            return choice
    fewest = [choice for choice in choices if not any(other < choice for other in choices)]
    wanted = ", or ".join(" and ".join(f"'{column}'" for column in sorted(choice)) for choice in fewest)
    raise InputError(f"--dataset_name {name}: needs column {wanted}; found {sorted(found)}. {_advice(found)}")


def _advice(columns: set[str]) -> str:
    if any(";" in column or "\t" in column for column in columns):
        return "A .csv file is separated by commas."
    if any(column != column.strip() for column in columns):
        return "Remove the spaces around the names."
    return "Rename or add columns."


def refuse_columns(dataset: Dataset, name: str, reasons: dict[str, str]) -> None:
    """Raise InputError if the dataset has one of these columns; the message gives its reason."""
    for column, reason in reasons.items():
        if column in dataset.column_names:
            raise InputError(f"--dataset_name {name}: column {column!r}: {reason}")


def check_messages(dataset: Dataset, name: str, columns: set[str]) -> None:
    """Check every row of the text-or-messages columns.

    Raises:
        InputError: on an empty text, a list of something else than messages, an unknown role, an empty message, a
            content that isn't text, or a column with texts and messages. The error names the column and the row.
    """
    for column in sorted(columns):
        before: type | None = None
        for number, value in enumerate(dataset[column]):
            if problem := _problem(value, before, column):
                raise InputError(f"--dataset_name {name}: column {column!r}, {place_of(dataset, number)}{problem}")
            before = type(value)


def _problem(value: object, before: type | None, column: str) -> str | None:
    """What is wrong with a text or a list of messages, if anything.

    Args:
        before: the type of the row before.
    """
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return " is empty. Remove the row or fill it."
    if not isinstance(value, (str, list)):
        return f": text or a list of messages is needed; found {type(value).__name__}."
    if before not in (None, type(value)):
        found, others = ("text", "messages") if isinstance(value, str) else ("messages", "text")
        return f" is {found}, and the rows before are {others}. Make all rows the same."
    if isinstance(value, str):
        if _is_chat_text(value):
            return f" holds messages as text ({value[:40]!r}). Give lists of messages, or such text in every row."
        if column == "messages":
            return f" is the text {value[:40]!r}, and not JSON. Give a list of messages."
        return None
    return next(filter(None, map(_message_problem, value)), None)


def _message_problem(message: object) -> str | None:
    if isinstance(message, dict) and message.get("function_call"):
        return ": a message has 'function_call', OpenAI's old format. Write it as 'tool_calls'."
    if not isinstance(message, dict) or "role" not in message or not ({"content", "tool_calls"} & set(message)):
        return f": a message is {{'role': ..., 'content': ...}}; found {str(message)[:80]}."
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        return f": role {role!r} is unknown. Roles are {', '.join(ROLES)}."
    if isinstance(content, list):
        for part in content:
            is_text = isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type") in TEXT_PARTS
            if not is_text:
                found = part.get("type", part) if isinstance(part, dict) else part
                return f": the {role} message has a part {str(found)[:40]!r}; only text is taken here."
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        return f": the {role} message's content is {type(content).__name__}; text is needed."
    if (content or "").strip() or message.get("tool_calls") or (role in ("system", "tool") and content is not None):
        return None
    return f": the {role} message has no text. Remove the row or fill it."
