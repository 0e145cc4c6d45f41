"""The mismatch between the log-probabilities of the engine that samples and those of the policy that trains.

Another implementation of the same model rounds differently, so its samples come from slightly other probabilities than
the update assumes. This is measured on every rollout and corrected by importance sampling. It is refused where it is no
rounding at all but other weights: an adapter that never arrived.
"""

import math
from typing import Literal

import torch

from rlhf.engines.seam import TOLERANCE
from rlhf.errors import InputError
from rlhf.ppo.processes import ONE_PROCESS, Processes

Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
FELT = 0.01  # nats per token: less of a difference can't tell the policy from the reference


def importance_weights(
    logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    mask: torch.Tensor,
    mode: Mode,
    clip_min: float | None,
    clip_max: float | None,
) -> torch.Tensor:
    """Weights (B, T) of the policy loss: π(token) / π_engine(token), kept within bounds.

    `sequence_*` takes the ratio of the whole completion for each of its tokens. `*_truncate` moves a ratio to the bound
    that it crosses, `*_mask` makes it 0. Tokens whose sampling log-probability is unknown (NaN) count as equal. As in
    GRPOTrainer:
    https://github.com/huggingface/trl/blob/v1.12.0/trl/trainer/grpo_trainer.py (`vllm_importance_sampling_mode`)

    Args:
        logprobs: (B, T) of the policy before the update.
        sampling_logprobs: (B, T) of the engine.
        mask: (B, T) bool, the completion tokens.
        clip_min, clip_max: bounds of the ratio; None: none.
    """
    difference = ((logprobs - sampling_logprobs) * mask).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(1, keepdim=True).expand_as(difference)
    ratio = difference.exp()
    low, high = -math.inf if clip_min is None else clip_min, math.inf if clip_max is None else clip_max
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def mismatch_metrics(
    logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor | None,
    mask: torch.Tensor,
    weights: torch.Tensor | None = None,
    processes: Processes = ONE_PROCESS,
) -> dict[str, float]:
    """How far the engine's log-probabilities are from the policy's, over the tokens of all processes.

    `sampling/kl` estimates KL(engine || policy) per token as r - 1 - log r, r = π / π_engine, which is never negative.
    """
    if sampling_logprobs is None:
        return {}
    known = mask & ~sampling_logprobs.isnan()
    difference = (logprobs - sampling_logprobs)[known]
    metrics = _over_tokens(difference.expm1() - difference, processes, mean="sampling/kl")
    metrics |= _over_tokens(difference.exp(), processes, largest="sampling/max_ratio")
    name = "sampling/sampling_logp_difference"
    metrics |= _over_tokens(difference.abs(), processes, mean=f"{name}/mean", largest=f"{name}/max")
    if weights is not None:
        name = "sampling/importance_sampling_ratio"
        least = _over_tokens(-weights[mask], processes, largest=f"{name}/min")
        metrics |= {key: -value for key, value in least.items()}
        metrics |= _over_tokens(weights[mask], processes, mean=f"{name}/mean", largest=f"{name}/max")
    return metrics


def _over_tokens(
    values: torch.Tensor, processes: Processes, mean: str | None = None, largest: str | None = None
) -> dict[str, float]:
    """The mean and the largest of values (N,) under these names; nothing where no process has one."""
    total, count = processes.sum(torch.stack([values.sum(), torch.ones_like(values).sum()])).tolist()
    top = float(processes.max(values.max() if len(values) else torch.full_like(values.sum(), -math.inf)))
    if not count:
        return {}
    return ({mean: total / count} if mean else {}) | ({largest: top} if largest else {})


def check_engine(
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    mask: torch.Tensor,
    advice: str,
    *,
    first: bool,
    processes: Processes = ONE_PROCESS,
) -> None:
    """Refuse a rollout that was sampled with other weights than the policy's.

    Rounding makes a small difference, so the first rollout is held against TOLERANCE. Later the policy may have moved
    so little that its old weights would pass; but then the engine's log-probabilities are those of the reference.

    Args:
        advice: what to look at, in a sentence.
        first: this is the first rollout of the process.

    Raises:
        InputError: with the difference.
    """
    known = mask & ~sampling_logprobs.isnan()
    sums = [(part - sampling_logprobs)[known].abs().sum() for part in (logprobs, reference_logprobs)]
    to_policy, to_reference, count = processes.sum(torch.stack([*sums, known.sum().float()])).tolist()
    if count == 0:
        raise InputError(f"The engine gave no log-probability of any token. {advice}")
    to_policy, to_reference = to_policy / count, to_reference / count
    if first and to_policy > TOLERANCE:
        raise InputError(
            f"The engine's log-probabilities differ from the policy's by {to_policy:.2f} nats per token, more than "
            f"rounding makes ({TOLERANCE}): it samples from other weights or at another temperature. {advice}"
        )
    if to_policy > FELT and to_reference < to_policy / 2:
        raise InputError(
            f"The engine's log-probabilities are those of the reference ({to_reference:.3f} nats per token from it, "
            f"{to_policy:.3f} from the policy): what was learned never arrived in the engine. {advice}"
        )
