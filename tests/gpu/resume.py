"""PPO under deterministic algorithms: two runs end in the same bytes, and so does one that is resumed."""

import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agreement import config
from piece import answer, save_random
from recipe import at_once, run_recipe, write_prompts

FILES = ("adapter_model.safetensors", "checkpoint-4/trainable.safetensors", "checkpoint-4/optimizer.pt")
SETTINGS = (
    "--reward_funcs", "recipe.count_w3", "--response_length", 16, "--total_episodes", 64, "--save_steps", 2,
    "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 2, "--num_mini_batches", 1,
    "--learning_rate", 1e-3,
)  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def undo_the_second_half(folder: Path) -> None:
    """Leave what a run killed after its second update leaves."""
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "adapter_model.safetensors").unlink()
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**state, "finished": False}))


def measure(tiny: bool, keep: Callable[[dict[str, Any]], None]) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        words = ["--model_name_or_path", save_random(config(tiny), folder / "model"), *SETTINGS,
                 "--dataset_name", write_prompts(folder, 16)]  # fmt: skip
        for name, more in (("deterministic", ["--full_determinism", "true"]), ("default", [])):
            one, two = folder / f"{name}-1", folder / f"{name}-2"
            run = functools.partial(run_recipe, "recipes/ppo.py", *words, *more, "--output_dir")
            at_once(functools.partial(run, one), functools.partial(run, two))
            first, second = digests(one), digests(two)
            undo_the_second_half(two)
            assert "Resuming from" in run(two)
            keep({name: {"two runs": first == second, "resumed": first == digests(two)}})
            if tiny:
                return


if __name__ == "__main__":
    answer(measure)
