"""Kill a PPO run at random moments with SIGKILL, resume it, and compare it with an uninterrupted run.

    python tests/kill_ppo.py --kills 20

A run is killed and resumed until it finishes; then the next run starts, until there were --kills kills. The adapter
files must be the same byte for byte, and every logged number of every update must be equal.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [
    "--total_episodes", "48", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1",
    "--num_mini_batches", "2", "--num_ppo_epochs", "2", "--response_length", "8", "--dtype", "float32", "--bf16",
    "false", "--lora_r", "4", "--save_steps", "1", "--save_total_limit", "2", "--learning_rate", "1e-2",
    "--adaptive_kl_target", "1.0", "--value_function", "adapter", "--eval_strategy", "steps", "--eval_steps", "4",
]  # fmt: skip


def start(model: str, prompts: str, folder: Path) -> subprocess.Popen:
    """The recipe, in a process of its own."""
    command = [sys.executable, str(ROOT / "recipes" / "ppo.py"), "--model_name_or_path", model]
    command += ["--dataset_name", prompts, "--output_dir", str(folder), *SETTINGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finished(folder: Path) -> bool:
    file = folder / "run.json"
    return file.exists() and json.loads(file.read_text())["finished"]


def outcome(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The adapter's bytes, and the log without times."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    log = json.loads((last / "ppo_state.json").read_text())["log"]
    timeless = [
        {key: value for key, value in entry.items() if not key.startswith("time/") and "runtime" not in key
         and key not in ("eps",)}
        for entry in log
    ]  # fmt: skip
    return (folder / "adapter_model.safetensors").read_bytes(), timeless


def complete(model: str, prompts: str, folder: Path) -> float:
    """Run to the end; returns the seconds it took."""
    began = time.monotonic()
    process = start(model, prompts, folder)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{folder}: ended with exit code {process.returncode}.\n{errors.decode()[-3000:]}")
    return time.monotonic() - began


def kill_and_compare(model: str, prompts: str, folder: Path, kills: int, seed: int = 0) -> list[float]:
    """Raise SystemExit at the first difference; returns the moments of the kills, in seconds after a start."""
    generator = random.Random(seed)
    duration = complete(model, prompts, folder / "whole")
    expected = outcome(folder / "whole")
    moments: list[float] = []
    number = 0
    while len(moments) < kills:
        number += 1
        run = folder / f"killed-{number}"
        while not finished(run):
            if len(moments) == kills:
                complete(model, prompts, run)
                break
            moment = generator.uniform(0.4 * duration, 0.95 * duration)
            began, process = time.monotonic(), start(model, prompts, run)
            try:
                process.wait(moment)
                duration = min(duration, time.monotonic() - began)  # the first run also warmed up the disk's cache
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                moments.append(moment)
                steps = [path.name for path in run.glob("*checkpoint-*")]
                print(f"kill {len(moments)}: run {number}, after {moment:.1f} s, with {sorted(steps)}", flush=True)
        if outcome(run) != expected:
            raise SystemExit(f"{run}: differs from the uninterrupted run.")
        print(f"run {number} finished: identical", flush=True)
    return moments


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    sys.path.insert(0, str(ROOT))
    from conftest import make_adapter, save_tiny, user
    from transformers import AutoTokenizer

    from rlhf.starter.model import starter_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = AutoTokenizer.from_pretrained(starter_model())
        tiny = save_tiny(folder / "tiny", tokenizer)
        make_adapter(tiny, tokenizer, folder / "sft")
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": user(f"Tell me about {n}.")}) + "\n" for n in range(10)))
        moments = kill_and_compare(str(folder / "sft"), str(prompts), folder, arguments.kills, arguments.seed)
    print(f"Killed {len(moments)} times, resumed, identical every time.")


if __name__ == "__main__":
    main()
