"""The memory and the operations of a computation, from running it on tensors without data.

torch's fake tensors have shapes, dtypes and lifetimes, but no memory. Every block that a real computation would
allocate is noted when it is made and when its last tensor goes, so the peak is that of the code that runs. What happens
inside one operation is not seen: workspaces of matrix products, for example.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

Memory = dict[str, float]  # bytes by role

WEIGHTS, ADAPTERS, CASTS, GRADIENTS, OPTIMIZER = "weights", "adapters", "casts of weights", "gradients", "optimizer"
ACTIVATIONS, LOGITS, CACHE = "activations", "logits", "KV cache"


CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@register_flop_formula(CPU_ATTENTION)
def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of shapes (B, H, Q, d) and (B, H, K, d): scores, and their product with the values."""
    return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


@register_flop_formula(CPU_ATTENTION_BACKWARD)
def attention_backward_flops(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """The scores once more, and the gradients of scores, values, queries and keys."""
    return 2 * query[0] * query[1] * query[2] * key[2] * (3 * query[3] + 2 * value[3])


class Trace(TorchDispatchMode):
    """Notes the blocks of memory that come and go inside the block.

    Args:
        vocabulary: tensors of this width are logits, or made from them.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.roles: list[str] = []  # of every block
        self.events: list[tuple[int, int]] = []  # (block, bytes); negative: it is freed
        self.operations = 0.0  # of floating-point numbers: two for each multiplication of a matrix product
        self._blocks: dict[int, int] = {}  # living blocks by the address of their storage

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=output)
        for tensor in output if isinstance(output, list | tuple) else [output]:
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, function, args)
        return output

    def _note(self, tensor: torch.Tensor, function: Any, args: Any) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._blocks:
            return
        block = len(self.roles)
        self._blocks[storage._cdata] = block
        self.roles.append(LOGITS if tensor.shape[-1:] == (self.vocabulary,) else ACTIVATIONS)
        if function is torch.ops.aten._to_copy.default and self.role(args[0]) in (WEIGHTS, ADAPTERS):
            self.roles[block] = CASTS
        self.events.append((block, storage.nbytes()))
        weakref.finalize(storage, self._freed, storage._cdata, block, storage.nbytes())

    def _freed(self, address: int, block: int, size: int) -> None:
        if self._blocks.get(address) == block:
            del self._blocks[address]
        self.events.append((block, -size))

    def hold(self, tensors: Iterable[torch.Tensor], role: str) -> None:
        """Count tensors that were made before, and stay."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._blocks:
                self._blocks[storage._cdata] = len(self.roles)
                self.events.append((len(self.roles), storage.nbytes()))
                self.roles.append(role)

    def role(self, tensor: torch.Tensor) -> str | None:
        """The role of a tensor's block, if it is known."""
        block = self._blocks.get(tensor.untyped_storage()._cdata)
        return None if block is None else self.roles[block]

    def mark(self, tensors: Iterable[Any], role: str) -> None:
        """Give the blocks of tensors their role, for all of their life."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                block = self._blocks.get(tensor.untyped_storage()._cdata)
                if block is not None:
                    self.roles[block] = role

    def peak(self, start: int = 0, leave_out: Iterable[str] = ()) -> Memory:
        """Bytes by role at the moment of the largest sum, from event number `start` on.

        Args:
            leave_out: roles that don't count.
        """
        left_out = {*leave_out}
        now: Memory = defaultdict(float)
        best: Memory = {}
        total, most = 0.0, -1.0
        for number, (block, size) in enumerate(self.events):
            role = self.roles[block]
            if role in left_out:
                continue
            now[role] += size
            total += size
            if total > most and number >= start:
                best, most = dict(now), total
        return best or dict(now)


def without_data(model: nn.Module, trained: torch.dtype | None = None) -> None:
    """Turn a model on the meta device into one on a fake CPU, inside a FakeTensorMode.

    Args:
        trained: another dtype for trained parameters.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            dtype = trained if trained is not None and tensor.requires_grad else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=dtype, device="cpu")
            made[id(tensor)] = (
                nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            )
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
