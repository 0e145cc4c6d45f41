"""Conversations, prompts and texts → token ids.

Conversations are tokenized here rather than in each trainer, for two reasons. A control token written inside a message
stays text. A conversation ends with the token that ends the reply (templates often put a newline after it), so the
reward model reads its score at the token that ends a sampled reply.
"""

import re

import jinja2
from transformers import PreTrainedTokenizerBase

from rlhf.comparisons import Messages
from rlhf.data.pairs import plain_text
from rlhf.errors import InputError


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation under the tokenizer's chat template.

    A control token (a token that the tokenizer calls special) inside a message is encoded as ordinary characters. Other
    added tokens, such as `</think>`, are left to the template, which may look for them. Without a generation prompt,
    anything that the template puts after the last control token, mostly a newline, is dropped.

    Raises:
        InputError: if the template refuses the conversation.
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
    # a template may leave out or move messages, so stand-ins are found by their number
    for place, part in enumerate(re.split("\U000f0000([0-9]+)\U000f0001", text)):
        if place % 2:
            ids += tokenizer(hidden[int(part)], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        else:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids if add_generation_prompt else _end_at_control_token(tokenizer, ids)


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all control tokens, also of those without a role such as eos (<|im_end|> of many base models)."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _end_at_control_token(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    special = control_ids(tokenizer)
    end = len(ids)
    while end and ids[end - 1] not in special and not tokenizer.decode(ids[end - 1]).strip():
        end -= 1
    return ids[:end] if end and ids[end - 1] in special else ids


def is_seq2seq(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `load_tokenizer` has marked the tokenizer as that of an encoder-decoder model."""
    return getattr(tokenizer, "is_encoder_decoder", False)


def tokens_needed(tokenizer: PreTrainedTokenizerBase, prompt: int, reply: int) -> int:
    """The context that a prompt and a reply of these lengths take.

    An encoder-decoder reads the prompt in one part and writes the reply, behind a start token, in another.
    """
    return max(prompt, reply + 1) if is_seq2seq(tokenizer) else prompt + reply


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt: a text unchanged, or messages with the generation prompt.

    The encoder of an encoder-decoder model reads a text as its tokenizer encodes it (T5's puts eos at the end), and
    messages without a chat template as plain text.
    """
    if is_seq2seq(tokenizer) and (isinstance(prompt, str) or tokenizer.chat_template is None):
        if isinstance(prompt, str):
            return tokenizer(prompt)["input_ids"]
        return tokenizer(plain_text(prompt), split_special_tokens=True)["input_ids"]
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return encode_messages(tokenizer, prompt, add_generation_prompt=True)


def encode_reply(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids that the decoder of an encoder-decoder model learns: a text and eos. The text has no control tokens."""
    ids = tokenizer(text_target=text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def encode_text_with_end(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a plain text that end with eos."""
    ids = tokenizer(text)["input_ids"]
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages, first: int = 0) -> dict[str, list[int]]:
    """Token ids and labels of a conversation; only assistant messages from number `first` on have labels.

    Returns:
        `input_ids` and `labels` of equal length; the label is the token id, or -100 where no loss is taken.

    Raises:
        InputError: if the template renders earlier turns differently once later ones follow. The tokens of a reply
            can't be found then.
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
                "The chat template renders earlier turns differently when later ones follow, so the reply's tokens "
                "can't be found. Give one with --chat_template_path, or rows of 'prompt' and 'completion' with one "
                "reply each."
            )
        labels[len(before) : len(through)] = ids[len(before) : len(through)]
    return {"input_ids": ids, "labels": labels}
