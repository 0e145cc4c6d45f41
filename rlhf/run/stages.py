"""Many short runs of a recipe, each in a process of its own, some of them at the same time.

Importing torch and transformers takes several seconds of a core, as long as a small model takes to train. A fork server
imports them once; each run is forked from it, reads its recipe from the file, and runs it as `__main__`.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.run.folders import RUN_FILE

PRELOAD = [
    "transformers.trainer",
    "trl",
    "rlhf.pretraining.trainer",
    "rlhf.hub",
    "eval.measuring.pretraining",
    "eval.report",
]


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds a finished run."""
    file = folder / RUN_FILE
    return file.exists() and json.loads(file.read_text(encoding="utf-8"))["finished"]


def run_all(script: str, config: str, runs: dict[Path, dict[str, Any]], max_workers: int) -> None:
    """Run a recipe for each folder that holds no finished run yet.

    Args:
        script: as in recipes/pretrain.py.
        config: its YAML file.
        runs: flags by output folder.
        max_workers: runs at a time; each gets its part of the cores.

    Raises:
        InputError: if a run fails; what it said is above. Those that have not begun are left out.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(PRELOAD)

    failed: list[str] = []

    def run(folder: Path) -> None:
        if failed:
            return
        flags = [word for name, value in runs[folder].items() for word in (f"--{name}", str(value))]
        words = [str(ROOT / script), "--config", config, "--output_dir", str(folder), *flags]
        print(f"\n=== {folder}: {script}", flush=True)
        process = context.Process(target=_run, args=(words, max_workers))
        process.start()
        process.join()
        if process.exitcode:
            failed.append(f"{folder}: {script} ended with exit code {process.exitcode}.")

    with ThreadPoolExecutor(max_workers) as pool:
        list(pool.map(run, [folder for folder in runs if not is_finished(folder)]))
    if failed:
        raise InputError(f"{failed[0]} Mend it; the same command goes on.")


def _run(words: list[str], max_workers: int) -> None:
    if (
        max_workers > 1
    ):  # rlhf.run.arguments gives a process its part of the cores; 1 thread is what `accelerate launch` set
        os.environ |= {"LOCAL_WORLD_SIZE": str(max_workers), "OMP_NUM_THREADS": "1"}
    multiprocessing.current_process().name = "MainProcess"  # what transformers' collators take for no loader's worker
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


ROOT = Path(__file__).resolve().parents[2]


def run_stage(script: str, config: str, output_dir: Path, flags: dict[str, Any]) -> bool:
    """Run a recipe on one process; it skips what is finished and goes on with what was interrupted.

    Args:
        script: as in recipes/ppo.py.
        config: its YAML file.
        flags: a list is several words; None is left out.

    Returns:
        whether the stage is finished; False if its people have more to compare.

    Raises:
        InputError: if it fails; what it said is above.
    """
    words = [sys.executable, str(ROOT / script), "--config", config, "--output_dir", str(output_dir)]
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    print(f"\n=== {output_dir}: {script}", flush=True)
    with subprocess.Popen(words) as stage:
        try:
            code = stage.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the stage too, and where people vote it writes what there is
            code = stage.wait()
    if code:
        raise InputError(f"{output_dir}: {script} ended with exit code {code}. Mend it; the same command goes on.")
    return json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))["finished"]
