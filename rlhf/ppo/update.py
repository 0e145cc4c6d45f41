"""The PPO loss and the minibatch loop."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from rlhf.models.prefix import Rows
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.model import TokenOutputs
from rlhf.ppo.processes import ONE_PROCESS, Processes
from rlhf.ppo.types import Advantages, LossSums, Rollout, Scored, UpdateStats, pack


class UpdateSettings(NamedTuple):
    """The settings of the loss and of the minibatch loop, with the names of PPOConfig."""

    cliprange: float
    cliprange_value: float
    vf_coef: float
    epsilon_high: float | None = None
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    temperature: float = 1.0
    target_kl: float | None = None
    train_policy: bool = True

    @classmethod
    def of(cls, args: PPOConfig, warming_up: bool) -> "UpdateSettings":
        """The settings of a run. The value warm-up (`warming_up`) trains the value function alone."""
        return cls(
            cliprange=args.cliprange,
            epsilon_high=args.epsilon_high,
            cliprange_value=args.cliprange_value,
            vf_coef=args.vf_coef,
            entropy_coef=args.entropy_coef,
            ptx_coef=0.0 if warming_up else args.ptx_coef,
            temperature=args.temperature,
            target_kl=args.target_kl,
            train_policy=not warming_up,
        )


def ppo_loss(
    new: TokenOutputs,
    old_logprobs: torch.Tensor,
    old_values: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    settings: UpdateSettings,
    weights: torch.Tensor | None = None,
) -> LossSums:
    """Clipped policy and value losses minus the entropy bonus, summed over the masked tokens of (B, T) inputs.

    Policy: -min(r A, clip(r, 1 - ε, 1 + ε_high) A), r = π/π_old; Schulman et al., eq. 7
    (https://arxiv.org/abs/1707.06347), there with one ε.
    Value: max((V - R)², (V_old + clip(V - V_old, ±ε_v) - R)²) / 2, as in
    https://github.com/openai/baselines/blob/ea25b9e8b234e6ee1bca43083f8f3cf974143998/baselines/ppo2/model.py#L68

    Args:
        weights: of the policy loss, where an engine sampled from other probabilities than `old_logprobs`; None: 1.
    """
    logratio = (new.logprobs - old_logprobs) * mask
    ratio = logratio.exp()
    high = settings.cliprange if settings.epsilon_high is None else settings.epsilon_high
    clipped_ratio = ratio.clamp(1 - settings.cliprange, 1 + high)
    unclipped, clipped = -advantages * ratio, -advantages * clipped_ratio
    policy_loss = torch.max(unclipped, clipped) * mask
    if weights is not None:
        policy_loss = policy_loss * weights
    near = old_values + (new.values - old_values).clamp(-settings.cliprange_value, settings.cliprange_value)
    error, near_error = (new.values - returns) ** 2, (near - returns) ** 2
    value_loss = 0.5 * torch.max(error, near_error) * mask
    entropy = new.entropy * mask
    # multiply by 0 instead of skipping: DDP needs every parameter in the graph
    policy_weight = 1.0 if settings.train_policy else 0.0
    policy_part = (policy_loss.sum() - settings.entropy_coef * entropy.sum()) * policy_weight
    return LossSums(
        loss=policy_part + settings.vf_coef * value_loss.sum(),
        policy_loss=policy_loss.sum().detach(),
        value_loss=value_loss.sum().detach(),
        approxkl=(0.5 * logratio.detach() ** 2).sum(),
        clipped=((clipped > unclipped) & mask).sum().float(),
        value_clipped=((near_error > error) & mask).sum().float(),
        entropy=entropy.sum().detach(),
        ratio=(ratio * mask).sum().detach(),
        tokens=mask.sum().float(),
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
    """Rows of the PPO-ptx dataset. (B, L) int64, padded on the right."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: torch.Tensor  # (B,) int64: tokens from the first one on that counts, which is never a row's first token
    loss_mask: torch.Tensor  # (B, T) bool: which of these T tokens count


def _first_learned(labels: list[int]) -> int:
    """The first token that counts; at least 1, and at most the last one."""
    return next((n for n, label in enumerate(labels[1:], 1) if label != -100), max(1, len(labels) - 1))


def ptx_batches(dataset: Dataset | None, batch_size: int, seed: int, device: torch.device) -> Iterator[PtxBatch]:
    """Endless batches of random rows for PPO-ptx.

    Args:
        dataset: rows with `input_ids`, and perhaps `labels` (-100 where a token doesn't count).
    """
    generator = torch.Generator().manual_seed(seed)
    while dataset is not None:
        rows = [dataset[n] for n in torch.randint(len(dataset), (batch_size,), generator=generator).tolist()]
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [row.get("labels") or row["input_ids"] for row in rows]
        counted = [torch.tensor(row[_first_learned(row) :]) != -100 for row in labels]
        ones = [torch.ones_like(tokens) for tokens in ids]
        inputs, mask, loss_mask = (pad_sequence(part, batch_first=True).to(device) for part in (ids, ones, counted))
        yield PtxBatch(inputs, mask, torch.tensor([len(row) for row in counted], device=device), loss_mask)


def update(
    forward: Callable[..., TokenOutputs],
    step: Callable[[], float],
    rollout: Rollout,
    scored: Scored,
    advantages: Advantages,
    batches: Iterable[list[torch.Tensor]],
    settings: UpdateSettings,
    processes: Processes = ONE_PROCESS,
    ptx_batches: Iterable[PtxBatch] = (),
) -> UpdateStats:
    """Several epochs of PPO on one rollout; one optimizer step per minibatch.

    The loss of a minibatch is a mean over its completion tokens on all processes. How it is split into microbatches and
    over processes doesn't change it. After a minibatch whose approxkl exceeds `target_kl` no further step is taken.

    Args:
        forward: the module being trained.
        step: clips gradients, takes an optimizer step and sets gradients to zero; returns the gradient norm.
        batches: the microbatches of every minibatch, see `minibatches`.
        ptx_batches: one per minibatch, if `ptx_coef` is above 0.
    """
    sums: list[LossSums] = []  # of each minibatch
    norms, ptx_losses = [], []
    ptx = iter(ptx_batches)
    for micro_batches in batches:
        tokens = processes.sum(rollout.completion_mask[torch.cat(micro_batches)].sum().float())
        # weight of a token in the minibatch's mean, times the number of processes, which average their gradients
        share = processes.number / float(tokens)
        if settings.ptx_coef > 0:
            with processes.synchronized(False):
                ptx_loss = language_model_loss(forward, next(ptx))
                processes.backward(settings.ptx_coef * ptx_loss)
            ptx_losses.append(float(ptx_loss))
        parts = []
        for number, rows in enumerate(micro_batches):
            with processes.synchronized(number == len(micro_batches) - 1):
                losses = micro_batch_losses(forward, rollout, scored, advantages, rows, settings)
                processes.backward(losses.loss * share)
            parts.append(losses.detach())
        norms.append(step())
        own = functools.reduce(operator.add, parts)
        sums.append(LossSums.from_tensor(processes.sum(own.to_tensor()).cpu()))
        if settings.target_kl is not None and float(sums[-1].means().approxkl) > settings.target_kl:
            break
    return update_stats(sums, norms, ptx_losses)


def clip_gradients(
    accelerator: Accelerator, model: nn.Module, max_grad_norm: float, only: set[str] | None = None
) -> float:
    """Clip the gradients before an optimizer step; returns their norm before clipping.

    Args:
        max_grad_norm: 0 doesn't clip.
        only: names of the parameters to train. The others get no gradient at all, so that weight decay and momentum
            leave them alone too. None: all.
    """
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if only is not None and name not in only:
            parameter.grad = None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return float(accelerator.clip_grad_norm_(parameters, max_grad_norm or math.inf))


def micro_batch_losses(
    forward: Callable[..., TokenOutputs],
    rollout: Rollout,
    scored: Scored,
    advantages: Advantages,
    rows: torch.Tensor,
    settings: UpdateSettings,
) -> LossSums:
    """The losses of some rows under the current model."""
    packed = pack(rollout, rows)
    length = int(packed.lengths.max())
    states = None if scored.value_states is None else scored.value_states[rows, :length]
    new = forward(packed, settings.temperature, entropy_gradient=settings.entropy_coef > 0, value_states=states)
    return ppo_loss(
        new,
        scored.logprobs[rows, :length],
        scored.values[rows, :length],
        advantages.advantages[rows, :length],
        advantages.returns[rows, :length],
        rollout.completion_mask[rows, :length],
        settings,
        None if scored.sampling_weights is None else scored.sampling_weights[rows, :length],
    )


def language_model_loss(forward: Callable[..., TokenOutputs], batch: PtxBatch) -> torch.Tensor:
    """Mean negative log-probability of the masked tokens, at temperature 1."""
    new = forward(Rows(batch.input_ids, batch.attention_mask, batch.lengths), 1.0, with_values=False)
    return -(new.logprobs * batch.loss_mask).sum() / batch.loss_mask.sum().clamp(min=1)


def update_stats(sums: list[LossSums], norms: list[float], ptx_losses: list[float]) -> UpdateStats:
    """Means over an update.

    Args:
        sums: those of each minibatch, over all processes.
        norms: gradient norm of each minibatch.
        ptx_losses: language model loss of each minibatch; empty without PPO-ptx.
    """
    total = functools.reduce(operator.add, sums).means()
    ratios = torch.stack([minibatch.means().ratio for minibatch in sums])
    return UpdateStats(
        policy_loss=float(total.policy_loss),
        value_loss=float(total.value_loss),
        approxkl=float(total.approxkl),
        clipfrac=float(total.clipped),
        value_clipfrac=float(total.value_clipped),
        entropy=float(total.entropy),
        ratio=float(total.ratio),
        ratio_var=float(ratios.var(unbiased=False)),
        first_ratio=float(ratios[0]),
        grad_norm=sum(norms) / len(norms),
        ptx_loss=sum(ptx_losses) / max(1, len(ptx_losses)),
        steps=len(norms),
    )
