"""Conversations, prompts and texts → token ids.

Tokens are made here rather than in each trainer, so that training and sampling see the same ones: a reply that is
learned stands behind exactly the tokens that it would be sampled behind, and is tokenized on its own, as it would be
sampled. In training, a conversation ends with the token that ends the reply (templates often put a newline after it),
so the reward model reads its score at the token that ends a sampled reply.
"""

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.comparisons import Messages
from rlhf.data.pairs import plain_text
from rlhf.data.rendering import STAND_IN, RenderedChat, TemplateOptions, facts
from rlhf.errors import InputError

# columns that a chat template reads besides the messages
OPTION_COLUMNS = ("tools", "chat_template_kwargs")
RESERVED_VARIABLES = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
}


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all control tokens, also of those without a role such as eos (<|im_end|> of many base models)."""
    return set(facts(tokenizer).controls)


def template_options(row: Mapping[str, Any]) -> TemplateOptions:
    """What a row's columns `tools` and `chat_template_kwargs` say; each may be JSON text.

    Raises:
        InputError: naming the column that holds something else.
    """
    tools, variables = (_parsed(row.get(column), f"column {column!r}") for column in OPTION_COLUMNS)
    if tools is not None:
        tools = [_parsed(tool, "column 'tools'") for tool in tools] if isinstance(tools, list) else [tools]
        if not all(isinstance(tool, dict) for tool in tools):
            raise InputError(f"column 'tools': a list of JSON schemas is needed; found {str(tools)[:60]}.")
        tools = [_dense(tool) for tool in tools]
    if variables is not None and not isinstance(variables, dict):
        raise InputError(f"column 'chat_template_kwargs': a mapping is needed; found {str(variables)[:60]}.")
    variables = {name: value for name, value in (variables or {}).items() if value is not None}
    if taken := RESERVED_VARIABLES & set(variables):
        raise InputError(f"column 'chat_template_kwargs': {sorted(taken)[0]!r} is set by the recipe. Remove it.")
    return TemplateOptions(tools or None, variables)  # an empty list of tools would be rendered by some templates


def options_of_rows(columns: Mapping[str, Any], count: int) -> list[TemplateOptions]:
    """`template_options` of `count` rows that are given by column."""
    given = {column: columns[column] for column in OPTION_COLUMNS if column in columns}
    return [template_options({column: values[number] for column, values in given.items()}) for number in range(count)]


def _parsed(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}).") from error


def _dense(value: Any) -> Any:
    """Data without the keys that Arrow filled in with None because other rows have them."""
    if isinstance(value, dict):
        return {key: _dense(part) for key, part in value.items() if part is not None}
    return [_dense(part) for part in value] if isinstance(value, list) else value


def _calls(value: Any) -> Any:
    """Tool calls, which may be written as JSON text."""
    calls = _parsed(value, "tool_calls")
    return _dense([_parsed(call, "tool_calls") for call in calls] if isinstance(calls, list) else calls)


def _chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, options: TemplateOptions | None) -> RenderedChat:
    dense = [
        {key: _calls(value) if key == "tool_calls" else value for key, value in message.items() if value is not None}
        for message in messages
    ]
    return RenderedChat(tokenizer, dense, options)


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    add_generation_prompt: bool = False,
    options: TemplateOptions | None = None,
) -> list[int]:
    """Token ids of a conversation under the tokenizer's chat template.

    A control token (a token that the tokenizer calls special) inside a message is encoded as ordinary characters. Other
    added tokens, such as `</think>`, are left to the template, which may look for them. Without a generation prompt,
    a conversation that ends with a reply ends with the token that ends it: the template's, or else eos.

    Raises:
        InputError: if the template refuses the conversation or leaves out a part of it.
    """
    chat = _chat(tokenizer, messages, options)
    if add_generation_prompt:
        return encode_rendered(chat, chat.prompt(len(messages)))
    if messages[-1]["role"] != "assistant":
        ids = encode_rendered(chat, chat.whole())
        return _end_at_control_token(tokenizer, ids)
    prompt, reply = _prompt_and_reply(chat, len(messages) - 1)
    return prompt + reply


def encode_scored(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, options: TemplateOptions | None = None
) -> list[int]:
    """Token ids of a conversation that a reward model scores: all that its chat template renders, to the very end.

    Raises:
        InputError: as for `encode_messages`.
    """
    chat = _chat(tokenizer, messages, options)
    if messages[-1]["role"] != "assistant":
        return encode_rendered(chat, chat.whole())
    prompt, *reply = chat.reply(len(messages) - 1)
    return encode_rendered(chat, prompt) + encode_rendered(chat, "".join(reply), behind=True)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, options: TemplateOptions | None = None
) -> list[int]:
    """Token ids of a prompt: a text with one bos and no eos, or messages with the generation prompt.

    If the last message is the assistant's, the reply continues it. The encoder of an encoder-decoder model reads a text
    as its tokenizer encodes it (T5's puts eos at the end), and messages without a chat template as plain text.
    """
    if is_seq2seq(tokenizer) and (isinstance(prompt, str) or tokenizer.chat_template is None):
        if isinstance(prompt, str):
            return tokenizer(prompt)["input_ids"]
        return tokenizer(plain_text(prompt), split_special_tokens=True)["input_ids"]
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    if prompt[-1]["role"] != "assistant":
        return encode_messages(tokenizer, prompt, add_generation_prompt=True, options=options)
    if prompt[-1].get("tool_calls"):
        raise InputError("The prompt ends with the assistant's tool call, which can't be continued. Add its result.")
    chat = _chat(tokenizer, prompt, options)
    before, begun, *_ = chat.reply(len(prompt) - 1)
    return encode_rendered(chat, before) + encode_rendered(chat, begun, behind=True)


def is_seq2seq(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `load_tokenizer` has marked the tokenizer as that of an encoder-decoder model."""
    return getattr(tokenizer, "is_encoder_decoder", False)


def tokens_needed(tokenizer: PreTrainedTokenizerBase, prompt: int, reply: int) -> int:
    """The context that a prompt and a reply of these lengths take.

    An encoder-decoder reads the prompt in one part and writes the reply, behind a start token, in another.
    """
    return max(prompt, reply + 1) if is_seq2seq(tokenizer) else prompt + reply


def encode_reply(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids that the decoder of an encoder-decoder model learns: a text and eos. The text has no control tokens."""
    ids = tokenizer(text_target=text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, **settings: bool) -> list[int]:
    """Token ids of a plain text, with what the tokenizer puts in front (mostly bos), once, and no eos behind."""
    ids = list(tokenizer(text, **settings)["input_ids"])
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids


def encode_text_with_end(tokenizer: PreTrainedTokenizerBase, text: str, completion: str = "") -> list[int]:
    """Token ids of a plain text that end with eos; of a prompt and its completion, tokenized as it would be sampled."""
    eos = tokenizer.eos_token
    if not completion and text.rstrip().endswith(eos):  # a rendered chat, whose template puts a newline behind the end
        text = text.rstrip()
    if completion.rstrip().endswith(eos):
        completion = completion.rstrip()
    ids = encode_text(tokenizer, text)
    if completion:
        ids = ids + _piece(tokenizer, completion, behind=bool(text))
    while ids[-2:] == [tokenizer.eos_token_id] * 2:
        ids = ids[:-1]
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, first: int = 0, options: TemplateOptions | None = None
) -> dict[str, list[int]]:
    """`conversation_rows` of a conversation that is one row.

    Raises:
        InputError: if it needs several.
    """
    rows = conversation_rows(tokenizer, messages, first, options)
    if len(rows) > 1:
        raise InputError(
            "The chat template renders earlier turns differently once later ones follow, so this conversation isn't "
            "one row. Give another template with --chat_template_path, or one reply a row ('prompt' and 'completion')."
        )
    return rows[0]


def conversation_rows(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, first: int = 0, options: TemplateOptions | None = None
) -> list[dict[str, list[int]]]:
    """Token ids and labels of a conversation; the assistant's messages from number `first` on are learned.

    A learned reply stands behind `encode_prompt` of what was before it. Where the template renders earlier turns
    differently once later ones follow, as those do that drop earlier reasoning, the replies need rows of their own.

    Returns:
        `input_ids` and `labels` of equal length, in one row or several; the label is the token id, or -100 where no
        loss is taken. Labels are on the text of each learned message and on the token that ends it.

    Raises:
        InputError: if the template refuses the conversation, or leaves out a part of a learned message.
    """
    begun = None
    if 0 < first < len(messages) and messages[first - 1]["role"] == messages[first]["role"] == "assistant":
        begun = _chat(tokenizer, messages[:first], options).reply(first - 1)[1]
        messages, first = continued(messages[:first], messages[first:]), first - 1
    chat = _chat(tokenizer, messages, options)
    rows: list[dict[str, list[int]]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < first:
            continue
        prompt, reply = _prompt_and_reply(chat, number, begun if number == first else None)
        known = rows[-1]["input_ids"] if rows else None
        if known is None or prompt[: len(known)] != known:
            rows.append({"input_ids": [], "labels": []})
        row = rows[-1]
        row["labels"] += [-100] * (len(prompt) - len(row["labels"])) + reply
        row["input_ids"] = prompt + reply
    return rows


def continued(prompt: Messages, reply: Messages) -> Messages:
    """A prompt and its reply as one conversation: a reply to an assistant's message is the rest of that message."""
    if not (prompt and reply and prompt[-1]["role"] == reply[0]["role"] == "assistant"):
        return [*prompt, *reply]
    begun, rest = prompt[-1].get("content"), reply[0].get("content")
    if not isinstance(begun, str) or not isinstance(rest, str):
        raise InputError("The prompt ends with the assistant's message, and the reply can't continue it.")
    return [*prompt[:-1], {**prompt[-1], **reply[0], "content": begun + rest}, *reply[1:]]


def _prompt_and_reply(chat: RenderedChat, number: int, begun: str | None = None) -> tuple[list[int], list[int]]:
    """Token ids of a message's prompt, and of the message with its end.

    Args:
        begun: the beginning of the message's text that belongs to the prompt.
    """
    before, text, end, _ = chat.reply(number)
    prompt = encode_rendered(chat, before)
    if begun:
        if not text.startswith(begun):
            raise InputError("The chat template renders the prompt's last message differently once it goes on.")
        prompt, text = prompt + encode_rendered(chat, begun, behind=True), text[len(begun) :]
    reply = encode_rendered(chat, text + end, behind=True)
    return prompt, reply if end else [*reply, chat.tokenizer.eos_token_id]


def encode_rendered(chat: RenderedChat, text: str, behind: bool = False) -> list[int]:
    """Token ids of rendered text; those of a control token that a stand-in stands for are its characters'.

    Args:
        behind: whether other tokens come before, so that no space belongs in front.
    """
    ids: list[int] = []
    # a template may leave out or move messages, so stand-ins are found by their number
    for place, part in enumerate(STAND_IN.split(text)):
        if place % 2:
            ids += _piece(chat.tokenizer, chat.hidden[int(part)], behind or bool(ids), split_special_tokens=True)
        elif part:
            ids += _piece(chat.tokenizer, part, behind or bool(ids))
    return ids


def _piece(tokenizer: PreTrainedTokenizerBase, text: str, behind: bool, **settings: bool) -> list[int]:
    if behind and facts(tokenizer).adds_space:  # behind a newline, there is none to add
        newline, both = (tokenizer.encode(part, add_special_tokens=False, **settings) for part in ("\n", "\n" + text))
        if both[: len(newline)] == newline:
            return both[len(newline) :]
    return tokenizer.encode(text, add_special_tokens=False, **settings)


def _end_at_control_token(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    special = facts(tokenizer).controls
    end = len(ids)
    while end and ids[end - 1] not in special and not tokenizer.decode(ids[end - 1]).strip():
        end -= 1
    return ids[:end] if end and ids[end - 1] in special else ids
