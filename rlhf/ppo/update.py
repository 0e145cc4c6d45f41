"""The PPO loss and the minibatch loop."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from rlhf.models.prefix import Rows
from rlhf.ppo.model import TokenOutputs
from rlhf.ppo.types import Advantages, LossSums, Rollout, Scored, UpdateStats, pack


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
    entropy_coef: float = 0.0,
    train_policy: bool = True,
) -> LossSums:
    """Clipped policy and value losses less the entropy bonus, summed over the masked tokens of (B, T) inputs.

    Policy: -min(r A, clip(r, 1 - ε, 1 + ε) A), r = π/π_old; Schulman et al., eq. 7 (https://arxiv.org/abs/1707.06347).
    Value: max((V - R)², (V_old + clip(V - V_old, ±ε_v) - R)²) / 2, as in
    https://github.com/openai/baselines/blob/ea25b9e8b234e6ee1bca43083f8f3cf974143998/baselines/ppo2/model.py#L68

    Args:
        train_policy: False leaves the value loss alone, for a value warm-up.
    """
    logratio = (new.logprobs - old_logprobs) * mask
    ratio = logratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    policy_loss = torch.max(unclipped, clipped) * mask
    near = old_values + (new.values - old_values).clamp(-cliprange_value, cliprange_value)
    error, near_error = (new.values - returns) ** 2, (near - returns) ** 2
    value_loss = 0.5 * torch.max(error, near_error) * mask
    entropy = new.entropy * mask
    # times 0, so that every parameter has its part in the graph, as DistributedDataParallel asks
    policy_part = (policy_loss.sum() - entropy_coef * entropy.sum()) * (1.0 if train_policy else 0.0)
    return LossSums(
        loss=policy_part + vf_coef * value_loss.sum(),
        policy_loss=policy_loss.sum().detach(),
        value_loss=value_loss.sum().detach(),
        approxkl=(0.5 * logratio.detach() ** 2).sum(),
        clipped=((clipped > unclipped) & mask).sum().float(),
        value_clipped=((near_error > error) & mask).sum().float(),
        entropy=entropy.sum().detach(),
        ratio=(ratio * mask).sum().detach(),
    )


def minibatches(
    lengths: torch.Tensor, num_ppo_epochs: int, num_mini_batches: int, micro_batch_size: int, generator: torch.Generator
) -> Iterator[list[torch.Tensor]]:
    """Per optimizer step, the row numbers of its microbatches: a fresh permutation each epoch.

    Within a minibatch, rows of similar length come together, which saves padding and changes no gradient.

    Args:
        lengths: (B,) tokens of each row.
    """
    for _ in range(num_ppo_epochs):
        for minibatch in torch.randperm(len(lengths), generator=generator).chunk(num_mini_batches):
            by_length = lengths[minibatch].argsort(stable=True)
            yield list(minibatch[by_length].split(micro_batch_size))


class PtxBatch(NamedTuple):
    """Rows of the dataset of PPO-ptx. (B, L) int64, left-padded."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor  # (B, L - 1) bool: whether each token but a row's first counts, from the row's beginning


def ptx_batches(dataset: Dataset | None, batch_size: int, seed: int, device: torch.device) -> Iterator[PtxBatch]:
    """Batches of random rows for PPO-ptx, without end.

    Args:
        dataset: rows with `input_ids`, and `labels` (-100 where a token doesn't count) or every token counts.
    """
    generator = torch.Generator().manual_seed(seed)
    while dataset is not None:
        rows = [dataset[n] for n in torch.randint(len(dataset), (batch_size,), generator=generator).tolist()]
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row.get("labels") or row["input_ids"]) for row in rows]
        ones = [torch.ones_like(tokens) for tokens in ids]
        left = {"batch_first": True, "padding_value": 0, "padding_side": "left"}
        counted = pad_sequence([kept[1:] != -100 for kept in labels], batch_first=True, padding_value=False)
        yield PtxBatch(pad_sequence(ids, **left).to(device), pad_sequence(ones, **left).to(device), counted.to(device))


def update(
    forward: Callable[..., TokenOutputs],
    step: Callable[[], float],
    rollout: Rollout,
    scored: Scored,
    advantages: Advantages,
    batches: Iterator[list[torch.Tensor]],
    *,
    backward: Callable[[torch.Tensor], None],
    synchronized: Callable[[bool], AbstractContextManager],
    reduce: Callable[[torch.Tensor], torch.Tensor],
    processes: int,
    temperature: float,
    target_kl: float | None = None,
    ptx_coef: float = 0.0,
    ptx_batches: Iterable[PtxBatch] = (),
    **loss_settings: Any,
) -> UpdateStats:
    """Several epochs of PPO on one rollout; one optimizer step per minibatch.

    The loss of a minibatch is a mean over its completion tokens on all processes, whatever the microbatches and
    processes it is computed in.

    Args:
        forward: the module being trained.
        step: clips, steps, zeroes; returns the gradient norm.
        synchronized: context of a microbatch's forward and backward; takes whether it is the minibatch's last, when
            processes average their gradients.
        reduce: sums a tensor over processes.
        target_kl: take no further step once a minibatch's approxkl exceeds this.
        ptx_batches: one per minibatch, if `ptx_coef` is above 0.
    """
    totals, ratios, norms, ptx_losses = torch.zeros(9), [], [], []
    ptx = iter(ptx_batches)
    for micro_batches in batches:
        tokens = reduce(rollout.completion_mask[torch.cat(micro_batches)].sum().float())
        share = processes / float(tokens)  # of each token in the minibatch's mean, undoing the mean over processes
        if ptx_coef > 0:
            with synchronized(False):
                ptx_loss = language_model_loss(forward, next(ptx))
                backward(ptx_coef * ptx_loss)
            ptx_losses.append(float(ptx_loss))
        sums = torch.zeros(9)
        for number, rows in enumerate(micro_batches):
            with synchronized(number == len(micro_batches) - 1):
                losses = micro_batch_losses(forward, rollout, scored, advantages, rows, temperature, loss_settings)
                backward(losses.loss * share)
            count = rollout.completion_mask[rows].sum().float()
            sums += torch.stack([*(value.detach().float() for value in losses), count]).cpu()
        norms.append(step())
        sums = reduce(sums.to(rollout.input_ids.device)).cpu()
        totals += sums
        ratios.append(float(sums[7] / sums[8]))
        if target_kl is not None and float(sums[3] / sums[8]) > target_kl:
            break
    return update_stats(totals, ratios, norms, ptx_losses)


def micro_batch_losses(
    forward: Callable[..., TokenOutputs],
    rollout: Rollout,
    scored: Scored,
    advantages: Advantages,
    rows: torch.Tensor,
    temperature: float,
    loss_settings: dict[str, Any],
) -> LossSums:
    """The losses of some rows under the model as it is now."""
    packed = pack(rollout, rows)
    length = int(packed.lengths.max())
    new = forward(packed, temperature, entropy_gradient=loss_settings.get("entropy_coef", 0.0) > 0)
    return ppo_loss(
        new,
        scored.logprobs[rows, :length],
        scored.values[rows, :length],
        advantages.advantages[rows, :length],
        advantages.returns[rows, :length],
        rollout.completion_mask[rows, :length],
        **loss_settings,
    )


def language_model_loss(forward: Callable[..., TokenOutputs], batch: PtxBatch) -> torch.Tensor:
    """Mean negative log-probability of the masked tokens, at temperature 1."""
    lengths = batch.attention_mask.sum(1) - 1  # every token but the first is a completion token
    new = forward(Rows(batch.input_ids, batch.attention_mask, lengths), 1.0, with_values=False)
    return -(new.logprobs * batch.loss_mask).sum() / batch.loss_mask.sum().clamp(min=1)


def update_stats(totals: torch.Tensor, ratios: list[float], norms: list[float], ptx_losses: list[float]) -> UpdateStats:
    """Means from the sums (9,) of all minibatches, the fields of LossSums and the number of tokens."""
    _, policy, value, approxkl, clipped, value_clipped, entropy, ratio, _ = (totals / totals[8]).tolist()
    return UpdateStats(
        policy, value, approxkl, clipped, value_clipped, entropy, ratio,
        ratio_var=float(torch.tensor(ratios).var(unbiased=False)),
        first_ratio=ratios[0],
        grad_norm=sum(norms) / len(norms),
        ptx_loss=sum(ptx_losses) / max(1, len(ptx_losses)),
        steps=len(norms),
    )  # fmt: skip
