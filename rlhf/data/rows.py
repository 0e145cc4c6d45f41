"""Datasets → the rows that each trainer takes."""

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, SFTConfig
from trl.data_utils import maybe_extract_prompt

from rlhf.comparisons import Messages, Prompt
from rlhf.data.datasets import Row, check_messages, load_splits, need_columns, place_of, refuse_columns
from rlhf.data.encoding import (
    OPTION_COLUMNS,
    continued,
    conversation_rows,
    encode_messages,
    encode_prompt,
    encode_reply,
    encode_text,
    encode_text_with_end,
    is_seq2seq,
    template_options,
    tokens_needed,
)
from rlhf.data.pairs import Encoded, encode_pair
from rlhf.data.rendering import REASONING_FIELDS
from rlhf.errors import InputError

MEDIA = dict.fromkeys(("image", "images", "video", "videos", "audio"), "these recipes train on text alone. Remove it.")
TOKENIZED = dict.fromkeys(
    ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "seq_lengths"),
    "is a name that the trainer uses for tokens; the recipe makes them itself. Rename or remove it.",
)
PAIR_TOKENS = dict.fromkeys(("chosen_ids", "rejected_ids", "input_ids"), TOKENIZED["input_ids"])
CALLS = {
    "functions": "chat templates read 'tools'. Rename it, with {'type': 'function', 'function': ...} for each.",
    **dict.fromkeys(("function_call", "tool_choice", "parallel_tool_calls"), "no chat template reads it. Remove it."),
}
YES_OR_NO = {"true", "false", "1", "0", "1.0", "0.0"}
# of a message, by which others' formats choose what is learned, and the value for yes
LEARNED = {"weight": 1, "train": True, "training": True, "loss": True, "mask": False, "masked": False}
REWARD_ARGUMENTS = dict.fromkeys(
    ("functions", "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"),
    "is a name of reward functions' own arguments. Rename it.",
)
PROMPT_TOKENS = {key: TOKENIZED[key] for key in ("input_ids", "attention_mask")}


def _map(
    dataset: Dataset,
    name: str,
    function: Callable[[Row], list[Row]],
    what: str,
    keep: set[str] | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """What `function` makes of each row, one or several; `keep` needs one. An InputError of it gets the row's place."""

    def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        rows = []
        for values, number in zip(zip(*batch.values(), strict=True), numbers, strict=True):
            row = dict(zip(batch, values, strict=True))
            try:
                rows += function(row)
            except InputError as error:
                raise InputError(f"--dataset_name {name}: {place_of(dataset, number)}: {error}") from error
        return {key: [row[key] for row in rows] for key in rows[0]}

    columns = [column for column in dataset.column_names if column not in (keep or ())]
    return dataset.map(
        encode, batched=True, with_indices=True, remove_columns=columns, desc=what, num_proc=num_proc, batch_size=200
    )


def sft_rows(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig | None = None,
    context_length: int | None = None,
) -> Dataset:
    """Rows for SFTTrainer: `input_ids` and `labels`.

    The loss of a conversation is taken on the assistant's messages; with `prompt` + `completion`, on the completion;
    with plain text, on all of it. A conversation becomes several rows where the chat template renders earlier turns
    differently once later ones follow. Rows without anything to learn, also because `max_length` cuts it, are left out
    and counted.

    Args:
        args: if its `completion_only_loss` is False, and `assistant_only_loss` too, the loss is taken on all tokens.
        context_length: the model's own limit, at which rows are cut; at `args.max_length` the trainer cuts them.

    Raises:
        InputError: if columns are missing or can't be used, a row can't be encoded, nothing is left, or
            `assistant_only_loss` meets plain text.
    """
    if is_seq2seq(tokenizer):
        return seq2seq_rows(dataset, name, tokenizer, args, context_length)
    replies_only = args is None or args.assistant_only_loss or args.completion_only_loss is not False
    field = args.dataset_text_field if args else "text"
    columns = need_columns(dataset, name, [{"messages"}, {"prompt", "completion"}, {field}])
    _refuse_for_sft(dataset, name, columns)
    check_messages(dataset, name, columns)
    chat = isinstance(dataset[0][min(columns)], list)
    _say_unused(dataset, name, chat)
    if not chat and args and args.assistant_only_loss:
        raise InputError(f"--assistant_only_loss: {name} has plain text, and no assistant in it. Leave it off.")
    options = {column for column in OPTION_COLUMNS if column in dataset.column_names and chat}

    def encode(row: Row) -> list[Row]:
        made = _encode_chat(tokenizer, row) if chat else [_encode_text(tokenizer, row, field)]
        return made if replies_only else [{**part, "labels": list(part["input_ids"])} for part in made]

    num_proc = args.dataset_num_proc if args else None
    rows = _map(dataset.select_columns(sorted(columns | options)), name, encode, "Tokenizing", num_proc=num_proc)
    return _learnable(rows, len(dataset), name, args, context_length)


def fit_max_length(args: SFTConfig, context_length: int | None) -> None:
    """Set `max_length` to the model's context where it is longer by default.

    Raises:
        InputError: if it is another number beyond the context.
    """
    if context_length is None or args.max_length is None or args.max_length <= context_length:
        return
    if args.max_length != SFTConfig.max_length:
        raise InputError(
            f"--max_length {args.max_length}: must be at most the model's context of {context_length} tokens. Lower it."
        )
    args.max_length = context_length


def _say_unused(dataset: Dataset, name: str, chat: bool) -> None:
    """Say which columns are left out because plain text goes through no chat template."""
    unused = [column for column in OPTION_COLUMNS if column in dataset.column_names]
    if unused and not chat:
        print(f"{name}: {' and '.join(unused)} not used: a chat template reads them, and these rows are plain text.")


def _refuse_weights(messages: Messages) -> None:
    """Refuse replies that are marked as not to be learned, or less, as in OpenAI's format for fine-tuning."""
    for number, message in enumerate(messages):
        for key, learned in LEARNED.items():
            if message["role"] == "assistant" and message.get(key) not in (None, learned):
                raise InputError(
                    f"message {number} has {key!r} {message[key]!r}, and every reply is learned here. Give the replies "
                    "to learn as 'completion', and what is before them as 'prompt'."
                )


def _refuse_for_sft(dataset: Dataset, name: str, columns: set[str]) -> None:
    """Refuse columns that the loss or the template would have to follow.

    Args:
        columns: those that are read.
    """
    chat = isinstance(dataset[0][min(columns)], list)
    refuse_columns(dataset, name, {**MEDIA, **TOKENIZED, **(CALLS if chat else {})})
    if "label" not in dataset.column_names:
        return
    marks = str(getattr(dataset.features["label"], "dtype", "")) == "bool"
    if "completion" in columns:  # beside `text`, 0 and 1 are classes
        # of the whole file: a short split of ratings may have but 0 and 1
        marks |= {str(label).strip('"').lower() for label in dataset.data["label"].to_pylist()} <= YES_OR_NO
    if marks:
        reason = "says which completions are good; SFT would learn all. Keep the good ones only, without this column."
        refuse_columns(dataset, name, {"label": reason})


def _encode_chat(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Row]:
    """Rows of a conversation; one row without tokens if it has nothing to learn."""
    prompt, completion = (row["prompt"], row["completion"]) if "prompt" in row else ([], row["messages"])
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise InputError("one of 'prompt' and 'completion' is text and the other messages. Make both messages.")
    if not any(message["role"] == "assistant" for message in completion):
        return [{"input_ids": [], "labels": []}]
    _refuse_weights(completion)
    rows = conversation_rows(tokenizer, prompt + completion, len(prompt), template_options(row))
    return [dict(part) for part in rows]


def _encode_text(tokenizer: PreTrainedTokenizerBase, row: Row, field: str) -> Row:
    if "completion" not in row:
        ids = encode_text_with_end(tokenizer, row[field])
        return {"input_ids": ids, "labels": list(ids)}
    if not isinstance(row["completion"], str):
        raise InputError("'prompt' is text and 'completion' messages. Make both text or both messages.")
    ids = encode_text_with_end(tokenizer, row["prompt"], row["completion"])
    before = len(encode_text(tokenizer, row["prompt"]))
    return {"input_ids": ids, "labels": [-100] * before + ids[before:]}


def _learnable(rows: Dataset, count: int, name: str, args: SFTConfig | None, context_length: int | None) -> Dataset:
    """Rows that have a label within `max_length` and the context. Prints how many are left out, cut or added.

    Args:
        count: number of rows of the dataset.
    """
    if len(rows) > count:
        print(
            f"{name}: {count} conversations are {len(rows)} rows: the chat template renders earlier turns differently "
            "once later ones follow, so those replies stand in rows of their own, as they would be sampled."
        )
    rows = _without_empty(rows, count, name)
    lengths = pc.list_value_length(rows.data["input_ids"]).to_pylist()
    limit, cuts = _limit(args.max_length if args else None, context_length)
    long = {number for number, length in enumerate(lengths) if limit is not None and length > limit}
    if long and args and args.packing and args.packing_strategy != "bfd":
        long = set()  # packed in pieces
    part = slice(-(limit or 0), None) if args and args.truncation_mode == "keep_end" else slice(limit)
    lost = {number for number in sorted(long) if all(label == -100 for label in rows[number]["labels"][part])}
    if long:
        print(
            f"{name}: {cuts} cuts {len(long)} of {len(lengths)} rows"
            + (f", {len(lost)} of them before anything that is learned; those are left out." if lost else ".")
        )
    if len(lost) == len(lengths):
        raise InputError(
            f"--dataset_name {name}: {cuts} cuts off all that is learned in all {len(lengths)} rows of a "
            "split, so nothing is left to learn."
        )
    rows = rows.select([number for number in range(len(rows)) if number not in lost]) if lost else rows
    if not long or limit != context_length:
        return rows
    return rows.map(lambda row: {key: ids[part] for key, ids in row.items()}, desc="Cutting")


def _limit(max_length: int | None, context_length: int | None) -> tuple[int | None, str]:
    """The smaller of two limits in tokens, if there is one, and its name."""
    limit = min((limit for limit in (max_length, context_length) if limit is not None), default=None)
    return limit, f"the model's context of {limit} tokens" if limit == context_length else f"--max_length {limit}"


def _without_empty(rows: Dataset, count: int, name: str) -> Dataset:
    """Rows that have tokens. Prints how many have none, as conversations without a reply.

    Raises:
        InputError: if none has.
    """
    lengths = pc.list_value_length(rows.data["input_ids"]).to_pylist() if len(rows) else []
    full = [number for number, length in enumerate(lengths) if length]
    if not full:
        raise InputError(
            f"--dataset_name {name}: no assistant's message is in all {count} rows of a split, so nothing is left to "
            "learn."
        )
    if len(full) == len(lengths):
        return rows
    print(
        f"{name}: left out {len(lengths) - len(full)} of {count} rows: without an assistant's message there is nothing "
        "to learn."
    )
    return rows.select(full)


def seq2seq_rows(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig | None = None,
    context_length: int | None = None,
) -> Dataset:
    """Rows for an encoder-decoder model: `input_ids` of the prompt, and `labels`, the reply and eos.

    Each assistant message of a conversation, or of its completion, is a row of its own. Its prompt is all that comes
    before it. Conversations without one are left out and counted. Prompts and replies longer than `args.max_length` or
    the context are cut at their end, and counted.

    Raises:
        InputError: if columns are missing or can't be used, a row can't be encoded, or nothing is left.
    """
    columns = need_columns(dataset, name, [{"messages"}, {"prompt", "completion"}])
    _refuse_for_sft(dataset, name, columns)
    check_messages(dataset, name, columns)
    known = columns | {column for column in OPTION_COLUMNS if column in dataset.column_names}
    _say_unused(dataset, name, isinstance(dataset[0][min(columns)], list))

    def encode(row: Row) -> list[Row]:
        options = template_options(row)
        rows = [
            {"input_ids": encode_prompt(tokenizer, before, options), "labels": encode_reply(tokenizer, reply)}
            for before, reply in _turns(row)
        ]
        return rows or [{"input_ids": [], "labels": []}]

    selected = dataset.select_columns(sorted(known))
    rows = _map(selected, name, encode, "Tokenizing conversations", num_proc=args.dataset_num_proc if args else None)
    rows = _without_empty(rows, len(dataset), name)
    limit, _ = _limit(args.max_length if args else None, context_length)
    if limit is None:
        return rows
    long = sum(max(len(a), len(b)) > limit for a, b in zip(rows["input_ids"], rows["labels"], strict=True))
    if long:
        print(f"{name}: cut {long} of {len(rows)} rows, whose prompt or reply has more than {limit} tokens.")
    return rows.map(lambda row: {key: ids[:limit] for key, ids in row.items()}, desc="Cutting")


def _turns(row: Row) -> list[tuple[Any, str]]:
    """What comes before each reply of a row, and the reply's text."""
    prompt, completion = row.get("prompt", []), row["completion"] if "completion" in row else row["messages"]
    if isinstance(prompt, str) != isinstance(completion, str) and prompt:
        raise InputError("one of 'prompt' and 'completion' is text and the other messages. Make both the same.")
    if isinstance(completion, str):
        return [(prompt, completion)]
    _refuse_weights(completion)
    messages = prompt + completion
    turns = []
    for number in range(max(1, len(prompt)), len(messages)):
        message = messages[number]
        if message["role"] == "assistant":
            more = [key for key in ("tool_calls", *REASONING_FIELDS) if message.get(key)]
            if more:
                raise InputError(
                    f"message {number} has {more[0]!r}, and the decoder of an encoder-decoder learns the 'content' "
                    "alone. Write it there."
                )
            turns.append((messages[:number], _plain(message.get("content"))))
    return turns


def texts_of(dataset: Dataset, name: str) -> list[str]:
    """Plain texts to pretrain on: the column `text`, or `messages` with the turns on lines of their own.

    Raises:
        InputError: if there is neither, or a row is empty.
    """
    columns = need_columns(dataset, name, [{"text"}, {"messages"}])
    refuse_columns(dataset, name, MEDIA)
    check_messages(dataset, name, columns)
    if columns == {"text"}:
        return dataset["text"][:]
    texts = ([_plain(message.get("content")) for message in messages] for messages in dataset["messages"])
    return ["\n".join(filter(None, parts)) for parts in texts]  # a tool call has no text


def _plain(content: str | list[dict[str, str]] | None) -> str:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


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
        return {key: ids[:context_length] for key, ids in row.items()}

    return rows.map(encode, desc="Cutting texts")


def preference_rows(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    num_proc: int | None = None,
    context_length: int | None = None,
    pairs: bool = False,
) -> Dataset:
    """Rows for RewardTrainer: `chosen_ids`, `rejected_ids` and perhaps `margin`.

    Pairs that are too long, or whose two sides are the same, are left out and counted. TRL's RewardTrainer turns a row
    into the loss -log σ(score of chosen - score of rejected - margin). It ignores other columns, such as `certainty`.

    Args:
        max_length: the limit that the user sets.
        context_length: the model's own limit.
        pairs: the model reads prompt and reply as a pair of texts (rlhf/data/pairs.py). The rows then also have
            `chosen_token_type_ids` and `rejected_token_type_ids`, if the tokenizer makes these.

    Raises:
        InputError: if columns are missing or can't be used, a row can't be encoded, or no pair is left.
    """
    columns = need_columns(dataset, name, [{"prompt", "chosen", "rejected"}, {"chosen", "rejected"}])
    chat = isinstance(dataset[0]["chosen"], list)
    refuse_columns(dataset, name, {**MEDIA, **PAIR_TOKENS, **(CALLS if chat else {})})
    check_messages(dataset, name, columns)
    known = columns | {column for column in (*OPTION_COLUMNS, "margin") if column in dataset.column_names}
    _say_unused(dataset, name, chat)
    others = sorted({*dataset.column_names} - known)
    if "prompt" not in columns and not chat and others:
        print(f"{name}: without a column 'prompt', each text is scored alone; {', '.join(others)} not used.")

    def encode(row: Row) -> list[Row]:
        if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
            raise InputError("one of 'chosen' and 'rejected' is text and the other messages. Make both the same.")
        if isinstance(row["chosen"], list):
            _check_pair(row)
        margin = {"margin": _margin(row["margin"])} if "margin" in row else {}
        row = maybe_extract_prompt(row) if pairs and "prompt" not in row else row  # pairs have no template
        sides = {side: _encode_side(tokenizer, row, side, pairs) for side in ("chosen", "rejected")}
        ids = {f"{side}_{key.removeprefix('input_')}": part for side, one in sides.items() for key, part in one.items()}
        return [{**ids, **margin}]

    encoded = _map(dataset.select_columns(sorted(known)), name, encode, "Tokenizing pairs", num_proc=num_proc)
    return _usable_pairs(encoded, name, max_length, context_length)


def _check_pair(row: Row) -> None:
    """Refuse two conversations that don't end with a reply, whose prompts differ, or that lack their prompt."""
    before = {}
    for side in ("chosen", "rejected"):
        messages = row[side]
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{side!r} ends with the {messages[-1]['role']}'s message. End it with the assistant's.")
        asked = list(takewhile(lambda message: message["role"] != "assistant", messages))
        before[side] = [(message["role"], _plain(message.get("content"))) for message in asked]
        if isinstance(row.get("prompt"), str) and not (asked and _says(messages[:-1], row["prompt"])):
            raise InputError(f"'prompt' is text, and {side!r} messages without the prompt. Make 'prompt' messages too.")
    if before["chosen"] != before["rejected"]:
        raise InputError("'chosen' and 'rejected' have different prompts. Compare replies to one prompt.")


def _says(messages: Messages, prompt: str) -> bool:
    """Whether a message has the prompt's text, or a part of it where the prompt is a whole conversation as text."""
    texts = [_plain(message.get("content")).strip() for message in messages]
    return any(text and (text in prompt or prompt.strip() in text) for text in texts)


def _usable_pairs(encoded: Dataset, name: str, max_length: int | None, context_length: int | None) -> Dataset:
    """Pairs with two different sides that aren't too long. Prints how many are left out."""
    both = zip(encoded["chosen_ids"], encoded["rejected_ids"], strict=True)
    same = {number for number, (chosen, rejected) in enumerate(both) if chosen == rejected}
    longest = longest_of_pairs(encoded)
    limit, name_of_limit = _limit(max_length, context_length)
    long = {number for number, length in enumerate(longest) if limit is not None and length > limit}
    if len(same) == len(longest):
        raise InputError(
            f"--dataset_name {name}: 'chosen' and 'rejected' are the same in every pair, so there is nothing to learn."
        )
    if same:
        print(f"{name}: left out {len(same)} of {len(longest)} pairs, whose 'chosen' and 'rejected' are the same.")
    kept = [number for number in range(len(longest)) if number not in same | long]
    if not kept:
        raise InputError(
            f"--dataset_name {name}: every pair is longer than {name_of_limit}; the shortest has {min(longest)}. "
            + ("Raise it." if limit != context_length else "Give shorter texts or another model.")
        )
    if long:
        print(f"{name}: left out {len(long)} of {len(longest)} pairs, longer than {name_of_limit}.")
    return encoded if len(kept) == len(longest) else encoded.select(kept)


def longest_of_pairs(encoded: Dataset) -> list[int]:
    """The number of tokens of each pair's longer reply, prompt included."""
    return [max(len(a), len(b)) for a, b in zip(encoded["chosen_ids"], encoded["rejected_ids"], strict=True)]


def _encode_side(tokenizer: PreTrainedTokenizerBase, row: Row, side: str, pairs: bool) -> Encoded:
    """The prompt of a pair and the reply on one side; for a decoder, ending where its score is read."""
    prompt, reply = row.get("prompt"), row[side]
    if isinstance(reply, str):
        if isinstance(prompt, list):
            raise InputError(f"'prompt' is messages and {side!r} text. Make both messages.")
        if pairs:
            return encode_pair(tokenizer, prompt or "", reply)
        return {"input_ids": encode_text_with_end(tokenizer, prompt or "", reply)}
    # a conversation may repeat its prompt, or have it as a text in another column, as in UltraFeedback
    repeated = not isinstance(prompt, list) or reply[: len(prompt)] == prompt
    messages: Messages = reply if repeated else continued(row["prompt"], reply)
    if pairs:
        return encode_pair(tokenizer, messages[:-1], _plain(messages[-1].get("content")))
    return {"input_ids": encode_messages(tokenizer, messages, options=template_options(row))}


def _margin(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise InputError(f"column 'margin': a number is needed; found {value!r}.")
    return float(value)


def prompt_rows(
    dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, context_length: int | None
) -> Dataset:
    """Rows with `prompt`, its `input_ids`, and the dataset's other columns.

    Without a column `prompt`, the prompt is all of `messages` before the last assistant message, or the beginning that
    `chosen` and `rejected` share. A text that is also a message of both in every row, as in UltraFeedback, is
    that beginning. A prompt that ends with the assistant's message is continued.

    Raises:
        InputError: if columns are missing or can't be used, a row can't be encoded, or a prompt and `max_new_tokens`
            don't fit into the model's context together.
    """
    columns = need_columns(dataset, name, [{"prompt"}, {"messages"}, {"chosen", "rejected"}])
    refuse_columns(dataset, name, {**MEDIA, **PROMPT_TOKENS, **REWARD_ARGUMENTS})
    check_messages(dataset, name, columns)
    pair = ["prompt", "chosen", "rejected"]
    repeated = {*pair} <= {*dataset.column_names} and all(map(_shared, dataset.select_columns(pair)))
    _say_unused(dataset, name, repeated or isinstance(dataset[0][min(columns)], list))

    def encode(row: Row) -> list[Row]:
        prompt = _shared(row) if repeated else _prompt_of(row)
        if not prompt:
            raise InputError("there is no prompt in front of the reply.")
        ids = encode_prompt(tokenizer, prompt, template_options(row) if isinstance(prompt, list) else None)
        if not ids:
            raise InputError("the prompt has no tokens.")
        return [{"prompt": prompt, "input_ids": ids}]

    rows = _map(dataset, name, encode, "Tokenizing prompts", keep=set(dataset.column_names) - {"messages"})
    lengths = [len(ids) for ids in rows["input_ids"]]
    longest = max(lengths)
    if context_length is not None and tokens_needed(tokenizer, longest, max_new_tokens) > context_length:
        raise InputError(
            f"--dataset_name {name}: the longest prompt ({place_of(dataset, lengths.index(longest))}) has {longest} "
            f"tokens and the reply up to {max_new_tokens}, more than the model's context of {context_length}. Shorten "
            "the prompts or the reply length."
        )
    return rows


def _prompt_of(row: Row) -> Prompt:
    if "prompt" in row:
        return row["prompt"]
    if "messages" in row:
        messages: Messages = row["messages"]
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return maybe_extract_prompt(row)["prompt"]


def _shared(row: Row) -> Messages:
    """The messages that `chosen` and `rejected` share before the reply, if one is the text `prompt`; else none."""
    prompt, *sides = row["prompt"], row["chosen"], row["rejected"]
    if not isinstance(prompt, str) or not all(isinstance(side, list) for side in sides):
        return []
    before = zip(*(side[:-1] for side in sides), strict=False)
    shared = [chosen for chosen, _ in takewhile(lambda messages: messages[0] == messages[1], before)]
    asked = [message.get("content") for message in shared if isinstance(message, dict)]
    return shared if prompt in asked else []
