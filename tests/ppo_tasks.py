"""PPO on small tasks with a known optimum, ten seeds each: what value functions and options are worth. `make tasks`.

    python tests/ppo_tasks.py                         # all, about an hour of one core; prints a line for each setting
    python tests/ppo_tasks.py --tasks long --settings "no value function" --seeds 3
    python tests/ppo_tasks.py --keep                  # also writes docs/results/ppo_tasks.json

A tiny Llama over twenty words learns to write one of them, in 30 updates of 32 completions. The best mean reward is 1.
Settings are compared with the default, paired by seed. Intervals are Student's 95% over seeds.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
UPDATES, WANTED = 30, "abcdefgh"


class Task(NamedTuple):
    """What is rewarded.

    Args:
        reward: words of a completion, and the word that it should have -> score, or one reward per token.
    """

    length: int
    reward: Callable[[list[str], str], float | list[float]]
    prompts: int = 1  # each asks for another word
    ends: bool = False  # whether completions may end early


def share(words: list[str], wanted: str) -> float:
    return words.count(wanted) / max(1, len(words))


def noisy(words: list[str], wanted: str) -> float:
    return share(words, wanted) + random.Random(zlib.crc32(" ".join(words).encode())).gauss(0, 0.2)


TASKS = {
    "short": Task(6, share),
    "long": Task(48, share),
    "long, a reward per token": Task(48, lambda words, wanted: [(word == wanted) / 48 for word in words]),
    "long, noise of 0.2": Task(48, noisy),
    "all or nothing": Task(6, lambda words, wanted: float(share(words, wanted) >= 0.5)),
    "cut off scores 0": Task(
        12, lambda words, wanted: share(words[:-1], wanted) if words[-1] == "<eos>" else 0.0, ends=True
    ),
    "eight prompts": Task(12, share, prompts=8),
    "eight prompts, all or nothing": Task(6, lambda words, wanted: float(share(words, wanted) >= 1 / 3), prompts=8),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "ten times the value function's rate": {"value_learning_rate": 10.0},  # times learning_rate
    "no value function": {"vf_coef": 0.0, "lam": 1.0},
    "λ 1": {"lam": 1.0},
    "epsilon_high 0.28": {"epsilon_high": 0.28},
}
MULTIPLIED = "value_learning_rate"  # given as a multiple of learning_rate


def learned(task: Task, setting: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """One run: mean reward of its last three updates and of all, and the median explained variance of an update."""
    from datasets import Dataset
    from optimum_ppo import SETTINGS as COMMON
    from optimum_ppo import make_model
    from transformers import AutoModelForCausalLM

    from rlhf.ppo import PPOConfig, PPOTrainer

    path, tokenizer = make_model(folder / "model", seed)
    rate = 1e-2 if task.length == 6 else 5e-3
    own = {name: value * rate if name == MULTIPLIED else value for name, value in setting.items()}
    args = PPOConfig(
        output_dir=str(folder / "run"), seed=seed, activation_checkpointing=False,
        **{**COMMON, "total_episodes": 32 * UPDATES, "response_length": task.length, "learning_rate": rate,
           "stop_token": "eos" if task.ends else None, **own},
    )  # fmt: skip
    texts = [f"go {word}" for word in WANTED[: task.prompts]] if task.prompts > 1 else ["go"]
    rows = Dataset.from_dict({"prompt": texts, "input_ids": [tokenizer(text)["input_ids"] for text in texts]})

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | list[float]]:
        wanted = [prompt.split()[-1] if task.prompts > 1 else WANTED[0] for prompt in prompts]
        words = [tokenizer.convert_ids_to_tokens(ids) for ids in completion_ids]
        return [task.reward(*pair) for pair in zip(words, wanted, strict=True)]

    model = AutoModelForCausalLM.from_pretrained(path)
    trainer = PPOTrainer(args, tokenizer, model, train_dataset=rows, reward_funcs=[reward])
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    rewards = [entry["objective/raw_scores"] for entry in log]
    explained = median(entry["val/explained_variance"] for entry in log)
    return {"end": fmean(rewards[-3:]), "mean": fmean(rewards), "explained": explained}


def compared(task: str, setting: str, runs: list[dict[str, float]], default: list[dict[str, float]]) -> dict[str, Any]:
    """A line of the table: the runs of a setting minus those of the default, by seed."""
    from ppo_settings import over_seeds

    gaps = {key: over_seeds([run[key] - other[key] for run, other in zip(runs, default, strict=False)])
            for key in ("end", "mean")}  # fmt: skip
    is_default = runs is default
    return {
        "task": task, "setting": setting, "end": fmean(run["end"] for run in runs),
        "lowest": min(run["end"] for run in runs), "explained": fmean(run["explained"] for run in runs),
        "end_difference": None if is_default else gaps["end"], "mean_difference": None if is_default else gaps["mean"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--keep", action="store_true", help="write docs/results/ppo_tasks.json")
    arguments = parser.parse_args()
    if arguments.keep and (len(arguments.tasks), len(arguments.settings)) != (len(TASKS), len(SETTINGS)):
        parser.error("--keep: replaces the whole table. Leave --tasks and --settings out.")
    rows = []
    for task in arguments.tasks:
        default: list[dict[str, float]] = []
        for setting in dict.fromkeys(["default", *arguments.settings]):
            runs = []
            for seed in range(arguments.seeds):
                with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
                    runs.append(learned(TASKS[task], SETTINGS[setting], seed, Path(folder)))
            default = default or runs
            rows.append(compared(task, setting, runs, default))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.keep:
        from ppo_settings import write_results

        write_results("ppo_tasks", "make tasks", {}, rows)


if __name__ == "__main__":
    main()
