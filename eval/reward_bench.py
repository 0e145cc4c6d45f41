"""RewardBench: how often a reward model scores the better reply higher, by category.

    accelerate launch eval/reward_bench.py --reward_model_path outputs/reward --dataset_name allenai/reward-bench
    accelerate launch eval/reward_bench.py --reward_model_path outputs/reward --dataset_name mine.jsonl

The rows are those of RewardBench (`prompt`, `chosen`, `rejected`, `subset`) or of RewardBench 2, where `chosen` and
`rejected` are lists; without --dataset_name RewardBench 2 from the Hub. A prompt is text, read as a user's message, or
messages. Sections, weights and the score of Ties are the published ones (eval/measuring/reward_bench.py); other subsets
are categories of their own. Writes reward_bench.json ({mean, low, high, n} of each; intervals are bootstrapped over
rows), scores.jsonl, and a picture.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table
from trl import ModelConfig, ScriptArguments

from eval.drawing.tables import reward_bench_rows
from eval.measuring.reward_bench import Item, accuracy_of_choices, accuracy_of_pairs, read_items
from eval.report import write_report
from rlhf.comparisons import as_message
from rlhf.data.datasets import load_first_split
from rlhf.errors import InputError, report_errors
from rlhf.models.sources import refuse_single_model
from rlhf.rewards import RewardFunction, call_rewards, load_reward, resolve_reward, total_scores
from rlhf.run.files import write_json, write_jsonl
from rlhf.run.folders import finish_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import PositiveInt

REWARD_BENCH_FILE = "reward_bench.json"


@dataclass
class RewardBenchArguments:
    """Which reward model is measured."""

    reward_model_path: str | None = field(
        default=None, metadata={"help": "Reward model: adapter or full model, folder or Hub id."}
    )
    output_dir: str = field(default="outputs/reward-bench", metadata={"help": "Folder for the results."})
    per_device_eval_batch_size: PositiveInt = field(default=16, metadata={"help": "Replies to score at once."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})


def score_items(function: RewardFunction, items: list[Item]) -> list[list[float]]:
    """The scores of each item's replies."""
    prompts = [item.prompt for item in items for _ in item.replies]
    completions = [as_message(item.prompt, reply) for item in items for reply in item.replies]
    answers = call_rewards([function], prompts, completions, [[] for _ in completions])
    scores = iter(total_scores([function], answers, [1.0], completions))
    return [[*islice(scores, len(item.replies))] for item in items]


def main() -> None:
    # Arguments
    script_args, args, model_args = parse(__file__, ScriptArguments, RewardBenchArguments, ModelConfig)
    need_one_process(__file__)
    refuse_single_model(model_args)
    if args.reward_model_path is None:
        raise InputError("--reward_model_path: name the reward model, a folder or a Hub id.")
    source = resolve_reward(args.reward_model_path, trust_remote_code=args.trust_remote_code)

    # Data
    name = script_args.dataset_name = script_args.dataset_name or "allenai/reward-bench-2"
    split = script_args.dataset_test_split
    # RewardBench's own is filtered, and that of a file is train
    rows = load_first_split(script_args, ["test", "filtered", "train"] if split == "test" else [split])
    items, several = read_items(rows, name)
    if not start_run(__file__, args.output_dir, script_args, args, model_args):
        return

    # Accuracy
    scores = score_items(load_reward(source, model_args, batch_size=args.per_device_eval_batch_size), items)
    found = (accuracy_of_choices if several else accuracy_of_pairs)(items, scores)
    parts = {"categories": found.categories, "subsets": found.subsets}
    results = {
        "model": Path(source.name).name,
        "replies": "lists" if several else "pairs",
        "overall": found.overall and found.overall.to_json(),
        **{part: {key: cell.to_json() for key, cell in cells.items()} for part, cells in parts.items()},
    }
    output = Path(args.output_dir)
    write_json(output / REWARD_BENCH_FILE, results)
    write_jsonl(output / "scores.jsonl", [
        {"id": item.id, "subset": item.subset, "num_correct": item.num_correct, "scores": own}
        for item, own in zip(items, scores, strict=True)
    ])  # fmt: skip

    # Report
    heading, lines = reward_bench_rows(results)
    table = Table(*heading, title=f"{results['model']} on {len(items)} prompts of {Path(name).name}; 95% intervals")
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    finish_run(args.output_dir, {key: cell.mean for key, cell in found.categories.items()})
    write_report(args.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
