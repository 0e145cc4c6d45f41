"""Rounds of the closed loop: each stage is a recipe in a process of its own, and what they reached side by side."""

import json
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import InputError
from rlhf.models.sources import Source
from rlhf.run.files import read_json, read_jsonl, write_json, write_jsonl
from rlhf.run.folders import RUN_FILE

ROUNDS_FILE = "rounds.json"


def check_start(sft: Source, ppo_config: str, rounds: int) -> None:
    """Refuse, before anything runs, what could not go on in round 2: PPO goes on from adapter to adapter.

    Raises:
        InputError: if the SFT model is a full one and PPO would train it whole.
    """
    settings = yaml.safe_load(Path(ppo_config).read_text(encoding="utf-8")) or {}
    if rounds > 1 and sft.adapter is None and not settings.get("use_peft"):
        raise InputError(
            f"--ppo_config {ppo_config}: trains {sft.name} whole (use_peft is not true), and round 2 goes on from an "
            "adapter only. Set use_peft: true there, or give an SFT adapter as --model_name_or_path."
        )


def gather_comparisons(rounds: list[Path], target: Path) -> dict[str, int]:
    """Join the preference pairs of all rounds into train.jsonl and test.jsonl.

    What any round holds out isn't trained on: training pairs with such a prompt are left out.

    Returns:
        number of pairs by split.

    Raises:
        InputError: if nothing is left to train on.
    """
    splits: dict[str, list[dict[str, Any]]] = {}
    for split in ("train", "test"):
        files = [folder / "preferences" / f"{split}.jsonl" for folder in rounds]
        splits[split] = [row for file in files for row in read_jsonl(file)]
    held_out = {json.dumps(row["prompt"]) for row in splits["test"]}
    found = len(splits["train"])
    splits["train"] = [row for row in splits["train"] if json.dumps(row["prompt"]) not in held_out]
    if len(splits["train"]) < found:
        print(f"{target}: left out {found - len(splits['train'])} training pairs whose prompt is held out.")
    if not splits["train"]:
        raise InputError(f"{target}: no pair is left to train on: every prompt is held out too. Give other prompts.")
    for split, rows in splits.items():
        write_jsonl(target / f"{split}.jsonl", rows)
    return {split: len(rows) for split, rows in splits.items()}


def summarize_rounds(output_dir: str, count: int) -> dict[str, Any]:
    """What each round reached on held-out prompts, from the newest comparison; written to rounds.json.

    The truth is the gold score where there is one, else the win rate of the first judge.

    Returns:
        `rounds`: the SFT model as round 0, then each round, with cells {mean, low, high} `truth`, `proxy` (score of the
        newest reward model) and `kl`, and from round 1 on `comparisons`, `reward_accuracy` and `difference` in the
        truth to the round before.
    """
    folder = Path(output_dir)
    results = read_json(folder / f"round-{count}" / "comparison" / "results.json")
    first = results["models"]["sft"]
    truth = "gold_score" if "gold_score" in first else next((n for n in first if n.startswith("win_rate/")), "")
    entries: list[dict[str, Any]] = []
    for number in range(count + 1):
        name = _name(number)
        cells = results["models"][name]
        entry = {"round": number, "truth": cells.get(truth), "proxy": cells.get("reward_score"), "kl": cells["kl"]}
        if number:
            reward = read_json(folder / f"round-{number}" / "reward" / RUN_FILE)
            pairs = folder / f"round-{number}" / "comparisons" / "train.jsonl"
            entry["comparisons"] = sum(1 for _ in pairs.open(encoding="utf-8"))
            entry["reward_accuracy"] = reward["metrics"]["eval_accuracy"]
            entry["difference"] = results["differences"][f"{name}_minus_{_name(number - 1)}"].get(truth)
        entries.append(entry)
    names = {"truth_name": truth, "proxy_name": "score of the newest reward model", "kl_name": "KL to SFT, nats"}
    summary = {"rounds": entries, **names}
    write_json(folder / ROUNDS_FILE, summary)
    return summary


def _name(number: int) -> str:
    """What a round's policy is called in the comparison."""
    return f"round_{number}" if number else "sft"


def round_verdicts(summary: dict[str, Any]) -> list[str]:
    """One sentence per round: does it beat the one before beyond doubt?"""
    sentences = []
    for entry in summary["rounds"][1:]:
        change = entry["difference"]
        if change is None:
            continue
        before = "SFT" if entry["round"] == 1 else f"round {entry['round'] - 1}"
        verb = "beats" if change["low"] > 0 else "is worse than" if change["high"] < 0 else "does not beat beyond doubt"
        sentences.append(
            f"Round {entry['round']} {verb} {before} in {summary['truth_name']} on held-out prompts: "
            f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]."
        )
    return sentences
