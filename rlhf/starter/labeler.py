"""The simulated labeler and people, who follow the starter's gold score."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rlhf.comparisons import (
    Comparison,
    PreferencePair,
    Prompt,
    Rating,
    Task,
    bradley_terry,
    make_task,
    prefer_higher,
    preference_pairs,
)
from rlhf.errors import InputError
from rlhf.starter.conversations import starter_dataset
from rlhf.starter.scorer import gold_scores


@dataclass
class SimulatedLabeler:
    """Prefers the completion with the higher gold score, with Bradley–Terry noise.

    Completions with equal scores are a tie. Answers depend on the seed, the prompt and the completions alone, so an
    interrupted collection continues with the same answers.

    Args:
        score: completions -> gold scores.
        temperature: noise in units of the score; a labeler with 0 never errs.
    """

    temperature: float = 0.15
    seed: int = 0
    score: Callable[[list[str]], list[float]] = gold_scores
    name: str = "simulated"
    finished: bool = True

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"--labeler_temperature {self.temperature}: can't be negative.")

    def compare(self, tasks: list[Task]) -> list[list[Comparison]]:
        return [self._compare(task.prompt, task.completions) for task in tasks]

    def _compare(self, prompt: Prompt, completions: list[str]) -> list[Comparison]:
        scores = self.score(completions)
        generator = random.Random(zlib.crc32(repr((self.seed, prompt, completions)).encode()))
        comparisons = []
        for sure in prefer_higher(scores, self.name):
            draw = generator.random()
            if sure.preferred == "tie":
                comparisons.append(sure._replace(certainty=0.5))
                continue
            probability = bradley_terry(scores[sure.first] - scores[sure.second], self.temperature)
            preferred: Literal["first", "second"] = "first" if draw < probability else "second"
            certainty = probability if preferred == "first" else 1 - probability
            comparisons.append(sure._replace(preferred=preferred, certainty=certainty))
        return comparisons


class Scale(NamedTuple):
    """A simulated person's scale from 1 to 7, which nobody else knows.

    The person feels `score + offset + noise`. Five classes of equal width divide the feelings from -`spread` to
    +`spread`; 1 and 7 are what lies beyond.
    """

    name: str
    offset: float  # above 0: a mild person
    spread: float  # small: one who is quick to give a 1 or a 7
    noise: float = 0.2  # standard deviation, in units of the score

    def rating(self, feeling: float) -> int:
        """The class of a feeling.

        >>> [Scale("ada", offset=0.0, spread=0.5).rating(feeling) for feeling in (-0.6, -0.5, 0.0, 0.29, 0.31, 0.9)]
        [1, 2, 4, 5, 6, 7]
        """
        cuts = [self.spread * (2 * number / 5 - 1) for number in range(6)]
        return 1 + sum(feeling >= cut for cut in cuts)


SCALES = (Scale("Ada", 0.0, 0.7), Scale("Ben", 0.25, 0.9), Scale("Cleo", -0.25, 0.5))


@dataclass
class SimulatedRaters:
    """Simulated people who compare completions and rate each from 1 to 7, each person by a scale of their own.

    What a person feels about a completion depends on the seed, the person, the prompt and the completion alone.

    Args:
        score: completions -> gold scores.
    """

    seed: int = 0
    scales: tuple[Scale, ...] = SCALES
    score: Callable[[list[str]], list[float]] = gold_scores
    name: str = "simulated"
    finished: bool = True

    def compare(self, tasks: list[Task]) -> list[list[Comparison]]:
        return [
            [
                comparison
                for scale in self.scales
                for comparison in prefer_higher(self._feelings(scale, task), scale.name)
            ]
            for task in tasks
        ]

    def ratings(self, tasks: list[Task]) -> list[list[Rating]]:
        return [
            [
                Rating(number, scale.rating(feeling), scale.name)
                for scale in self.scales
                for number, feeling in enumerate(self._feelings(scale, task))
            ]
            for task in tasks
        ]

    def _feelings(self, scale: Scale, task: Task) -> list[float]:
        feelings = []
        for completion, score in zip(task.completions, self.score(task.completions), strict=True):
            key = repr((self.seed, scale.name, task.prompt, completion))
            noise = random.Random(zlib.crc32(key.encode())).gauss(0, scale.noise)
            feelings.append(score + scale.offset + noise)
        return feelings


def starter_preferences(config: str | None = None, seed: int = 0) -> dict[str, list[PreferencePair]]:
    """Preference pairs for recipes/reward.py without arguments: the simulated labeler compares two human replies, the
    real one and another chat's.

    Returns:
        rows by split, `train` and `test`.
    """
    labeler = SimulatedLabeler(seed=seed)
    splits = {}
    for split, rows in starter_dataset("preference", config).items():
        replies = [row["completion"][0]["content"] for row in rows]
        others = replies[1:] + replies[:1]
        tasks = [
            make_task(split, row["prompt"], [reply, other], ["people", "people"])
            for row, reply, other in zip(rows, replies, others, strict=True)
        ]
        answers = labeler.compare(tasks)
        splits[split] = [
            pair for task, given in zip(tasks, answers, strict=True) for pair in preference_pairs(task, given)
        ]
    return splits
