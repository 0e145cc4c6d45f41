"""What a PPO run needs to go on: trained weights, optimizer, scheduler, random states, episode count.

A checkpoint is written aside and renamed, so it is complete or not there, and carries a digest of every file, so that a
damaged one is found. Tensors are safetensors or are loaded with `weights_only=True`; everything else is JSON.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments

from rlhf.errors import InputError
from rlhf.run.files import read_json, write_jsonl
from rlhf.run.folders import checkpoints, damage, write_digests


@contextmanager
def written_aside(folder: Path, main: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """Give a folder to write into, which becomes `folder` at the end.

    Args:
        main: whether this is the process that renames.
        wait: waits for all processes.
    """
    working = folder.with_name(f"writing-{folder.name}")
    if main and working.exists():
        shutil.rmtree(working)  # from a run that was killed while it wrote
    wait()
    working.mkdir(parents=True, exist_ok=True)
    yield working
    wait()
    if main:
        write_digests(working)
        if folder.exists():
            shutil.rmtree(folder)  # an earlier checkpoint of this step, from before a resume
        os.replace(working, folder)
    wait()


def drop_old(output_dir: str, limit: int | None, keep: str | None) -> None:
    """Delete the run's oldest checkpoints beyond `limit`, but never `keep`, the best one."""
    spared = Path(keep).name if keep else ""
    found = [path for path in checkpoints(output_dir) if path.name != spared]
    for old in found[:-limit] if limit else []:
        shutil.rmtree(old)


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes, by name, on the CPU."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def random_state() -> dict[str, Any]:
    """State of every random generator of this process."""
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
    """Undo `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def save(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any, state: dict[str, Any]) -> None:
    """Write the main process's part of a checkpoint into `folder`."""
    save_file(trainable_state(model), folder / "trainable.safetensors")
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, folder / "optimizer.pt")
    (folder / "ppo_state.json").write_text(json.dumps(state), encoding="utf-8")


def save_random_state(folder: Path, rank: int) -> None:
    """Write this process's random state into `folder`."""
    torch.save(random_state(), folder / f"random_state_{rank}.pt")


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy the trained tensors of a checkpoint into the model."""
    saved = load_file(folder / "trainable.safetensors")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if set(saved) != set(trainable):
        differ = sorted(set(saved) ^ set(trainable))
        raise InputError(f"--resume_from_checkpoint {folder}: trains other tensors than this run, like {differ[0]}.")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(saved[name])


def load(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any, rank: int) -> dict[str, Any]:
    """Restore everything from `folder`; returns the JSON state.

    Raises:
        InputError: if it is no PPO checkpoint, is damaged, or was made by fewer processes or another kind of run.
    """
    if not (folder / "ppo_state.json").exists():
        raise InputError(f"--resume_from_checkpoint {folder}: no PPO checkpoint (ppo_state.json is missing).")
    wrong = damage(folder)
    if wrong is not None:
        raise InputError(f"--resume_from_checkpoint {folder}: {wrong}. Resume from an earlier checkpoint.")
    file = folder / f"random_state_{rank}.pt"
    if not file.exists():
        raise InputError(f"--resume_from_checkpoint {folder}: was made with fewer processes. Use as many as it was.")
    load_weights(folder, model)
    states = torch.load(folder / "optimizer.pt", weights_only=True)
    optimizer.load_state_dict(states["optimizer"])
    scheduler.load_state_dict(states["scheduler"])
    restore_random_state(torch.load(file, weights_only=True))
    return read_json(folder / "ppo_state.json")


def save_samples(args: TrainingArguments, step: int, prefix: str, rows: list[dict[str, Any]]) -> None:
    """Write a table of completions to `<output_dir>/<prefix>_samples/<step>.jsonl`. Only the main process writes."""
    if args.should_save:
        write_jsonl(Path(args.output_dir) / f"{prefix}_samples" / f"{step}.jsonl", rows)
