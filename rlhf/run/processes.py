"""This process: its rank, its cores, its arithmetic.

torch is imported in functions: the command line is read before it (see rlhf/run/arguments.py).
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from rlhf.errors import PARENT_PIPE, InputError

PRECISIONS = ("no", "fp16", "bf16", "fp8")  # accelerate's
PATIENCE = 20  # seconds that an interrupted process has to end by itself


def end_with_parent() -> None:
    """Have this process end when its parent does, however that is: nobody would know that it still writes.

    That is for the stages of a recipe, and for what `accelerate launch` and torchrun start, which hand no signal on.
    """
    if PARENT_PIPE in os.environ:
        pipe = int(os.environ[PARENT_PIPE])
        os.set_inheritable(pipe, False)
        # nothing is ever written: reading returns when the other end is closed
        threading.Thread(target=_end_after, args=(lambda: os.read(pipe, 1), 0), daemon=True).start()
    elif _launched():
        parent = os.getppid()

        def wait() -> None:
            while os.getppid() == parent:
                time.sleep(1)

        threading.Thread(target=_end_after, args=(wait, PATIENCE), daemon=True).start()


def _launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    try:
        words = psutil.Process(os.getppid()).cmdline()[:4]
    except psutil.Error:
        return False
    names = {Path(word).name for word in words}
    return bool(names & {"accelerate", "accelerate-launch", "torchrun", "torch.distributed.run"})


def _end_after(wait: Callable[[], object], patience: float) -> None:
    wait()
    if patience:
        os.kill(os.getpid(), signal.SIGTERM)  # what is half written is removed
        time.sleep(patience)
    os._exit(128 + signal.SIGTERM)


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


def check_environment() -> None:
    """Refuse variables of `accelerate launch` and torchrun that can't be right. Those libraries would name none.

    Raises:
        InputError: naming the variable.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        found = os.environ.get(name, "0")
        if not found.strip().removeprefix("-").isdecimal():
            os.environ.pop(name)  # else the error itself can't be said: `main_process` reads it
            raise InputError(f"{name}={found}: this variable needs a whole number. Unset it; a launcher sets it.")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision.lower() not in PRECISIONS:
        raise InputError(f"ACCELERATE_MIXED_PRECISION={precision}: give one of {', '.join(PRECISIONS)}, or unset it.")


def need_one_process(recipe: str) -> None:
    """Refuse a launch on several processes, which would all do and write the same.

    Raises:
        InputError: if there is more than one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"--num_processes: {Path(recipe).name} runs in one process. Launch it with --num_processes 1.")


def main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
