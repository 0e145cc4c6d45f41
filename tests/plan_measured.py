"""Plans against real runs: `make plan` runs recipes on the CPU, measures their memory and fills docs/plan.md.

Each setting is run twice, in processes of its own: with `--plan true`, and for a few steps. Measured is the peak of the
process's resident memory, as Linux counts it, less what it had after the imports and a first small run, which brings
torch's libraries into memory. malloc gives every large block back at once (MALLOC_MMAP_THRESHOLD_), so that resident
memory follows what torch allocates.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
         "num_key_value_heads": 4, "max_position_embeddings": 1024}  # fmt: skip
COMMON = ["--dtype", "float32", "--bf16", "false", "--save_strategy", "no", "--per_device_eval_batch_size", "1",
          "--report_to", "none", "--lora_r", "16", "--eval_on_start", "false", "--logging_steps", "1"]  # fmt: skip
STEPS = ["--max_steps", "2"]
PPO = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--num_mini_batches", "1",
       "--num_ppo_epochs", "2", "--response_length", "64", "--local_rollout_forward_batch_size", "16",
       "--total_episodes", "32", "--reward_funcs", "starter", "--stop_token_id", "3"]  # fmt: skip
FULL = ["--use_peft", "false"]
SETTINGS = {
    "SFT, LoRA": ("sft", ["--per_device_train_batch_size", "8", *STEPS]),
    "SFT, full": ("sft", ["--per_device_train_batch_size", "8", *STEPS, *FULL]),
    "SFT, full, 4 batches accumulated": (
        "sft", ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4", *STEPS, *FULL]),
    "reward, LoRA": ("reward", ["--per_device_train_batch_size", "4", *STEPS]),
    "reward, full": ("reward", ["--per_device_train_batch_size", "4", *STEPS, *FULL]),
    "PPO, LoRA": ("ppo", PPO),
    "PPO, LoRA, activation checkpointing": ("ppo", [*PPO, "--activation_checkpointing", "true"]),
    "PPO, full": ("ppo", [*PPO, *FULL]),
}  # fmt: skip


def make_inputs(folder: Path, **changes: int) -> None:
    """A random model, and rows of nearly one length for each recipe."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rlhf.starter.model import starter_model

    tokenizer = AutoTokenizer.from_pretrained(starter_model())
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    sizes = {**SIZES, **changes}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **ids)).save_pretrained(
        folder / "model"
    )
    tokenizer.save_pretrained(folder / "model")
    for name in ("sft", "reward", "ppo"):
        rows = []
        for number in range(40):  # two full steps where batches are accumulated
            prompt = [{"role": "user", "content": f"number {number}: " + "tell me about rain " * 20}]
            replies = [[{"role": "assistant", "content": word * 60}] for word in ("yes indeed ", "no never ")]
            rows.append(
                {"prompt": prompt} if name == "ppo"
                else {"prompt": prompt, "completion": replies[0]} if name == "sft"
                else {"prompt": prompt, "chosen": replies[0], "rejected": replies[1]}
            )  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def words_of(name: str, folder: Path, output: str) -> list[str]:
    """The command of a setting."""
    recipe, flags = SETTINGS[name]
    data = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / f"{recipe}.jsonl")]
    return [str(ROOT / "recipes" / f"{recipe}.py"), *data, "--output_dir", str(folder / output), *COMMON, *flags]


def planned(name: str, folder: Path) -> float:
    """GiB that the plan says."""
    command = [sys.executable, *words_of(name, folder, "planned"), "--plan", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = re.search(r"The peak is ([\d.]+) GiB", done.stdout)
    assert found is not None, done.stdout
    assert not (folder / "planned").exists()
    return float(found[1])


def measured(name: str, folder: Path) -> float:
    """GiB that a run takes, in a process of its own."""
    words = [sys.executable, __file__, "--run", name, "--folder", str(folder)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.strip().splitlines()[-1].removeprefix("GiB "))


def resident(most: bool = False) -> float:
    """GiB of this process's resident memory as Linux counts it: now, or the most since `clear_refs` was written."""
    found = re.search(rf"Vm{'HWM' if most else 'RSS'}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**20


def run_and_measure(name: str, folder: Path) -> None:
    """Run a setting in this process, after a first run on a model of two layers."""
    from conftest import load_script

    def run(words: list[str]) -> None:
        sys.argv = words
        load_script(str(Path(words[0]).relative_to(ROOT))).main()

    with tempfile.TemporaryDirectory() as small:
        make_inputs(Path(small), num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=2,
                    num_key_value_heads=1)  # fmt: skip
        run(words_of(name, Path(small), "warm"))
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run(words_of(name, folder, f"run-{list(SETTINGS).index(name)}"))
    print(f"GiB {resident(most=True) - before:.4f}")


def write_row(setting: str, plan: float, run: float) -> None:
    """Write a setting's row into the table of docs/plan.md."""
    page = ROOT / "docs" / "plan.md"
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition("| setting | planned, GiB | measured, GiB | difference |\n| - | - | - | - |\n")
    table, end, after = rest.partition("\n\n")
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    rows[setting] = f"| {setting} | {plan:.2f} | {run:.2f} | {plan / run - 1:+.0%} |"
    lines = [rows[name] for name in SETTINGS if name in rows]
    page.write_text(before + begin + "\n".join(lines) + end + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the settings' names")
    parser.add_argument("--run", help="measure this setting in this process")
    parser.add_argument("--folder", type=Path, help="with --run: of model and rows")
    args = parser.parse_args()
    if args.run:
        return run_and_measure(args.run, args.folder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for setting in SETTINGS:
            if args.only in setting:
                plan, run = planned(setting, folder), measured(setting, folder)
                write_row(setting, plan, run)
                print(f"{setting}: planned {plan:.2f} GiB, measured {run:.2f}, {plan / run - 1:+.0%}", flush=True)


if __name__ == "__main__":
    main()
