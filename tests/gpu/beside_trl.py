"""PPO beside TRL 1.12's class at the size of Pythia 1B, with random weights: 512 prompt and 53 new tokens, batch 64.

With LoRA as in `make bench`, and in full with a value model. Each runs alone on the card: one update to warm up, then
those that count, then one whose floating-point operations are counted (torch.utils.flop_counter), for the share of the
card's rate of matrix products.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_ppo import clock, trainer_of
from card import matmul_tflops
from datasets import Dataset
from piece import DEVICE, answer, peak_gib, save_random
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, TrainerCallback
from trl import ModelConfig

TIMED = 2  # updates
BATCH, PROMPT, NEW = 64, 512, 53
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "num_mini_batches": 1, "num_ppo_epochs": 4,
    "response_length": NEW, "temperature": 0.7, "learning_rate": 3e-6, "stop_token": "eos", "logging_steps": 1,
    "num_sample_generations": 0, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "activation_checkpointing": False, "local_rollout_forward_batch_size": 64, "total_episodes": BATCH * (TIMED + 2),
    "bf16": True,
}  # fmt: skip


def config(tiny: bool) -> GPTNeoXConfig:
    """https://huggingface.co/EleutherAI/pythia-1b/blob/main/config.json"""
    if tiny:
        return GPTNeoXConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=2048, rotary_pct=0.25, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
    return GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=8,
        max_position_embeddings=2048, rotary_pct=0.25, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip


class Watch(TrainerCallback):
    """Times the updates, and counts the operations of the last one."""

    def __init__(self, phases: Callable[[], dict[str, float]]) -> None:
        self.phases, self.seconds, self.by_phase = phases, list[float](), list[dict[str, float]]()
        self.counter, self.start, self.peak = FlopCounterMode(display=False), 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = clock()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if "objective/kl" not in state.log_history[-1]:
            return
        self.seconds.append(clock() - self.start)
        self.by_phase.append(dict(self.phases()))
        if len(self.seconds) == TIMED + 1:
            self.peak = peak_gib()
            self.counter.__enter__()
        if len(self.seconds) == TIMED + 2:
            self.counter.__exit__(None, None, None)
        self.start = clock()

    def report(self) -> dict[str, Any]:
        """Means over the updates that count."""
        counted, phases = self.seconds[1 : 1 + TIMED], self.by_phase[1 : 1 + TIMED]
        mean = sum(counted) / TIMED
        tera = self.counter.get_total_flops() / 1e12
        return {
            "seconds_per_update": round(mean, 2),
            "phases": {name: round(sum(phase[name] for phase in phases) / TIMED, 2) for name in phases[0]},
            "peak_memory_gib": self.peak,
            "teraflop_per_update": float(f"{tera:.4g}"),
            "tflops": float(f"{tera / mean:.4g}"),
        }


def run(which: str, mode: str, folder: str, tiny: bool) -> None:
    """One trainer; prints its report."""
    lora = mode == "lora"
    model_args = ModelConfig(
        dtype="bfloat16" if lora else "float32", use_peft=lora, lora_r=16, lora_alpha=32, lora_dropout=0.0,
        lora_target_modules=["all-linear"], attn_implementation="sdpa",
    )  # fmt: skip
    settings, prompt = dict(SETTINGS), PROMPT
    if tiny:
        settings |= {"per_device_train_batch_size": 2, "total_episodes": 8 * (TIMED + 2), "response_length": 5}
        settings |= {"use_cpu": DEVICE == "cpu", "bf16": DEVICE != "cpu", "num_ppo_epochs": 1}
        prompt = 12
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, config(tiny).vocab_size, (settings["total_episodes"], prompt), generator=generator)
    rows = Dataset.from_dict({"input_ids": tokens.tolist()})
    trainer, phases = trainer_of(which, folder, model_args, rows, settings)
    watch = Watch(phases)
    trainer.add_callback(watch)
    trainer.train()
    print("REPORT " + json.dumps(watch.report()), flush=True)


def measure(tiny: bool, keep: Callable[[dict[str, Any]], None]) -> None:
    rate = matmul_tflops(512 if tiny else 8192)
    with tempfile.TemporaryDirectory() as parent:
        folder = save_random(config(tiny), Path(parent) / "model", torch.bfloat16)
        torch.cuda.empty_cache()
        for mode in ("lora", "full"):
            for which in ("ours", "trl"):
                command = [sys.executable, __file__, "--worker", which, mode, folder, *["--tiny"] * tiny]
                start = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True)
                print(f"--- {which} {mode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}", flush=True)
                reports = [line[7:] for line in done.stdout.splitlines() if line.startswith("REPORT ")]
                found: dict[str, Any] = json.loads(reports[0]) if reports else {"error": done.stderr.splitlines()[-3:]}
                if reports:
                    found["share_of_matmul_rate"] = round(found["tflops"] / rate, 3)
                found["process_seconds"] = round(time.perf_counter() - start, 1)
                keep({f"{which}_{mode}": found})


if __name__ == "__main__":
    if "--worker" in sys.argv:
        which, mode, folder = sys.argv[2:5]
        run(which, mode, folder, "--tiny" in sys.argv)
    else:
        answer(measure)
