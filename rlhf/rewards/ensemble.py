"""Several reward models as one reward function."""

import statistics
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch

from rlhf.comparisons import Prompt
from rlhf.errors import InputError
from rlhf.rewards.answers import Completion, RewardError, Score
from rlhf.rewards.calling import RewardFunction, call_rewards, reward_names

Combination: TypeAlias = Literal["mean", "wco", "uwo"]


class RewardScale(NamedTuple):
    """Mean and standard deviation of the scores of the first batch, which the SFT model samples."""

    mean: float
    std: float


def combine(scores: torch.Tensor, how: Combination, uwo_coef: float) -> torch.Tensor:
    """The scores (B,) of an ensemble from those of its K models, (K, B) on one scale.

    `mean`, the worst (`wco`), or the mean minus `uwo_coef` × the variance over the models (`uwo`). The last two are
    worst-case and uncertainty-weighted optimization of Coste et al., https://arxiv.org/abs/2310.02743.

    >>> scores = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, -3.0]])
    >>> [combine(scores, how, 0.5).tolist() for how in ("mean", "wco", "uwo")]
    [[2.0, -1.0], [1.0, -3.0], [1.6666666269302368, -2.0]]
    """
    if how == "wco":
        return scores.amin(0)
    penalty = uwo_coef * scores.var(0, correction=0) if how == "uwo" else 0.0
    return scores.mean(0) - penalty


class RewardEnsemble:
    """Several reward models as one reward function (https://arxiv.org/abs/2310.02743).

    The Bradley-Terry loss leaves the level of a model's scores to chance, and how far they lie apart depends on how
    long the model was trained. So each model's scores are shifted and scaled first: to mean 0 and standard deviation 1
    on one batch, which PPO's policy samples before it is trained. Without the shift the model with the lowest level
    would always be the worst; without the scale the one with the largest scores would decide. Later batches keep these
    scales, as scores must mean the same in all updates.

    It logs as `ensemble/spread` the mean over completions of the standard deviation over the models, which grows where
    they no longer agree. `raw` has the models' own scores of the last call, by name.

    Args:
        members: the models; functions that score each completion with a number are possible too.
        how, uwo_coef: see `combine`.

    Raises:
        InputError: if there are fewer than two models.
    """

    __name__ = "ensemble"

    def __init__(self, members: Sequence[RewardFunction], how: Combination = "mean", uwo_coef: float = 0.1) -> None:
        if len(members) < 2:
            raise InputError(f"An ensemble needs two reward models or more; found {len(members)}.")
        self.members, self.how, self.uwo_coef = list(members), how, uwo_coef
        self.scales: list[RewardScale] | None = None  # of each model; None until the first batch is scored
        self.raw: dict[str, list[float]] = {}

    def measure(self, scores: Sequence[Sequence[float]]) -> None:
        """Take the scale of each model from its scores. The standard deviation of a constant counts as 1."""
        spreads = [statistics.pstdev(own) for own in scores]
        self.scales = [RewardScale(statistics.fmean(own), std if std > 1e-6 else 1.0)
                       for own, std in zip(scores, spreads, strict=True)]  # fmt: skip

    def __call__(
        self,
        prompts: list[Prompt],
        completions: list[Completion],
        completion_ids: list[list[int]] | None = None,
        log_metric: Callable[[str, float], None] = lambda name, value: None,
        **columns: object,
    ) -> list[float]:
        """One score per completion, in standard deviations of the batch that set the scales."""
        names, ids = reward_names(self.members), completion_ids or [[] for _ in completions]
        answers = call_rewards(self.members, prompts, completions, ids, log_metric=log_metric, **columns)
        self.raw = {name: _numbers(name, scores) for name, scores in zip(names, answers, strict=True)}
        raw = list(self.raw.values())
        if self.scales is None:
            self.measure(raw)
        assert self.scales is not None
        means, stds = (torch.tensor(part, dtype=torch.float64)[:, None] for part in zip(*self.scales, strict=True))
        scores = (torch.tensor(raw, dtype=torch.float64) - means) / stds
        log_metric("ensemble/spread", float(scores.std(0, correction=0).mean()))
        return combine(scores, self.how, self.uwo_coef).tolist()


def _numbers(name: str, scores: list[Score]) -> list[float]:
    """Scores that are numbers: models can't be compared where one has no opinion.

    Raises:
        RewardError: naming the function and the completion.
    """
    numbers = [score for score in scores if isinstance(score, float)]
    if len(numbers) < len(scores):
        number = next(number for number, score in enumerate(scores) if not isinstance(score, float))
        raise RewardError(
            f"Reward function {name!r} of an ensemble returned {scores[number]!r} for a completion (number {number} of "
            "the batch). There it has to give each completion one number."
        )
    return numbers
