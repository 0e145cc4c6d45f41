"""Any dataset → conversations, prompts or preference pairs, and their token ids.

A dataset is a Hub id, a folder saved by `datasets`, a .jsonl/.json/.csv/.parquet file, or the word `starter`. Columns
are TRL's own formats (https://huggingface.co/docs/trl/dataset_formats):

- conversations: `messages`, or `prompt` + `completion`, or `text`
- prompts: `prompt` (text or messages); other columns travel along
- preference pairs: `chosen` and `rejected` (text or messages), and optionally `prompt`
- problems: `prompt`, mostly `answer`, and perhaps `solution` (see rlhf/tasks/problems.py)

Token ids of conversations are made here rather than in each trainer, for two reasons. A control token written inside a
message stays text. And a conversation ends with the token that ends the reply (templates often put a newline behind
it), so the reward model reads its score at the same token that a sampled reply ends with.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from sklearn.model_selection import GroupShuffleSplit
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, SFTConfig, is_conversational
from trl.data_utils import get_dataset_column_names, maybe_extract_prompt

from rlhf.comparisons import Messages, Task
from rlhf.errors import InputError
from rlhf.run.files import write_jsonl
from rlhf.starter.conversations import starter_dataset
from rlhf.starter.labeler import starter_preferences
from rlhf.starter.labels import finetuning_dataset
from rlhf.starter.model import STARTER
from rlhf.starter.problems import starter_problems

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLIT_SEED = 20
TASKS_FILE = "tasks.jsonl"
ROLES = ("system", "user", "assistant", "tool")


# ---------------------------------------------------------------------------------------------- loading


def looks_local(name: str) -> bool:
    """Whether a name that may be a Hub id is plainly a path: the Hub has no such ids, so asking it would be in vain."""
    return name.startswith((".", "/", "~", "outputs/")) or name.count("/") > 1


def load_splits(script_args: ScriptArguments, part: str) -> tuple[Dataset | None, Dataset]:
    """The (train, test) splits of `--dataset_name`.

    Held out is the split `test`, or else `validation`, or else 10% of train (at most 500 rows, or prompts where several
    rows share one). Which those are never changes, so that no stage trains on what another one, with another seed,
    evaluates on.

    Args:
        part: which part of the starter to take (see rlhf/starter/conversations.py); ignored for everything else.

    Raises:
        InputError: if the dataset can't be found or read, is empty, or lacks the split.
    """
    name = script_args.dataset_name = script_args.dataset_name or STARTER  # cards and messages name it, too
    train_split, test_split = script_args.dataset_train_split, script_args.dataset_test_split
    if script_args.dataset_streaming:
        raise InputError("--dataset_streaming: these recipes check every row before they start. Leave it off.")
    splits = _read(name, part, script_args.dataset_config)
    if not splits:
        raise InputError(f"--dataset_name {name}: found no data in it.")
    if train_split not in splits and (part != "held_out" or test_split not in splits):
        raise InputError(f"--dataset_train_split {train_split}: {name} has no such split; found {sorted(splits)}.")
    if test_split == "test" and "test" not in splits and "validation" in splits:
        splits = {**splits, "test": splits["validation"]}
    if test_split not in splits:
        if test_split != "test":
            raise InputError(f"--dataset_test_split {test_split}: {name} has no such split; found {sorted(splits)}.")
        splits[train_split], splits["test"] = _halves(splits[train_split])
    for split in (train_split, test_split):
        if split in splits and len(splits[split]) == 0:
            raise InputError(f"--dataset_name {name}: split {split!r} is empty. Give a dataset with at least one row.")
    return splits.get(train_split), splits[test_split]


def _halves(whole: Dataset) -> tuple[Dataset, Dataset]:
    """Nine tenths and a tenth. Rows with the same prompt (comparisons of four replies, say) stay together."""
    if len(whole) < 2:
        return whole, whole
    known = [column for column in ("prompt", "chosen") if column in whole.column_names]
    prompts = [
        json.dumps(_prompt_of(row, number), default=str) for number, row in enumerate(whole.select_columns(known))
    ]
    count = len(set(prompts))
    if count in (0, 1, len(whole)):
        halves = whole.train_test_split(test_size=min(500, max(1, len(whole) // 10)), seed=SPLIT_SEED)
        return halves["train"], halves["test"]
    by_prompt = GroupShuffleSplit(n_splits=1, test_size=min(500, max(1, count // 10)), random_state=SPLIT_SEED)
    train, test = next(by_prompt.split(prompts, groups=prompts))
    return whole.select(train), whole.select(test)


def _prompt_of(row: dict[str, Any], number: int) -> Any:
    """What a row's reply or replies follow; of a row without a prompt its number."""
    if row.get("prompt"):
        return row["prompt"]
    chosen = row.get("chosen")
    return chosen[:-1] if isinstance(chosen, list) and len(chosen) > 1 else number


def _read(name: str, part: str, config: str | None) -> dict[str, Dataset]:
    if name == STARTER and part == "preference_pairs":
        return {split: Dataset.from_list(rows) for split, rows in starter_preferences(config).items()}
    if name == STARTER and part == "finetune":
        return dict(finetuning_dataset(config))
    if name == STARTER and part == "problems":
        return dict(starter_problems(config))
    if name == STARTER:
        return dict(starter_dataset(part, config))
    path = Path(name).expanduser()
    try:
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            loaded = load_from_disk(str(path))
        elif path.is_file():
            if path.suffix not in FILE_TYPES:
                raise InputError(f"--dataset_name {name}: files end in {', '.join(FILE_TYPES)}; found {path.suffix!r}.")
            if path.stat().st_size == 0:
                raise InputError(f"--dataset_name {name}: the file is empty.")
            loaded = load_dataset(FILE_TYPES[path.suffix], data_files=str(path))
        elif path.is_dir() or not (path.suffix in FILE_TYPES or looks_local(name)):
            loaded = load_dataset(name, config)
        else:
            raise InputError(f"--dataset_name {name}: no such file or folder. Check the path.")
    except InputError:
        raise
    except Exception as error:  # datasets raises a different class for each way in which data can't be read
        cause = error.__cause__ or error
        raise InputError(
            f"--dataset_name {name}: can't be read ({type(cause).__name__}: {str(cause)[:200]}). Give a Hub id "
            f"(needs the network), a folder saved by datasets, a {'/'.join(FILE_TYPES)} file, or 'starter'."
        ) from error
    return dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}


def need_columns(dataset: Dataset, name: str, choices: list[set[str]]) -> set[str]:
    """The first of `choices` whose columns the dataset has.

    Raises:
        InputError: if it has none of them; the message lists the columns found.
    """
    found = set(get_dataset_column_names(dataset))
    for choice in choices:
        if choice <= found:
            return choice
    wanted = " or ".join(" + ".join(f"'{column}'" for column in sorted(choice)) for choice in choices)
    raise InputError(f"--dataset_name {name}: needs column {wanted}; found {sorted(found)}. Rename or add columns.")


def check_messages(dataset: Dataset, name: str, columns: set[str]) -> None:
    """Check every row of the text-or-messages columns.

    Raises:
        InputError: on an empty text, a list that is no list of messages, an unknown role, or an empty message; it
            names the column and the row.
    """
    for column in sorted(columns):
        for number, value in enumerate(dataset[column]):
            where = f"--dataset_name {name}: column {column!r}, row {number}"
            if isinstance(value, str) and value.strip():
                continue
            if value is None or value == [] or isinstance(value, str):
                raise InputError(f"{where} is empty. Remove the row or fill it.")
            if not isinstance(value, list):
                raise InputError(f"{where}: text or a list of messages is needed; found {type(value).__name__}.")
            for message in value:
                if not isinstance(message, dict) or "role" not in message or "content" not in message:
                    raise InputError(
                        f"{where}: a message is {{'role': ..., 'content': ...}}; found {str(message)[:80]}."
                    )
                if message["role"] not in ROLES:
                    raise InputError(f"{where}: role {message['role']!r} is unknown. Roles are {', '.join(ROLES)}.")
                if not isinstance(message["content"], str) or not message["content"].strip():
                    raise InputError(f"{where}: the {message['role']} message has no text. Remove the row or fill it.")


# ---------------------------------------------------------------------------------------------- token ids


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation under the tokenizer's chat template.

    A control token (a token that the tokenizer calls special) inside a message is encoded as the ordinary characters it
    is written with. Other added tokens, such as `</think>`, are left to the template, which may look for them. Without
    a generation prompt, what the template puts behind the last control token (a newline, mostly) is left out.
    """
    controls = sorted(tokenizer.convert_ids_to_tokens(sorted(control_ids(tokenizer))), key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(control) for control in [*controls, "\U000f0000", "\U000f0001"]))
    hidden: list[str] = []

    def hide(match: re.Match[str]) -> str:
        # private-use characters stand in for the control token while the template is rendered
        hidden.append(match.group())
        return f"\U000f0000{len(hidden) - 1}\U000f0001"

    safe = [{**message, "content": pattern.sub(hide, message["content"])} for message in messages]
    try:
        text = tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        roles = " → ".join(message["role"] for message in messages)
        raise InputError(f"The model's chat template refuses a conversation of {roles}: {error}.") from error
    ids: list[int] = []
    # a template may leave messages out or move them, so each stand-in is looked for where it is
    for place, part in enumerate(re.split("\U000f0000([0-9]+)\U000f0001", text)):
        if place % 2:
            ids += tokenizer(hidden[int(part)], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        else:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids if add_generation_prompt else _end_at_control_token(tokenizer, ids)


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all control tokens, also of those (<|im_end|> of many base models) that have no role such as eos."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _end_at_control_token(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    special = control_ids(tokenizer)
    end = len(ids)
    while end and ids[end - 1] not in special and not tokenizer.decode(ids[end - 1]).strip():
        end -= 1
    return ids[:end] if end and ids[end - 1] in special else ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt that a reply can follow: plain text as it is, messages with the generation prompt."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return encode_messages(tokenizer, prompt, add_generation_prompt=True)


def encode_text_with_end(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a plain text that end with eos."""
    ids = tokenizer(text)["input_ids"]
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages, first: int = 0) -> dict[str, list[int]]:
    """Token ids and labels of a conversation; only assistant messages from number `first` on have labels.

    Returns:
        `input_ids` and `labels` of equal length; the label is the token id, or -100 where no loss is taken.

    Raises:
        InputError: if the template renders earlier turns differently once later ones follow, so that the tokens of a
            reply can't be told from the rest.
    """
    ids = encode_messages(tokenizer, messages)
    labels = [-100] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < first:
            continue
        before = encode_messages(tokenizer, messages[:number], add_generation_prompt=True) if number else []
        through = encode_messages(tokenizer, messages[: number + 1])
        if ids[: len(before)] != before or ids[: len(through)] != through:
            raise InputError(
                "The chat template renders a conversation differently when it goes on, so the reply's tokens can't be "
                "found. Give one with --chat_template_path, or rows of 'prompt' and 'completion' with one reply each."
            )
        labels[len(before) : len(through)] = ids[len(before) : len(through)]
    return {"input_ids": ids, "labels": labels}


# ---------------------------------------------------------------------------------------------- what trainers take


def _map(
    dataset: Dataset,
    function: Callable[[dict[str, Any]], dict[str, Any]],
    keep: set[str],
    what: str,
    num_proc: int | None = None,
) -> Dataset:
    columns = [column for column in dataset.column_names if column not in keep]
    return dataset.map(function, remove_columns=columns, desc=what, num_proc=num_proc)


def sft_rows(dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, args: SFTConfig | None = None) -> Dataset:
    """Rows for SFTTrainer: conversations as `input_ids` and `labels`, plain text, in column `text`, as TRL takes it.

    Args:
        args: without it, or unless its `completion_only_loss` is False and `assistant_only_loss` too, the loss is taken
            on the assistant's messages (for `prompt` + `completion`: those of the completion).

    Raises:
        InputError: if columns are missing, a conversation has no reply, or `assistant_only_loss` meets plain text.
    """
    replies_only = args is None or args.assistant_only_loss or args.completion_only_loss is not False
    field = args.dataset_text_field if args else "text"
    columns = need_columns(dataset, name, [{"messages"}, {"prompt", "completion"}, {field}])
    check_messages(dataset, name, columns)
    dataset = dataset.select_columns(sorted(columns))
    if not is_conversational(dataset[0]):
        if args and args.assistant_only_loss:
            raise InputError(f"--assistant_only_loss: {name} has plain text, and no assistant in it. Leave it off.")
        # TRL adds the end-of-text token and takes the loss on the completion
        return dataset.rename_column(field, "text") if columns == {field} != {"text"} else dataset

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt, completion = (row["prompt"], row["completion"]) if "prompt" in row else ([], row["messages"])
        if not any(message["role"] == "assistant" for message in completion):
            raise InputError(
                f"--dataset_name {name}: a conversation without an assistant message has nothing to learn."
            )
        encoded = encode_conversation(tokenizer, prompt + completion, first=len(prompt))
        return encoded if replies_only else {**encoded, "labels": list(encoded["input_ids"])}

    return _map(dataset, encode, set(), "Tokenizing conversations", args and args.dataset_num_proc)


def texts_of(dataset: Dataset, name: str) -> list[str]:
    """Plain texts to pretrain on: the column `text`, or `messages` with the turns on lines of their own.

    Raises:
        InputError: if there is neither, or a row is empty.
    """
    columns = need_columns(dataset, name, [{"text"}, {"messages"}])
    check_messages(dataset, name, columns)
    if columns == {"text"}:
        return dataset["text"][:]
    return ["\n".join(message["content"] for message in messages) for messages in dataset["messages"]]


def language_model_rows(name: str | None, tokenizer: PreTrainedTokenizerBase, context_length: int | None) -> Dataset:
    """Rows of `input_ids` and `labels` (-100 where no loss is taken) for PPO-ptx; an empty dataset without a name.

    Conversations, prompt and completion, or text, as recipes/sft.py takes them. Longer rows are cut at the context.
    """
    if name is None:
        return Dataset.from_list([])
    train, _ = load_splits(ScriptArguments(dataset_name=name), "sft")
    assert train is not None
    rows = sft_rows(train, name, tokenizer)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        if "text" in row:
            row = {"prompt": "", "completion": row["text"]}
        if "completion" in row:
            ids = encode_text_with_end(tokenizer, row["prompt"] + row["completion"])
            before = len(encode_text_with_end(tokenizer, row["prompt"])) - 1 if row["prompt"] else 0
            row = {"input_ids": ids, "labels": [-100] * before + ids[before:]}
        return {key: row[key][:context_length] for key in ("input_ids", "labels")}

    return _map(rows, encode, set(), "Tokenizing texts")


def preference_rows(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    num_proc: int | None = None,
) -> Dataset:
    """Rows for RewardTrainer: `chosen_ids` and `rejected_ids`. Longer pairs than `max_length` are left out and counted.

    Raises:
        InputError: if columns are missing or no pair fits into `max_length`.
    """
    columns = need_columns(dataset, name, [{"prompt", "chosen", "rejected"}, {"chosen", "rejected"}])
    check_messages(dataset, name, columns)

    def encode_one(row: dict[str, Any], column: str) -> list[int]:
        prompt, reply = row.get("prompt"), row[column]
        if isinstance(reply, str):
            if isinstance(prompt, list):
                raise InputError(
                    f"--dataset_name {name}: 'prompt' is messages and {column!r} text. Make both messages."
                )
            return encode_text_with_end(tokenizer, (prompt or "") + reply)
        # a conversation may repeat its prompt, or have it as a text of its own beside (as UltraFeedback does)
        whole = not isinstance(prompt, list) or reply[: len(prompt)] == prompt
        return encode_messages(tokenizer, reply if whole else prompt + reply)

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        return {"chosen_ids": encode_one(row, "chosen"), "rejected_ids": encode_one(row, "rejected")}

    chosen_columns = dataset.select_columns(sorted(columns))
    encoded = _map(chosen_columns, encode, set(), "Tokenizing preference pairs", num_proc)
    if max_length is None:
        return encoded
    longest = [max(len(a), len(b)) for a, b in zip(encoded["chosen_ids"], encoded["rejected_ids"], strict=True)]
    kept = [number for number, length in enumerate(longest) if length <= max_length]
    if not kept:
        raise InputError(
            f"--max_length {max_length}: every pair of {name} is longer (the shortest has {min(longest)} tokens). "
            "Raise --max_length."
        )
    if len(kept) < len(longest):
        print(
            f"{name}: left out {len(longest) - len(kept)} of {len(longest)} pairs, longer than --max_length "
            f"{max_length}."
        )
    return encoded.select(kept)


def prompt_rows(
    dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, context_length: int | None
) -> Dataset:
    """Rows with `prompt` and its `input_ids`; the other columns travel along.

    `prompt` may be missing where it can be read off: `messages` (all before the last assistant message) or `chosen` and
    `rejected` (their common beginning).

    Raises:
        InputError: if a prompt and `max_new_tokens` don't fit into the model's context together.
    """
    columns = need_columns(dataset, name, [{"prompt"}, {"messages"}, {"chosen", "rejected"}])
    check_messages(dataset, name, columns)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        if "prompt" not in row and "messages" in row:
            messages = row["messages"]
            row["prompt"] = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        row = maybe_extract_prompt(row)
        return {"prompt": row["prompt"], "input_ids": encode_prompt(tokenizer, row["prompt"])}

    rows = _map(dataset, encode, set(dataset.column_names) - {"messages"}, "Tokenizing prompts")
    longest = max(len(ids) for ids in rows["input_ids"])
    if context_length is not None and longest + max_new_tokens > context_length:
        raise InputError(
            f"--dataset_name {name}: the longest prompt has {longest} tokens and the reply up to {max_new_tokens}, "
            f"more than the model's context of {context_length}. Shorten the prompts or the reply length."
        )
    return rows


def write_tasks(folder: str, tasks: list[Task]) -> None:
    """Write tasks.jsonl into a run's folder, whole or not at all."""
    write_jsonl(Path(folder) / TASKS_FILE, [task._asdict() for task in tasks])


def read_tasks(folder: str) -> list[Task] | None:
    """The tasks of a run's folder, or None if it has none.

    Raises:
        InputError: if tasks.jsonl holds something else.
    """
    file = Path(folder) / TASKS_FILE
    if not file.exists():
        return None
    tasks = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            tasks.append(Task(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise InputError(f"{file}, line {number}: not a task ({error}).") from error
    return tasks
