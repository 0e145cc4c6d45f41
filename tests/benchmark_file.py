"""What a benchmark measured, kept as JSON in benchmarks/ and compared with a later run.

Only ratios are compared, ours to TRL's in one run: seconds depend on the machine and on what else runs on it.
"""

import dataclasses
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


@dataclass(frozen=True)
class Machine:
    """What a ratio may depend on. It has no host name, so that the file can be published."""

    cores: int  # that this process may use
    cpu_flags: list[str]  # avx2, avx512_f and all for bfloat16, sorted
    memory_gib: int | None  # None: not known

    def is_like(self, other: "Machine") -> bool:
        """Whether both have the same cores, flags and memory; an unknown memory equals any."""
        memory = {self.memory_gib, other.memory_gib} - {None}
        return (self.cores, self.cpu_flags) == (other.cores, other.cpu_flags) and len(memory) < 2


@dataclass(frozen=True)
class Benchmark:
    """The content of one file."""

    command: str
    commit: str  # short hash
    machine: Machine
    versions: dict[str, str]
    ratios: dict[str, float]  # ours / TRL's, by what was measured
    source: str | None = None  # where the numbers come from, if no run wrote this file


def this_machine() -> Machine:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    known = sorted(name for name in flags if name in ("avx2", "avx512_f") or name.endswith("bf16"))
    return Machine(cores, known, round(psutil.virtual_memory().total / 2**30))


def this_commit() -> str:
    """Short hash, followed by "+changes" if tracked files differ; "unknown" outside of git."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return "unknown"
    # a file written by --keep is no change of what was measured
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks"]).returncode
    return found.stdout.strip() + ("+changes" if changed else "")


def measured(command: str, ratios: dict[str, float]) -> Benchmark:
    """A benchmark that ran now, here; ratios are rounded to three digits behind the point."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    rounded = {name: round(ratio, 3) for name, ratio in ratios.items()}
    return Benchmark(command, this_commit(), this_machine(), versions, rounded)


def write_benchmark(file: Path, benchmark: Benchmark) -> None:
    file.write_text(json.dumps(dataclasses.asdict(benchmark), indent=2) + "\n", encoding="utf-8")


def read_benchmark(file: Path) -> Benchmark:
    content = json.loads(file.read_text(encoding="utf-8"))
    return Benchmark(**{**content, "machine": Machine(**content["machine"])})


def compare(new: Benchmark, kept: Benchmark | None) -> list[str]:
    """A line for each ratio, with the kept one beside it; or one line that says why nothing is compared.

    Args:
        kept: None if there is none yet.
    """
    if kept is None:
        return ["No kept benchmark to compare with: --keep writes one."]
    if new.command != kept.command:
        return [f"The kept benchmark is of another command ({kept.command}): not compared."]
    where = "this machine" if new.machine.is_like(kept.machine) else "another machine"
    return [
        f"{name}: {ratio:.2f}x, kept: {kept.ratios[name]:.2f}x at commit {kept.commit}, {where}"
        for name, ratio in new.ratios.items()
        if name in kept.ratios
    ]
