"""Mixed precision of forward passes, and float64 where the device has it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from transformers import PreTrainedModel


def exact(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, for sums of many numbers; in float32 on Apple's GPUs, which have no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def running_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums of probabilities up to each one, along the last dimension, in float64."""
    if values.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return whole_sums(values)
    return exact(values).cumsum(-1)


def whole_sums(values: torch.Tensor) -> torch.Tensor:
    """The same of whole multiples of 2⁻⁵²: CUDA adds in any order, which changes sums of floats alone."""
    return exact((exact(values) * 2**52).long().cumsum(-1)) / 2**52


def autocast(accelerator: Accelerator) -> AbstractContextManager[None]:
    """The run's autocast, also under DeepSpeed, where accelerate's does nothing."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision == "bf16":
        return torch.autocast(accelerator.device.type, dtype=torch.bfloat16)
    return accelerator.autocast()


@contextmanager
def mixed_precision(accelerator: Accelerator, model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """The run's autocast, for forward passes only: it caches casts of weights until it ends, but steps change weights.

    Args:
        model: not wrapped by DDP.
    """
    with autocast(accelerator), without_casts(accelerator, model):
        yield


def without_casts(accelerator: Accelerator, model: PreTrainedModel | PeftModel) -> AbstractContextManager[None]:
    """Skip PEFT's cast of each LoRA layer's input to float32 where autocast would undo it anyway."""
    undone = isinstance(model, PeftModel) and accelerator.mixed_precision in ("bf16", "fp16")
    return disable_input_dtype_casting(model, active=undone)
