"""Log-probabilities of tokens."""

from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from rlhf.models.prefix import CANNOT, before_head, reraise_out_of_memory, same

Entropy = Literal["none", "value", "graph"]
PIECE = 64  # tokens at once: (64, V) fits a processor's caches, (N, V) doesn't
PIECE_ON_GPU = 512  # fewer and larger products


def token_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    entropy: Entropy = "value",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token and entropy of each distribution, (N,) float32.

    Args:
        logits: (N, V) at the positions before the tokens, raw; they are divided by `temperature` in float32.
        tokens: (N,) int64.
        entropy: `none` returns 0 and saves the computation; `graph` lets gradients through it.
    """
    logprobs, entropies = [], []
    for some_logits, some_tokens in zip(logits.split(PIECE), tokens.split(PIECE), strict=True):
        every = _every_logprob(some_logits, temperature)
        logprobs.append(every.gather(-1, some_tokens.unsqueeze(-1)).squeeze(-1))
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "graph"):
            entropies.append(torch.zeros_like(logprobs[-1]) if entropy == "none" else -(every.exp() * every).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def _every_logprob(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities (N, V) float32."""
    scaled = logits if temperature == 1 else logits.float() / temperature
    return torch.log_softmax(scaled, dim=-1, dtype=torch.float32)


def logprobs_behind(
    head: nn.Linear, hidden: torch.Tensor, tokens: torch.Tensor, temperature: float, entropy: Entropy = "value"
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `token_logprobs` gives for the logits of a frozen head, which are never all in memory.

    Args:
        head: see `frozen_head`.
        hidden: (N, d) in front of the head.
        entropy: not `graph`.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        hidden, weight = hidden.to(dtype), head.weight.to(dtype)
        return _FrozenHead.apply(hidden, weight, tokens, temperature, entropy != "none")


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities and entropies (N,) behind a head, with gradients of the log-probabilities to `hidden` alone.

    The gradient by a hidden state is (onehot - probabilities) W / temperature. It is computed where the probabilities
    are at hand, and the backward pass multiplies it. So no pass keeps (N, V) numbers.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: float, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropies, slopes = [], [], []
        size = PIECE if hidden.device.type == "cpu" else PIECE_ON_GPU
        for some, some_tokens in zip(hidden.split(size), tokens.split(size), strict=True):
            every, chosen = _every_logprob(linear(some, weight), temperature), some_tokens[:, None]
            logprobs.append(every.gather(1, chosen)[:, 0])
            slope = every.exp() if entropy or ctx.needs_input_grad[0] else every
            entropies.append(-every.mul_(slope).sum(-1) if entropy else torch.zeros_like(logprobs[-1]))
            if ctx.needs_input_grad[0]:
                slope.neg_().scatter_add_(1, chosen, torch.ones_like(logprobs[-1])[:, None])
                slopes.append((slope.to(weight.dtype) @ weight).div_(temperature))
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        ctx.mark_non_differentiable(found := torch.cat(entropies))
        return torch.cat(logprobs), found

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grads[0][:, None]).to(slopes.dtype), None, None, None, None


def frozen_head(model: Any) -> nn.Linear | None:
    """The model's head, if it is a plain, whole matrix product that this pass doesn't train."""
    head = model.get_output_embeddings()
    plain = (
        type(head) is nn.Linear and head.bias is None and not (head.weight.requires_grad and torch.is_grad_enabled())
        and not isinstance(head.weight, DTensor) and not head._forward_hooks
        and not hasattr(head, "_hf_hook")  # accelerate's, which moves weights
    )  # fmt: skip
    return head if plain else None


_ENDS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def ends_with(model: Any, head: nn.Linear, input_ids: torch.Tensor) -> bool:
    """Whether a model's logits are what its head gives: Gemma 2 caps them, Granite scales them.

    Tried once, on tokens (L,), with states so large that a cap of the logits would show.
    """
    if model not in _ENDS:
        caught = []

        def enlarge(hidden: torch.Tensor) -> torch.Tensor:
            caught.append(hidden * (1000 / linear(hidden, head.weight.to(hidden.dtype)).abs().max().clamp(min=1e-6)))
            return caught[-1]

        try:
            with before_head(model, enlarge):
                logits = model(input_ids=input_ids[None], use_cache=False).logits
            expected = linear(caught[-1], head.weight.to(caught[-1].dtype))
            _ENDS[model] = logits.shape == expected.shape and same(logits.flatten(0, 1), expected.flatten(0, 1))
        except CANNOT as error:
            reraise_out_of_memory(error)
            _ENDS[model] = False
    return _ENDS[model]
