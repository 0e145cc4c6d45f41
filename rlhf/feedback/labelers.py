"""The labelers behind `--labeler`: a simulation, a score, a judge model, people."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.comparisons import Comparison, Labeler, Task, as_message, prefer_higher
from rlhf.errors import InputError
from rlhf.feedback.assignment import VotingSettings
from rlhf.feedback.votes import VOTES_FILE
from rlhf.rewards import (
    JudgeArguments,
    JudgeSource,
    RewardFunction,
    call_rewards,
    load_reward,
    resolve_judge,
    resolve_reward_functions,
    total_scores,
)
from rlhf.rewards.judge import refuse_judge_flags
from rlhf.rewards.rubrics import JUDGE, LEAST_ANSWERED, LETTERS, choice_question
from rlhf.run.ranges import NonNegativeFloat
from rlhf.starter.labeler import SimulatedLabeler
from rlhf.starter.model import STARTER

LABELERS = ("simulated", "human", "judge", "reward")


@dataclass
class LabelerSettings(VotingSettings, JudgeArguments):
    """Settings of each kind of labeler, in collecting preferences and in evaluation."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "For 'reward': reward models (folder or Hub id), import paths of functions, or 'judge'."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})


@dataclass
class LabelerArguments(LabelerSettings):
    """Which labeler compares the replies."""

    labeler: Literal["simulated", "human", "judge", "reward"] = field(
        default="simulated", metadata={"help": "Who compares."}
    )
    labeler_temperature: NonNegativeFloat = field(
        default=0.15, metadata={"help": "Noise of the simulated labeler; 0: none."}
    )


def labeler_flags(folder: str) -> list[str]:
    """The flags of the labeler that may still change: all, until somebody's answers are in the run's folder.

    The sampled replies serve every labeler.
    """
    answered = any((Path(folder) / name).exists() for name in (VOTES_FILE, "train.jsonl"))
    return [] if answered else [flag.name for flag in dataclasses.fields(LabelerArguments)]


def check_labeler_kind(name: str) -> None:
    """Refuse an unknown labeler.

    Raises:
        InputError: naming the known ones.
    """
    if name not in LABELERS:
        raise InputError(f"--labeler {name}: unknown. Labelers are {', '.join(LABELERS)}.")


def check_labeler_flags(names: list[str], settings: LabelerSettings, add: str) -> None:
    """Raise InputError for flags of a labeler that is not among these.

    Args:
        add: what would add one, such as "--labeler {}".
    """
    if JUDGE not in names and not ("reward" in names and JUDGE in (settings.reward_funcs or [])):
        refuse_judge_flags(settings, add.format(JUDGE))
    if settings.reward_funcs is not None and "reward" not in names:
        raise InputError(f"{' '.join(['--reward_funcs', *settings.reward_funcs])}: scores nothing here. Add "
                         f"{add.format('reward')}, or leave it out.")  # fmt: skip
    temperature = getattr(settings, "labeler_temperature", LabelerArguments.labeler_temperature)  # judges have none
    if temperature != LabelerArguments.labeler_temperature and "simulated" not in names:
        raise InputError(f"--labeler_temperature {temperature}: is the simulated labeler's. Add "
                         f"{add.format('simulated')}, or leave it out.")  # fmt: skip


def make_labeler(
    name: str,
    settings: LabelerSettings,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
    seed: int,
) -> Labeler:
    """A labeler by name. Its models are found now and loaded at the first comparison.

    Args:
        tokenizer: of the model that wrote the replies, for reward functions that read token ids.
        folder: the run's folder, which gets people's votes.

    Raises:
        InputError: for an unknown labeler, model or function, or flags of another labeler.
    """
    check_labeler_kind(name)
    if isinstance(settings, LabelerArguments):
        check_labeler_flags([name], settings, "--labeler {}")
    if name == "simulated" and isinstance(settings, LabelerArguments):
        return SimulatedLabeler(temperature=settings.labeler_temperature, seed=seed)
    if name == "reward":
        rewards = [STARTER] if settings.reward_funcs is None else settings.reward_funcs
        return ScoreLabeler(rewards, model_args, tokenizer, settings)
    if name == "judge":
        return JudgeLabeler(resolve_judge(settings, settings.trust_remote_code), model_args)
    if name == "human":
        from rlhf.feedback.vote_page import People  # Gradio takes seconds to import

        return People(settings, Path(folder) / VOTES_FILE, seed)
    raise ValueError(f"{name} is in LABELERS and not here")  # check_labeler_kind passed it


class ScoreLabeler:
    """Prefers the reply that reward models or functions score higher; several scores are added.

    A reward model is a Bradley–Terry model, so the difference of its scores gives the certainty. Functions give none. A
    reply without a score, which a judge may give, is neither better nor worse than another.
    """

    finished = True

    def __init__(
        self,
        rewards: list[str],
        model_args: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        settings: LabelerSettings | None = None,
    ) -> None:
        if not rewards:
            raise InputError("--reward_funcs: --labeler reward needs at least one reward model or function.")
        trust = settings is not None and settings.trust_remote_code
        self.sources = resolve_reward_functions(
            rewards, "--reward_funcs", columns=(), trust_remote_code=trust, judge=settings
        )
        self.model_args, self.tokenizer = model_args, tokenizer
        self.temperature = 1.0 if all(source.model for source in self.sources) else None
        self.name = "reward " + " + ".join(Path(name).name for name in rewards)

    def compare(self, tasks: list[Task]) -> list[list[Comparison]]:
        functions: list[RewardFunction] = [load_reward(source, self.model_args) for source in self.sources]
        texts = [text for task in tasks for text in task.completions]
        completions = [as_message(task.prompt, text) for task in tasks for text in task.completions]
        columns = call_rewards(
            functions,
            [task.prompt for task in tasks for _ in task.completions],
            completions,
            self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [],
        )
        scores = total_scores(functions, columns, [1.0] * len(functions), completions, need_all=False)
        if silent := sum(map(math.isnan, scores)):
            print(f"{self.name}: no score for {silent} of {len(scores)} replies; their comparisons count as ties.")
        totals = iter(scores)
        return [prefer_higher([next(totals) for _ in task.completions], self.name, self.temperature) for task in tasks]


class JudgeLabeler:
    """Asks a language model which of two replies is better by a written principle or rubric (RLAIF).

    Each pair is asked in both orders. Averaging the probabilities of the answers "A" and "B" over the two cancels a
    preference for the first or the second place. Source: Bai et al., Constitutional AI, arXiv 2212.08073, section 4.1
    (multiple choice, normalized log-probabilities of the answers as soft labels).
    """

    finished = True

    def __init__(self, source: JudgeSource, model_args: ModelConfig) -> None:
        self.source, self.model_args = source, model_args
        self.name = f"judge {source.name}"

    def compare(self, tasks: list[Task]) -> list[list[Comparison]]:
        judge = self.source.load(self.model_args)
        pairs = [(task, c) for task in tasks for c in prefer_higher([0.0] * len(task.completions), self.name)]
        questions = []
        for task, pair in pairs:
            one, other = task.completions[pair.first], task.completions[pair.second]
            for criterion in self.source.criteria:
                questions.append(choice_question(criterion.text, task.prompt, one, other))
                questions.append(choice_question(criterion.text, task.prompt, other, one))
        shares = iter(judge.answers(questions, LETTERS))
        answers: dict[str, list[Comparison]] = {task.id: [] for task in tasks}
        silent = 0
        for task, pair in pairs:
            share = self._share_of_first([(next(shares), next(shares)) for _ in self.source.criteria])
            if share is None:
                silent += 1
                answers[task.id].append(pair._replace(certainty=None))  # a tie: no pair in the dataset
                continue
            preferred: Literal["first", "second", "tie"]
            preferred = "tie" if share == 0.5 else "first" if share > 0.5 else "second"
            answers[task.id].append(pair._replace(preferred=preferred, certainty=max(share, 1 - share)))
        if silent:
            print(f"{self.name}: answered neither A nor B to {silent} of {len(pairs)} questions; these count as ties.")
        if pairs and silent == len(pairs):
            raise InputError(
                f"--judge_model_name_or_path {judge.name}: answered neither A nor B to any question. Use a model that "
                "follows instructions, or another --principle."
            )
        return [answers[task.id] for task in tasks]

    def _share_of_first(self, asked: list[tuple[list[float], list[float]]]) -> float | None:
        """The weighted mean over the criteria of P(the first reply is better); None if one has no answer.

        Args:
            asked: for each criterion P(A) and P(B) when the first reply is A, and when it is B.
        """
        if any(min(sum(one_way), sum(other_way)) < LEAST_ANSWERED for one_way, other_way in asked):
            return None
        shares = [(one[0] / sum(one) + other[1] / sum(other)) / 2 for one, other in asked]
        weights = [criterion.weight for criterion in self.source.criteria]
        return sum(weight * share for weight, share in zip(weights, shares, strict=True)) / sum(weights)
