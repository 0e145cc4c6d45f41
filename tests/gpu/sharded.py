"""PPO under FSDP2 on one card, with recipes/accelerate/fsdp.yaml, beside plain PPO: LoRA, full; float32, bfloat16.

One card shards nothing, but everything else is as on many: NCCL, DTensors, gathering, mixed precision, checkpoints.
"""

import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agreement import config
from piece import DEVICE, answer, save_random
from recipe import at_once, largest_difference, run_recipe, updates, write_prompts
from resume import SETTINGS

LAUNCH = (
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    "recipes/accelerate/fsdp.yaml",
    "--num_processes",
    "1",
)


def compared(words: list[Any], folder: Path, peft: str, bf16: str) -> dict[str, Any]:
    """The metrics of a sharded run beside those of a plain one, and what has to hold before the first step."""
    one, two = folder / "plain", folder / "sharded"
    more = ["--use_peft", peft, "--bf16", bf16]
    launch = (*LAUNCH, "--mixed_precision", "bf16" if bf16 == "true" else "no", "--main_process_port", "0")
    at_once(
        lambda: run_recipe("recipes/ppo.py", *words, *more, "--output_dir", one),
        lambda: run_recipe("recipes/ppo.py", *words, *more, "--output_dir", two,
                           launcher=launch if DEVICE == "cuda" else ()),
    )  # fmt: skip
    first, second = (updates(run, 4) for run in (one, two))
    return {
        "largest difference of update 1": largest_difference(first[0], second[0]),
        "of update 2": largest_difference(first[1], second[1]),
        "KL before the first step": second[0]["objective/kl"],
        "ratio before the first step": second[0]["val/first_ratio"],
    }


def measure(tiny: bool, keep: Callable[[dict[str, Any]], None]) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        words = ["--model_name_or_path", save_random(config(tiny), folder / "model"), *SETTINGS,
                 "--dataset_name", write_prompts(folder, 16), "--dtype", "float32"]  # fmt: skip
        cases = [(peft, bf16) for peft in ("true", "false") for bf16 in ("false", "true")][: 1 if tiny else 4]
        compare = [functools.partial(compared, words, folder / f"{peft}-{bf16}", peft, bf16) for peft, bf16 in cases]
        for (peft, bf16), found in zip(cases, at_once(*compare), strict=True):
            keep({("LoRA" if peft == "true" else "full") + (", bfloat16" if bf16 == "true" else ", float32"): found})


if __name__ == "__main__":
    answer(measure)
