"""Labelers compare replies; their comparisons become preference pairs.

A labeler is anything with a `name` and a method `compare(prompt, completions) -> list[Comparison]`: a simulation, a
person behind a page, a model. What it says is recorded with who said it and how sure they were.
"""

import itertools
import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from rlhf.errors import InputError
from rlhf.starter import gold_scores, starter_dataset

Messages = list[dict[str, Any]]
Prompt = str | Messages


class Comparison(NamedTuple):
    """One labeler's answer about two of a prompt's completions."""

    first: int  # index of a completion
    second: int  # index of another one
    preferred: Literal["first", "second", "tie"]
    certainty: float  # probability that the labeler would answer so again; 0.5 for a tie


class Labeler(Protocol):
    """Who or what compares. `name` is written into every pair of the dataset."""

    name: str

    def compare(self, prompt: Prompt, completions: list[str]) -> list[Comparison]:
        """Compare the completions of one prompt, in as many pairs as the labeler likes."""
        ...


@dataclass
class SimulatedLabeler:
    """Prefers what a hidden score ranks higher, with Bradley–Terry noise, so that the truth is known and checkable.

    P(first preferred) = 1 / (1 + exp(-(s_first - s_second) / temperature)); Bradley & Terry, Biometrika 39 (1952).
    Completions with equal scores are a tie. Answers depend on the seed, the prompt and the completions alone, so an
    interrupted collection goes on with the same answers.

    Args:
        score: completions -> hidden scores.
        temperature: noise in units of the score; 0 is a labeler who never errs.
    """

    temperature: float = 0.15
    seed: int = 0
    score: Callable[[list[str]], list[float]] = gold_scores
    name: str = "simulated"

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"--labeler_temperature {self.temperature}: can't be negative.")

    def compare(self, prompt: Prompt, completions: list[str]) -> list[Comparison]:
        scores = self.score(completions)
        generator = random.Random(zlib.crc32(repr((self.seed, prompt, completions)).encode()))
        comparisons = []
        for first, second in itertools.combinations(range(len(completions)), 2):
            difference = scores[first] - scores[second]
            draw = generator.random()
            if difference == 0:
                comparisons.append(Comparison(first, second, "tie", 0.5))
                continue
            steepness = difference / self.temperature if self.temperature else math.copysign(math.inf, difference)
            probability = 1 / (1 + math.exp(-max(-500.0, min(500.0, steepness))))
            preferred: Literal["first", "second"] = "first" if draw < probability else "second"
            comparisons.append(
                Comparison(first, second, preferred, probability if preferred == "first" else 1 - probability)
            )
        return comparisons


LABELERS: dict[str, Callable[..., Labeler]] = {"simulated": SimulatedLabeler}


def as_message(prompt: Prompt, completion: str) -> str | Messages:
    """A completion in the form of its prompt: text for text, an assistant message for messages."""
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


def preference_pairs(prompt: Prompt, completions: list[str], labeler: Labeler, model: str) -> list[dict[str, Any]]:
    """Rows `prompt`, `chosen`, `rejected`, `labeler`, `certainty`, `model` from one prompt's comparisons, without ties.

    Args:
        model: what the completions were sampled from, recorded in each row.
    """
    rows = []
    for comparison in labeler.compare(prompt, completions):
        if comparison.preferred == "tie":
            continue
        first, second = completions[comparison.first], completions[comparison.second]
        chosen, rejected = (first, second) if comparison.preferred == "first" else (second, first)
        rows.append(
            {
                "prompt": prompt,
                "chosen": as_message(prompt, chosen),
                "rejected": as_message(prompt, rejected),
                "labeler": labeler.name,
                "certainty": comparison.certainty,
                "model": model,
            }
        )
    return rows


def starter_preferences(config: str | None = None, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Preference pairs that need no sampling: two human replies, the real one and another chat's, compared by the
    simulated labeler. They let recipes/reward.py run without arguments.

    Returns:
        rows by split, `train` and `test`.
    """
    labeler = SimulatedLabeler(seed=seed)
    splits = {}
    for split, rows in starter_dataset("preference", config).items():
        replies = [row["completion"][0]["content"] for row in rows]
        others = replies[1:] + replies[:1]
        splits[split] = [
            pair
            for row, reply, other in zip(rows, replies, others, strict=True)
            for pair in preference_pairs(row["prompt"], [reply, other], labeler, "people")
        ]
    return splits
