"""What the steps of PPO hand to each other. B prompts, P prompt tokens (left-padded), T completion tokens."""

from typing import Any, NamedTuple

import torch

from rlhf.models.prefix import Rows


class Rollout(NamedTuple):
    """Prompts with the completions that the policy sampled for them."""

    prompts: list[Any]  # B prompts as the dataset has them: text or messages
    completions: list[str]  # B texts, without special tokens
    columns: dict[str, list[Any]]  # the dataset's other columns, B values each
    input_ids: torch.Tensor  # (B, P + T) int64
    attention_mask: torch.Tensor  # (B, P + T) int64: 0 on both kinds of padding
    completion_mask: torch.Tensor  # (B, T) bool: True through the stop token
    ended: torch.Tensor  # (B,) bool: a stop token or stop string was sampled


class Rewards(NamedTuple):
    """What the reward functions said about a rollout. Float32."""

    by_function: dict[str, torch.Tensor]  # (B,) each, by name; NaN where a function had no opinion
    scores: torch.Tensor  # (B,) their weighted sum
    per_token: torch.Tensor | None  # (B, T) the part of it that functions gave per token


class Scored(NamedTuple):
    """A rollout's scores, and what the models said about its tokens before the update. All float32."""

    raw_scores: torch.Tensor  # (B,) what the reward gave
    scores: torch.Tensor  # (B,) normalized, clipped, with penalties: what is learned from, all tokens together
    logprobs: torch.Tensor  # (B, T) policy
    reference_logprobs: torch.Tensor  # (B, T)
    values: torch.Tensor  # (B, T) value of the state before each token
    per_token: torch.Tensor | None = None  # (B, T) the part of `scores` that belongs to single tokens
    by_function: dict[str, torch.Tensor] | None = None  # (B,) each, raw, by the name of the reward function


class Advantages(NamedTuple):
    """What the update learns from. All (B, T) float32, 0 on padding."""

    rewards: torch.Tensor  # KL penalty and reward per token, plus the rest of the score at the last one
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
    steps: int  # optimizer steps taken; fewer than asked for if target_kl ended the update


class LossSums(NamedTuple):
    """Sums over completion tokens, 0-dimensional float32. Divided by the minibatch's tokens they are means."""

    loss: torch.Tensor
    policy_loss: torch.Tensor
    value_loss: torch.Tensor
    approxkl: torch.Tensor
    clipped: torch.Tensor
    value_clipped: torch.Tensor
    entropy: torch.Tensor
    ratio: torch.Tensor


def pack(rollout: Rollout, rows: torch.Tensor) -> Rows:
    """Rows of a rollout with each completion right behind its prompt, padded on the left to the longest row."""
    mask = rollout.attention_mask[rows].bool()
    totals = mask.sum(1)
    width = int(totals.max())
    packed = torch.zeros(len(rows), width, dtype=torch.long, device=mask.device)
    kept = torch.arange(width, device=mask.device) >= (width - totals)[:, None]
    # 0 stands for padding: a pad token may lie outside of the embeddings, and no masked token matters
    packed[kept] = rollout.input_ids[rows][mask]
    return Rows(packed, kept.long(), rollout.completion_mask[rows].sum(1))
