"""The numbers that are logged for an update. README has a glossary of them."""

from typing import Any

import torch

from rlhf.ppo.moments import Reduce, exact
from rlhf.ppo.types import Advantages, Rollout, Scored, UpdateStats


def batch_metrics(rollout: Rollout, scored: Scored, advantages: Advantages, reduce: Reduce) -> dict[str, float]:
    """Means over the completions of all processes.

    Args:
        reduce: sums a tensor over processes.
    """
    mask = rollout.completion_mask
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
    means = _means(torch.stack(list(per_row.values())), reduce)
    return {
        **dict(zip(per_row, means.tolist(), strict=True)),
        **reward_metrics(scored.by_function or {}, reduce),
        "val/num_eos_tokens": float(reduce(rollout.ended.sum().float())),
        "val/explained_variance": explained_variance(advantages.returns, scored.values, mask, reduce),
    }


def reward_metrics(by_function: dict[str, torch.Tensor], reduce: Reduce) -> dict[str, float]:
    """`rewards/<name>/mean` and `/std` of every reward function, over the completions that it has an opinion on."""
    metrics = {}
    for name, scores in by_function.items():
        known = ~scores.isnan()
        values = exact(scores.nan_to_num(0.0))
        count, total, squares = reduce(torch.stack([exact(known).sum(), values.sum(), (values**2).sum()])).tolist()
        if count:
            mean = total / count
            metrics[f"rewards/{name}/mean"] = mean
            metrics[f"rewards/{name}/std"] = max(0.0, squares / count - mean**2) ** 0.5
    return metrics


def update_metrics(stats: UpdateStats) -> dict[str, float]:
    """What an update's optimizer steps did."""
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


def explained_variance(returns: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, reduce: Reduce) -> float:
    """1 - Var[return - value] / Var[return] over all completion tokens (B, T); 0 where returns don't vary.

    As logged by https://github.com/openai/baselines/blob/ea25b9e8b234e6ee1bca43083f8f3cf974143998/baselines/common/math_util.py#L25
    """
    errors, targets = exact((returns - values)[mask]), exact(returns[mask])
    parts = [exact(mask).sum(), errors.sum(), (errors**2).sum(), targets.sum(), (targets**2).sum()]
    count, error, errors2, target, targets2 = reduce(torch.stack(parts)).tolist()
    variance = targets2 / count - (target / count) ** 2
    return 1 - (errors2 / count - (error / count) ** 2) / variance if variance > 1e-12 else 0.0


def _means(rows: torch.Tensor, reduce: Reduce) -> torch.Tensor:
    """Row means of (K, B) over the completions of all processes."""
    rows = exact(rows)
    sums = reduce(torch.cat([rows.sum(1), torch.ones_like(rows[:1]).sum(1)]))
    return sums[:-1] / sums[-1]


def sample_table(rollout: Rollout, scores: torch.Tensor, rows: int) -> list[dict[str, Any]]:
    """The first rows as `prompt`, `completion` and `score`."""
    triples = zip(rollout.prompts, rollout.completions, scores.tolist(), strict=True)
    return [{"prompt": prompt, "completion": text, "score": score} for prompt, text, score in list(triples)[:rows]]
