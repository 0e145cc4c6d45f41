"""Weights that FSDP2 or DeepSpeed spreads over processes: whole to sample and score with, and to save.

A module that is not sharded passes through all of this unchanged. What DeepSpeed needs is in zero.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
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
from torch.optim.lr_scheduler import LRScheduler

from rlhf.errors import InputError
from rlhf.ppo.lockstep import in_lockstep
from rlhf.ppo.model import PolicyAndValue, Shardable
from rlhf.ppo.processes import Processes
from rlhf.ppo.zero import check, is_held, put_value, split_value_groups, start_engine

T = TypeVar("T")


def shard(
    accelerator: Accelerator, model: Shardable, gather_for_generation: bool = True, ddp_timeout: float = 1800
) -> None:
    """Spread the weights as the launch configuration says, before there is an optimizer, which holds what is left here.

    DeepSpeed spreads the trained model when it has the optimizer (`prepare`), and leaves a reference whole.

    Args:
        gather_for_generation: see `--ds3_gather_for_generation`.
        ddp_timeout: seconds that processes wait for each other.

    Raises:
        InputError: for FSDP1, and what PPO has not been run with under DeepSpeed.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if uses_deepspeed(accelerator):
        check(accelerator)
        if not gather_for_generation:
            raise InputError("--ds3_gather_for_generation false: PPO has not been run with it under DeepSpeed. Leave "
                             "it out, or launch with FSDP2.")  # fmt: skip
        return
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise InputError("PPO runs on one process, under DDP, FSDP2 (fsdp_version: 2) and DeepSpeed's ZeRO-2 and "
                         "ZeRO-3, not under FSDP1.")  # fmt: skip
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
    model.layer_by_layer, model.timeout = not gather_for_generation, timedelta(seconds=ddp_timeout)


def say_gathered(accelerator: Accelerator, *models: Shardable | None) -> None:
    """Print what each process gathers to sample and score, and what the other way would take."""
    held = [model for model in models if model is not None and shards(model)]
    if not held:
        return
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    dtype = policy.param_dtype if policy is not None else None  # in which weights are gathered
    sizes = [[_bytes(part, dtype) for part in shards(model)] for model in held]  # the whole model first
    everything = sum(total for total, *_ in sizes) / 2**30
    few = sum(total - sum(layers) + 2 * max(layers, default=0) for total, *layers in sizes) / 2**30
    layer_by_layer = held[0].layer_by_layer
    accelerator.print(
        f"To sample and score, each process gathers {few if layer_by_layer else everything:.3g} GiB of weights "
        f"(--ds3_gather_for_generation {'false' if layer_by_layer else 'true'}); "
        + (f"true: {everything:.3g} GiB, faster." if layer_by_layer else f"false: {few:.3g} GiB, slower.")
    )


def _bytes(module: nn.Module, dtype: torch.dtype | None) -> int:
    return sum(p.numel() * (dtype.itemsize if dtype else p.element_size()) for p in module.parameters())


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether the launch configuration asks for DeepSpeed."""
    return getattr(accelerator.state, "deepspeed_plugin", None) is not None


def group_value_function(
    accelerator: Accelerator,
    model: PolicyAndValue,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler | None,
    value_warmup_steps: int,
) -> None:
    """Prepare an optimizer for a value warm-up under DeepSpeed, before it has a scheduler.

    Raises:
        InputError: if it has one.
    """
    if value_warmup_steps == 0 or not uses_deepspeed(accelerator):
        return
    if lr_scheduler is not None:
        raise InputError("--value_warmup_steps: under DeepSpeed it regroups the optimizer, so PPO has to make the "
                         "scheduler. Pass an optimizer alone, or none.")  # fmt: skip
    own = model.value_parameters()
    split_value_groups(optimizer, {p for name, p in model.named_parameters() if name in own})


def prepare(
    accelerator: Accelerator, model: PolicyAndValue, optimizer: Optimizer, micro_batch_size: int, max_grad_norm: float
) -> tuple[nn.Module, Optimizer]:
    """The model and the optimizer, prepared by the Accelerator. DeepSpeed's engine clips gradients itself."""
    if uses_deepspeed(accelerator):
        model.zero, *prepared = start_engine(accelerator, model, optimizer, micro_batch_size, max_grad_norm)
        model.in_step = True
        return tuple(prepared)
    if shards(model):
        return model, accelerator.prepare_optimizer(optimizer)
    return accelerator.prepare(model, optimizer)


def processes(accelerator: Accelerator, model: PolicyAndValue, wrapped: nn.Module) -> Processes:
    """The processes that train a model together, which `prepare` has wrapped."""
    if model.zero is None:
        return Processes.of(accelerator, wrapped)
    own = {"backward": model.zero.backward, "synchronized": model.zero.synchronized}
    return dataclasses.replace(Processes.of(accelerator, wrapped), **own)


def shards(model: nn.Module) -> list[FSDPModule]:
    """The parts that FSDP2 gathers one at a time; the whole is among them. None without FSDP2."""
    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def is_sharded(model: Shardable) -> bool:
    """Whether no process has all weights."""
    return bool(shards(model)) or (model.zero is not None and model.zero.stage == 3)


def whole(function: Callable[[], T], *models: Shardable | None) -> T:
    """What `function` returns. While it runs, every process may use any part of the models as often as it likes.

    All processes call this together. It costs a copy of the weights on each, or with `layer_by_layer` a copy of what is
    outside of the layers, and a gathering of each layer in each pass.
    """
    held = [model for model in models if model is not None]
    layers = [part for model in held if model.layer_by_layer for part in shards(model) if part is not model]
    with in_lockstep(layers, held[0].timeout) if layers else nullcontext():
        for model in held:
            function = functools.partial(_whole, model, function)
        return function()


def _whole(model: Shardable, function: Callable[[], T]) -> T:
    parts, in_step = shards(model), model.in_step
    for part in parts:
        kept = not model.layer_by_layer or part is model
        part.set_reshard_after_forward(not kept, recurse=False)
        if kept:
            part.unshard()
    model.in_step = False
    try:
        return model.zero.whole(function) if model.zero else model.run(function)
    finally:
        model.in_step = in_step
        for part in parts:
            part.set_reshard_after_forward(model.reshards and part is not model, recurse=False)
            part.reshard()


def gather(model: Shardable) -> dict[str, torch.Tensor]:
    """The tensors that training changes, whole, by name, on the CPU. All processes call it together."""
    if model.zero:
        return model.zero.gather()
    for part in shards(model):
        part.reshard()  # what a forward pass left gathered is a copy, perhaps of less precision
    return {name: _full(p).cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def policy_weights(model: PolicyAndValue) -> dict[str, torch.Tensor] | None:
    """What training changes of the policy, whole and by its own names; None if each process has all of it anyway.

    All processes call it together.
    """
    return policy_part(gather(model)) if is_sharded(model) else None


def policy_part(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the policy among the tensors of `gather`, by its own names.

    >>> policy_part({"policy.lm_head.weight": torch.ones(1), "value_head.bias": torch.ones(1)})
    {'lm_head.weight': tensor([1.])}
    """
    own = "policy."
    return {name.removeprefix(own): tensor for name, tensor in weights.items() if name.startswith(own)}


def _full(parameter: torch.Tensor) -> torch.Tensor:
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor, the same on all processes, into a parameter."""
    if is_held(parameter):
        return put_value(parameter, value)
    own = parameter.detach()
    if isinstance(own, DTensor):
        value = distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    parameter.copy_(value)


def optimizer_state(model: Shardable, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state by the parameters' names, whole and, if it is sharded, on the CPU. All call it together."""
    if model.zero:
        return model.zero.optimizer_state()
    if shards(model):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), options=options)
    names, state = names_by_index(model, optimizer), optimizer.state_dict()
    by_name = {names[index]: values for index, values in state["state"].items()}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": by_name, "param_groups": groups}


def load_optimizer_state(model: Shardable, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Undo `optimizer_state`, however the model was sharded then. All processes call it together, with the same state.

    Raises:
        InputError: if it is sharded now, and the state is by number, as earlier versions saved it.
    """
    by_number = any(isinstance(name, int) for group in state["param_groups"] for name in group["params"])
    if by_number and (model.zero or shards(model)):
        raise InputError("--resume_from_checkpoint: an earlier version saved this checkpoint, without FSDP2 and "
                         "DeepSpeed. Resume without them.")  # fmt: skip
    if model.zero:
        return model.zero.load_optimizer_state(state)
    if shards(model):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        state = {**state, "state": begun(model, state["state"])}
        return set_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), state, options=options)
    optimizer.load_state_dict(state if by_number else by_index(model, optimizer, state))


def names_by_index(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The names of an optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def by_index(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state by name as this optimizer numbers it. Its groups may be other ones."""
    index = {name: number for number, name in enumerate(names_by_index(model, optimizer))}
    settings = {name: group for group in state["param_groups"] for name in group["params"]}
    names, groups = iter(index), []
    for group in optimizer.param_groups:
        own = [next(names) for _ in group["params"]]
        groups.append({**settings[own[0]], "params": [index[name] for name in own]} if own else group)
    values = {index[name]: values for name, values in state["state"].items()}
    return {**state, "state": values, "param_groups": groups}


def begun(model: nn.Module, state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """An optimizer's state by name, with that of a first step for what a value warm-up has not trained yet."""
    example = next(iter(state.items()), None)
    if example is None:
        return state
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    shape = named[example[0]].shape

    def zeros(value: Any, own: torch.Size) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.zeros(own if value.shape == shape else value.shape, dtype=value.dtype)

    new = {name: {key: zeros(value, p.shape) for key, value in example[1].items()} for name, p in named.items()}
    return new | state
