"""The processes that train together, as the steps of PPO see them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn


@dataclass(frozen=True)
class Processes:
    """How the processes of a run share sums and gradients. The defaults are those of a single process.

    Args:
        number: how many there are.
        sum: sums a tensor over all processes.
        max: the largest of each process's number.
        backward: computes the gradients of a loss.
        synchronized: context for a microbatch's forward and backward pass. Its argument says whether the microbatch is
            the minibatch's last one, after which the processes average their gradients.
    """

    number: int = 1
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
    max: Callable[[torch.Tensor], torch.Tensor] = lambda value: value
    backward: Callable[[torch.Tensor], None] = lambda loss: loss.backward()
    synchronized: Callable[[bool], AbstractContextManager[None]] = lambda last: nullcontext()

    @classmethod
    def of(cls, accelerator: Accelerator, model: nn.Module) -> "Processes":
        """The processes of an Accelerator, which has prepared `model`.

        With `sync_each_batch` of --accelerator_config they average after each microbatch.
        """
        always = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return cls(
            number=accelerator.num_processes,
            sum=lambda values: accelerator.reduce(values, "sum"),
            max=lambda value: accelerator.gather(value[None]).max(),
            backward=accelerator.backward,
            synchronized=lambda last: nullcontext() if last or always else accelerator.no_sync(model),
        )


ONE_PROCESS = Processes()
