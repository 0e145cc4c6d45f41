"""The model that PPO trains, in the hands of DeepSpeed's engine: ZeRO-2 and ZeRO-3, for rlhf/ppo/sharding.py.

The engine wraps torch's optimizer: it averages gradients, clips them and steps. ZeRO-2 spreads gradients and the
optimizer over the processes, ZeRO-3 the weights too. DeepSpeed is imported only where it runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.models.utils import add_hooks, remove_hooks

from rlhf.errors import InputError

T = TypeVar("T")
VALUE_GROUP = "value_function"  # of a group of the optimizer: whether the value warm-up trains it


class Zero:
    """DeepSpeed's engine of a model.

    Args:
        engine: a deepspeed.DeepSpeedEngine of stage 2 or 3.
    """

    def __init__(self, engine: Any) -> None:
        self.engine, self.stage = engine, engine.zero_optimization_stage()
        self.backward = engine.backward
        self.warming_up = False
        self._optimizer.register_step_pre_hook(self._drop_gradients)

    @property
    def _optimizer(self) -> Optimizer:
        return self.engine.optimizer.optimizer  # torch's own, in which the engine keeps its shares

    @contextmanager
    def synchronized(self, last: bool) -> Iterator[None]:
        """For a microbatch's forward and backward pass. After the minibatch's last one a step may follow."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def step(self, warming_up: bool) -> float:
        """Clip, take an optimizer step and drop the gradients; returns their norm before clipping."""
        self.warming_up = warming_up
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def _drop_gradients(self, optimizer: Optimizer, *_: object) -> None:
        """During the value warm-up the rest gets no gradient at all, so that weight decay leaves it alone too."""
        for group in optimizer.param_groups:
            if self.warming_up and not group[VALUE_GROUP]:
                for parameter in group["params"]:
                    parameter.grad = None

    def whole(self, function: Callable[[], T]) -> T:
        """What `function` returns. While it runs, every process has all weights, and the engine gathers none."""
        if self.stage < 3:
            return function()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(self.engine.module.parameters())):
            remove_hooks(self.engine)
            try:
                return function()
            finally:
                add_hooks(self.engine)

    def gather(self) -> dict[str, torch.Tensor]:
        """The tensors that training changes, whole, by name, on the CPU. All processes call it together."""
        from deepspeed.utils import safe_get_full_fp32_param

        named = self.engine.module.named_parameters()
        return {name: safe_get_full_fp32_param(p).cpu().contiguous() for name, p in named if p.requires_grad}

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, whole, on the CPU and by name, on the main process. All processes call it together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        names, state = self._names(), {}
        groups: dict[int, dict[str, Any]] = {}
        for parameters, share, group in self._parts():
            settings = {key: value for key, value in group.items() if key not in ("params", VALUE_GROUP)}
            groups.setdefault(id(group), {**settings, "params": []})["params"] += [names[p] for p in parameters]
            found = self._linked(parameters, share)
            for parameter in parameters if found else []:
                values = {
                    key: safe_get_full_optimizer_state(parameter, key) if is_spread(value, share) else value
                    for key, value in found.items()
                }
                if self.engine.global_rank == 0:
                    state[names[parameter]] = {key: to_cpu(value) for key, value in values.items()}
        return {"state": state, "param_groups": list(groups.values())}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Undo `optimizer_state`. All processes call it together, with the same state."""
        names = self._names()
        settings = {name: group for group in state["param_groups"] for name in group["params"]}
        for parameters, share, group in self._parts():
            saved = {parameter: state["state"].get(names[parameter], {}) for parameter in parameters}
            group.update({key: value for key, value in settings[names[parameters[0]]].items() if key != "params"})
            example = saved[parameters[0]]
            shape = getattr(parameters[0], "ds_shape", parameters[0].shape)
            spread = [key for key, value in example.items() if torch.is_tensor(value) and value.shape == shape]
            on_device = group.get("fused") or group.get("capturable")
            device = share.device if on_device else "cpu"
            own = {key: value.clone().to(device) if torch.is_tensor(value) else value for key, value in example.items()}
            self._optimizer.state[share] = {**own, **{key: torch.zeros_like(share) for key in spread}}
            self._linked(parameters, share)
            for parameter in parameters:
                for key in spread:
                    set_state(parameter, saved[parameter][key].to(share.device), key)

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.engine.module.named_parameters()}

    def _parts(self) -> Iterator[tuple[list[nn.Parameter], torch.Tensor, dict[str, Any]]]:
        """Parameters, this process's share of all of them in one flat tensor, and their group in the optimizer."""
        own, groups = self.engine.optimizer, self._optimizer.param_groups
        if self.stage == 3:
            for number, share in enumerate(own.fp32_partitioned_groups_flat):
                yield own.fp16_groups[number], share, groups[own.sub_group_to_group_id[number]]
        else:
            yield from zip(own.bit16_groups, own.single_partition_of_fp32_groups, groups, strict=True)

    def _linked(self, parameters: list[nn.Parameter], share: torch.Tensor) -> dict[str, Any]:
        """The optimizer's state of a share, once ZeRO-2 knows which parts of it belong to which parameter."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.stage < 3:
            lazy_init_hp_params_optimizer_state(parameters, share, self._optimizer.state)
        return self._optimizer.state[share]


def is_spread(value: object, share: torch.Tensor) -> bool:
    """Whether a part of an optimizer's state has an element for each weight, unlike the number of steps."""
    return isinstance(value, torch.Tensor) and value.shape == share.shape


def to_cpu(value: Any) -> Any:
    """A copy on the CPU, if it is a tensor."""
    return value.detach().clone().cpu() if isinstance(value, torch.Tensor) else value


def set_state(parameter: nn.Parameter, value: torch.Tensor, key: str) -> None:
    """Put an optimizer's whole tensor of a parameter, the same on all processes, where the shares of it are."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if hasattr(parameter, "ds_id"):
        safe_set_local_optimizer_state(parameter, own_share(parameter, value), key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def put_value(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Copy a whole tensor, the same on all processes, into a parameter and into the optimizer's shares of it."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "ds_id"):
        safe_set_full_fp32_param(parameter, value.to(parameter.device))
        parameter.data.copy_(value)
        return
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
    safe_set_local_fp32_param(parameter, own_share(parameter, value.to(parameter.device)))


def own_share(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This process's share of a whole tensor under ZeRO-3, flat; the last one is filled up with zeros."""
    size, rank, count = parameter.ds_tensor.numel(), torch.distributed.get_rank(), torch.distributed.get_world_size()
    return nn.functional.pad(value.flatten(), (0, size * count - value.numel())).narrow(0, size * rank, size)


def is_held(parameter: torch.Tensor) -> bool:
    """Whether a parameter's weights are DeepSpeed's."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def check(accelerator: Accelerator) -> None:
    """Refuse what has not been run.

    Raises:
        InputError: naming it.
    """
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.hf_ds_config
    if config.get_value("zero_optimization.stage") not in (2, 3):
        raise InputError(f"zero_stage {plugin.zero_stage}: PPO runs under DeepSpeed's ZeRO-2 and ZeRO-3. Give one of "
                         "them.")  # fmt: skip
    for part in ("offload_optimizer", "offload_param"):
        device = config.get_value(f"zero_optimization.{part}.device", "none")
        if device != "none":
            raise InputError(f"{part}_device {device}: PPO has not been run with offloading. Give none.")
    for part in ("optimizer", "scheduler"):
        if part in config.config:
            raise InputError(f"DeepSpeed's configuration has {part!r}: PPO brings its own. Leave it out.")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise InputError(f"--mixed_precision {accelerator.mixed_precision}: under DeepSpeed PPO computes in bfloat16 "
                         "or float32. Give --bf16 true or false.")  # fmt: skip
    unset_hf_deepspeed_config()  # else models that are loaded from now on would be empty


def start_engine(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, micro_batch_size: int, max_grad_norm: float
) -> tuple[Zero, nn.Module, Optimizer]:
    """The engine, the model that it wraps, and its optimizer.

    Raises:
        InputError: for weights and optimizers for which ZeRO would compute something else.
    """
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise InputError("--load_in_4bit, --load_in_8bit: PPO has not been run with them under DeepSpeed. Leave them "
                         "out.")  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise InputError(f"--dtype: {name} is trained in {str(parameter.dtype).removeprefix('torch.')}. Under "
                             "DeepSpeed, give --dtype float32 --bf16 true.")  # fmt: skip
    if type(optimizer) not in (AdamW, Adam, SGD):
        raise InputError(f"--optim: {type(optimizer).__name__} has not been run under DeepSpeed. Give adamw_torch.")
    accelerator.gradient_accumulation_steps = 1  # PPO's own loop weights the microbatches
    config, half = accelerator.state.deepspeed_plugin.deepspeed_config, accelerator.mixed_precision == "bf16"
    config |= {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "train_batch_size": micro_batch_size * accelerator.num_processes,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        # autocast, as without DeepSpeed: its own bfloat16 would round the value head, log-probabilities and gradients
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": half, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
    engine, optimizer = accelerator.prepare(model, optimizer)
    config["bf16"] = {"enabled": half}  # for accelerate, whose mixed_precision reads it
    return Zero(engine), engine, optimizer


def split_value_groups(optimizer: Optimizer, value_parameters: set[nn.Parameter]) -> None:
    """Give the value function groups of its own, since the engine makes one flat tensor of a group."""
    groups = []
    for group in optimizer.param_groups:
        for own in (False, True):
            parameters = [parameter for parameter in group["params"] if (parameter in value_parameters) is own]
            groups += [{**group, "params": parameters, VALUE_GROUP: own}] if parameters else []
    optimizer.param_groups[:] = groups
