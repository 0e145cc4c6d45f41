"""The labelers behind `--labeler`: a simulation, a score, a judge model, people."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.comparisons import Comparison, Labeler, Prompt, Task, as_message, prefer_higher
from rlhf.data.encoding import encode_prompt
from rlhf.errors import InputError
from rlhf.feedback.assignment import VotingSettings
from rlhf.feedback.votes import VOTES_FILE
from rlhf.models.generation import left_pad
from rlhf.models.loading import load_causal_lm
from rlhf.models.seq2seq import generation_inputs
from rlhf.models.sources import context_length, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards import RewardFunction, call_rewards, load_reward, resolve_reward_functions, total_scores
from rlhf.run.ranges import NonNegativeFloat
from rlhf.starter.labeler import SimulatedLabeler
from rlhf.starter.model import STARTER

LABELERS = ("simulated", "human", "judge", "reward")


@dataclass
class LabelerSettings(VotingSettings):
    """Settings of each kind of labeler, in collecting preferences and in evaluation."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "For 'reward': reward models (folder or Hub id) or import paths of functions."},
    )
    judge_model_name_or_path: str = field(default="starter", metadata={"help": "For 'judge': the model."})
    principle: str = field(
        default="Choose the reply that is more helpful, honest and harmless.",
        metadata={"help": "For 'judge': the criterion, in words."},
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
        InputError: for an unknown labeler, model or function.
    """
    check_labeler_kind(name)
    if name == "simulated" and isinstance(settings, LabelerArguments):
        return SimulatedLabeler(temperature=settings.labeler_temperature, seed=seed)
    if name == "reward":
        rewards = [STARTER] if settings.reward_funcs is None else settings.reward_funcs
        return ScoreLabeler(rewards, model_args, tokenizer, settings.trust_remote_code)
    if name == "judge":
        return JudgeLabeler(
            settings.judge_model_name_or_path,
            settings.principle,
            model_args,
            trust_remote_code=settings.trust_remote_code,
        )
    if name == "human":
        from rlhf.feedback.vote_page import People  # Gradio takes seconds to import

        return People(settings, Path(folder) / VOTES_FILE, seed)
    raise ValueError(f"{name} is in LABELERS and not here")  # check_labeler_kind passed it


class ScoreLabeler:
    """Prefers the reply that reward models or functions score higher; several scores are added.

    A reward model is a Bradley–Terry model, so the difference of its scores gives the certainty. Functions give none.
    """

    finished = True

    def __init__(
        self,
        rewards: list[str],
        model_args: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        trust_remote_code: bool = False,
    ) -> None:
        if not rewards:
            raise InputError("--reward_funcs: --labeler reward needs at least one reward model or function.")
        self.sources = resolve_reward_functions(rewards, "--reward_funcs", trust_remote_code=trust_remote_code)
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
        totals = iter(total_scores(functions, columns, [1.0] * len(functions), completions))
        return [prefer_higher([next(totals) for _ in task.completions], self.name, self.temperature) for task in tasks]


class JudgeLabeler:
    """Asks a language model which of two replies follows a written principle better (RLAIF).

    Each pair is asked in both orders. Averaging the probabilities of the answers "A" and "B" over the two cancels a
    preference for the first or the second place. Source: Bai et al., Constitutional AI, arXiv 2212.08073, section 4.1
    (multiple choice, normalized log-probabilities of the answers as soft labels).
    """

    finished = True
    # with less probability than this on A and B together, the model has not answered
    least_answered = 0.1

    def __init__(
        self,
        name: str,
        principle: str,
        model_args: ModelConfig,
        batch_size: int = 16,
        trust_remote_code: bool = False,
    ) -> None:
        if not principle.strip():
            raise InputError("--principle: is empty. Describe what makes one reply better than another.")
        self.source = resolve(name, "--judge_model_name_or_path", trust_remote_code=trust_remote_code)
        self.name = f"judge {Path(name).name}"
        self.principle, self.model_args, self.batch_size = principle, model_args, batch_size

    def compare(self, tasks: list[Task]) -> list[list[Comparison]]:
        tokenizer = load_tokenizer(self.source)
        model = load_causal_lm(self.source, self.model_args, tokenizer, trainable=False)
        pairs = [(task, c) for task in tasks for c in prefer_higher([0.0] * len(task.completions), self.name)]
        questions = []
        for task, pair in pairs:
            one, other = task.completions[pair.first], task.completions[pair.second]
            questions += [self.question(task.prompt, one, other), self.question(task.prompt, other, one)]
        probabilities = self.probabilities(model, tokenizer, questions)
        answers: dict[str, list[Comparison]] = {task.id: [] for task in tasks}
        silent = 0
        for number, (task, pair) in enumerate(pairs):
            one_way, other_way = probabilities[2 * number : 2 * number + 2]
            if min(sum(one_way), sum(other_way)) < self.least_answered:
                silent += 1
                answers[task.id].append(pair._replace(certainty=None))  # a tie: no pair in the dataset
                continue
            share = (one_way[0] / sum(one_way) + other_way[1] / sum(other_way)) / 2
            preferred: Literal["first", "second", "tie"]
            preferred = "tie" if share == 0.5 else "first" if share > 0.5 else "second"
            answers[task.id].append(pair._replace(preferred=preferred, certainty=max(share, 1 - share)))
        if silent:
            print(f"{self.name}: answered neither A nor B to {silent} of {len(pairs)} questions; these count as ties.")
        if pairs and silent == len(pairs):
            raise InputError(
                f"--judge_model_name_or_path {self.source.name}: answered neither A nor B to any question. Use a model "
                "that follows instructions, or another --principle."
            )
        return [answers[task.id] for task in tasks]

    def question(self, prompt: Prompt, first: str, second: str) -> str:
        """The judge's prompt, whose next word is A or B."""
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
        return (
            f"{self.principle}\n\nConversation:\n{prompt}\n\nReply A:\n{first}\n\nReply B:\n{second}\n\n"
            "Which reply is better? Answer with the letter A or B only."
        )

    @torch.no_grad()
    def probabilities(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str]
    ) -> list[tuple[float, float]]:
        """P(A) and P(B) as the token after each question, each summed over its spellings with and without a space."""
        rows = [self._encode(tokenizer, question) for question in questions]
        room = context_length(self.source)
        longest = max((len(row) for row in rows), default=0)
        if room is not None and longest > room:
            raise InputError(
                f"--judge_model_name_or_path {self.source.name}: a question has {longest} tokens, its context {room}. "
                "Use a model with a longer context."
            )
        letters = [_first_tokens(tokenizer, (letter, f" {letter}")) for letter in "AB"]
        model.eval()
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        found: dict[int, tuple[float, float]] = {}
        for start in tqdm(range(0, len(order), self.batch_size), desc=self.name, unit="batch"):
            numbers = order[start : start + self.batch_size]
            batch = left_pad(tokenizer, [rows[number] for number in numbers]).to(model.device)
            if model.config.is_encoder_decoder:
                batch, _ = generation_inputs(model, batch, model.generation_config)
            else:
                batch["logits_to_keep"] = 1
            logits = model(**batch).logits[:, -1].float()
            shares = torch.stack([logits.softmax(-1)[:, ids].sum(-1) for ids in letters], -1).tolist()
            found.update(zip(numbers, [(row[0], row[1]) for row in shares], strict=True))
        return [found[number] for number in range(len(rows))]

    @staticmethod
    def _encode(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
        if tokenizer.chat_template is None:
            return encode_prompt(tokenizer, question + "\nAnswer:")
        return encode_prompt(tokenizer, [{"role": "user", "content": question}])


def _first_tokens(tokenizer: PreTrainedTokenizerBase, spellings: tuple[str, ...]) -> list[int]:
    """Ids of the spellings that are a single token."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in spellings]
    return sorted({ids[0] for ids in encoded if len(ids) == 1})
