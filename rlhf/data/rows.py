"""Datasets → the rows that each trainer takes."""

from collections.abc import Callable

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, SFTConfig, is_conversational
from trl.data_utils import maybe_extract_prompt

from rlhf.data.datasets import Row, check_messages, load_splits, need_columns
from rlhf.data.encoding import (
    encode_conversation,
    encode_messages,
    encode_prompt,
    encode_reply,
    encode_text_with_end,
    is_seq2seq,
    tokens_needed,
)
from rlhf.data.pairs import Encoded, encode_pair
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


def sft_rows(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig | None = None,
    context_length: int | None = None,
) -> Dataset:
    """Rows for SFTTrainer: conversations as `input_ids` and `labels`, plain text in the column `text`.

    The loss of a conversation is taken on the assistant's messages; with `prompt` + `completion`, on those of the
    completion.

    Args:
        args: if its `completion_only_loss` is False, and `assistant_only_loss` too, the loss is taken on all tokens.
        context_length: of an encoder-decoder model, for `seq2seq_rows`.

    Raises:
        InputError: if columns are missing, a conversation has no reply, or `assistant_only_loss` meets plain text.
    """
    if is_seq2seq(tokenizer):
        return seq2seq_rows(dataset, name, tokenizer, args, context_length)
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


def seq2seq_rows(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig | None = None,
    context_length: int | None = None,
) -> Dataset:
    """Rows for an encoder-decoder model: `input_ids` of the prompt, and `labels`, the reply and eos.

    Each assistant message of a conversation, or of its completion, is a row of its own. Its prompt is all that comes
    before it. Prompts and replies longer than `args.max_length` or the context are cut at their end, and counted.

    Raises:
        InputError: if columns are missing, or a conversation has no reply.
    """
    columns = need_columns(dataset, name, [{"messages"}, {"prompt", "completion"}])
    check_messages(dataset, name, columns)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        rows: dict[str, list] = {"input_ids": [], "labels": []}
        for number in range(len(next(iter(batch.values())))):
            row = {column: batch[column][number] for column in batch}
            prompt, completion = row.get("prompt", []), row.get("completion", row.get("messages"))
            if isinstance(completion, str):
                turns = [(prompt, completion)]
            else:
                every = prompt + completion
                turns = [(every[:n], message["content"]) for n, message in enumerate(every)
                         if message["role"] == "assistant" and n >= max(1, len(prompt))]  # fmt: skip
            if not turns:
                raise InputError(
                    f"--dataset_name {name}: a conversation without an assistant message has nothing to learn."
                )
            rows["input_ids"] += [encode_prompt(tokenizer, before) for before, _ in turns]
            rows["labels"] += [encode_reply(tokenizer, reply) for _, reply in turns]
        return rows

    selected = dataset.select_columns(sorted(columns))
    rows = selected.map(encode, batched=True, remove_columns=selected.column_names, desc="Tokenizing conversations",
                        num_proc=args and args.dataset_num_proc)  # fmt: skip
    limit = min((n for n in (args and args.max_length, context_length) if n is not None), default=None)
    if limit is None:
        return rows
    long = sum(max(len(a), len(b)) > limit for a, b in zip(rows["input_ids"], rows["labels"], strict=True))
    if long:
        print(f"{name}: cut {long} of {len(rows)} rows, whose prompt or reply has more than {limit} tokens.")
    return _map(rows, lambda row: {key: ids[:limit] for key, ids in row.items()}, set(), "Cutting")


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
    rows = sft_rows(train, name, tokenizer, context_length=context_length)

    def encode(row: Row) -> Row:
        if is_seq2seq(tokenizer):
            prompt, reply = row["input_ids"], row["labels"]
            return {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}
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
    context_length: int | None = None,
    pairs: bool = False,
) -> Dataset:
    """Rows for RewardTrainer: `chosen_ids` and `rejected_ids`. Pairs that are too long are dropped and counted.

    TRL's RewardTrainer turns a row into the loss -log σ(score of chosen - score of rejected). It ignores other columns,
    such as `certainty`.

    Args:
        max_length: the limit that the user sets.
        context_length: the model's own limit.
        pairs: the model reads prompt and reply as a pair of texts (rlhf/data/pairs.py). The rows then also have
            `chosen_token_type_ids` and `rejected_token_type_ids`, if the tokenizer makes these.

    Raises:
        InputError: if columns are missing or no pair fits.
    """
    columns = need_columns(dataset, name, [{"prompt", "chosen", "rejected"}, {"chosen", "rejected"}])
    check_messages(dataset, name, columns)

    def encode(row: Row) -> Encoded:
        row = maybe_extract_prompt(row) if pairs and "prompt" not in row else row
        encoded = {column: _encode_preference(row, column, name, tokenizer, pairs) for column in ("chosen", "rejected")}
        return {
            f"{column}_{key.removeprefix('input_')}": ids for column, one in encoded.items() for key, ids in one.items()
        }

    selected = dataset.select_columns(sorted(columns))
    encoded = _map(selected, encode, set(), "Tokenizing preference pairs", num_proc)
    limits = [limit for limit in (max_length, context_length) if limit is not None]
    if not limits:
        return encoded
    limit, longest = min(limits), longest_of_pairs(encoded)
    kept = [number for number, length in enumerate(longest) if length <= limit]
    name_of_limit = f"--max_length {limit}" if limit == max_length else f"the model's context of {limit} tokens"
    if not kept:
        raise InputError(
            f"--dataset_name {name}: every pair is longer than {name_of_limit}; the shortest has {min(longest)}. "
            + ("Raise it." if limit == max_length else "Give shorter texts or another model.")
        )
    if len(kept) < len(longest):
        print(f"{name}: left out {len(longest) - len(kept)} of {len(longest)} pairs, longer than {name_of_limit}.")
    return encoded.select(kept)


def _encode_preference(row: Row, column: str, name: str, tokenizer: PreTrainedTokenizerBase, pairs: bool) -> Encoded:
    """The prompt of a row and the reply in one of its columns."""
    prompt, reply = row.get("prompt"), row[column]
    if isinstance(reply, str):
        if isinstance(prompt, list):
            raise InputError(f"--dataset_name {name}: 'prompt' is messages and {column!r} text. Make both messages.")
        if pairs:
            return encode_pair(tokenizer, prompt or "", reply)
        return {"input_ids": encode_text_with_end(tokenizer, (prompt or "") + reply)}
    # a conversation may repeat its prompt, or have it as a text in another column, as in UltraFeedback
    whole = not isinstance(prompt, list) or reply[: len(prompt)] == prompt
    messages = reply if whole else prompt + reply
    if pairs:
        return encode_pair(tokenizer, messages[:-1], messages[-1]["content"])
    return {"input_ids": encode_messages(tokenizer, messages)}


def longest_of_pairs(encoded: Dataset) -> list[int]:
    """The number of tokens of each pair's longer reply, prompt included."""
    return [max(len(a), len(b)) for a, b in zip(encoded["chosen_ids"], encoded["rejected_ids"], strict=True)]


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
    if context_length is not None and tokens_needed(tokenizer, longest, max_new_tokens) > context_length:
        raise InputError(
            f"--dataset_name {name}: the longest prompt has {longest} tokens and the reply up to {max_new_tokens}, "
            f"more than the model's context of {context_length}. Shorten the prompts or the reply length."
        )
    return rows
