"""A run folder remembers its recipe and settings in `run.json`.

The same command resumes an interrupted run and does nothing for a finished one. A folder that holds another run is
refused. A run that failed before it made anything holds nothing, so that a corrected command runs in the same folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from rlhf.data.paths import RUN_FILE, behind_name, need_checkpoint, need_output_dir
from rlhf.errors import InputError, at_failure, full_disk
from rlhf.run.checkpoints import WRITING, checkpoints
from rlhf.run.files import digest, read_json, write_json
from rlhf.run.locks import LOCK_FILE, hold_folder
from rlhf.run.processes import main_process

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# what a run writes before its first result, and can write again
PASSING = ("eval_samples", "completions", "runs", "vllm_adapters", WRITING, "*.partial")
# Flags that may differ when a run is resumed: they don't change what it computes.
FREE_FLAGS = {
    "config", "output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo",
    "hub_strategy", "hub_revision", "hub_always_push", "report_to", "run_name", "disable_tqdm", "log_level",
    "logging_steps", "logging_strategy", "logging_dir", "save_total_limit", "save_steps", "save_strategy",
    "dataset_num_proc", "dataloader_num_workers", "world_size", "local_rank", "deepspeed", "fsdp", "fsdp_config",
    "project", "trackio_space_id", "logging_nan_inf_filter", "log_on_each_node", "accelerator_config", "ddp_backend",
    "rounds", "server_name", "server_port", "max_workers", "vllm_server_base_url", "vllm_server_host",
    "vllm_server_port", "vllm_server_timeout",
}  # fmt: skip
# Flags of which only counts whether they are given: the server may move, and its model has a name of its own.
ADDRESS_FLAGS = {"judge_base_url": "an address"}
# Flags that name local files or folders whose content belongs to the run.
CONTENT_FLAGS = (
    "model_name_or_path", "sft_model_path", "reward_model_path", "reward_funcs", "eval_reward_funcs", "dataset_name",
    "ptx_dataset_name", "templates", "models", "few_shot", "comparisons", "tokenizer_name", "base_config",
    "sft_config", "collect_config", "reward_config", "ppo_config", "compare_config", "judge_model_name_or_path",
    "rubric",
)  # fmt: skip
# what a finished run must still have, with and without LoRA; a large model's weights are several files
MODEL: dict[str, tuple[str, ...]] = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "model": ("config.json", "model*.safetensors"),
}
RESULTS: dict[str, dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("sft", "reward", "ppo", "rloo", "finetune", "pretrain"), MODEL),
    "tokenizer": {"model": ("tokenizer.json",)},
}


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

    Addresses are left out of them (ADDRESS_FLAGS).

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
                value = ADDRESS_FLAGS.get(field.name, value)
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


def _contents_of_defaults(flags: Collection[str], arguments: tuple[DataclassInstance, ...]) -> set[str]:
    """Keys of the settings for the content of these flags' defaults, which the flags themselves don't name there."""
    fields = [field for argument in arguments for field in dataclasses.fields(argument)]
    return {f"content of {field.default}" for field in fields if field.name in flags}


def start_run(
    recipe: str,
    output_dir: str,
    *arguments: DataclassInstance,
    more: bool = False,
    open_flags: Collection[str] = (),
    derived: Collection[str] = (),
) -> bool:
    """Claim the output folder for this run.

    The run's identity includes the content of local models and datasets. Other content under the same path makes
    another run; the same content under another path does not.

    Args:
        recipe: the recipe's `__file__`.
        arguments: its dataclasses of flags.
        more: there is more to do now than when the run was finished.
        open_flags: flags that may still change until the run is finished: what they decide is not yet done, or is done
            by stages that check their own settings.
        derived: names in the folder that the run can make again. They alone make no other run impossible.

    Returns:
        False if the folder holds this run, finished: there is nothing left to do.

    Raises:
        InputError: if the folder holds another run or foreign files, is used by another process or can't be written, if
            the run is finished and its model gone, or if --resume_from_checkpoint names no checkpoint of this recipe.
    """
    settings = settings_of(*arguments) | _contents(arguments)
    run: Run = {"recipe": Path(recipe).stem, "command": command(recipe), "settings": settings, "finished": False}
    asked = next((a.resume_from_checkpoint for a in arguments if hasattr(a, "resume_from_checkpoint")), None)
    need_checkpoint(asked, run["recipe"])
    folder = Path(output_dir)
    if not main_process():  # the main process checks and writes; the others only ask whether there is work
        return not is_finished(folder)
    old = _enter(folder)
    if old is not None:
        differ = _differences(old, run)
        if old["recipe"] == run["recipe"] and not differ:
            if old["finished"] and not more:
                _need_results(folder, run["recipe"])
                print(f"{output_dir}: already finished, nothing to do. Give another --output_dir to run again.")
            return more or not old["finished"]
        may_change = old["recipe"] == run["recipe"] and (more or not old["finished"])
        may_change &= set(differ) <= {*open_flags, *_contents_of_defaults(open_flags, arguments)}
        if not may_change and not _holds_nothing(folder, derived):
            same = old["recipe"] == run["recipe"]
            known = old["settings"]
            words = [f"content of {known[key]}" if known.get(key) == settings.get(key) else key for key in differ]
            raise InputError(
                f"--output_dir {output_dir}: holds another run ({old['recipe']}.py"
                + (f"; these differ: {', '.join(words[:4])}" if same else "")
                + "). Give another --output_dir, or the same settings to continue it."
            )
        if not may_change:
            _clear(folder, derived)
    with _refused_if_not_written(folder):
        write_json(folder / RUN_FILE, run)
    at_failure(lambda: _release(folder))
    return True


def _enter(folder: Path) -> Run | None:
    """Make the folder and lock it; the run that is in it.

    Raises:
        InputError: if it can't be written, holds foreign files or a checkpoint that is no folder, or is in use.
    """
    need_output_dir(str(folder))
    with _refused_if_not_written(folder):
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        # a disk that was full from the start leaves a part of run.json
        if names - {LOCK_FILE, f"{RUN_FILE}.partial"} and RUN_FILE not in names:
            raise InputError(f"--output_dir {folder}: not empty, and not a run of this project. Give a new folder.")
        for path in checkpoints(str(folder)):
            if not path.is_dir():
                raise InputError(f"--output_dir {folder}: {path.name} in it is not a folder. Remove it.")
        folder.mkdir(parents=True, exist_ok=True)
        hold_folder(folder)
    return read_run(folder)


def _need_results(folder: Path, recipe: str) -> None:
    """Refuse a finished run whose model is gone.

    Raises:
        InputError: naming the file.
    """
    kind = "adapter" if any(folder.glob("adapter_*")) else "model"
    needed = RESULTS.get(recipe, {}).get(kind, ())
    for name in needed:
        if not any(folder.glob(name)):
            raise InputError(
                f"--output_dir {folder}: this run is finished, but its {name.replace('*', '')} is missing. Restore the "
                "file, or give another --output_dir to run again."
            )


@contextmanager
def _refused_if_not_written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if full_disk(error) is not None:
            raise
        raise InputError(
            f"--output_dir {folder}: can't be written ({error.strerror}). Give a folder that you may write."
        ) from error


def _differences(old: Run, new: Run) -> list[str]:
    """The settings in which two runs differ. Of local files and folders the content counts, not the path."""
    one, other = (_by_content(json.loads(json.dumps(run["settings"]))) for run in (old, new))
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def _by_content(settings: Settings) -> Settings:
    """Settings with digests in place of the paths of local files and folders."""
    named: set[str] = set()

    def content(word: object) -> object:
        key = f"content of {word}"
        if key not in settings:
            return word
        named.add(key)
        label = str(word).partition("=")[0] if "=" in str(word) else ""
        return f"{label}={settings[key]}"

    replaced = {
        flag: [content(word) for word in value] if isinstance(value, list) else content(value)
        for flag, value in settings.items()
        if not flag.startswith("content of ")
    }
    return replaced | {key: settings[key] for key in settings.keys() - replaced.keys() - named}  # of defaults


def _holds_nothing(folder: Path, derived: Collection[str] = ()) -> bool:
    """Whether a run's folder holds no result yet, only what can be made again."""

    def nothing(path: Path) -> bool:
        if path.name in (RUN_FILE, LOCK_FILE) or any(path.match(name) for name in PASSING):
            return True
        return path.is_dir() and not path.is_symlink() and all(nothing(inner) for inner in path.iterdir())

    return all(path.name in derived or nothing(path) for path in folder.iterdir())


def _clear(folder: Path, derived: Collection[str] = ()) -> None:
    """Remove what an earlier run of other settings left. It holds no result, and would mix with this run's files."""
    for path in list(folder.iterdir()):
        if path.name in derived or any(path.match(name) for name in PASSING):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _release(folder: Path) -> None:
    """Give up the claim of a run that failed before it made anything, so that other settings can use the folder."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {RUN_FILE, LOCK_FILE}:
        for name in (RUN_FILE, LOCK_FILE):
            (folder / name).unlink(missing_ok=True)


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
                for one in value if isinstance(value, list) else [value]:
                    follow(one)
            commands.append(run["command"])
            seeds[Path(name).name] = run["settings"].get("seed", 42)  # 42 is transformers' default

    for folder in folders:
        follow(folder)
    return list(dict.fromkeys([*commands, command(sys.argv[0])])), seeds
