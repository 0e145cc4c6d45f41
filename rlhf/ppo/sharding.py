"""Weights that FSDP2 spreads over processes: whole to sample and score with, and to save.

A module that is not sharded passes through all of this unchanged.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from rlhf.errors import InputError
from rlhf.ppo.model import PolicyAndValue, Shardable

T = TypeVar("T")


def shard(accelerator: Accelerator, model: Shardable) -> None:
    """Spread the weights as the launch configuration says, before there is an optimizer, which holds what is left here.

    Raises:
        InputError: for FSDP1 and DeepSpeed.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None or (plugin and plugin.fsdp_version != 2):
        raise InputError("PPO runs on one process, under DDP or under FSDP2 (fsdp_version: 2), not under FSDP1 and "
                         "DeepSpeed.")  # fmt: skip
    if plugin is None:
        return
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype is not None:
        # log-probabilities and values leave the model in float32: rounded to bfloat16, no ratio would mean anything
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None, reduce_dtype=torch.float32)
    if isinstance(model, PolicyAndValue) and model.value_model is None:  # the value head computes in float32
        mesh = getattr(accelerator, "torch_device_mesh", None)
        mesh = mesh and mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
        fully_shard(model.value_head, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    fsdp2_prepare_model(accelerator, model)
    register_fsdp_forward_method(model, "run")
    model.in_step, model.reshards = True, plugin.reshard_after_forward


def prepare(accelerator: Accelerator, model: PolicyAndValue, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """The model and the optimizer, prepared by the Accelerator."""
    if shards(model):
        return model, accelerator.prepare_optimizer(optimizer)
    return accelerator.prepare(model, optimizer)


def shards(model: nn.Module) -> list[FSDPModule]:
    """The parts that FSDP2 gathers one at a time; the whole is among them. None where nothing is sharded."""
    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def whole(model: Shardable | None, function: Callable[[], T]) -> T:
    """What `function` returns. While it runs, every process has all weights and may use any part as often as it likes.

    All processes call this together. It costs a copy of the weights on each.
    """
    if model is None:
        return function()
    parts, in_step = shards(model), model.in_step
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    model.in_step = False
    try:
        return model.run(function)
    finally:
        model.in_step = in_step
        for part in parts:
            part.set_reshard_after_forward(model.reshards and part is not model, recurse=False)
            part.reshard()


def gather(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes, whole, by name, on the CPU. All processes call it together."""
    for part in shards(model):
        part.reshard()  # what a forward pass left gathered is a copy, perhaps of less precision
    return {name: _full(p).cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def _full(parameter: torch.Tensor) -> torch.Tensor:
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor, the same on all processes, into a parameter."""
    own = parameter.detach()
    if isinstance(own, DTensor):
        value = distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    parameter.copy_(value)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state; of a sharded model whole, on the CPU and by name. All processes call it together."""
    if not shards(model):
        return optimizer.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), options=options)


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Undo `optimizer_state`. All processes call it together; of a sharded model the main process's `state` counts."""
    if not shards(model):
        return optimizer.load_state_dict(state)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), state, options=options)
