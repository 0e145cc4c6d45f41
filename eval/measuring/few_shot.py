"""Few-shot prompts: examples of conversations as turns of a chat in front of a prompt."""

import random
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.comparisons import Messages, Prompt
from rlhf.data.datasets import check_messages, need_columns
from rlhf.data.encoding import encode_prompt, tokens_needed
from rlhf.errors import InputError
from rlhf.run.files import content_of, read_json


def with_turns(prompt: Prompt, turns: Messages) -> Prompt:
    """A prompt with turns in front of it, behind its system message if it has one.

    >>> with_turns([{"role": "user", "content": "b"}], [{"role": "user", "content": "a"}])
    [{'role': 'user', 'content': 'a'}, {'role': 'user', 'content': 'b'}]

    Raises:
        InputError: if there are turns and the prompt is text.
    """
    if not turns:
        return prompt
    if isinstance(prompt, str):
        raise InputError("Few-shot prompts are turns of a chat, and these prompts are text. Give messages.")
    start = int(prompt[0]["role"] == "system")
    return [*prompt[:start], *turns, *prompt[start:]]


def read_turns(file: str, where: str) -> Messages:
    """The turns in the file that eval/few_shot.py writes: `messages` of a user and an assistant.

    Args:
        where: what to call the file in an error: the flag that names it.

    Raises:
        InputError: if it is missing or holds something else.
    """
    content = read_json(Path(file), messages=list)
    if content is None:
        raise InputError(f"{where}: no such file. eval/few_shot.py writes one.")
    with content_of(Path(file)):
        check_messages(Dataset.from_list([{"messages": content["messages"]}]), where, {"messages"})
    roles = {message["role"] for message in content["messages"]}
    if not roles <= {"user", "assistant"} or content["messages"][-1]["role"] != "assistant":
        raise InputError(f"{where}: 'messages' must be turns of user and assistant that end with the assistant's.")
    return [{"role": message["role"], "content": message["content"]} for message in content["messages"]]


def conversations_of(train: Dataset, name: str) -> list[Messages]:
    """The training rows as conversations without system messages.

    Raises:
        InputError: if the dataset has no conversations.
    """
    columns = need_columns(train, name, [{"prompt", "completion"}, {"messages"}])
    check_messages(train, name, columns)
    if isinstance(train[0][min(columns)], str):
        raise InputError(f"--dataset_name {name}: has text, and few-shot prompts are turns of a chat. Give messages.")
    rows = [row["messages"] if "messages" in columns else row["prompt"] + row["completion"] for row in train]
    return [[message for message in row if message["role"] != "system"] for row in rows]


def draw_turns(
    conversations: list[Messages],
    num_fewshot: int,
    longest: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    context_length: int | None,
    rng: random.Random,
) -> Messages:
    """`num_fewshot` conversations in random order, in front of which the longest prompt and a reply still fit.

    A conversation that doesn't fit any more is passed over.

    Raises:
        InputError: if so many don't fit.
    """
    turns: Messages = []
    count = 0
    for conversation in rng.sample(conversations, len(conversations)):
        ids = encode_prompt(tokenizer, with_turns(longest, [*turns, *conversation]))
        if context_length is not None and tokens_needed(tokenizer, len(ids), max_new_tokens) > context_length:
            continue
        turns, count = [*turns, *conversation], count + 1
        if count == num_fewshot:
            return turns
    raise InputError(
        f"--num_fewshot {num_fewshot}: only {count} of {len(conversations)} training conversations fit beside the "
        f"longest prompt and {max_new_tokens} new tokens into the model's context of {context_length}. Give fewer."
    )
