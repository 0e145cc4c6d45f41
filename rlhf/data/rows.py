"""Datasets → the rows that each trainer takes."""

from collections.abc import Callable

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, SFTConfig, is_conversational
from trl.data_utils import maybe_extract_prompt

from rlhf.data.datasets import Row, check_messages, load_splits, need_columns
from rlhf.data.encoding import encode_conversation, encode_messages, encode_prompt, encode_text_with_end
from rlhf.errors import InputError


def _map(
    dataset: Dataset,
    function: Callable[[Row], Row],
    keep: set[str],
    what: str,
    num_proc: int | None = None,
) -> Dataset:
    columns = [column for column in dataset.column_names if column not in keep]
    return dataset.map(function, remove_columns=columns, desc=what, num_proc=num_proc)


def sft_rows(dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, args: SFTConfig | None = None) -> Dataset:
    """Rows for SFTTrainer: conversations as `input_ids` and `labels`, plain text in the column `text`.

    The loss of a conversation is taken on the assistant's messages; with `prompt` + `completion`, on those of the
    completion.

    Args:
        args: if its `completion_only_loss` is False, and `assistant_only_loss` too, the loss is taken on all tokens.

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

    def encode(row: Row) -> Row:
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
    """Rows of `input_ids` and `labels` (-100 where no loss is taken) for PPO-ptx; empty if no dataset is named.

    The dataset's columns are those that recipes/sft.py takes. Rows longer than the context are cut.
    """
    if name is None:
        return Dataset.from_list([])
    train, _ = load_splits(ScriptArguments(dataset_name=name), "sft")
    rows = sft_rows(train, name, tokenizer)

    def encode(row: Row) -> Row:
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
    """Rows for RewardTrainer: `chosen_ids` and `rejected_ids`. Pairs longer than `max_length` are dropped and counted.

    TRL's RewardTrainer turns a row into the loss -log σ(score of chosen - score of rejected). It ignores other columns,
    such as `certainty`.

    Raises:
        InputError: if columns are missing or no pair fits into `max_length`.
    """
    columns = need_columns(dataset, name, [{"prompt", "chosen", "rejected"}, {"chosen", "rejected"}])
    check_messages(dataset, name, columns)

    def encode_one(row: Row, column: str) -> list[int]:
        prompt, reply = row.get("prompt"), row[column]
        if isinstance(reply, str):
            if isinstance(prompt, list):
                raise InputError(
                    f"--dataset_name {name}: 'prompt' is messages and {column!r} text. Make both messages."
                )
            return encode_text_with_end(tokenizer, (prompt or "") + reply)
        # a conversation may repeat its prompt, or have it as a text in another column, as in UltraFeedback
        whole = not isinstance(prompt, list) or reply[: len(prompt)] == prompt
        return encode_messages(tokenizer, reply if whole else prompt + reply)

    def encode(row: Row) -> dict[str, list[int]]:
        return {"chosen_ids": encode_one(row, "chosen"), "rejected_ids": encode_one(row, "rejected")}

    selected = dataset.select_columns(sorted(columns))
    encoded = _map(selected, encode, set(), "Tokenizing preference pairs", num_proc)
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
    """Rows with `prompt`, its `input_ids`, and the dataset's other columns.

    Without a column `prompt`, the prompt is all of `messages` before the last assistant message, or the beginning that
    `chosen` and `rejected` share.

    Raises:
        InputError: if a prompt and `max_new_tokens` don't fit into the model's context together.
    """
    columns = need_columns(dataset, name, [{"prompt"}, {"messages"}, {"chosen", "rejected"}])
    check_messages(dataset, name, columns)

    def encode(row: Row) -> Row:
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
