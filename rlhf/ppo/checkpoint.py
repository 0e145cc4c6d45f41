"""PPO checkpoints: trained weights, optimizer, scheduler, random states and the progress of a run.

rlhf/run/checkpoints.py writes it as a whole, with digests. Tensors are safetensors or are loaded with
`weights_only=True`; the rest is JSON.
"""

import json
import random
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainingArguments

from rlhf.data.datasets import Row
from rlhf.errors import InputError
from rlhf.models.adapters import REWARD
from rlhf.ppo.model import PolicyAndValue
from rlhf.ppo.sharding import load_optimizer_state, put
from rlhf.rewards import RewardScale
from rlhf.run.checkpoints import damage
from rlhf.run.files import read_json, write_jsonl


class Progress(TypedDict):
    """How far a run is: the content of ppo_state.json."""

    step: int  # updates so far
    episode: int  # completions so far
    log: list[dict[str, Any]]  # the Trainer's log_history
    reward_scale: tuple[float, float] | None  # mean and standard deviation of the first batch's scores
    ensemble_scales: list[list[RewardScale] | None]  # likewise of each ensemble, for each of its models
    kl_coef: float
    remarked: dict[str, int]  # the update of the monitor's last remark, by rule
    best: tuple[float | None, int | None, str | None]  # metric, step and name of the best checkpoint
    metrics: dict[str, float]  # of the last update
    reward_metrics: dict[str, list[float]]  # what reward functions logged since the last log
    callbacks: dict[str, Any]  # the state of each callback that has one
    value_adapter: str | None  # which adapter the value function reads (PolicyAndValue)


def random_state() -> dict[str, Any]:
    """The state of every random generator of this process."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every random generator to a state from `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(
    folder: Path,
    weights: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    scheduler: LRScheduler,
    progress: Progress,
) -> None:
    """Write the main process's part of a checkpoint into `folder`.

    Args:
        weights: what `gather` returns.
        optimizer: what `optimizer_state` returns.
    """
    save_file(weights, folder / "trainable.safetensors")
    torch.save({"optimizer": optimizer, "scheduler": scheduler.state_dict()}, folder / "optimizer.pt")
    (folder / "ppo_state.json").write_text(json.dumps(progress), encoding="utf-8")


def save_random_state(folder: Path, rank: int) -> None:
    """Write this process's random state into `folder`."""
    torch.save(random_state(), folder / f"random_state_{rank}.pt")


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy the trained tensors of a checkpoint into the model.

    Raises:
        InputError: if the checkpoint holds other tensors than those the model trains.
    """
    saved = load_file(folder / "trainable.safetensors")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = {(name, *getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trainable.items()}
    differ = sorted(name for name, *_ in shapes ^ {(name, *tensor.shape) for name, tensor in saved.items()})
    if differ:
        raise InputError(f"--resume_from_checkpoint {folder}: trains other tensors than this run, like {differ[0]}.")
    for name, parameter in trainable.items():
        put(parameter, saved[name])


def load_checkpoint(
    folder: Path, model: PolicyAndValue, optimizer: Optimizer, scheduler: LRScheduler, rank: int
) -> Progress:
    """Restore model, optimizer, scheduler and this process's random state from a checkpoint.

    Raises:
        InputError: if `folder` is not a PPO checkpoint, is damaged, or was made by another number of processes or
            another kind of run.
    """
    if not (folder / "ppo_state.json").exists():
        raise InputError(f"--resume_from_checkpoint {folder}: not a PPO checkpoint (ppo_state.json is missing).")
    wrong = damage(folder, foreign=True)
    if wrong is not None:
        raise InputError(f"--resume_from_checkpoint {folder}: {wrong}. Resume from an earlier checkpoint.")
    made_by, processes = len(list(folder.glob("random_state_*.pt"))), PartialState().num_processes
    if made_by != processes:
        raise InputError(f"--resume_from_checkpoint {folder}: was made by {made_by} processes, not {processes}. Use "
                         "the same number.")  # fmt: skip
    progress: Progress = read_json(folder / "ppo_state.json")
    # a head on the trunk and one on the reward adapter have equal names and shapes; earlier versions had the first
    if REWARD in (progress.get("value_adapter"), model.value_adapter) and (
        progress.get("value_adapter") != model.value_adapter
    ):
        before = "reward" if progress.get("value_adapter") == REWARD else "head"
        raise InputError(f"--resume_from_checkpoint {folder}: has another value function. Give --value_function "
                         f"{before}, or another --output_dir for a new run.")  # fmt: skip
    load_weights(folder, model)
    states = torch.load(folder / "optimizer.pt", weights_only=True)
    load_optimizer_state(model, optimizer, states["optimizer"])
    scheduler.load_state_dict(for_groups(states["scheduler"], len(optimizer.param_groups)))
    restore_random_state(torch.load(folder / f"random_state_{rank}.pt", weights_only=True))
    return progress


def for_groups(schedule: dict[str, Any], count: int) -> dict[str, Any]:
    """A scheduler's state for an optimizer with `count` groups: DeepSpeed's may have more than others, of one rate.

    >>> for_groups({"base_lrs": [0.1, 0.1], "last_epoch": 3}, 3)
    {'base_lrs': [0.1, 0.1, 0.1], 'last_epoch': 3}
    """
    if len(schedule.get("base_lrs", [])) in (0, count):
        return schedule
    per_group = ("base_lrs", "_last_lr", "lr_lambdas")
    return {key: value[:1] * count if key in per_group else value for key, value in schedule.items()}


def save_samples(args: TrainingArguments, step: int, prefix: str, rows: list[Row]) -> None:
    """Write a table of completions to `<output_dir>/<prefix>_samples/<step>.jsonl`. Only the main process writes."""
    if args.should_save:
        write_jsonl(Path(args.output_dir) / f"{prefix}_samples" / f"{step}.jsonl", rows)
