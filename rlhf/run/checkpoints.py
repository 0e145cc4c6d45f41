"""The checkpoints of a run: which are whole, which one to resume from, which are deleted.

A checkpoint is written into a temporary folder and renamed, so it is either complete or absent. It holds a digest of
every file, so damage is noticed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.data.paths import need_checkpoint
from rlhf.errors import InputError
from rlhf.run.files import digest, read_json, write_json
from rlhf.run.processes import main_process

if TYPE_CHECKING:
    from transformers import TrainingArguments

DIGEST_FILE = "digests.json"
WRITING = "writing"  # folder of a checkpoint that is being written
RANDOM_STATES = ("rng_state*.pth", "random_state_*.pt")  # of a Trainer and of PPO, a file for each process
OPTIMIZERS = ("optimizer*", "global_step*", "pytorch_model_fsdp*")  # of a Trainer and PPO, of DeepSpeed, of FSDP


def checkpoints(output_dir: str) -> list[Path]:
    """The run's checkpoint-<step> folders, oldest first. Other names, such as checkpoint-best, are the user's own."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step of a folder checkpoint-<step>."""
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoint_folder(args: TrainingArguments, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return Path(args.output_dir) / f"checkpoint-{step}"


def last_checkpoint(training_args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the one that `--resume_from_checkpoint` names, else the run's newest whole one.

    Raises:
        InputError: if `--resume_from_checkpoint` names no checkpoint or a damaged one, if the run has checkpoints and
            none is whole, or if the checkpoint was made by another number of processes.
    """
    asked = training_args.resume_from_checkpoint
    if asked in (False, "false", "False"):  # in YAML it is a bool
        return None
    if asked and asked not in ("true", "True", True):
        need_checkpoint(asked)
        folder = Path(asked).expanduser()
        if wrong := damage(folder, foreign=True):
            raise InputError(f"--resume_from_checkpoint {asked}: {wrong}. Resume from an earlier checkpoint.")
        _need_same_processes(folder)
        return str(folder)
    found = checkpoints(training_args.output_dir)
    for folder in reversed(found):
        wrong = damage(folder)
        if main_process():
            print(f"Resuming from {folder}." if wrong is None else f"Warning: {folder} is passed over: {wrong}.")
        if wrong is None:
            _need_same_processes(folder)
            return str(folder)
    if found:
        raise InputError(
            f"--output_dir {training_args.output_dir}: none of its {len(found)} checkpoints is whole "
            f"({found[0].name}: {wrong}). Give --resume_from_checkpoint false to train from the beginning, or another "
            "--output_dir."
        )
    return None


def _need_same_processes(folder: Path) -> None:
    """Refuse to resume with more or fewer processes: batches, schedule and random numbers would be others.

    Raises:
        InputError: naming both numbers.
    """
    made_by = sum(1 for pattern in RANDOM_STATES for _ in folder.glob(pattern))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if made_by != processes:
        raise InputError(
            f"--num_processes {processes}: {folder} was made by {made_by}, whose batches were others. Launch with "
            f"--num_processes {made_by}, or give another --output_dir."
        )


def write_digests(folder: Path) -> None:
    """Write the SHA-256 of every file in `folder` beside them, for `damage`."""
    write_json(folder / DIGEST_FILE, {name: digest(str(folder / name)) for name in _files(folder)})


def _files(folder: Path) -> list[str]:
    """The names of a checkpoint's files, without that of the digests and hidden ones, which file systems make."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return [path.relative_to(folder).as_posix() for path in paths if path != folder / DIGEST_FILE]


def damage(folder: Path, foreign: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, or None.

    Args:
        foreign: it may be made by another program, without digests.
    """
    try:
        digests = read_json(folder / DIGEST_FILE)
    except (ValueError, OSError):
        return f"{DIGEST_FILE} is unreadable"
    if not isinstance(digests, dict) and not (digests is None and foreign):
        return f"{DIGEST_FILE} is missing"
    for name, expected in (digests or {}).items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if digest(str(folder / name)) != expected:
            return f"{name} is damaged"
    weights = [name for name in _files(folder) if name.endswith((".safetensors", ".pt", ".pth", ".bin"))]
    unknown = [name for name in weights if digests is not None and name not in digests]
    if unknown:  # it may have been exchanged together with its entry
        return f"{DIGEST_FILE} lacks {unknown[0]}"
    for patterns, what in ((OPTIMIZERS, "state of the optimizer"), (RANDOM_STATES, "random state")):
        if not any(found for pattern in patterns for found in folder.glob(pattern)):
            return f"it has no {what}"
    return None


@contextmanager
def atomic_folder(folder: Path, main: bool, wait: Callable[[], object]) -> Iterator[Path]:
    """Give all processes a temporary folder to write into, and rename it to `folder` at the end, with digests.

    Args:
        main: whether this process renames.
        wait: waits for all processes.
    """
    working = folder.parent / WRITING / folder.name
    if main:
        shutil.rmtree(working.parent, ignore_errors=True)  # left by a run that was killed while it wrote
    wait()
    working.mkdir(parents=True, exist_ok=True)
    try:
        yield working
        wait()
        if main:
            write_digests(working)
            if folder.exists():
                shutil.rmtree(folder)  # an earlier checkpoint of this step, from before a resume
            os.replace(working, folder)
    finally:
        if main:
            shutil.rmtree(working.parent, ignore_errors=True)  # on a full disk it would take space
    wait()


def delete_old_checkpoints(output_dir: str, limit: int | None, step: int, best: str | None) -> None:
    """Delete the oldest checkpoints of a run, as `save_total_limit` of transformers does.

    Args:
        limit: how many stay, the best one among them; at least the newest and the best one stay.
        step: of the newest one. Later ones were passed over when the run was resumed, and don't count.
    """
    if not limit or limit < 0:
        return
    found = [path for path in checkpoints(output_dir) if step_of(path) <= step]
    newest, spared = found[-limit:], Path(best).name if best else ""
    if spared and spared not in (path.name for path in newest):
        newest = found[-max(1, limit - 1) :]
    for old in found:
        if old not in newest and old.name != spared:
            shutil.rmtree(old)
