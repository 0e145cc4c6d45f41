"""Rounds of the closed loop: the data that passes from stage to stage, and a summary of all rounds."""

import json
from pathlib import Path
from typing import Any, TypedDict

import yaml

from rlhf.errors import InputError
from rlhf.models.sources import Source
from rlhf.rewards import JudgeArguments, resolve_reward_functions
from rlhf.run.files import read_json, read_jsonl, write_json, write_jsonl
from rlhf.run.folders import RUN_FILE

ROUNDS_FILE = "rounds.json"
Cell = dict[str, float]  # a mean with its 95% interval: `mean`, `low`, `high`


class RoundEntry(TypedDict, total=False):
    """One round's policy on held-out prompts. Round 0 is the SFT model and has only the first four fields."""

    round: int
    truth: Cell | None
    proxy: Cell | None  # score of the newest reward model
    kl: Cell  # to the SFT model, nats
    comparisons: int  # training pairs so far
    reward_accuracy: float
    difference: Cell | None  # of the truth, to the round before


class RoundsSummary(TypedDict):
    """Content of rounds.json. The truth is the gold score if there is one, else the win rate of the first judge."""

    rounds: list[RoundEntry]
    truth_name: str
    proxy_name: str
    kl_name: str


def check_start(sft: Source, ppo_config: str, rounds: int) -> None:
    """Refuse, before anything runs, settings that would fail in round 2, where PPO starts from an adapter.

    Raises:
        InputError: if the SFT model is a reward adapter, or a full model that PPO would train whole.
    """
    if sft.is_reward_adapter:
        raise InputError(f"--model_name_or_path {sft.name}: is a reward adapter; round 1 starts from a language model.")
    settings = yaml.safe_load(Path(ppo_config).read_text(encoding="utf-8")) or {}
    if rounds > 1 and sft.adapter is None and not settings.get("use_peft"):
        raise InputError(
            f"--ppo_config {ppo_config}: trains {sft.name} whole (use_peft is not true), and round 2 can only start "
            "from an adapter. Set use_peft: true there, or give an SFT adapter as --model_name_or_path."
        )


def check_reward_functions(stage: tuple[Any, ...], config: str) -> None:
    """Refuse reward models and functions that a stage would not find.

    Args:
        stage: its dataclasses of flags.
        config: the flag that names their file.

    Raises:
        InputError: naming the file and the reward.
    """
    for part in stage:
        for flag in ("reward_funcs", "eval_reward_funcs"):
            judge = part if isinstance(part, JudgeArguments) else None
            resolve_reward_functions(getattr(part, flag, None), f"{config}: {flag}", judge=judge)


def gather_comparisons(rounds: list[Path], target: Path) -> dict[str, int]:
    """Join the preference pairs of all rounds into train.jsonl and test.jsonl.

    Training pairs whose prompt is held out in any round are dropped.

    Returns:
        number of pairs by split.

    Raises:
        InputError: if nothing is left to train on.
    """
    splits: dict[str, list[dict[str, Any]]] = {}  # rows of train.jsonl and test.jsonl
    for split in ("train", "test"):
        files = [folder / "preferences" / f"{split}.jsonl" for folder in rounds]
        splits[split] = [row for file in files for row in read_jsonl(file)]
    held_out = {json.dumps(row["prompt"]) for row in splits["test"]}
    found = len(splits["train"])
    splits["train"] = [row for row in splits["train"] if json.dumps(row["prompt"]) not in held_out]
    if len(splits["train"]) < found:
        print(f"{target}: left out {found - len(splits['train'])} training pairs with held-out prompts.")
    if not splits["train"]:
        raise InputError(
            f"{target}: no pair is left to train on, because every prompt is held out. Give other prompts."
        )
    for split, rows in splits.items():
        write_jsonl(target / f"{split}.jsonl", rows)
    return {split: len(rows) for split, rows in splits.items()}


def summarize_rounds(output_dir: str, count: int) -> RoundsSummary:
    """Summarize rounds 0 to `count` from the newest comparison, and write the summary to rounds.json."""
    folder = Path(output_dir)
    results = read_json(folder / f"round-{count}" / "comparison" / "results.json")
    first = results["models"]["sft"]
    truth = "gold_score" if "gold_score" in first else next((n for n in first if n.startswith("win_rate/")), "")
    entries: list[RoundEntry] = []
    for number in range(count + 1):
        name = _name(number)
        cells = results["models"][name]
        entry: RoundEntry = {
            "round": number, "truth": cells.get(truth), "proxy": cells.get("reward_score"), "kl": cells["kl"],
        }  # fmt: skip
        if number:
            reward = read_json(folder / f"round-{number}" / "reward" / RUN_FILE)
            pairs = folder / f"round-{number}" / "comparisons" / "train.jsonl"
            entry["comparisons"] = sum(1 for _ in pairs.open(encoding="utf-8"))
            entry["reward_accuracy"] = reward["metrics"]["eval_accuracy"]
            entry["difference"] = results["differences"][f"{name}_minus_{_name(number - 1)}"].get(truth)
        entries.append(entry)
    summary: RoundsSummary = {
        "rounds": entries, "truth_name": truth, "proxy_name": "score of the newest reward model",
        "kl_name": "KL to SFT, nats",
    }  # fmt: skip
    write_json(folder / ROUNDS_FILE, summary)
    return summary


def _name(number: int) -> str:
    """The name of a round's policy in the comparison."""
    return f"round_{number}" if number else "sft"


def round_verdicts(summary: RoundsSummary) -> list[str]:
    """One sentence per round: is it significantly better than the round before?"""
    sentences = []
    for entry in summary["rounds"][1:]:
        change = entry["difference"]
        if change is None:
            continue
        before = "SFT" if entry["round"] == 1 else f"round {entry['round'] - 1}"
        better, worse = change["low"] > 0, change["high"] < 0
        verb = "beats" if better else "is worse than" if worse else "does not differ significantly from"
        sentences.append(
            f"Round {entry['round']} {verb} {before} in {summary['truth_name']} on held-out prompts: "
            f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]; "
            f"the 95% interval {'excludes' if better or worse else 'includes'} 0."
        )
    return sentences
