"""Recipes as stages of another one, each in a process of its own.

Importing torch and transformers takes several seconds of a core, as long as a small model takes to train. A fork server
imports them once. Each stage is forked from it and runs its recipe's file as `__main__`.

A stage ends with its parent, however that ends: nobody else would know that it still writes.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datasets import fingerprint

from rlhf.data.paths import check_paths
from rlhf.errors import PARENT_PIPE, InputError, say_if
from rlhf.run.arguments import parse
from rlhf.run.declarations import argument_names
from rlhf.run.folders import is_finished
from rlhf.run.processes import PATIENCE

# what most recipes import; accelerate imports the last one where it is installed
LIBRARIES = (
    "torch", "transformers.trainer", "trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "peft",
    "datasets", "evaluate", "accelerate", "matplotlib.figure", "scipy.stats", "sklearn.metrics",
    "deepspeed",
)  # fmt: skip
FROZEN = "rlhf.run.frozen"  # imported behind them
CONTINUE = "Fix the problem and run the same command again to continue."


def run_stage(script: Path, config: str, output_dir: Path, flags: dict[str, Any]) -> bool:
    """Run a recipe on one process. It skips what is finished and resumes what was interrupted.

    Args:
        script: the recipe's file.
        config: its YAML file.
        flags: a list is several words; None is left out.

    Returns:
        whether the stage is finished; False if people have more to compare.

    Raises:
        InputError: if it fails; its own message is above.
        SystemExit: if it refuses its input. Its own line says why.
    """
    words = [str(script), *_words(config, output_dir, flags)]
    print(f"\n=== {output_dir}: {_short(script)}", flush=True)
    code = _wait(_context().Process(target=_run, args=(words,)))
    if code == 2:
        sys.exit(2)
    if code:
        raise InputError(f"{output_dir}: {_short(script)} ended with exit code {code}. {CONTINUE}")
    return is_finished(output_dir)


def check_stage(script: Path, flag: str, config: str, output_dir: Path, flags: dict[str, Any]) -> tuple[Any, ...]:
    """Refuse what a stage's own parser would refuse, before any stage runs.

    Files and models are looked for too, but for those in `flags`, which earlier stages may have to make first.

    Args:
        script, config, output_dir, flags: as `run_stage` gets them.
        flag: the one that names `config`.

    Returns:
        the stage's dataclasses of flags.

    Raises:
        InputError: naming the flag, the file and the key.
    """
    try:
        names = runpy.run_path(str(script))
        types = [names[name] for name in argument_names(str(script))]
        parsed = parse(str(script), *types, args=_words(config, output_dir, flags))
        if any(getattr(part, "plan", False) for part in parsed):
            raise InputError("plan true: trains nothing, and the next stage needs what this one trains. Leave it out.")
        values = {name: value for part in parsed for name, value in vars(part).items() if name not in flags}
        check_paths(values, {})
    except InputError as error:
        said = str(error).removeprefix("--config ").removeprefix(f"{config}: ")
        raise InputError(f"{flag} {config}: {said}") from error
    return parsed


def _words(config: str, output_dir: Path, flags: dict[str, Any]) -> list[str]:
    words = ["--config", config, "--output_dir", str(output_dir)]
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return words


def _context() -> Any:
    """How processes are started: forked from a server that has imported the libraries once.

    On a machine with a GPU they import them anew: an import may ask for GPUs, and a fork can't use CUDA after that.
    """
    import torch

    if "forkserver" not in multiprocessing.get_all_start_methods() or torch.accelerator.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*LIBRARIES, FROZEN])
    return context


def _wait(process: Any) -> int:
    """Run a process that ends when this one does; its exit code."""
    process.start()
    try:
        process.join()
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if interrupted:  # Ctrl-C in a terminal reaches the stage too; where people vote, it writes the votes so far
            process.join(PATIENCE)
        for end in (process.terminate, process.terminate, process.kill):
            if process.exitcode is None:
                end()
                process.join(PATIENCE)
        if not interrupted or process.exitcode:
            raise
    return process.exitcode


def _short(script: Path) -> str:
    """As in recipes/ppo.py."""
    return "/".join(script.parts[-2:])


def run_all(script: Path, config: str, runs: dict[Path, dict[str, Any]], max_workers: int) -> None:
    """Run a recipe for each folder that holds no finished run yet.

    Args:
        script: the recipe's file.
        config: its YAML file.
        runs: flags by output folder.
        max_workers: runs at a time; each gets its part of the cores.

    Raises:
        InputError: if a run fails; its own message is above. Runs that have not begun are skipped.
        SystemExit: if a run refuses its input. Its own line says why.
    """
    context = _context()
    one_speaks = context.Semaphore(1)
    failed: list[str] = []
    refused = f"exit code 2. {CONTINUE}"
    running: list[Any] = []
    interrupted: list[BaseException] = []

    def run(folder: Path) -> None:
        if failed or interrupted:
            return
        flags = [word for name, value in runs[folder].items() for word in (f"--{name}", str(value))]
        words = [str(script), "--config", config, "--output_dir", str(folder), *flags]
        print(f"\n=== {folder}: {_short(script)}", flush=True)
        process = context.Process(target=_run, args=(words, max_workers, one_speaks))
        process.start()
        running.append(process)
        if interrupted:  # while it was being started
            process.terminate()
        process.join()
        if process.exitcode:
            failed.append(f"{folder}: {_short(script)} ended with exit code {process.exitcode}. {CONTINUE}")

    with ThreadPoolExecutor(max_workers) as pool:
        try:
            list(pool.map(run, [folder for folder in runs if not is_finished(folder)]))
        except BaseException as error:
            interrupted.append(error)
            for process in running:
                process.terminate()
            for process in running:
                process.join(PATIENCE)
                process.kill()  # a signal in the first moments of a process can get lost
            raise
    if failed and failed[0].endswith(refused):
        sys.exit(2)  # its own line says why
    if failed:
        raise InputError(failed[0])


def _run(words: list[str], max_workers: int = 1, one_speaks: Any = None) -> None:
    if one_speaks is not None:
        say_if(lambda: one_speaks.acquire(block=False))
    parent = multiprocessing.parent_process()
    if parent is not None and os.name == "posix":
        os.environ[PARENT_PIPE] = str(parent.sentinel)
    if max_workers > 1:  # rlhf.run.processes gives a process its part of the cores, as if launched with one thread
        os.environ |= {"LOCAL_WORLD_SIZE": str(max_workers), "OMP_NUM_THREADS": "1"}
    # else all forks have the same random names of files in the cache, and one reads the rows of another
    fingerprint.fingerprint_rng.seed()
    multiprocessing.current_process().name = "MainProcess"  # else collators take it for a loader's worker
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves these out, and trackers send their last numbers in them
