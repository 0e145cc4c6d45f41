"""What the card can do: the rate of a large matrix product in bfloat16, and of a large copy."""

from collections.abc import Callable
from typing import Any

import torch
from bench_ppo import clock
from piece import DEVICE, answer


def matmul_tflops(size: int, repeats: int = 10) -> float:
    """10^12 floating-point operations per second of bfloat16 products of (size, size) matrices."""
    one, two = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    for _ in range(3):
        one @ two
    start = clock()
    for _ in range(repeats):
        one @ two
    return 2 * size**3 * repeats / (clock() - start) / 1e12


def copy_gb(size: int, repeats: int = 10) -> float:
    """10^9 bytes per second that a copy on the device reads and writes."""
    source = torch.randn(size, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    start = clock()
    for _ in range(repeats):
        target.copy_(source)
    return 2 * 4 * size * repeats / (clock() - start) / 1e9


def measure(tiny: bool, keep: Callable[[dict[str, Any]], None]) -> None:
    keep({"bf16_matmul_tflops": round(matmul_tflops(512 if tiny else 8192), 4 if tiny else 0)})
    keep({"copy_gb_per_second": round(copy_gb(10**6 if tiny else 10**9), 1)})


if __name__ == "__main__":
    answer(measure)
