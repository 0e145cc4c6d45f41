"""Labelers compare replies; their comparisons become preference pairs.

A labeler has a `name` and a method `compare(tasks)`: a simulation, people behind a page, a model
(rlhf/feedback/labelers.py). A comparison records who made it and how certain they were.
"""

import hashlib
import itertools
import json
import math
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

Messages = list[dict[str, Any]]  # {"role": ..., "content": ...}, and other keys that a chat template reads
Prompt = str | Messages


class Task(NamedTuple):
    """A prompt and the different replies to compare."""

    id: str  # digest of the content below, so that a vote can't count for other replies
    split: str  # train or test
    prompt: Prompt
    completions: list[str]
    models: list[str]  # what each completion was sampled from


def make_task(split: str, prompt: Prompt, completions: list[str], models: list[str]) -> Task:
    """A task, with its id."""
    content = json.dumps([split, prompt, completions, models], sort_keys=True)
    return Task(hashlib.sha256(content.encode()).hexdigest()[:16], split, prompt, completions, models)


class Comparison(NamedTuple):
    """One labeler's answer about two of a task's completions."""

    first: int  # index of a completion
    second: int  # index of another one
    preferred: Literal["first", "second", "tie"]
    certainty: float | None  # probability of the same answer if asked again; 0.5 for a tie; None if not known
    labeler: str


class Rating(NamedTuple):
    """How good one labeler finds one of a task's completions."""

    completion: int  # its index
    rating: int  # from 1, the worst, to 7
    labeler: str


class Labeler(Protocol):
    """Who or what compares. If `finished` is false after `compare`, some comparisons are still open."""

    name: str
    finished: bool

    def compare(self, tasks: list[Task]) -> list[list[Comparison]]:
        """Compare any number of pairs of each task's completions."""
        ...


@runtime_checkable
class Rater(Protocol):
    """A labeler that rates completions too."""

    def ratings(self, tasks: list[Task]) -> list[list[Rating]]:
        """The ratings of each task's completions that `compare` has asked for; none where nobody gave any."""
        ...


def prefer_higher(scores: list[float], labeler: str, temperature: float | None = None) -> list[Comparison]:
    """Comparisons of all pairs of a task's completions by their scores; equal scores, or a NaN, are a tie.

    >>> [comparison.preferred for comparison in prefer_higher([0.5, 2.0, 2.0], "judge")]
    ['second', 'second', 'tie']
    >>> prefer_higher([0.5, float("nan")], "judge", temperature=1.0)[0][2:4]
    ('tie', None)

    Args:
        temperature: of the Bradley–Terry model that the scores belong to. It gives each answer its certainty, 1 / (1 +
            exp(-difference / temperature)). Without it certainty is not known.
    """
    answers = []
    for first, second in itertools.combinations(range(len(scores)), 2):
        difference = scores[first] - scores[second]
        preferred: Literal["first", "second", "tie"]
        preferred = "first" if difference > 0 else "second" if difference < 0 else "tie"
        unknown = temperature is None or math.isnan(difference)
        certainty = None if unknown else bradley_terry(abs(difference), temperature or 0.0)
        answers.append(Comparison(first, second, preferred, certainty, labeler))
    return answers


def bradley_terry(difference: float, temperature: float) -> float:
    """P(the first is preferred) = 1 / (1 + exp(-(s_first - s_second) / temperature)).

    >>> bradley_terry(0.0, 1.0), round(bradley_terry(1.0, 1.0), 3)
    (0.5, 0.731)

    Source: Bradley and Terry, Biometrika 39 (1952).
    """
    steepness = difference / temperature if temperature else math.copysign(math.inf, difference)
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, steepness))))


class PreferencePair(TypedDict):
    """A row of a preference dataset."""

    prompt: Prompt
    chosen: str | Messages
    rejected: str | Messages
    labeler: str
    certainty: float | None
    model: str  # what the two completions were sampled from


def as_message(prompt: Prompt, completion: str) -> str | Messages:
    """A completion in the form of its prompt: text for text, an assistant message for messages."""
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


def preference_pairs(task: Task, comparisons: list[Comparison]) -> list[PreferencePair]:
    """The preference pairs of a task's comparisons; a tie gives none."""
    rows: list[PreferencePair] = []
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
