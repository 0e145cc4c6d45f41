"""A judge as a reward function: a language model rates each completion by a principle or a rubric."""

from collections import deque
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel
from trl import ModelConfig

from rlhf.comparisons import Prompt
from rlhf.errors import InputError
from rlhf.models.sources import Source, resolve
from rlhf.rewards.answers import Completion, RewardError, completion_text
from rlhf.rewards.local_judge import LocalJudge, load_judge
from rlhf.rewards.rubrics import (
    JUDGE,
    RATINGS,
    Criterion,
    JudgeArguments,
    criteria_of,
    expected_rating,
    rating_question,
)
from rlhf.rewards.server_judge import ServerJudge

LATEST, MOST_UNANSWERED = 100, 0.5  # of so many questions, the share that may have no answer


class JudgeSource(NamedTuple):
    """A judge that was found: on a server, or a model to load."""

    criteria: list[Criterion]
    model: Source | None
    server: ServerJudge | None

    @property
    def name(self) -> str:
        """The model's name, without folders."""
        return Path(self.server.name if self.server else self.model.name if self.model else JUDGE).name

    def load(
        self, model_args: ModelConfig, policy: PreTrainedModel | PeftModel | None = None, batch_size: int = 16
    ) -> LocalJudge | ServerJudge:
        """The judge to ask. One that is the policy's base is the policy with its adapters off."""
        if self.server is not None:
            return self.server
        assert self.model is not None
        return load_judge(self.model, model_args, policy, batch_size)


def resolve_judge(args: JudgeArguments, trust_remote_code: bool = False) -> JudgeSource:
    """Find the judge that the flags name. A server is asked a first question.

    Sets `judge_model_name_or_path` to the name of a server's only model: a run's settings record it, so that a run that
    goes on has the same judge.

    Raises:
        InputError: for a wrong principle, rubric, model or address; or if the server doesn't answer.
    """
    criteria, name = criteria_of(args), args.judge_model_name_or_path
    if args.judge_base_url is not None:
        server = ServerJudge(args.judge_base_url, name, args.judge_max_new_tokens)
        args.judge_model_name_or_path = server.name
        return JudgeSource(criteria, None, server)
    if args.judge_max_new_tokens != JudgeArguments.judge_max_new_tokens:
        raise InputError("--judge_max_new_tokens: is for a judge on a server (--judge_base_url); one in this process "
                         "writes nothing. Leave it out.")  # fmt: skip
    source = resolve(name, "--judge_model_name_or_path", trust_remote_code=trust_remote_code)
    return JudgeSource(criteria, source, None)


def refuse_judge_flags(args: JudgeArguments, add: str = f"--reward_funcs {JUDGE}") -> None:
    """Raise InputError for flags of a judge where none judges.

    Args:
        add: what would make one judge.
    """
    for flag in fields(JudgeArguments):
        if getattr(args, flag.name) != flag.default:
            raise InputError(f"--{flag.name}: is a judge's, and none judges. Add {add}.")


class JudgeReward:
    """A judge's rating of each completion, from 1 to 7: of several criteria, the weighted mean.

    A rating is the mean of the numbers 1 to 7 under the judge's probabilities. A completion that the judge doesn't
    rate by every criterion has no score. The log gets `judge/unanswered`, the share of such questions; the tables of
    samples get each rating.

    Args:
        judge: has `answers`, and a server also `answers_later`.
        criteria: at least one.

    Raises:
        RewardError: when called, if more than half of the latest questions were not answered, or a server fails.
    """

    def __init__(self, judge: LocalJudge | ServerJudge, criteria: list[Criterion]) -> None:
        self.judge, self.criteria, self.__name__ = judge, criteria, JUDGE
        self.latest: deque[bool] = deque(maxlen=LATEST)  # whether each question was answered

    def __call__(
        self,
        prompts: list[Prompt],
        completions: list[Completion],
        log_metric: Callable[..., object] = lambda *_: None,
        log_extra: Callable[..., object] = lambda *_: None,
    ) -> Any:
        """One rating or None per completion. With a server it is awaited, beside other async functions."""
        questions = [
            rating_question(criterion.text, prompt, completion_text(completion))
            for criterion in self.criteria
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        if isinstance(self.judge, ServerJudge):
            return self._later(self.judge, questions, len(completions), log_metric, log_extra)
        return self._scores(self.judge.answers(questions, RATINGS), len(completions), log_metric, log_extra)

    async def _later(self, judge: ServerJudge, questions: list[str], count: int, *log: Any) -> list[float | None]:
        return self._scores(await judge.answers_later(questions, RATINGS), count, *log)

    def _scores(
        self,
        answers: list[list[float]],
        count: int,
        log_metric: Callable[..., object],
        log_extra: Callable[..., object],
    ) -> list[float | None]:
        ratings = [expected_rating(shares) for shares in answers]
        self._note([rating is not None for rating in ratings])
        by_criterion = [ratings[start : start + count] for start in range(0, len(ratings), count)] if count else []
        for criterion, column in zip(self.criteria, by_criterion, strict=bool(count)):
            name = JUDGE if len(self.criteria) == 1 else f"{JUDGE}/{criterion.name}"
            log_extra(name, [None if rating is None else round(rating, 2) for rating in column])
        if ratings:
            log_metric(f"{JUDGE}/unanswered", ratings.count(None) / len(ratings))
        weights = [criterion.weight for criterion in self.criteria]
        return [_weighted_mean(row, weights) for row in zip(*by_criterion, strict=True)]

    def _note(self, answered: list[bool]) -> None:
        self.latest.extend(answered)
        silent = self.latest.count(False)
        if silent > MOST_UNANSWERED * len(self.latest):
            why = getattr(self.judge, "last_failure", "") or "another token is more likely"
            raise RewardError(
                f"{JUDGE} {Path(self.judge.name).name}: gave no rating in answer to {silent} of the last "
                f"{len(self.latest)} questions (the last time, {why}). Use a model that follows instructions, a "
                "plainer principle or, for one that thinks first, a server and a larger --judge_max_new_tokens."
            )


def _weighted_mean(ratings: tuple[float | None, ...], weights: list[float]) -> float | None:
    """The weighted mean of ratings; None if one is missing.

    >>> _weighted_mean((7.0, 1.0), [2.0, 1.0]), _weighted_mean((7.0, None), [2.0, 1.0])
    (5.0, None)
    """
    given = [rating for rating in ratings if rating is not None]
    if len(given) < len(ratings):
        return None
    return sum(weight * rating for weight, rating in zip(weights, given, strict=True)) / sum(weights)
