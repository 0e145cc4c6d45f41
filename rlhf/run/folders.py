"""A run folder remembers its recipe and settings in `run.json`.

The same command resumes an interrupted run and does nothing for a finished one. A folder that holds another run is
refused.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from rlhf.data.paths import behind_name, need_checkpoint
from rlhf.errors import InputError, at_failure
from rlhf.run.files import digest, read_json, write_json
from rlhf.run.processes import main_process

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from transformers import TrainingArguments

RUN_FILE = "run.json"
DIGEST_FILE = "digests.json"  # of a PPO checkpoint
# Flags that may differ when a run is resumed: they don't change what it computes.
FREE_FLAGS = {
    "config", "output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo",
    "hub_strategy", "hub_revision", "hub_always_push", "report_to", "run_name", "disable_tqdm", "log_level",
    "logging_steps", "logging_strategy", "logging_dir", "save_total_limit", "save_steps", "save_strategy",
    "dataset_num_proc", "dataloader_num_workers", "world_size", "local_rank", "deepspeed", "fsdp", "fsdp_config",
    "project", "trackio_space_id", "logging_nan_inf_filter", "log_on_each_node", "accelerator_config", "ddp_backend",
    "rounds", "server_name", "server_port", "max_workers",
}  # fmt: skip
# Flags that name local files or folders whose content belongs to the run.
CONTENT_FLAGS = (
    "model_name_or_path", "sft_model_path", "reward_model_path", "reward_funcs", "eval_reward_funcs", "dataset_name",
    "ptx_dataset_name", "templates", "models", "tokenizer_name", "base_config", "sft_config", "collect_config",
    "reward_config", "ppo_config", "compare_config",
)  # fmt: skip


Settings = dict[str, Any]  # text, numbers, bools and lists of them, by flag


class Pushed(TypedDict):
    """Where a run was pushed."""

    name: str  # of the Hub repo
    revision: str  # the commit
    branch: str | None  # None: main


class _Claim(TypedDict):
    recipe: str  # name of the file, without .py
    command: str  # as `command` gives it
    settings: Settings  # as `settings_of` gives them, and digests of local files under "content of <name>"
    finished: bool


class Run(_Claim, total=False):
    """Content of run.json."""

    metrics: dict[str, Any]  # of a finished run
    hub: Pushed


def settings_of(*arguments: DataclassInstance) -> Settings:
    """The settings that decide what a run computes: those that differ from their class's default, without FREE_FLAGS.

    Args:
        arguments: dataclasses of flags.
    """
    settings: Settings = {}
    for argument in arguments:
        for field in dataclasses.fields(argument):
            if not field.init or field.name in FREE_FLAGS or field.name.startswith("_"):
                continue
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            value = getattr(argument, field.name)
            if value != default:
                settings[field.name] = value if isinstance(value, str | int | float | bool | list) else str(value)
    return settings


def _contents(arguments: tuple[DataclassInstance, ...]) -> dict[str, str]:
    """Digests of the local files and folders that the arguments name."""
    contents = {}
    for flag in CONTENT_FLAGS:
        # defaults count too, though the settings leave them out: their content may change
        given: str | list[str] = next((getattr(a, flag) for a in arguments if getattr(a, flag, None)), [])
        for name in [given] if isinstance(given, str) else given:
            path = behind_name(str(name))
            if path.exists():
                contents[f"content of {name}"] = digest(str(path))
    return contents


def start_run(recipe: str, output_dir: str, *arguments: DataclassInstance, more: bool = False) -> bool:
    """Claim the output folder for this run.

    The run's identity includes the content of local models and datasets. Other content under the same path makes
    another run.

    Args:
        recipe: the recipe's `__file__`.
        arguments: its dataclasses of flags.
        more: there is more to do now than when the run was finished.

    Returns:
        False if the folder holds this run, finished: there is nothing left to do.

    Raises:
        InputError: if the folder holds another run or foreign files, or --resume_from_checkpoint names no folder.
    """
    settings = settings_of(*arguments) | _contents(arguments)
    asked = next((a.resume_from_checkpoint for a in arguments if hasattr(a, "resume_from_checkpoint")), None)
    need_checkpoint(asked)
    run: Run = {"recipe": Path(recipe).stem, "command": command(recipe), "settings": settings, "finished": False}
    folder = Path(output_dir)
    if not main_process():  # the main process checks and writes; the others only ask whether there is work
        return not is_finished(folder)
    if old := read_run(folder):
        if old["recipe"] != run["recipe"] or old["settings"] != json.loads(json.dumps(settings)):
            differ = sorted(
                key for key in {*old["settings"], *settings} if old["settings"].get(key) != settings.get(key)
            )
            raise InputError(
                f"--output_dir {output_dir}: holds another run ({old['command'].split()[2]}"
                + (f"; these differ: {', '.join(differ[:4])}" if old["recipe"] == run["recipe"] else "")
                + "). Give another --output_dir, or the same settings to continue it."
            )
        if old["finished"] and not more:
            print(f"{output_dir}: already finished, nothing to do. Give another --output_dir to run again.")
        return more or not old["finished"]
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--output_dir {output_dir}: not empty, and not a run of this project. Give a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_FILE, run)
    at_failure(lambda: _release(folder))
    return True


def _release(folder: Path) -> None:
    """Give up the claim of a run that failed before it made anything, so that other settings can use the folder."""
    if folder.is_dir() and [path.name for path in folder.iterdir()] == [RUN_FILE]:
        (folder / RUN_FILE).unlink()


def finish_run(output_dir: str, metrics: Mapping[str, object]) -> None:
    """Mark the run as finished and keep its final metrics. Only the main process writes."""
    if main_process():
        file = Path(output_dir) / RUN_FILE
        write_json(file, {**read_json(file), "finished": True, "metrics": metrics})


def read_run(folder: Path) -> Run | None:
    """Content of a folder's run.json, or None if there is none.

    Raises:
        InputError: if it is damaged.
    """
    run = read_json(folder / RUN_FILE, recipe=str, settings=dict, finished=bool)
    if run is not None:
        run.setdefault("command", f"accelerate launch recipes/{run['recipe']}.py")
    return run


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds a finished run."""
    run = read_run(folder)
    return run is not None and run["finished"]


def note_in_run(output_dir: str, key: str, value: object) -> None:
    """Add an entry to run.json."""
    file = Path(output_dir) / RUN_FILE
    write_json(file, {**read_json(file), key: value})


def checkpoints(output_dir: str) -> list[Path]:
    """The run's checkpoint-<step> folders, oldest first. Other names, such as checkpoint-best, are the user's own."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(training_args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the one that `--resume_from_checkpoint` names, else the run's newest whole one.

    Raises:
        InputError: if `--resume_from_checkpoint` names no folder.
    """
    asked = training_args.resume_from_checkpoint
    if asked in (False, "false", "False"):  # in YAML it is a bool
        return None
    if asked and asked not in ("true", "True", True):
        need_checkpoint(asked)
        return str(Path(asked).expanduser())
    for folder in reversed(checkpoints(training_args.output_dir)):
        # both trainers write their state last: a checkpoint without it is incomplete
        whole = (folder / "trainer_state.json").exists() or (folder / "ppo_state.json").exists()
        wrong = damage(folder) if whole else "incomplete"
        if main_process():
            print(f"Resuming from {folder}." if wrong is None else f"Warning: {folder} is passed over: {wrong}.")
        if wrong is None:
            return str(folder)
    return None


def write_digests(folder: Path) -> None:
    """Write the SHA-256 of every file in `folder` beside them, for `damage`."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    (folder / DIGEST_FILE).write_text(json.dumps({path.name: digest(str(path)) for path in files}, indent=2))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. transformers' checkpoints have no digests and pass."""
    try:
        digests = read_json(folder / DIGEST_FILE) or {}
    except ValueError:
        return f"{DIGEST_FILE} is unreadable"
    for name, expected in digests.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if digest(str(folder / name)) != expected:
            return f"{name} is damaged"
    return None


def command(recipe: str) -> str:
    """The command line of this process, without tokens. Paths outside of the project are cut to their last name."""

    def public(word: str) -> str:
        flag, equals, value = word.rpartition("=")
        return flag + equals + (Path(value).name if value.startswith(("/", "~", "..")) else value)

    words, hidden = [], False
    for word in sys.argv[1:]:
        is_token = word.split("=")[0].replace("-", "_") == "__hub_token"
        words.append("..." if hidden else "--hub_token=..." if is_token and "=" in word else public(word))
        hidden = is_token and "=" not in word
    return " ".join(["accelerate launch", "/".join(Path(recipe).resolve().parts[-2:]), *words])


def history_of(folders: list[str]) -> tuple[list[str], dict[str, int]]:
    """The commands and seeds that made these run folders, and the folders that those were made from.

    Returns:
        the commands in order, the current one last; and the seed of each run, by folder name.
    """
    commands: list[str] = []
    seeds: dict[str, int] = {}

    def follow(name: object) -> None:
        if isinstance(name, str) and name and (run := read_run(Path(name))):
            for value in run["settings"].values():
                follow(value)
            commands.append(run["command"])
            seeds[Path(name).name] = run["settings"].get("seed", 42)  # 42 is transformers' default

    for folder in folders:
        follow(folder)
    return list(dict.fromkeys([*commands, command(sys.argv[0])])), seeds
