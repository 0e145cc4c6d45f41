"""LoRA layers in three matrix products: `fuse` makes those of a PeftModel compute so wherever the result is the same.

PEFT's layer casts, multiplies by the scaling and adds in passes of their own over the layer's whole output. Here the
low-rank part is added by the product that computes it, forward and backward, and the backward keeps nothing but the
input and its low-rank image. That saves memory above all (docs/ppo.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear


class _LowRankProduct(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ (LoRA, https://arxiv.org/abs/2106.09685, eq. 3), with gradients to x, A and B alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """(N, out) from x (N, in), weight (out, in), bias (out,), down = A (r, in), up = B (out, r), of one dtype."""
        low = linear(x, down)
        ctx.save_for_backward(x, weight, down, up, low)
        ctx.scaling = scaling
        return linear(x, weight, bias).addmm_(low, up.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, down, up, low = ctx.saved_tensors
        (grad,) = grads
        low_grad = (grad @ up).mul_(ctx.scaling)
        x_grad = (grad @ weight).addmm_(low_grad, down) if ctx.needs_input_grad[0] else None
        down_grad = low_grad.T @ x if ctx.needs_input_grad[3] else None
        up_grad = (grad.T @ low).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return x_grad, None, None, down_grad, up_grad, None


class _Product(NamedTuple):
    """What a layer multiplies with, all of one dtype; shapes as in `_LowRankProduct.forward`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    down: torch.Tensor
    up: torch.Tensor
    scaling: float

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The output (N, out) for x (N, in), without gradients."""
        x = x.to(self.weight.dtype)
        return linear(x, self.weight, self.bias).addmm_(linear(x, self.down), self.up.T, alpha=self.scaling)


_products: dict["FusedLora", _Product] | None = None


@contextmanager
def weights_stay() -> Iterator[None]:
    """Promise that inside the block no weight and no active adapter changes, as while sampling a batch.

    A layer then looks for its weights, and casts them, once and not at every token. Of the 0.37 ms of a layer of 576 by
    192 weights and 32 tokens (one core, bfloat16), that was 0.15 ms.
    """
    global _products
    before, _products = _products, {}
    try:
        yield
    finally:
        _products = before


class FusedLora(Linear):
    """PEFT's LoRA layer over a plain `nn.Linear`, in three products if one plain adapter is active."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output (..., out) for x (..., in), as PEFT's layer gives it up to rounding."""
        kept = None if _products is None or torch.is_grad_enabled() else _products.get(self)
        if kept is not None and not args and not kwargs:
            return kept.of(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or len(active) != 1 or not self._plain(active[0]):
            return super().forward(x, *args, **kwargs)
        base, down, up = self.base_layer, self.lora_A[active[0]].weight, self.lora_B[active[0]].weight
        kind = x.device.type
        mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else base.weight.dtype
        if not mixed and (x.dtype != dtype or (down.requires_grad and down.dtype != dtype)):
            return super().forward(x)  # PEFT computes what is trained in the adapter's own precision then
        if dtype == torch.float32 or hasattr(base.weight, "ds_id"):
            # float32 rounds as in PEFT, whichever strategy trains; ZeRO-3, whose hooks some passes lack, does so always
            return super().forward(x)
        with torch.autocast(kind, enabled=False):
            bias = None if base.bias is None else base.bias.to(dtype)
            parts = (base.weight.to(dtype), bias, down.to(dtype), up.to(dtype))
            product = _Product(*parts, self.scaling[active[0]])
            if torch.is_grad_enabled():
                output = _LowRankProduct.apply(x.to(dtype).flatten(0, -2), *product)
            else:
                output = product.of(x.flatten(0, -2))
                if _products is not None:
                    _products[self] = product
        return output.unflatten(0, x.shape[:-1])

    def _plain(self, adapter: str) -> bool:
        """Whether nothing else happens in the layer: no dropout, variant (DoRA) or trained bias, no hook."""
        parts = [self.base_layer, self.lora_A[adapter], self.lora_B[adapter]]
        return (
            adapter not in self.lora_variant
            and type(self.lora_dropout[adapter]) is nn.Identity
            and all(type(part) is nn.Linear and not part._forward_pre_hooks and not part._forward_hooks
                    and not isinstance(part.weight, DTensor) for part in parts)
            and self.lora_B[adapter].bias is None
            and not self.base_layer.weight.requires_grad
            and (self.base_layer.bias is None or not self.base_layer.bias.requires_grad)
        )  # fmt: skip


M = TypeVar("M", bound=nn.Module)


def fuse(model: M) -> M:
    """The model, whose plain LoRA layers now compute in three products."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = FusedLora
    return model
