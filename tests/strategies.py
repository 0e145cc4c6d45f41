"""PPO on one process beside DDP, FSDP2, ZeRO-2 and ZeRO-3 on two CPU processes: how far apart the runs are.

    make strategies                  # prints the table of docs/many-gpus.md
    python tests/strategies.py LoRA  # the rows with this word

Two updates of 8 completions with two epochs each, of the tiny random Llama of the tests. The differences are from the
run on one process: the largest of all metrics after each update, in parts of the metric's size where that is above 1,
and of all trained weights after the second.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
from conftest import LORA, make_adapter, save_tiny, write_rows
from test_fsdp import metrics, trained
from test_zero import SEAMS, ppo
from transformers import AutoTokenizer

from rlhf.models.loading import load_reward_model
from rlhf.models.sources import resolve
from rlhf.starter.model import starter_model

NAMES = {"ddp": "DDP", "fsdp": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
UPDATES = ["--total_episodes", 16, "--num_ppo_epochs", 2]


def difference(first: dict[str, float], second: dict[str, float]) -> float:
    """The largest of the metrics' differences, without times."""
    names = [name for name in first if not name.startswith("time/") and name not in ("eps", "epoch")]
    return max(abs(first[name] - second[name]) / max(1.0, abs(first[name])) for name in names)


def farthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of tensors."""
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def make_models(folder: Path, **changes: int) -> dict[str, list[object]]:
    """The flags of each way to train: with four adapters over one base, or the whole model.

    Args:
        changes: of the base's configuration.
    """
    tokenizer = AutoTokenizer.from_pretrained(starter_model())
    tiny = save_tiny(folder / "tiny", tokenizer, **changes)
    sft = make_adapter(tiny, tokenizer, folder / "sft")
    lora = dataclasses.replace(LORA, lora_r=3)
    reward = load_reward_model(resolve(resolve(sft).base), lora, tokenizer, seed=3)
    reward.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    roles = ["--model_name_or_path", sft, "--reward_model_path", folder / "reward", "--value_function", "adapter"]
    whole = ["--model_name_or_path", tiny, "--use_peft", "false", "--response_length", 12]
    return {
        "LoRA, float32": [*roles, "--response_length", 24],
        "LoRA, bfloat16": [*roles, "--response_length", 12, "--dtype", "bfloat16", "--bf16", "true"],
        "full, float32": whole,
        "full, bfloat16": [*whole, "--bf16", "true"],
    }


def main(only: str) -> None:
    """Run each strategy and print a line of the table for it."""
    print("| method, `--bf16` or not | launched with | update 1 | update 2 | weights |\n| - | - | - | - | - |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        for way, flags in make_models(folder).items():
            if only not in way:
                continue
            runs = {kind: folder / f"{way} {kind}" for kind in (None, *SEAMS)}
            for kind, run in runs.items():
                ppo(kind, folder, run, *flags, *UPDATES, "--per_device_train_batch_size", 4 if kind else 8)
                if kind is None:
                    continue
                updates = [difference(*pair) for pair in zip(metrics(runs[None]), metrics(run), strict=True)]
                weights = farthest(trained(runs[None], 2), trained(run, 2))
                numbers = " | ".join(f"{number:.0e}" for number in (*updates, weights))
                print(f"| {way} | {NAMES[kind]} | {numbers} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
