"""The numbers that are logged for an update. docs/metrics.md has a glossary of them."""

import math

import torch

from rlhf.data.datasets import Row
from rlhf.ppo.mismatch import mismatch_metrics
from rlhf.ppo.moments import moments
from rlhf.ppo.processes import ONE_PROCESS, Processes
from rlhf.ppo.types import Advantages, Rewards, Rollout, Scored, UpdateStats
from rlhf.rewards import with_own


def batch_metrics(
    rollout: Rollout, scored: Scored, advantages: Advantages, processes: Processes = ONE_PROCESS
) -> dict[str, float]:
    """Means over the completions of all processes. Completions without a score don't count in means of scores."""
    mask = rollout.completion_mask
    learned = mask & ~scored.scores.isnan()[:, None]
    lengths = mask.sum(1).float()
    kl = ((scored.logprobs - scored.reference_logprobs) * mask).sum(1)
    non_score = advantages.kl_rewards.sum(1)
    per_row = {
        "objective/kl": kl,
        "objective/entropy": (-scored.logprobs * mask).sum(1),
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": non_score + scored.scores,
        "objective/scores": scored.scores,
        "objective/raw_scores": scored.raw_scores,
        "completions/mean_length": lengths,
        "completions/ended": rollout.ended.float(),
    }
    values = torch.stack(list(per_row.values()))
    means = moments(values, ~values.isnan(), processes).mean
    return {
        **dict(zip(per_row, means.tolist(), strict=True)),
        **reward_metrics(scored.rewards.by_function if scored.rewards else {}, processes),
        **mismatch_metrics(scored.logprobs, rollout.sampling_logprobs, mask, scored.sampling_weights, processes),
        "val/num_eos_tokens": float(processes.sum(rollout.ended.sum().float())),
        "val/explained_variance": explained_variance(advantages.returns, scored.values, learned, processes),
    }


def reward_metrics(by_function: dict[str, torch.Tensor], processes: Processes = ONE_PROCESS) -> dict[str, float]:
    """`rewards/<name>/mean` and `/std` of every reward function, over the completions that it gave a score."""
    metrics = {}
    for name, scores in by_function.items():
        count, mean, variance = (float(moment) for moment in moments(scores, ~scores.isnan(), processes))
        if count:
            metrics[f"rewards/{name}/mean"] = mean
            metrics[f"rewards/{name}/std"] = math.sqrt(variance)
    return metrics


def evaluation_metrics(
    rollout: Rollout, rewards: Rewards, held_out: Rewards, logratios: torch.Tensor, processes: Processes = ONE_PROCESS
) -> dict[str, float]:
    """Means over the evaluation prompts of all processes.

    Args:
        held_out: rewards that training never sees.
        logratios: (B, T) log-probability of each token under the policy minus that under the reference.
    """
    per_row = {
        "score": rewards.scores,
        "kl": (logratios * rollout.completion_mask).sum(1),
        "length": rollout.completion_mask.sum(1),
        "ended": rollout.ended,
    }
    values = torch.stack([row.float() for row in per_row.values()])
    metrics = dict(zip(per_row, moments(values, ~values.isnan(), processes).mean.tolist(), strict=True))
    for name, value in reward_metrics(rewards.by_function, processes).items():
        if name.endswith("/mean"):
            metrics[name] = value
    for name, value in reward_metrics(held_out.by_function, processes).items():
        if name.endswith("/mean"):
            metrics[f"held_out/{name.removeprefix('rewards/').removesuffix('/mean')}"] = value
    return with_own(metrics, {**(held_out.metrics or {}), **(rewards.metrics or {})})


def update_metrics(stats: UpdateStats) -> dict[str, float]:
    """Means over the optimizer steps of an update."""
    metrics = {
        "policy/approxkl_avg": stats.approxkl,
        "policy/clipfrac_avg": stats.clipfrac,
        "policy/entropy_avg": stats.entropy,
        "policy/grad_norm": stats.grad_norm,
        "loss/policy_avg": stats.policy_loss,
        "loss/value_avg": stats.value_loss,
        "val/clipfrac_avg": stats.value_clipfrac,
        "val/ratio": stats.ratio,
        "val/ratio_var": stats.ratio_var,
        "val/first_ratio": stats.first_ratio,
        "val/optimizer_steps": float(stats.steps),
    }
    return {**metrics, **({"loss/ptx": stats.ptx_loss} if stats.ptx_loss else {})}


def explained_variance(
    returns: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, processes: Processes = ONE_PROCESS
) -> float:
    """1 - Var[return - value] / Var[return] over all completion tokens (B, T); 0 where returns don't vary.

    As logged by https://github.com/openai/baselines/blob/ea25b9e8b234e6ee1bca43083f8f3cf974143998/baselines/common/math_util.py#L25
    """
    of_errors, of_returns = moments(
        torch.stack([(returns - values)[mask], returns[mask]]), processes=processes
    ).variance
    return 1 - float(of_errors) / float(of_returns) if of_returns > 1e-12 else 0.0


def sample_table(rollout: Rollout, rewards: Rewards, rows: int) -> list[Row]:
    """The first rows as `prompt`, `completion`, `score` (None without one), and what the reward functions logged."""
    scores = [None if math.isnan(score) else score for score in rewards.scores.tolist()]
    columns = {"prompt": rollout.prompts, "completion": rollout.completions, "score": scores}
    columns |= rewards.extra or {}
    return [dict(zip(columns, row, strict=True)) for row in list(zip(*columns.values(), strict=True))[:rows]]
