"""The models of a plan as fake tensors, and what each GPU holds of them in a phase."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from rlhf.planning.launch import Launch
from rlhf.planning.plan import Need
from rlhf.planning.trace import (
    ACTIVATIONS,
    ADAPTERS,
    CACHE,
    CASTS,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    WEIGHTS,
    Memory,
    Trace,
    without_data,
)

GATHERED, BUCKETS = "gathered by FSDP2", "DDP's buckets"
ROLES = (WEIGHTS, ADAPTERS, GRADIENTS, BUCKETS, OPTIMIZER, GATHERED, CASTS, ACTIVATIONS, LOGITS, CACHE)


class Stage:
    """Models on which passes can be tried, inside a FakeTensorMode.

    Args:
        trained: the module that is trained, on the meta device.
        split: of modules that FSDP2 spreads, the models whose layers it gathers one at a time. They are within
            `trained`, or frozen beside it.
        whole: frozen models that every GPU has a copy of.
        vocabulary: width of the logits.
        args: the run's, for its optimizer.
    """

    def __init__(
        self,
        trained: nn.Module,
        split: list[nn.Module],
        whole: list[nn.Module],
        vocabulary: int,
        args: TrainingArguments,
        launch: Launch,
    ) -> None:
        self.trained, self.split, self.vocabulary, self.launch = trained, split, vocabulary, launch
        everything = nn.ModuleList([trained, *split, *whole])
        casts = launch.sharded and launch.mixed is not None
        without_data(everything, torch.float32 if casts else None)  # accelerate does so before it shards
        self.names = {id(parameter): name for name, parameter in everything.named_parameters()}
        spread = {id(parameter) for module in [trained, *split] for parameter in module.parameters()}
        self.everything = list(everything.parameters())
        self.copied = [parameter for parameter in self.everything if id(parameter) not in spread]
        self.buffers = list(everything.buffers())
        self.optimizer = make_optimizer(trained, args)
        self.state = state_of(self.optimizer)
        self.stored = {id(p): p.numel() * p.element_size() for p in self.everything}
        if casts:
            for parameter in self.everything:
                if id(parameter) in spread:
                    parameter.data = parameter.data.to(launch.mixed)

    def autocast(self) -> AbstractContextManager[object]:
        """The run's mixed precision. FSDP2 casts the weights themselves."""
        if self.launch.mixed is None or self.launch.sharded:
            return nullcontext()
        return torch.autocast("cpu", self.launch.mixed)

    @contextmanager
    def tracing(self) -> Iterator[Trace]:
        """Trace what a phase makes beside the weights and, unless they are spread, the optimizer's state."""
        with Trace(self.vocabulary) as trace:
            trace.hold(self.buffers, WEIGHTS)
            for parameter in self.everything:
                trace.hold([parameter], self._role(parameter))
            if not self.launch.sharded:
                trace.hold(self.state, OPTIMIZER)
            handles = [
                parameter.register_post_accumulate_grad_hook(lambda p: trace.mark([p.grad], GRADIENTS))
                for parameter in self.everything
                if parameter.requires_grad
            ]
            yield trace
            for handle in handles:
                handle.remove()

    def _role(self, parameter: nn.Parameter) -> str:
        return ADAPTERS if ".lora_" in self.names[id(parameter)] else WEIGHTS

    def need(
        self, run: Callable[[Trace], object], trains: bool = True, gathers_all: bool = False, accumulates: bool = False
    ) -> Need:
        """Bytes by role on each GPU at the peak of a phase, and its operations.

        Args:
            run: makes the phase's passes.
            trains: the phase computes gradients.
            gathers_all: under FSDP2, it has all weights at once, not those of two layers.
            accumulates: gradients of several passes are added up before they are averaged over processes.
        """
        with self.tracing() as trace:
            run(trace)
        if self.launch.sharded:
            passing = trace.peak(leave_out=(WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER))
            spread = self._spread(trains, gathers_all, accumulates and self.launch.accumulates)
            return Need(passing | spread, trace.operations)
        memory = trace.peak()
        if self.launch.processes > 1:  # DDP keeps a second copy of the gradients, by buckets
            memory[BUCKETS] = float(sum(self.stored[id(p)] for p in self.everything if p.requires_grad))
        return Need(memory, trace.operations)

    def _spread(self, trains: bool, gathers_all: bool, accumulates: bool) -> Memory:
        """What FSDP2 holds: shards, and what is gathered at a time."""
        share = 1 / self.launch.processes
        memory: Memory = {WEIGHTS: 0.0, ADAPTERS: 0.0}
        copied = {id(parameter) for parameter in self.copied}
        for parameter in self.everything:
            stored = self.stored[id(parameter)]
            memory[self._role(parameter)] += stored * (1 if id(parameter) in copied else share)
        memory[OPTIMIZER] = sum(tensor.numel() * tensor.element_size() for tensor in self.state) * share
        trained = [parameter for parameter in self.everything if parameter.requires_grad]
        if trains:
            # without a sum over processes, gradients are not spread
            memory[GRADIENTS] = (
                float(sum(p.numel() * p.element_size() for p in trained))
                if accumulates
                else sum(self.stored[id(p)] for p in trained) * share
            )
        memory[GATHERED] = float(sum(self._gathered(model, gathers_all, trains) for model in self.split))
        return memory

    def _gathered(self, model: nn.Module, everything: bool, trains: bool) -> int:
        """Bytes of whole weights: those outside of layers, two layers at a time, and one layer's gradients, if any."""
        sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
        if everything or (trains and not self.launch.reshards):
            return sum(sizes.values())
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        names = getattr(base, "_no_split_modules", None) or []
        layers = [[*module.parameters()] for module in base.modules() if type(module).__name__ in names]
        inside = {id(parameter) for layer in layers for parameter in layer}
        largest = max((sum(sizes[id(p)] for p in layer) for layer in layers), default=0)
        gradients = max((sum(sizes[id(p)] for p in layer if p.requires_grad) for layer in layers), default=0)
        outside = sum(size for key, size in sizes.items() if key not in inside)
        return outside + 2 * largest + (gradients if trains else 0)


def make_optimizer(trained: nn.Module, args: TrainingArguments) -> Optimizer:
    """The run's optimizer over a module, with its state."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, trained)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = kind(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def state_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """The tensors that an optimizer keeps for its parameters."""
    return [
        tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, torch.Tensor)
    ]
