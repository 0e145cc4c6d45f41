"""Calling reward functions: `(prompts, completions, **columns) -> list[float]`.

That is the signature of `reward_funcs` in TRL's GRPO and RLOO, with its details:

- The completions of conversational prompts are lists of one assistant message; others are texts.
- `completion_ids`, `trainer_state`, `log_metric`, `log_extra` and the dataset's other columns are passed by name.
- None means that a function has no opinion on a completion.
- A function may be async.

Unlike in TRL, a function without `**kwargs` gets only the arguments that it names, and a function may return a list of
rewards for a completion, one per token of its `completion_ids`.
"""

import copy
import functools
import inspect
import math
import operator
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerState

from rlhf.comparisons import Prompt
from rlhf.errors import InputError
from rlhf.rewards.answers import Completion, RewardError, Score, check_scores, completion_text
from rlhf.rewards.event_loop import run_together
from rlhf.rewards.log import RewardLog

RewardFunction = Callable[..., Any]  # the result is an iterable of scores, or awaits one
# What reward functions get besides the dataset's columns. A column of the same name is left out.
ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
NOT_PASSED = ("prompt", "messages", "input_ids", "attention_mask")  # columns that become `prompts`


def reward_name(function: RewardFunction) -> str:
    """The name of a reward function in logs and errors: of a `functools.partial`, that of the function inside."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def reward_names(functions: Sequence[RewardFunction]) -> list[str]:
    """A name for each function; functions of the same name are numbered."""
    names = [reward_name(function) for function in functions]
    return [name if names.count(name) == 1 else f"{name}_{names[:number].count(name) + 1}"
            for number, name in enumerate(names)]  # fmt: skip


def check_reward_function(function: object, where: str, columns: Sequence[str] | None = None) -> None:
    """Refuse what can't be called as a reward function.

    Args:
        where: what the error names.
        columns: of the dataset, if they are known; empty if none are passed.

    Raises:
        InputError: if it is a class or no function, takes none of the arguments of a reward function, or needs others.
    """
    rule = "A reward function takes the argument 'completions' and returns one score for each"
    if isinstance(function, type) or not callable(function):
        kind = "a class" if isinstance(function, type) else f"of type {type(function).__name__}"
        raise InputError(f"{where}: is {kind}, not a function. {rule}.")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: its arguments can't be found out. {rule}.") from error
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_all and not named & {"prompts", "completions", "completion_ids"}:
        raise InputError(f"{where}: takes {inspect.signature(function)}. {rule}.")
    for parameter in parameters:
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise InputError(f"{where}: takes {parameter.name!r} by position only. Arguments are passed by name.")
        passed = sorted(set(columns or ()) - {*ARGUMENTS, *NOT_PASSED})
        if columns is not None and parameter.name not in (*ARGUMENTS, *passed):
            found = f"is no column of the dataset (found: {', '.join(passed) or 'none besides the prompt'})"
            raise InputError(
                f"{where}: needs the argument {parameter.name!r}, which "
                f"{found if columns else 'is not passed: labelers see no columns of the dataset'}. {rule}."
            )


def reward_columns(rows: Dataset) -> dict[str, list[Any]]:
    """The columns of a dataset that reward functions get by name."""
    return {name: rows[name][:] for name in rows.column_names if name not in (*ARGUMENTS, *NOT_PASSED)}


def call_rewards(
    functions: Sequence[RewardFunction],
    prompts: list[Prompt],
    completions: list[Completion],
    completion_ids: list[list[int]],
    /,
    **columns: object,
) -> list[list[Score]]:
    """Every function's scores, in the order of the functions. Async functions run at the same time.

    Each function gets a copy of its own of everything.

    Args:
        columns: the dataset's other columns, and what TRL adds to them: `trainer_state`, `log_metric`, `log_extra`.

    Raises:
        RewardError: if a function raises or exits, or returns a wrong number of scores or a value that is not a finite
            number.
    """
    log = RewardLog()
    given: dict[str, Any] = {
        "trainer_state": TrainerState(), "log_metric": log.log_metric, "log_extra": log.log_extra, **columns,
        "prompts": prompts, "completions": completions, "completion_ids": completion_ids,
    }  # fmt: skip
    answers: dict[int, Any] = {}
    waiting = {}
    for number, function in enumerate(functions):
        answer = _call(function, given)
        if inspect.isawaitable(answer):
            waiting[number] = answer
        answers[number] = answer
        if isinstance(answer, BaseException):
            break
    if not any(isinstance(answer, BaseException) for answer in answers.values()):
        here = os.getcwd()
        answers |= zip(waiting, run_together(list(waiting.values())), strict=True)
        os.chdir(here)
    for answer in waiting.values():
        if inspect.iscoroutine(answer):
            answer.close()  # does nothing to one that has run
    for number, function in enumerate(functions):
        if isinstance(answers.get(number), KeyboardInterrupt | RewardError):  # a judge's errors are lines already
            raise answers[number]
        if isinstance(answers.get(number), BaseException):
            raise _blame(function, answers[number], given)
    names = reward_names(functions)
    return [check_scores(name, answers[number], completions, completion_ids) for number, name in enumerate(names)]


def _call(function: RewardFunction, given: Mapping[str, Any]) -> object:
    """The answer, or the exception that the function raised. A generator is drawn from here, since it may raise too.

    The function may go to another folder; this process stays in its own, where the run's files are.
    """
    here = os.getcwd()
    try:
        answer = function(**_inputs(function, given))
        return list(islice(answer, len(given["completions"]) + 1)) if isinstance(answer, Iterator) else answer
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # exit() too
        return error
    finally:
        os.chdir(here)


def _inputs(function: RewardFunction, given: Mapping[str, Any]) -> dict[str, object]:
    """Copies of the arguments that the function names; of all, if it has `**kwargs`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    named = {parameter.name for parameter in parameters}
    takes_all = not named or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return {name: _copied(value) for name, value in given.items() if takes_all or name in named}


def _copied(value: Any) -> Any:
    """A copy at all depths; nothing done to it reaches the original. What can't be copied is passed as it is."""
    if value is None or isinstance(value, str | int | float) or inspect.isroutine(value):
        return value
    if type(value) is list:
        return [_copied(item) for item in value]
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, TrainerState):
        state = copy.copy(value)
        rest = {name: _copied(item) for name, item in vars(value).items() if name != "log_history"}
        vars(state).update(rest, log_history=[dict(entry) for entry in value.log_history])  # it may be long
        return state
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def _blame(function: RewardFunction, error: BaseException, given: Mapping[str, Any]) -> RewardError:
    """The error with its place in the user's file, and the completion on which the function raises, if that is found.

    The search for it halves the batch, so that the function computes no more than for a second batch.
    """
    culprits = list(range(len(given["completions"])))
    while len(culprits) > 1:
        half = culprits[: len(culprits) // 2]
        culprits = half if _raises(function, given, half) else culprits[len(half) :]
    found = bool(culprits) and _raises(function, given, culprits)
    where = "the completion" if found else "a batch that begins with the completion"
    completion = given["completions"][culprits[0] if found else 0] if given["completions"] else ""
    what = f"raised {type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        what = f"ended the program with exit({error.code!r})"
    blamed = RewardError(
        f"Reward function {reward_name(function)!r} {what}, on {where} {completion_text(completion)[:200]!r}"
        f"{_place(function, error)}."
    )
    blamed.__cause__ = error
    return blamed


def _raises(function: RewardFunction, given: Mapping[str, Any], rows: list[int]) -> bool:
    """Whether the function raises when it gets these rows alone."""
    count = len(given["completions"])
    part = {
        name: [values[row] for row in rows] if isinstance(values, list) and len(values) == count else values
        for name, values in given.items()
    }
    answer = _call(function, part)
    if inspect.isawaitable(answer):
        answer = run_together([answer])[0]
    return isinstance(answer, BaseException)


def _place(function: RewardFunction, error: BaseException) -> str:
    """Where the user's own code raised, like ` (my_rewards.py, line 3)`; empty if it never got there."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function if hasattr(function, "__code__") else type(function).__call__)
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}, line {lines[-1]})" if file and lines else ""


def need_scores(functions: Sequence[RewardFunction], scored: int, completions: int) -> None:
    """Warn of completions for which every function returned None.

    Args:
        scored: how many completions have a score, over all processes.
        completions: how many there are.

    Raises:
        RewardError: if no completion has a score.
    """
    names = ", ".join(map(repr, reward_names(functions)))
    if scored == 0:
        raise RewardError(f"Reward functions {names}: returned None for all {completions} completions of a batch.")
    if scored < completions:
        warnings.warn(
            f"Reward functions {names}: all returned None for some completions. Nothing is learned from those.",
            stacklevel=2,
        )


def total_scores(
    functions: Sequence[RewardFunction],
    scores: list[list[Score]],
    weights: list[float],
    completions: list[Completion],
    need_all: bool = True,
) -> list[float]:
    """The weighted sum of the functions' scores for each completion. Rewards per token are added; None adds nothing.

    Args:
        scores: as `call_rewards` returns them.
        need_all: False gives NaN to a completion for which all functions returned None.

    Raises:
        RewardError: if all functions returned None for a completion, so that it can't be compared with others.
    """
    totals = []
    for number, (completion, row) in enumerate(zip(completions, zip(*scores, strict=True), strict=True)):
        if all(score is None for score in row):
            if not need_all:
                totals.append(math.nan)
                continue
            names = ", ".join(map(repr, reward_names(functions)))
            raise RewardError(
                f"Reward functions {names}: returned None for the completion {completion_text(completion)[:200]!r} "
                f"(number {number} of the batch), which can't be compared without a score."
            )
        sums = [math.fsum(score) if isinstance(score, list) else score or 0.0 for score in row]
        totals.append(math.fsum(map(operator.mul, weights, sums)))
    return totals
