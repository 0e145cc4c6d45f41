"""Float64 where the device has it."""

import torch


def exact(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, for sums of many numbers; in float32 on Apple's GPUs, which have no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)
