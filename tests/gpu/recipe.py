"""A recipe as a subprocess, for the pieces of the GPU check."""

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import recipe_process
from piece import DEVICE

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]


def at_once(*runs: Callable[[], T]) -> list[T]:
    """What several functions return that run side by side, on a GPU; on a CPU they would be slower that way."""
    with ThreadPoolExecutor(len(runs) if DEVICE == "cuda" else 1) as pool:
        return list(pool.map(lambda run: run(), runs))


def run_recipe(script: str, *words: Any, launcher: tuple[str, ...] = ()) -> str:
    """Run `script words` in a process of its own, with `launcher` before them if given; returns what it printed.

    Raises:
        SystemExit: if it fails, with its output on standard output.
    """
    command = [str(ROOT / script), *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if launcher:
        done = subprocess.run([*launcher, *command], cwd=ROOT, env=environment, text=True, capture_output=True)
    else:
        done = recipe_process.run_recipe(recipe_process.start(environment), command, environment, ROOT)
    print(f"--- {script}\n{done.stdout[-2000:]}{done.stderr[-3000:]}", flush=True)
    if done.returncode:
        raise SystemExit(f"{script} ended with exit code {done.returncode}")
    return done.stdout


def updates(folder: Path, step: int) -> list[dict[str, float]]:
    """What PPO logged for each update up to a checkpoint."""
    log = json.loads((folder / f"checkpoint-{step}" / "ppo_state.json").read_text())["log"]
    return [entry for entry in log if "objective/kl" in entry]


def largest_difference(one: dict[str, float], two: dict[str, float]) -> tuple[str, float]:
    """The metric that differs most, relative to its size but at least 1."""
    names = [name for name in one if not name.startswith("time/") and name not in ("eps", "epoch")]
    by_name = {name: abs(one[name] - two[name]) / max(1.0, abs(one[name])) for name in names}
    return max(by_name.items(), key=lambda pair: pair[1])


def write_prompts(folder: Path, number: int) -> Path:
    """Prompts of the words of `piece.word_tokenizer`."""
    rows = [
        {"prompt": [{"role": "user", "content": " ".join(f"w{3 + (7 * n + k) % 200}" for k in range(3 + n % 9))}]}
        for n in range(number)
    ]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def count_w3(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """A reward function: how many words of a reply begin with w3."""
    return [float(str(completion).count("w3")) for completion in completions]
