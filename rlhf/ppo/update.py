"""The PPO loss and the minibatch loop."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from rlhf.ppo.model import TokenOutputs
from rlhf.ppo.types import Advantages, Rollout, Scored, UpdateStats


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


def ppo_loss(
    new: TokenOutputs,
    old_logprobs: torch.Tensor,
    old_values: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    cliprange: float,
    cliprange_value: float,
    vf_coef: float,
) -> LossSums:
    """Clipped policy and value losses, summed over the masked tokens of (B, T) inputs.

    Policy: -min(r A, clip(r, 1 - ε, 1 + ε) A), r = π/π_old; Schulman et al., eq. 7 (https://arxiv.org/abs/1707.06347).
    Value: max((V - R)², (V_old + clip(V - V_old, ±ε_v) - R)²) / 2, as in
    https://github.com/openai/baselines/blob/ea25b9e8b234e6ee1bca43083f8f3cf974143998/baselines/ppo2/model.py#L68
    """
    logratio = (new.logprobs - old_logprobs) * mask
    ratio = logratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    policy_loss = torch.max(unclipped, clipped) * mask
    near = old_values + (new.values - old_values).clamp(-cliprange_value, cliprange_value)
    error, near_error = (new.values - returns) ** 2, (near - returns) ** 2
    value_loss = 0.5 * torch.max(error, near_error) * mask
    return LossSums(
        loss=policy_loss.sum() + vf_coef * value_loss.sum(),
        policy_loss=policy_loss.sum().detach(),
        value_loss=value_loss.sum().detach(),
        approxkl=(0.5 * logratio.detach() ** 2).sum(),
        clipped=((clipped > unclipped) & mask).sum().float(),
        value_clipped=((near_error > error) & mask).sum().float(),
        entropy=(new.entropy * mask).sum().detach(),
        ratio=(ratio * mask).sum().detach(),
    )


def minibatches(
    rows: int, num_ppo_epochs: int, num_mini_batches: int, micro_batch_size: int, generator: torch.Generator
) -> Iterator[list[torch.Tensor]]:
    """Per optimizer step, the row numbers of its microbatches: a fresh permutation each epoch."""
    for _ in range(num_ppo_epochs):
        for minibatch in torch.randperm(rows, generator=generator).chunk(num_mini_batches):
            yield list(minibatch.split(micro_batch_size))


def trim(rollout: Rollout, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """`input_ids`, `attention_mask` and completion length of some rows, without columns that are padding in all."""
    mask = rollout.attention_mask[rows]
    used = mask.any(0).nonzero()
    start, end = int(used[0]), int(used[-1]) + 1
    prompt_length = mask.shape[1] - rollout.completion_mask.shape[1]
    return rollout.input_ids[rows, start:end], mask[:, start:end], end - prompt_length


def update(
    forward: Callable[..., TokenOutputs],
    step: Callable[[], float],
    rollout: Rollout,
    scored: Scored,
    advantages: Advantages,
    batches: Iterator[list[torch.Tensor]],
    *,
    backward: Callable[[torch.Tensor, bool], None],
    count_tokens: Callable[[torch.Tensor], float],
    temperature: float,
    **loss_settings: float,
) -> UpdateStats:
    """Several epochs of PPO on one rollout; one optimizer step per minibatch.

    The loss of a minibatch is a mean over all its completion tokens, whatever the microbatches it is computed in.

    Args:
        forward: the module being trained.
        step: clips, steps, zeroes; returns the gradient norm.
        backward: takes a microbatch's share of the loss, and whether it is the minibatch's last.
        count_tokens: completion tokens of the minibatch over all processes, divided by their number (gradients are
            averaged over processes).
    """
    totals, ratios, norms, tokens = torch.zeros(8), [], [], 0.0
    for micro_batches in batches:
        in_batch = count_tokens(rollout.completion_mask[torch.cat(micro_batches)].sum())
        sums, local = torch.zeros(8), 0
        for number, rows in enumerate(micro_batches):
            input_ids, attention_mask, length = trim(rollout, rows)
            mask = rollout.completion_mask[rows, :length]
            new = forward(input_ids, attention_mask, length, temperature)
            losses = ppo_loss(
                new,
                scored.logprobs[rows, :length],
                scored.values[rows, :length],
                advantages.advantages[rows, :length],
                advantages.returns[rows, :length],
                mask,
                **loss_settings,
            )
            backward(losses.loss / in_batch, number == len(micro_batches) - 1)
            sums += torch.stack([value.detach().float().cpu() for value in losses])
            local += int(mask.sum())
        norms.append(step())
        ratios.append(float(sums[7]) / local)
        totals, tokens = totals + sums, tokens + local
    _, policy, value, approxkl, clipped, value_clipped, entropy, ratio = (totals / tokens).tolist()
    return UpdateStats(
        policy, value, approxkl, clipped, value_clipped, entropy, ratio,
        ratio_var=float(torch.tensor(ratios).var(unbiased=False)),
        first_ratio=ratios[0],
        grad_norm=sum(norms) / len(norms),
    )  # fmt: skip
