"""Two rewards of the same replies: means and paired differences, the front, and where the rewards disagree."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from eval.measuring.replies import Replies
from eval.stats.intervals import Interval, JsonObject, Scores, mean_difference, over_known
from rlhf.comparisons import Prompt, as_message
from rlhf.errors import InputError
from rlhf.rewards import RewardFunction, call_rewards


def score_by_each(
    functions: Sequence[RewardFunction],
    prompts: list[Prompt],
    replies: Replies,
    columns: Mapping[str, list[Any]] | None = None,
) -> list[Scores]:
    """Each reward's scores of one reply to each prompt; None: no opinion. Rewards per token are added up.

    Args:
        columns: the dataset's other columns, see `reward_columns`.
    """
    completions = [as_message(prompt, text) for prompt, text in zip(prompts, replies.texts, strict=True)]
    answers = call_rewards(functions, prompts, completions, replies.ids, **(columns or {}))
    return [[math.fsum(score) if isinstance(score, list) else score for score in scores] for scores in answers]


def undominated(means: Mapping[str, tuple[float, float]]) -> list[str]:
    """The Pareto front: the models that no other dominates, that is, is as good as by both rewards and better by one.

    >>> undominated({"a": (2.0, 0.0), "b": (1.0, 1.0), "c": (1.0, 0.5), "d": (0.0, 0.9)})
    ['a', 'b']

    Args:
        means: by model.
    """
    return [
        name
        for name, own in means.items()
        if not any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in means.values())
    ]


def front_of(scores: Mapping[str, Sequence[Scores]], rewards: list[str]) -> JsonObject:
    """Means, paired differences to the first model, and the front, as front.json has them.

    Args:
        scores: by model, of each of the two rewards.
        rewards: their names.

    Raises:
        InputError: if a reward has no opinion on any reply of a model.
    """
    first, *others = scores
    cells: dict[str, list[Interval]] = {}
    for name, columns in scores.items():
        for reward, column in zip(rewards, columns, strict=True):
            if all(score is None for score in column):
                raise InputError(f"--reward_funcs: {reward} has no opinion on any of {len(column)} replies of {name}.")
            cells.setdefault(name, []).append(over_known(column))
    gaps = {name: list(map(mean_difference, scores[name], scores[first])) for name in others}
    return {
        "rewards": rewards,
        "models": {name: [cell.to_json() for cell in pair] for name, pair in cells.items()},
        "differences": {f"{name}_minus_{first}": [cell and cell.to_json() for cell in pair]
                        for name, pair in gaps.items()},
        "front": undominated({name: (pair[0].mean, pair[1].mean) for name, pair in cells.items()}),
    }  # fmt: skip


def largest_disagreement(samples: Sequence[JsonObject]) -> JsonObject | None:
    """The reply whose ranks by the two rewards differ most, among the replies that both have an opinion on.

    >>> largest_disagreement([{"prompt": "q", "a": "Ha!", "b": "Oh.", "scores": {"a": [0.9, -1.0], "b": [0.1, 0.0]}}])
    {'prompt': 'q', 'model': 'a', 'reply': 'Ha!', 'scores': [0.9, -1.0], 'ranks': [1.0, 2.0], 'of': 2}

    Args:
        samples: rows of samples.jsonl: the prompt, each model's reply, and `scores` by model.

    Returns:
        prompt, model, reply, both scores, and both ranks among the `of` replies. Rank 1 is the best; equal scores share
        their mean rank. None if the ranks agree on all replies.
    """
    known = [(row, name) for row in samples for name, pair in row["scores"].items() if None not in pair]
    if not known:
        return None
    ranks = rankdata([[-score for score in row["scores"][name]] for row, name in known], axis=0)  # (R, 2)
    gaps = np.abs(ranks[:, 0] - ranks[:, 1])
    at = int(gaps.argmax())
    row, name = known[at]
    about = {"prompt": row["prompt"], "model": name, "reply": row[name], "scores": row["scores"][name]}
    return {**about, "ranks": ranks[at].tolist(), "of": len(known)} if gaps[at] else None
