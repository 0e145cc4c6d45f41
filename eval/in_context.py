"""In-context learning: accuracy without examples, with one, and with a few, through the lm-eval harness.

    accelerate launch eval/in_context.py
    accelerate launch eval/in_context.py --model_name_or_path outputs/sft --tasks sentiment question --num_fewshot 0 8
    accelerate launch eval/in_context.py --tasks arc_easy hellaswag --limit 200 --model_name_or_path Qwen/Qwen2.5-0.5B
    accelerate launch eval/in_context.py --dataset_name my.jsonl --templates my.yaml --tasks mine.yaml starter

Needs `pip install -e '.[eval]'`. Without arguments it reads recipes/configs/in_context.yaml: the starter model on the
starter's tasks. --tasks takes their names, `starter` for all of them, names that lm-eval knows (their data comes from
the Hub) and YAML files in its format. Answers are ranked by log-likelihood (FLAN's rank classification).

For zero-shot accuracy before and after instruction tuning, run the untuned model first, then the tuned one with it as
the --baseline_dir; prompts are worded with all templates, in the form that the model was tuned on:

    accelerate launch eval/in_context.py --tasks reverse_words upper_case replace_word --num_fewshot 0 \
        --num_templates 10 --include_options true --apply_chat_template true --output_dir outputs/before
    (the same with --model_name_or_path outputs/sft-without-copying --baseline_dir outputs/before --output_dir ...)

Writes results.json (`tasks.<task>.<number of examples>`, `clusters`, `differences` between most and no examples, and
`against_baseline`, each {mean, low, high, n}), every answer in answers-<number of examples>.jsonl, in_context.png and
report.html. Intervals are 95% bootstrap intervals over test rows, and differences are paired. They don't cover which
examples are drawn: ten test rows in a row share theirs. The same command goes on after an interruption.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from trl import ModelConfig, ScriptArguments

from eval.report import write_report
from rlhf.errors import InputError, need_at_least, report_errors
from rlhf.hub import public_base
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.run.files import write_json
from rlhf.run.folders import command, finish_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.starter.model import STARTER
from rlhf.starter.tasks import TASKS
from rlhf.tasks.instructions import TaskArguments, load_tasks, word_instructions

POOL = 200  # training rows per task that examples are drawn from


@dataclass
class InContextArguments:
    """What is asked, and with how many examples. Which tasks: rlhf.tasks.instructions.TaskArguments."""

    output_dir: str = field(default="outputs/in-context", metadata={"help": "Folder for results.json and answers."})
    num_fewshot: list[int] = field(default_factory=lambda: [0, 1, 4, 8], metadata={"help": "Numbers of examples."})
    limit: int = field(default=100, metadata={"help": "Test rows per task, at most."})
    num_templates: int = field(default=1, metadata={"help": "The first so many templates of a task, taken in turn."})
    apply_chat_template: bool = field(default=False, metadata={"help": "Prompts and examples as turns of a chat."})
    baseline_dir: str | None = field(
        default=None, metadata={"help": "Finished run of another model on the same rows: adds paired differences."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Answers to score at once."})
    seed: int = field(default=42, metadata={"help": "Seed of the rows, the examples and the bootstrap."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})


def print_accuracies(results: dict[str, Any]) -> None:
    """Accuracy by number of examples, whether they help, and how a baseline did."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    numbers = [str(number) for number in results["num_fewshot"]]
    table = Table(title="Accuracy by number of examples; means with 95% intervals")
    gains = results["differences"]
    for heading in (
        "task",
        "chance",
        *numbers,
        *((f"{numbers[-1]} − {numbers[0]}", "examples help?") if gains else ()),
    ):
        table.add_column(heading)
    for task, cells in results["tasks"].items():
        chance = results["chance"].get(task)
        table.add_row(
            task, "" if chance is None else f"{chance:.0%}", *(shown(cells[number]) for number in numbers),
            *((shown(gains[task]), verdict(gains[task])) if gains else ()),
        )  # fmt: skip
    console.print(table)
    if gains:
        verdicts = [verdict(gain) for gain in gains.values()]
        print(
            f"{numbers[-1]} examples beat {numbers[0]} on {sum(v.startswith('yes') for v in verdicts)} of "
            f"{len(verdicts)} tasks (beyond doubt on {verdicts.count('yes')}); they are worse on "
            f"{sum(v.startswith('no') for v in verdicts)} (beyond doubt on {verdicts.count('no')})."
        )
    for kind, rows in results.get("against_baseline", {}).items():
        for name, cells in rows.items():
            for number, gain in cells.items():
                print(f"{kind} {name}, {number} examples: {shown(gain)} against {results['baseline']}")


def shown(cell: dict[str, Any]) -> str:
    return f"{cell['mean']:.1%} [{cell['low']:.1%}, {cell['high']:.1%}]"


def verdict(gain: dict[str, Any]) -> str:
    """`yes` and `no` where the interval excludes 0."""
    if gain["mean"] == 0:
        return "equal"
    word, sure = ("yes", gain["low"] > 0) if gain["mean"] > 0 else ("no", gain["high"] < 0)
    return word if sure else f"{word}, within doubt"


def check(args: InContextArguments) -> None:
    """Refuse numbers that can't be, and say how to install lm-eval if it isn't there."""
    args.num_fewshot = sorted(set(args.num_fewshot))
    if not args.num_fewshot or args.num_fewshot[0] < 0 or args.num_fewshot[-1] > POOL:
        raise InputError(f"--num_fewshot {args.num_fewshot}: give numbers from 0 to {POOL}.")
    need_at_least(args, limit=1, num_templates=1, per_device_eval_batch_size=1)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise InputError("eval/in_context.py needs lm-eval. Install it with: pip install -e '.[eval]'") from None


def is_ours(task: str) -> bool:
    return task in {STARTER, *TASKS}


def questions(
    script_args: ScriptArguments, task_args: TaskArguments, args: InContextArguments
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The worded rows, `train` and `test`, of the starter's tasks and the user's own, by task.

    Raises:
        InputError: if a task has fewer training rows than examples are asked for.
    """
    if task_args.tasks == [] and script_args.dataset_name in (None, STARTER):
        return {}
    wording: dict[str, Any] = {"num_templates": args.num_templates, "include_options": task_args.include_options}
    tasks = load_tasks(script_args, task_args, POOL, args.limit, args.seed)
    for task in tasks:
        if len(task.train) < args.num_fewshot[-1]:
            raise InputError(
                f"--num_fewshot {args.num_fewshot[-1]}: task {task.name!r} has {len(task.train)} training rows to draw "
                "examples from. Give at most as many."
            )
    return {
        task.name: {
            "train": word_instructions(task, task.train, **wording),
            "test": word_instructions(task, task.test, **wording),
        }
        for task in tasks
    }


def main() -> None:
    script_args, task_args, args, model_args = parse(
        __file__, ScriptArguments, TaskArguments, InContextArguments, ModelConfig
    )
    need_one_process(__file__)
    check(args)
    from eval.measuring import harness  # takes seconds, so mistakes above answer first

    source = resolve(model_args.model_name_or_path, revision=model_args.model_revision)
    names = task_args.tasks
    others = harness.find_tasks([name for name in names or [] if not is_ours(name)])
    ours = None if names is None else [name for name in names if is_ours(name)]
    rows = questions(script_args, dataclasses.replace(task_args, tasks=ours), args)
    baseline = harness.read_answers(args.baseline_dir, args.num_fewshot, rows) if args.baseline_dir else None
    tokenizer = load_tokenizer(source, trust_remote_code=args.trust_remote_code)
    if not start_run(__file__, args.output_dir, script_args, task_args, args, model_args):
        return

    folder = Path(args.output_dir)
    model = load_causal_lm(
        source, model_args, tokenizer, trainable=False, trust_remote_code=args.trust_remote_code
    ).eval()
    lm = harness.SharedPrefixLM(model, tokenizer, args.per_device_eval_batch_size)
    configs = [harness.write_task(name, splits, folder / "tasks") for name, splits in rows.items()]
    answers = {k: harness.answer(lm, [*configs, *others], k, args) for k in args.num_fewshot}
    results = {
        "model": public_base(source.name),
        "num_fewshot": args.num_fewshot,
        **harness.summarize_answers(answers, args.seed),
        "chance": {
            name: sum(1 / len(row["choices"]) for row in splits["test"]) / len(splits["test"])
            for name, splits in rows.items()
        },
        **({"baseline": Path(args.baseline_dir).name, "against_baseline": harness.against(answers, baseline, args.seed)}
           if baseline else {}),
        "commands": [command(__file__)],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "lm_eval")},
    }  # fmt: skip
    write_json(folder / "results.json", json.loads(json.dumps(results)))
    print_accuracies(results)
    print(f"Written: {folder / 'results.json'} and answers")
    finish_run(args.output_dir, {})
    print(f"Report: {write_report(args.output_dir)}")


if __name__ == "__main__":
    with report_errors():
        main()
