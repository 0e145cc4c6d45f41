"""Calling reward functions: `(prompts, completions, **columns) -> list[float]`.

That is the signature of `reward_funcs` in TRL's GRPO and RLOO, with its details:

- The completions of conversational prompts are lists of one assistant message; others are texts.
- `completion_ids` and the dataset's other columns are passed by name.
- None means that a function has no opinion on a completion.
- A function may be async.

Unlike in TRL, a function may also return a list of rewards for a completion, one per token of its `completion_ids`.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from rlhf.comparisons import Messages, Prompt

Completion = str | Messages
Score = float | list[float] | None  # of the whole completion, of each token, or no opinion
RewardFunction = Callable[..., Any]  # the result is a sequence of scores, or awaits one


class RewardError(ValueError):
    """A reward function raised, or returned something that is not a score. The message shows the completion."""


def completion_text(completion: Completion) -> str:
    """The text of a completion in either form.

    >>> completion_text([{"role": "assistant", "content": "Hello."}])
    'Hello.'
    """
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def reward_name(function: RewardFunction) -> str:
    """The name of a reward function in logs and errors."""
    return getattr(function, "__name__", type(function).__name__)


def call_rewards(
    functions: Sequence[RewardFunction],
    prompts: list[Prompt],
    completions: list[Completion],
    completion_ids: list[list[int]],
    **columns: object,
) -> list[list[Score]]:
    """Every function's scores, in the order of the functions. Async functions run at the same time.

    Args:
        columns: the dataset's other columns, and what TRL adds to them, such as `trainer_state`.

    Raises:
        RewardError: if a function raises, or returns a wrong number of scores or a value that is not a finite number.
    """
    inputs = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
    answers: dict[int, Iterable[object] | BaseException] = {}

    async def gather() -> None:
        waiting = {number: function(**inputs) for number, function in enumerate(functions) if _is_async(function)}
        answers.update(zip(waiting, await asyncio.gather(*waiting.values(), return_exceptions=True), strict=True))

    if any(_is_async(function) for function in functions):
        asyncio.run(gather())
    scores = []
    for number, function in enumerate(functions):
        try:
            answer = answers[number] if number in answers else function(**inputs)
        except Exception as error:
            answer = error
        if isinstance(answer, BaseException):
            raise _blame(function, answer, completions, inputs) from answer
        scores.append(check_scores(function, answer, completions, completion_ids))
    return scores


def _is_async(function: RewardFunction) -> bool:
    """Whether a call returns an awaitable: an async function, or an object whose class has an async `__call__`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _blame(
    function: RewardFunction, error: BaseException, completions: list[Completion], inputs: dict[str, object]
) -> RewardError:
    """The error with the first completion on which the function raises when it gets that completion alone."""

    def score(number: int) -> None:
        one = {name: [values[number]] if isinstance(values, list) else values for name, values in inputs.items()}
        answer = function(**one)
        if inspect.iscoroutine(answer):
            asyncio.run(answer)

    culprit, where = completions[0], "a batch that begins with the completion"
    for number, completion in enumerate(completions):
        try:
            score(number)
        except Exception:
            culprit, where = completion, "the completion"
            break
    return RewardError(
        f"Reward function {reward_name(function)!r} raised {type(error).__name__}: {error}, on {where} "
        f"{completion_text(culprit)[:200]!r}."
    )


def check_scores(
    function: RewardFunction,
    scores: Iterable[Any],
    completions: list[Completion],
    completion_ids: list[list[int]] | None = None,
) -> list[Score]:
    """The scores as floats, lists of floats (rewards per token) or None. Tensors are accepted.

    Raises:
        RewardError: if the number of scores is not that of the completions, or a score is not a finite number. The
            message names the reward function and shows the completion.
    """
    name, scores = reward_name(function), list(scores)
    if len(scores) != len(completions):
        raise RewardError(f"Reward function {name!r} returned {len(scores)} scores for {len(completions)} completions.")
    checked: list[Score] = []
    for number, (score, completion) in enumerate(zip(scores, completions, strict=True)):
        text = completion_text(completion)[:200]
        score = score.tolist() if isinstance(score, torch.Tensor) else score
        if score is None:
            checked.append(None)
            continue
        per_token = isinstance(score, list | tuple)
        values = list(score) if per_token else [score]
        try:
            finite = all(math.isfinite(value) for value in values)
        except TypeError:
            finite = False
        if not finite:
            raise RewardError(f"Reward function {name!r} returned {score!r} for the completion {text!r}.")
        if per_token and completion_ids is not None and len(values) != len(completion_ids[number]):
            raise RewardError(
                f"Reward function {name!r} returned {len(values)} rewards for the {len(completion_ids[number])} tokens "
                f"of the completion {text!r}."
            )
        checked.append([float(value) for value in values] if per_token else float(score))
    return checked
