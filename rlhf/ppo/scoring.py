"""Rollout → Scored: rewards, their scale, and the log-probabilities and values before the update."""

import math

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerState

from rlhf.comparisons import as_message
from rlhf.models.adapters import REWARD
from rlhf.ppo.model import PolicyAndValue, reference_logprobs
from rlhf.ppo.moments import moments
from rlhf.ppo.processes import ONE_PROCESS, Processes
from rlhf.ppo.sharding import put
from rlhf.ppo.types import Rewards, Rollout, pack
from rlhf.rewards import (
    RewardEnsemble,
    RewardError,
    RewardFunction,
    RewardLog,
    RewardModel,
    RewardScale,
    call_rewards,
    reward_names,
)


def collect_rewards(
    rollout: Rollout, functions: list[RewardFunction], weights: list[float], trainer_state: TrainerState | None = None
) -> Rewards:
    """Call every reward function on the rollout and add up the weighted rewards.

    A function that returns None for a completion adds nothing to its score. The scores of each model of an ensemble are
    kept too, as `<ensemble>/<model>`.

    Raises:
        RewardError: see rlhf.rewards.call_rewards; or if a weighted sum is beyond float32.
    """
    shape, device = rollout.completion_mask.shape, rollout.input_ids.device
    tokens = rollout.input_ids[:, -shape[1] :]
    ids = [row[mask].tolist() for row, mask in zip(tokens, rollout.completion_mask, strict=True)]
    completions = [as_message(*pair) for pair in zip(rollout.prompts, rollout.completions, strict=True)]
    log, names = RewardLog(), reward_names(functions)
    given = {"trainer_state": trainer_state or TrainerState(), "log_metric": log.log_metric, "log_extra": log.log_extra}
    answers = call_rewards(functions, rollout.prompts, completions, ids, **{**rollout.columns, **given})
    log.check(len(completions))
    by_function, total = {}, torch.zeros(shape[0], device=device)
    scored = torch.zeros(shape[0], dtype=torch.bool, device=device)
    per_token: torch.Tensor | None = None
    for name, weight, scores in zip(names, weights, answers, strict=True):
        sums = [math.fsum(score) if isinstance(score, list) else score for score in scores]
        by_function[name] = torch.tensor([math.nan if s is None else s for s in sums], device=device)
        given_one = ~by_function[name].isnan()
        total, scored = torch.where(given_one, total + weight * by_function[name], total), scored | given_one
        for row, score in enumerate(scores):
            if isinstance(score, list):
                per_token = torch.zeros(shape, device=device) if per_token is None else per_token
                per_token[row, : len(score)] += weight * torch.tensor(score, device=device)
    for name, function in zip(names, functions, strict=True):
        if isinstance(function, RewardEnsemble):
            by_function |= {
                f"{name}/{own}": torch.tensor(scores, device=device) for own, scores in function.raw.items()
            }
    if not total.isfinite().all():
        raise RewardError(f"The weighted sum of {', '.join(names)} is beyond float32. Scale the rewards down.")
    return Rewards(
        by_function,
        total.masked_fill(~scored, math.nan),
        per_token,
        log.means(),
        log.extra,
    )


def measure_scale(scores: torch.Tensor, processes: Processes = ONE_PROCESS) -> RewardScale:
    """The scale of raw scores (B,) over all processes, without NaN. The standard deviation of a constant counts as 1.

    lm-human-preferences normalizes likewise, on samples of the policy before training:
    https://github.com/openai/lm-human-preferences/blob/cbfd210bb8b08f6bc5c26878c10984b90f516c66/lm_human_preferences/train_reward.py#L207
    """
    _, mean, variance = moments(scores, ~scores.isnan(), processes)
    std = math.sqrt(variance)
    return RewardScale(float(mean), std if std > 1e-6 else 1.0)


def shape_scores(
    rewards: Rewards,
    scale: RewardScale,
    lengths: torch.Tensor,
    ended: torch.Tensor,
    *,
    score_clip: float | None,
    length_penalty: float,
    missing_eos_penalty: float | None,
    missing_eos_score: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scores to learn from (B,), and the part of them that belongs to single tokens (B, T) or None.

    The steps in order: shift and scale, clip, length penalty, then the penalty or the fixed score of completions that
    never ended. NaN (no score) stays NaN, unless `missing_eos_score` replaces it.
    """
    scores = (rewards.scores - scale.mean) / scale.std
    per_token = None if rewards.per_token is None else rewards.per_token / scale.std
    if score_clip is not None:
        clipped = scores.clamp(-score_clip, score_clip)
        if per_token is not None:  # rewards of tokens shrink with their sum, by a factor of 1 where nothing was clipped
            per_token = per_token * torch.where(scores == 0, 1.0, clipped / scores)[:, None]
        scores = clipped
    scores = scores - length_penalty * lengths
    if missing_eos_penalty is not None:
        scores = torch.where(ended, scores, scores - missing_eos_penalty)
    if missing_eos_score is not None:
        scores = torch.where(ended, scores, torch.full_like(scores, missing_eos_score))
        per_token = None if per_token is None else per_token * ended[:, None]
    return scores, per_token


def start_value_head(
    model: PolicyAndValue, functions: list[RewardFunction], weights: list[float], scale: RewardScale
) -> None:
    """Start a value function on an adapter as the reward model, as in InstructGPT, but on the scale of the scores.

    Other value functions start at 0, and so does this one if no reward function is an adapter of the policy. In place
    of an ensemble it starts as the first of its models.
    """
    for function, weight in zip(functions, weights, strict=True):
        first, own = function, RewardScale(0.0, 1.0)
        if isinstance(function, RewardEnsemble) and function.scales:
            first, own = function.members[0], function.scales[0]
        # the value function's adapter is a copy of the reward adapter of this name
        if model.value_adapter is None or not isinstance(first, RewardModel) or first.adapter != REWARD:
            continue
        assert first.head is not None
        put(model.value_head.weight, first.head.weight.detach() * weight / (own.std * scale.std))
        put(model.value_head.bias, torch.full((1,), -(weight * own.mean / own.std + scale.mean) / scale.std))


@torch.no_grad()
def logprobs_and_values(
    model: PolicyAndValue,
    ref_model: PreTrainedModel | PeftModel | None,
    ref_adapter_name: str | None,
    rollout: Rollout,
    *,
    batch_size: int,
    temperature: float,
    with_values: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Logprobs, values and reference logprobs, (B, T) float32, and the frozen states of the value function if it has
    some, (B, T, d). Rows of similar length are computed together.

    Args:
        with_values: False gives zeros for the values, without their computation.
    """
    model.eval()
    kept: torch.Tensor | None = None
    results = [torch.zeros(rollout.completion_mask.shape, device=rollout.input_ids.device) for _ in range(3)]
    for rows in rollout.attention_mask.sum(1).argsort().split(batch_size):
        packed = pack(rollout, rows)
        states = model.frozen_states(packed) if with_values else None
        policy = model(packed, temperature, with_values, value_states=states)
        if states is not None:
            kept = states.new_zeros(*rollout.completion_mask.shape, states.shape[-1]) if kept is None else kept
            kept[rows, : states.shape[1]] = states
        reference = reference_logprobs(model.policy, ref_model, ref_adapter_name, packed, temperature)
        mask = rollout.completion_mask[rows, : policy.logprobs.shape[1]]
        for result, part in zip(results, (policy.logprobs, policy.values, reference), strict=True):
            result[rows, : part.shape[1]] = part * mask
    return results[0], results[1], results[2], kept
