"""Recipes in processes of their own that needn't import torch, transformers and TRL anew each time.

Importing them takes a core 6 to 8 seconds, and the tests start some two hundred recipes. multiprocessing's fork server
imports them once and forks; in the fork the recipe is read from its file and run as `__main__`, with its own arguments,
environment, folder, output and exit code.

As a script it does so for commands that it reads from its input: `Elsewhere` starts it for environments that libraries
read while they are imported.
"""

import atexit
import json
import multiprocessing
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path

from datasets import fingerprint

import rlhf
from rlhf.run import stages
from rlhf.run.stages import FROZEN, LIBRARIES

# not those that import Gradio and trackio, which read variables of the environment then
OWN = [name for _, name, _ in pkgutil.walk_packages(rlhf.__path__, "rlhf.")]
OWN = [name for name in OWN if not name.startswith(("rlhf.feedback", "rlhf.rloo")) and name != FROZEN]
PRELOAD = [*LIBRARIES, "transformers.models.llama.modeling_llama", "rich.table", "bitsandbytes", "gradio"]
PRELOAD += [*OWN, "warm", FROZEN]


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


def _enter(environment: dict[str, str], cwd: str, stdout: str, stderr: str, stdin: str) -> None:
    for number, file in enumerate((stdin, stdout, stderr)):
        if number == 2 and stderr == stdout:
            os.dup2(1, 2)
            continue
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)


class Stages:
    """The context of stages that the fork server of the tests forks, with the files and the environment of a recipe."""

    def __init__(self, place: tuple) -> None:
        self.place, self.context = place, multiprocessing.get_context("forkserver")
        self.Semaphore = self.context.Semaphore

    def Process(self, target: Callable, args: tuple) -> multiprocessing.context.ForkServerProcess:
        return self.context.Process(target=_stage, args=(self.place, target, args))


def _stage(place: tuple, target: Callable, args: tuple) -> None:
    _enter(*place)
    target(*args)
    sys.stdout.flush()
    sys.stderr.flush()


def _run(
    command: list[str], environment: dict[str, str], cwd: str, stdout: str, stderr: str, stdin: str = os.devnull
) -> None:
    place = (environment, cwd, stdout, stderr, stdin)
    _enter(*place)
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    stages._context = lambda: Stages(place)  # forked where it was, in place of a server of its own
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    fingerprint.fingerprint_rng.seed()  # as rlhf/run/stages.py does
    code = command.pop(1) if command[0] == "-c" else None
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path.append(str(Path(__file__).parent))  # a stage finds `_stage` there
    status = 0
    try:
        if code is None:
            runpy.run_path(command[0], run_name="__main__")
        else:
            exec(code, {"__name__": "__main__"})
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()  # as rlhf/run/stages.py does
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


class _Run:
    """A recipe in a fork, and the files that it writes its output to."""

    def __init__(
        self,
        context: multiprocessing.context.ForkServerContext,
        command: list[str],
        environment: dict[str, str],
        cwd: Path,
        folder: Path,
        typed: str = "",
    ) -> None:
        self.files = [folder / name for name in ("stdout", "stderr", "stdin")]
        for file in self.files:
            file.write_text(typed if file.name == "stdin" else "", encoding="utf-8")
        self.process = context.Process(target=_run, args=(command, environment, str(cwd), *map(str, self.files)))
        self.process.start()

    def interrupt_at(self, text: str) -> None:
        """Send Ctrl-C once it has printed this."""
        while self.process.is_alive():
            if text in self.said(0):
                assert self.process.pid is not None
                return os.kill(self.process.pid, signal.SIGINT)
            time.sleep(0.1)

    def said(self, number: int) -> str:
        """What it has written to standard output (0) or standard error (1)."""
        return self.files[number].read_text(encoding="utf-8", errors="replace")


def run_recipe(
    context: multiprocessing.context.ForkServerContext,
    command: list[str],
    environment: dict[str, str],
    cwd: Path,
    interrupt_at: str | None = None,
    typed: str = "",
) -> subprocess.CompletedProcess:
    """Run a script with its arguments to its end; Ctrl-C comes once it has printed `interrupt_at`.

    Args:
        typed: what it reads from standard input.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(context, command, environment, cwd, Path(folder), typed)
        if interrupt_at is not None:
            run.interrupt_at(interrupt_at)
        run.process.join()
        assert run.process.exitcode is not None  # it has ended
        return subprocess.CompletedProcess(command, run.process.exitcode, run.said(0), run.said(1))


def run_on_processes(
    context: multiprocessing.context.ForkServerContext,
    count: int,
    command: list[str],
    environment: dict[str, str],
    cwd: Path,
) -> subprocess.CompletedProcess:
    """Run a script on several processes that find each other as those of torchrun do; one that fails ends the others.

    Returns:
        all that they printed, one process behind the other, and the first exit code that isn't 0.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as parent:
        runs = []
        for rank in range(count):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            own = {**{name: str(number) for name, number in numbers.items()}, "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
            folder = Path(parent) / str(rank)
            folder.mkdir()
            runs.append(_Run(context, command, {**environment, **own}, cwd, folder))
        patience: float | None = None
        while alive := [run.process for run in runs if run.process.is_alive()]:
            if not connection.wait([process.sentinel for process in alive], patience):
                for process in alive:
                    process.terminate()
            if any(run.process.exitcode for run in runs):
                patience = 10.0  # for the others to fail in the same line
        code = next((run.process.exitcode for run in runs if run.process.exitcode), 0)
        return subprocess.CompletedProcess(command, code, *("".join(run.said(n) for run in runs) for n in (0, 1)))


class Forked:
    """A script in a fork, with the part of subprocess.Popen's interface that tests use, and pipes as text.

    Args:
        command: the script's file and its arguments, or -c, code, and its arguments.
        together: whether standard error goes to standard output.
    """

    def __init__(self, command: list[str], environment: dict[str, str], cwd: Path, together: bool = False) -> None:
        with tempfile.TemporaryDirectory() as folder:
            stdin, stdout, stderr = pipes = [os.path.join(folder, name) for name in ("in", "out", "err")]
            for pipe in pipes:
                os.mkfifo(pipe)
            files = (stdout, stdout if together else stderr, stdin)
            self._process = start(environment).Process(target=_run, args=(command, environment, str(cwd), *files))
            self._process.start()
            # each waits until the fork opens its end, in this order
            self.stdin = Path(stdin).open("w", encoding="utf-8")  # noqa: SIM115
            self.stdout = Path(stdout).open(encoding="utf-8", errors="replace")  # noqa: SIM115
            self.stderr = self.stdout if together else Path(stderr).open(encoding="utf-8", errors="replace")  # noqa: SIM115
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: if it goes on for longer than this many seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self._process.is_alive():
            os.kill(self.pid, number)


class Elsewhere:
    """A process that runs recipes, one after the other, with variables that are read while libraries are imported."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, command: list[str], environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
        """Run a script with its arguments to its end; `environment` is its own."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([command, environment, str(cwd)]), file=self.process.stdin, flush=True)
        return subprocess.CompletedProcess(command, *json.loads(self.process.stdout.readline()))


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", 1)
    os.dup2(2, 1)  # libraries print while they are imported
    for line in sys.stdin:
        words, variables, where = json.loads(line)
        done = run_recipe(start(dict(os.environ)), words, variables, Path(where))
        print(json.dumps([done.returncode, done.stdout, done.stderr]), file=answers)
