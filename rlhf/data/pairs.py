"""How a classifier without a chat template reads a prompt and a reply: as the two texts of a pair.

That is how encoders (BERT, RoBERTa, DeBERTa, ...) read two texts and how reward models over them are trained:
`tokenizer(prompt, reply)` puts their separators between the two and, for BERT, numbers them in `token_type_ids`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import pad

from rlhf.comparisons import Messages, Prompt

Encoded = dict[str, list[int]]  # `input_ids`, and `token_type_ids` where the tokenizer makes them


def plain_text(messages: Messages) -> str:
    """A conversation as plain text: one message alone, several with their roles.

    >>> plain_text([{"role": "user", "content": "Hi!"}])
    'Hi!'
    >>> plain_text([{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}])
    'User: Hi!\\nAssistant: Hello.'
    """
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, reply: str, max_length: int | None = None
) -> Encoded:
    """A prompt and a reply as a classifier's pair of texts. A control token inside a text stays text.

    A tokenizer with an eos token and no separator of its own gets eos at the end, where T5 reads the score.

    Args:
        prompt: an empty one makes a single text of the reply.
        max_length: the beginning of the prompt is cut off beyond it, then the beginning of the reply.
    """
    first = prompt if isinstance(prompt, str) else plain_text(prompt) if prompt else ""
    texts = [first, reply] if first else [reply]
    whole = tokenizer(*texts, split_special_tokens=True)
    eos = tokenizer.eos_token_id
    ended = eos in (None, tokenizer.sep_token_id) or whole["input_ids"][-1:] == [eos]
    end = [] if ended else [eos]
    if max_length is not None and len(whole["input_ids"]) + len(end) > max_length:
        room = max_length - len(end)
        alone = len(tokenizer(reply, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        fits = len(texts) == 2 and alone + tokenizer.num_special_tokens_to_add(pair=True) < room
        side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
        cut = {"truncation": "only_first" if fits else "longest_first", "max_length": room}
        whole = tokenizer(*texts, split_special_tokens=True, **cut)
        tokenizer.truncation_side = side
    encoded: Encoded = {name: list(whole[name]) for name in ("input_ids", "token_type_ids") if name in whole}
    encoded["input_ids"] += end
    if "token_type_ids" in encoded and end:
        encoded["token_type_ids"].append(encoded["token_type_ids"][-1])
    return encoded


@dataclass
class PreferenceCollator(DataCollatorForPreference):
    """TRL's collator of preference pairs, which also pads `chosen_token_type_ids` and `rejected_token_type_ids`."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and perhaps `token_type_ids` (2B, L): B chosen replies, then the rejected."""
        output = super().torch_call(examples)
        columns = [f"{side}_token_type_ids" for side in ("chosen", "rejected")]
        if columns[0] in examples[0]:
            types = [torch.tensor(example[column]) for column in columns for example in examples]
            more = self.pad_to_multiple_of
            output["token_type_ids"] = pad(types, padding_value=0, padding_side="right", pad_to_multiple_of=more)
        return output
