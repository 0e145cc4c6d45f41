"""What a PPO run needs to go on: trained weights, optimizer, scheduler, random states, episode count.

A checkpoint is written aside and renamed, so it is complete or not there. Tensors are safetensors or are loaded with
`weights_only=True`; everything else is JSON.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.errors import InputError


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
    folder.mkdir(parents=True, exist_ok=True)
    save_file(trainable_state(model), folder / "trainable.safetensors")
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, folder / "optimizer.pt")
    (folder / "ppo_state.json").write_text(json.dumps(state), encoding="utf-8")


def save_random_state(folder: Path, rank: int) -> None:
    """Write this process's random state into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(random_state(), folder / f"random_state_{rank}.pt")


def load(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any, rank: int) -> dict[str, Any]:
    """Restore everything from `folder`; returns the JSON state."""
    saved = load_file(folder / "trainable.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name])
    states = torch.load(folder / "optimizer.pt", weights_only=True)
    optimizer.load_state_dict(states["optimizer"])
    scheduler.load_state_dict(states["scheduler"])
    file = folder / f"random_state_{rank}.pt"
    if not file.exists():
        raise InputError(f"--resume_from_checkpoint {folder}: was made with fewer processes. Use as many as it was.")
    restore_random_state(torch.load(file, weights_only=True))
    return json.loads((folder / "ppo_state.json").read_text(encoding="utf-8"))
