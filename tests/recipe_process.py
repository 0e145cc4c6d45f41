"""Recipes in processes of their own that needn't import torch, transformers and TRL anew each time.

Importing them takes a core 6 to 8 seconds, and the tests start some two hundred recipes. multiprocessing's fork server
imports them once and forks; in the fork the recipe is read from its file and run as `__main__`, with its own arguments,
environment, folder, output and exit code.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

from datasets import fingerprint

from rlhf.run.stages import FROZEN, LIBRARIES

# libraries: the project's own modules are imported by each recipe, as their files are then
PRELOAD = [*LIBRARIES, "transformers.models.llama.modeling_llama", "rich.table", "bitsandbytes", FROZEN]


def start(environment: dict[str, str]) -> multiprocessing.context.ForkServerContext:
    """The fork server, started with this environment: some of it is read while libraries are imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _run(command: list[str], environment: dict[str, str], cwd: str, stdout: str, stderr: str) -> None:
    for number, file in ((1, stdout), (2, stderr)):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    fingerprint.fingerprint_rng.seed()  # as rlhf/run/stages.py does
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    code = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def run_recipe(
    context: multiprocessing.context.ForkServerContext,
    command: list[str],
    environment: dict[str, str],
    cwd: Path,
    interrupt_at: str | None = None,
) -> subprocess.CompletedProcess:
    """Run a script with its arguments to its end; Ctrl-C comes once it has printed `interrupt_at`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        process = context.Process(target=_run, args=(command, environment, str(cwd), *map(str, files)))
        process.start()
        assert process.pid is not None
        while interrupt_at is not None and process.is_alive():
            if interrupt_at in files[0].read_text(encoding="utf-8", errors="replace"):
                os.kill(process.pid, signal.SIGINT)
                break
            time.sleep(0.1)
        process.join()
        assert process.exitcode is not None  # it has ended
        said = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        return subprocess.CompletedProcess(command, process.exitcode, *said)
