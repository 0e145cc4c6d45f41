"""Two rewards at once: how models that weigh them differently score by both, and which of them no other dominates.

    accelerate launch eval/front.py --models sft=outputs/sft ppo=outputs/ppo kind=outputs/kind
    accelerate launch eval/front.py --models a=outputs/a b=outputs/b --dataset_name my.jsonl \
        --reward_funcs outputs/reward my_rewards.short

Each model replies once to each held-out prompt, with the same seed, and both --reward_funcs score every reply (for the
starter's data by default its own scorer and kindness, rlhf.starter.kindness.kind). Prompts on which a reward has no
opinion don't count for it. Writes front.json:

- `models.<name>`: mean scores, a cell {mean, low, high, n} for each reward, bootstrapped over prompts;
- `differences.<name>_minus_<first>`: the same of differences to the first model, paired by prompt;
- `front`: the models that no other dominates, that is, is as good as by both rewards and better than by one;
- `disagreement`: the reply whose ranks by the two rewards differ most.

Also writes samples.jsonl, with both scores of each reply, and a picture.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table
from trl import ModelConfig

from eval.drawing.figures import front_figure, save_figure
from eval.drawing.tables import disagreement_line, front_rows
from eval.measuring.front import front_of, largest_disagreement, score_by_each
from eval.measuring.replies import Replies, sample_replies, use_model
from eval.report import write_report
from eval.stats.intervals import JsonObject
from rlhf.comparisons import Prompt
from rlhf.data.datasets import DatasetArguments, load_test_split
from rlhf.data.rows import prompt_rows
from rlhf.errors import InputError, report_errors
from rlhf.models.generation import Sampling
from rlhf.models.sources import Source, context_length, named_models, refuse_single_model, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards import (
    JUDGE,
    JudgeArguments,
    RewardSource,
    load_reward,
    resolve_reward_functions,
    reward_columns,
    reward_names,
)
from rlhf.rewards.judge import refuse_judge_flags
from rlhf.run.files import write_json, write_jsonl
from rlhf.run.folders import finish_run, history_of, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import PositiveInt, Seed, Temperature
from rlhf.starter.model import STARTER

STARTER_REWARDS = [STARTER, "rlhf.starter.kindness.kind"]


@dataclass
class FrontArguments(JudgeArguments):
    """Which models are scored, and by what."""

    models: list[str] = field(
        default_factory=list, metadata={"help": "name=model pairs; differences are to the first."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Two rewards: reward models (folder or Hub id), import paths of functions, or 'judge'."},
    )
    output_dir: str = field(default="outputs/two-rewards", metadata={"help": "Folder for the results."})
    max_new_tokens: PositiveInt = field(default=32, metadata={"help": "Longest reply, in tokens."})
    temperature: Temperature = field(default=1.0, metadata={"help": "Sampling temperature."})
    per_device_eval_batch_size: PositiveInt = field(default=64, metadata={"help": "Replies to sample at once."})
    max_prompts: PositiveInt = field(default=400, metadata={"help": "Use at most this many held-out prompts."})
    seed: Seed = field(default=42, metadata={"help": "Seed of sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})


def resolve_two(args: FrontArguments, dataset: str, columns: list[str]) -> list[RewardSource]:
    """The two rewards.

    Args:
        columns: the dataset's.

    Raises:
        InputError: if they are not two, or can't be found, or there are flags of a judge and no judge.
    """
    names = args.reward_funcs or (STARTER_REWARDS if dataset == STARTER else [])
    if len({*names}) != 2 or len(names) != 2:
        found = f"found {len(names)}" if len(names) != 2 else "both are the same"
        raise InputError(f"{' '.join(['--reward_funcs', *names])}: {found}. Give two different rewards.")
    if JUDGE not in names:
        refuse_judge_flags(args)
    trust = args.trust_remote_code
    return resolve_reward_functions(names, "--reward_funcs", columns=columns, trust_remote_code=trust, judge=args)


def reply_to(
    name: str, source: Source, prompts: list[list[int]], sampling: Sampling, model_args: ModelConfig
) -> Replies:
    """One reply of a model to each prompt."""
    return use_model(
        source, model_args, lambda model, tokenizer: sample_replies(model, tokenizer, prompts, 1, sampling, name)
    )


def print_front(results: JsonObject) -> None:
    """The table of means, and the reply that the rewards disagree on most."""
    heading, lines = front_rows(results)
    table = Table(*heading, title="Held-out prompts: mean scores with 95% intervals, and paired differences")
    for line in lines:
        table.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    console.print(disagreement_line(results), markup=False, highlight=False)


def main() -> None:
    # Arguments
    script_args, args, model_args = parse(__file__, DatasetArguments, FrontArguments, ModelConfig)
    need_one_process(__file__)
    refuse_single_model(model_args)
    dataset, trust = script_args.dataset_name, args.trust_remote_code
    models = dict(named_models(args.models, taken=("prompt", "scores")))  # columns of samples.jsonl
    sources = {name: resolve(path, "--models", trust_remote_code=trust) for name, path in models.items()}

    # Data
    test = load_test_split(script_args)
    test = test.select(range(min(len(test), args.max_prompts)))
    rewards = resolve_two(args, dataset, test.column_names)

    # Tokenizer
    rows = {
        name: prompt_rows(test, dataset, load_tokenizer(source), args.max_new_tokens, context_length(source))
        for name, source in sources.items()
    }
    first = rows[next(iter(rows))]
    prompts: list[Prompt] = first["prompt"][:]
    if not start_run(__file__, args.output_dir, script_args, args, model_args):
        return

    # Replies
    sampling = Sampling(args.max_new_tokens, args.temperature, args.per_device_eval_batch_size, args.seed)
    replies = {
        name: reply_to(name, source, rows[name]["input_ids"][:], sampling, model_args)
        for name, source in sources.items()
    }

    # Scores, report
    functions = [load_reward(reward, model_args, batch_size=args.per_device_eval_batch_size) for reward in rewards]
    scores = {name: score_by_each(functions, prompts, own, reward_columns(first)) for name, own in replies.items()}
    rows_of_samples = [
        {"prompt": prompt, **{name: own.texts[number] for name, own in replies.items()},
         "scores": {name: [column[number] for column in columns] for name, columns in scores.items()}}
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    commands, seeds = history_of(list(models.values()))
    results = {
        **front_of(scores, reward_names(functions)),
        "disagreement": largest_disagreement(rows_of_samples),
        "commands": commands,
        "seeds": {**seeds, "front": args.seed},
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    output = Path(args.output_dir)
    write_json(output / "front.json", results)
    write_jsonl(output / "samples.jsonl", rows_of_samples)
    save_figure(front_figure(results), output / "front.png")
    print_front(results)
    print(f"Written: {output / 'front.json'}, samples.jsonl and front.png")
    finish_run(args.output_dir, {})
    write_report(args.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
