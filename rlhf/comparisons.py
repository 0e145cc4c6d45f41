"""Labelers compare replies; their comparisons become preference pairs.

A labeler is anything with a `name` and a method `compare(tasks)`: a simulation, people behind a page, a model
(rlhf/feedback/labelers.py). What is said is recorded with who said it and how sure they were.
"""

import hashlib
import itertools
import json
import math
from typing import Any, Literal, NamedTuple, Protocol

Messages = list[dict[str, Any]]
Prompt = str | Messages


class Task(NamedTuple):
    """A prompt and the different replies to compare."""

    id: str  # of the content below: a vote can't end up at other replies
    split: str  # train or test
    prompt: Prompt
    completions: list[str]
    models: list[str]  # what each completion was sampled from


def make_task(split: str, prompt: Prompt, completions: list[str], models: list[str]) -> Task:
    """A task, named after its content."""
    content = json.dumps([split, prompt, completions, models], sort_keys=True)
    return Task(hashlib.sha256(content.encode()).hexdigest()[:16], split, prompt, completions, models)


class Comparison(NamedTuple):
    """One labeler's answer about two of a task's completions."""

    first: int  # index of a completion
    second: int  # index of another one
    preferred: Literal["first", "second", "tie"]
    certainty: float | None  # probability that the labeler would answer so again; 0.5 for a tie; None if not known
    labeler: str


class Labeler(Protocol):
    """Who or what compares. With `finished` false after `compare`, there is more to compare another time."""

    name: str
    finished: bool

    def compare(self, tasks: list[Task]) -> list[list[Comparison]]:
        """Compare the completions of each task, in as many pairs as the labeler likes."""
        ...


def prefer_higher(scores: list[float], labeler: str, temperature: float | None = None) -> list[Comparison]:
    """All pairs of a task's completions, ordered by score; equal scores are a tie.

    Args:
        temperature: if the scores are those of a Bradley–Terry model, the unit in which its noise is 1, and with it
            how certain each answer is: 1 / (1 + exp(-difference / temperature)).
    """
    answers = []
    for first, second in itertools.combinations(range(len(scores)), 2):
        difference = scores[first] - scores[second]
        preferred: Literal["first", "second", "tie"]
        preferred = "tie" if difference == 0 else "first" if difference > 0 else "second"
        certainty = bradley_terry(abs(difference), temperature) if temperature is not None else None
        answers.append(Comparison(first, second, preferred, certainty, labeler))
    return answers


def bradley_terry(difference: float, temperature: float) -> float:
    """P(the first is preferred) = 1 / (1 + exp(-(s_first - s_second) / temperature)); Biometrika 39 (1952)."""
    steepness = difference / temperature if temperature else math.copysign(math.inf, difference)
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, steepness))))


def as_message(prompt: Prompt, completion: str) -> str | Messages:
    """A completion in the form of its prompt: text for text, an assistant message for messages."""
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


def preference_pairs(task: Task, comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """Rows `prompt`, `chosen`, `rejected`, `labeler`, `certainty`, `model` from a task's comparisons, without ties."""
    rows = []
    for comparison in comparisons:
        if comparison.preferred == "tie":
            continue
        chosen, rejected = comparison.first, comparison.second
        if comparison.preferred == "second":
            chosen, rejected = rejected, chosen
        models = dict.fromkeys((task.models[chosen], task.models[rejected]))
        rows.append(
            {
                "prompt": task.prompt,
                "chosen": as_message(task.prompt, task.completions[chosen]),
                "rejected": as_message(task.prompt, task.completions[rejected]),
                "labeler": comparison.labeler,
                "certainty": comparison.certainty,
                "model": ", ".join(models),
            }
        )
    return rows
