"""Reward functions and reward models behind one call: `(prompts, completions, **columns) -> list[float]`.

The signature is that of `reward_funcs` in TRL's GRPO and RLOO: `completions` are texts, `columns` the dataset's other
columns, and there is one score per completion.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, TaskType
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.data import encode_messages, encode_text_with_end
from rlhf.errors import InputError
from rlhf.feedback import Prompt, as_message
from rlhf.models import Source, load_reward_model, load_tokenizer, place, resolve
from rlhf.starter import STARTER, gold_scores

RewardFunction = Callable[..., list[float]]


class RewardModel:
    """A trained reward model as a reward function, with its own tokenizer and chat template.

    It scores texts, so the policy's tokenizer doesn't matter. A completion is scored as a finished reply: what was
    sampled behind the stop token is not seen.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        name: str = "reward_model",
    ) -> None:
        self.model, self.tokenizer, self.batch_size, self.__name__ = model.eval(), tokenizer, batch_size, name
        self.model.requires_grad_(False)

    def encode(self, prompt: Prompt, completion: str) -> list[int]:
        """Token ids of a prompt and a completion, ending with the token at which the score is read."""
        if isinstance(prompt, str):
            return encode_text_with_end(self.tokenizer, prompt + completion)
        return encode_messages(self.tokenizer, [*prompt, *as_message(prompt, completion)])

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt], completions: list[str], **columns: list[Any]) -> list[float]:
        """One score per completion."""
        rows = [self.encode(*pair) for pair in zip(prompts, completions, strict=True)]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            batch = self.tokenizer.pad(
                {"input_ids": [rows[number] for number in numbers]}, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
            for number, score in zip(numbers, self.model(**batch).logits.float()[:, 0].tolist(), strict=True):
                scores[number] = score
        return scores


def starter_reward(prompts: list[Prompt], completions: list[str], **columns: list[Any]) -> list[float]:
    """The starter's scorer as a reward function: VADER sentiment in [-1, 1]."""
    return gold_scores(completions)


def check_scores(function: RewardFunction, scores: Any, completions: list[str]) -> list[float]:
    """The scores as a list of floats.

    Raises:
        ValueError: if there are not as many as completions, or one is no finite number; it names the reward function
            and shows the offending completion.
    """
    name = getattr(function, "__name__", type(function).__name__)
    scores = list(scores)
    if len(scores) != len(completions):
        raise ValueError(f"Reward function {name!r} returned {len(scores)} scores for {len(completions)} completions.")
    for score, completion in zip(scores, completions, strict=True):
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"Reward function {name!r} returned {score!r} for the completion {completion[:200]!r}.")
    return [float(score) for score in scores]


def resolve_reward(name: str, base: str | None = None) -> Source | None:
    """Check, before anything is loaded, that `--reward_model_path` names a reward model; None for the starter's scorer.

    Args:
        base: the policy's base model, which a reward adapter has to share.

    Raises:
        InputError: if it is a language model, or an adapter of another base.
    """
    if name == STARTER:
        return None
    source = resolve(name, "--reward_model_path")
    if source.peft_config is None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source.base, revision=source.revision)
        architecture = (config.architectures or ["none"])[0]
        if "SequenceClassification" not in architecture or config.num_labels != 1:
            raise InputError(
                f"--reward_model_path {name}: a reward model is a sequence classifier with one output; found "
                f"{architecture} with {config.num_labels}. Train one with recipes/reward.py."
            )
        return source
    if source.peft_config.task_type != TaskType.SEQ_CLS:
        raise InputError(
            f"--reward_model_path {name}: a reward adapter has task type SEQ_CLS; found "
            f"{source.peft_config.task_type}. Train one with recipes/reward.py."
        )
    if base is not None and source.base != base:
        raise InputError(
            f"--reward_model_path {name}: this adapter belongs to the base {source.base}, the policy to {base}. Train "
            "a reward adapter on the policy's base, or merge this one into a full model (merge_and_unload)."
        )
    return source


def load_reward(
    source: Source | None, model_args: ModelConfig, *, batch_size: int = 32, trust_remote_code: bool = False
) -> RewardFunction:
    """The reward function that `resolve_reward` found."""
    if source is None:
        return starter_reward
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    model = load_reward_model(source, model_args, tokenizer, trainable=False, trust_remote_code=trust_remote_code)
    return RewardModel(place(model), tokenizer, batch_size)
