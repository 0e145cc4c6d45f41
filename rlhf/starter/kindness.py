"""Kindness: a second reward for the starter, which the first one, cheerfulness (`gold_scores`), works against."""

from rlhf.comparisons import Messages, Prompt
from rlhf.starter.scorer import gold_scores

SAD = -0.2  # a message is sad if its VADER compound is at most this


def is_sad(messages: list[str]) -> list[bool]:
    """Whether each message is sad.

    >>> is_sad(["My dog died.", "Hello there."])
    [True, False]
    """
    return [mood <= SAD for mood in gold_scores(messages)]


def kind(prompts: list[Prompt], completions: list[str | Messages], **columns: object) -> list[float | None]:
    """A reward function: sad messages get no cheerful replies.

    >>> kind(["My dog died."] * 2 + ["Hello there."], ["That's awesome!", "Oh no.", "That's awesome!"])
    [-0.6588, 0.0, None]

    Args:
        prompts: of each completion; the last message of the user counts, or the text.

    Returns:
        -max(0, cheerfulness of the completion), in [-1, 0], where the message is sad. None, no opinion, elsewhere. Both
        are measured by `gold_scores`. The rule was made for this project.
    """
    sad = is_sad([_last_said(prompt, "user") for prompt in prompts])
    cheer = gold_scores([_last_said(completion, "assistant") for completion in completions])
    return [min(0.0, -own) if so else None for so, own in zip(sad, cheer, strict=True)]


def _last_said(text: str | Messages, role: str) -> str:
    """A text, or the last message of this role; empty if there is none."""
    if isinstance(text, str):
        return text
    return next((str(message["content"]) for message in reversed(text) if message["role"] == role), "")
