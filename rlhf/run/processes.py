"""This process: its rank, its cores, its arithmetic.

torch is imported in functions: the command line is read before it (see rlhf/run/arguments.py).
"""

import os
from pathlib import Path

import psutil

from rlhf.errors import InputError


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16."""
    import torch

    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def use_all_cores() -> None:
    """Without a GPU, undo the single thread that `accelerate launch` and torchrun give a process by default."""
    import torch

    launched = "ACCELERATE_USE_CPU" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.accelerator.is_available():
        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):  # taskset, Slurm and containers give a process some of them
            cores = min(cores, len(os.sched_getaffinity(0)))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def need_one_process(recipe: str) -> None:
    """Refuse a launch on several processes, which would all do and write the same.

    Raises:
        InputError: if there is more than one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"--num_processes: {Path(recipe).name} runs in one process. Launch it with --num_processes 1.")


def main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
