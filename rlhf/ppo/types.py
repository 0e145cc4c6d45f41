"""The results of PPO's steps. B prompts, P prompt tokens (left-padded), T completion tokens."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from rlhf.comparisons import Prompt
from rlhf.models.prefix import Rows, without_gaps


class Rollout(NamedTuple):
    """Prompts with the completions that the policy sampled for them."""

    prompts: list[Prompt]  # B prompts as in the dataset: text or messages
    completions: list[str]  # B texts, without special tokens
    columns: dict[str, list[Any]]  # the other columns of the dataset, B values each
    input_ids: torch.Tensor  # (B, P + T) int64
    attention_mask: torch.Tensor  # (B, P + T) int64: 0 on both kinds of padding
    completion_mask: torch.Tensor  # (B, T) bool: True through the stop token
    ended: torch.Tensor  # (B,) bool: a stop token or stop string was sampled
    sampling_logprobs: torch.Tensor | None = None  # (B, T) float32: of the engine that sampled; NaN where unknown


class Rewards(NamedTuple):
    """The rewards of a rollout. Float32."""

    by_function: dict[str, torch.Tensor]  # (B,) each, by name of the reward function; NaN where it gave no score
    scores: torch.Tensor  # (B,) their weighted sum; NaN where none of them gave a score
    per_token: torch.Tensor | None  # (B, T) the part of the sum that functions gave per token
    metrics: dict[str, float] | None = None  # what the functions logged: means on this process, then over all
    extra: dict[str, list[Any]] | None = None  # the columns that the functions logged, B values each


class Scored(NamedTuple):
    """A rollout's scores, and the log-probabilities and values of its tokens before the update. All float32."""

    raw_scores: torch.Tensor  # (B,) weighted sum of the rewards; NaN where no reward function gave a score
    scores: torch.Tensor  # (B,) the same after normalization, clipping and penalties; the update learns from these
    logprobs: torch.Tensor  # (B, T) policy
    reference_logprobs: torch.Tensor  # (B, T)
    values: torch.Tensor  # (B, T) value of the state before each token
    per_token: torch.Tensor | None = None  # (B, T) the part of `scores` that belongs to single tokens
    rewards: Rewards | None = None  # what the reward functions gave
    sampling_weights: torch.Tensor | None = None  # (B, T) of the policy loss; see rlhf/ppo/mismatch.py
    value_states: torch.Tensor | None = None  # (B, T, d) what the value head reads, if the update doesn't change it


class Advantages(NamedTuple):
    """The advantages that the update learns from, and their parts. All (B, T) float32, 0 on padding."""

    rewards: torch.Tensor  # KL penalty plus reward per token; the last token also gets the rest of the score
    kl_rewards: torch.Tensor  # the KL penalty alone
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor  # target of the value function


class UpdateStats(NamedTuple):
    """Means over all minibatches of an update and all processes, weighted by completion tokens."""

    policy_loss: float
    value_loss: float
    approxkl: float  # mean of (new - old logprob)² / 2
    clipfrac: float  # share of tokens whose policy loss was clipped
    value_clipfrac: float
    entropy: float
    ratio: float  # mean of exp(new - old logprob)
    ratio_var: float  # variance of the minibatch means of the ratio
    first_ratio: float  # of the first minibatch, before any step: 1 unless something is wrong
    grad_norm: float
    ptx_loss: float  # language model loss per token of PPO-ptx; 0 without it
    steps: int  # optimizer steps taken; fewer than planned if target_kl ended the update


@dataclass(frozen=True)
class LossSums:
    """Losses and statistics, summed over completion tokens. All 0-dimensional float32."""

    loss: torch.Tensor
    policy_loss: torch.Tensor
    value_loss: torch.Tensor
    approxkl: torch.Tensor
    clipped: torch.Tensor
    value_clipped: torch.Tensor
    entropy: torch.Tensor
    ratio: torch.Tensor
    tokens: torch.Tensor  # number of completion tokens

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums.from_tensor(self.to_tensor() + other.to_tensor())

    def means(self) -> "LossSums":
        """Every sum divided by the number of tokens."""
        return LossSums.from_tensor(self.to_tensor() / self.tokens)

    def detach(self) -> "LossSums":
        """The same sums without gradients."""
        return LossSums.from_tensor(self.to_tensor())

    def to_tensor(self) -> torch.Tensor:
        """The fields in their order, (9,) float32 without gradients, so that one reduction sums them all."""
        return torch.stack([getattr(self, field.name).detach().float() for field in fields(self)])

    @classmethod
    def from_tensor(cls, values: torch.Tensor) -> "LossSums":
        """The inverse of `to_tensor`."""
        return cls(*values)


def pack(rollout: Rollout, rows: torch.Tensor) -> Rows:
    """Rows of a rollout with each completion right after its prompt, padded on the right to the longest row."""
    return without_gaps(rollout.input_ids[rows], rollout.attention_mask[rows], rollout.completion_mask[rows].sum(1))
