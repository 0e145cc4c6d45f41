"""KL penalty, generalized advantage estimation and whitening, as pure functions."""

import torch

from rlhf.models.precision import exact
from rlhf.ppo.moments import moments
from rlhf.ppo.processes import ONE_PROCESS, Processes
from rlhf.ppo.types import Advantages


def kl_penalty(
    logprobs: torch.Tensor, reference_logprobs: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """Per-token reward -β (log π(a|s) - log π_ref(a|s)), (B, T), 0 off the mask.

    Its sum over a completion is -β times the log-probability ratio of the completion; Ziegler et al., eq. 2
    (https://arxiv.org/abs/1909.08593), with the k1 estimator of http://joschu.net/blog/kl-approx.html.

    >>> logprobs, reference_logprobs = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    >>> kl_penalty(logprobs, reference_logprobs, torch.tensor([[True, True]]), kl_coef=0.5)
    tensor([[-0.2500,  0.5000]])
    """
    return -kl_coef * (logprobs - reference_logprobs) * mask


def add_scores(kl_rewards: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rewards (B, T): the KL penalty, plus each completion's score (B,) at its last token."""
    last = mask.long().sum(1).clamp(min=1) - 1
    rewards = kl_rewards.clone()
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantages and returns, (B, T), 0 off the mask.

    δ_t = r_t + γ V_{t+1} - V_t and A_t = δ_t + γ λ A_{t+1}, with V = A = 0 after the last token; return = A + V.
    Schulman et al., eq. 11-16 (https://arxiv.org/abs/1506.02438).

    A reward of 1 at the end, from values that expected 0.5 throughout:

    >>> rewards, values, mask = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5), torch.ones(1, 3).bool()
    >>> gae(rewards, values, mask, gamma=1.0, lam=0.5)
    (tensor([[0.1250, 0.2500, 0.5000]]), tensor([[0.6250, 0.7500, 1.0000]]))
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def whiten(
    values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True, processes: Processes = ONE_PROCESS
) -> torch.Tensor:
    """Scale the masked values to variance 1, and to mean 0 if `shift_mean`; 0 off the mask.

    Biased variance, ε = 1e-8, as lm-human-preferences does:
    https://github.com/openai/lm-human-preferences/blob/cbfd210bb8b08f6bc5c26878c10984b90f516c66/lm_human_preferences/utils/core.py#L41

    Args:
        processes: they all whiten with the mean and the variance of the whole batch.
    """
    _, mean, variance = moments(values.flatten(), mask.flatten(), processes)
    whitened = (exact(values) - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return (whitened * mask).to(values.dtype)


def estimate_advantages(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool = False,
    per_token: torch.Tensor | None = None,
    processes: Processes = ONE_PROCESS,
) -> Advantages:
    """Advantages and returns from scores (B,) and the models' outputs per token (B, T).

    Nothing is learned from a completion whose score is NaN: its advantages are 0 and its returns are the values. TRL's
    GRPO and RLOO set the advantage of such completions to 0 too.

    Args:
        per_token: (B, T) the part of the scores that belongs to single tokens; the last token gets the rest.
    """
    kl_rewards = kl_penalty(logprobs, reference_logprobs, mask, kl_coef)
    without_score = scores.isnan()
    scores, mask = scores.masked_fill(without_score, 0.0), mask & ~without_score[:, None]
    if per_token is None:
        rewards = add_scores(kl_rewards, scores, mask)
    else:
        rewards = add_scores(kl_rewards + per_token, scores - per_token.sum(1), mask)
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False, processes=processes)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    returns = torch.where(without_score[:, None], values, returns)
    return Advantages(rewards, kl_rewards, whiten(advantages, mask, processes=processes), returns)
