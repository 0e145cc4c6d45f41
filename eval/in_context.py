"""In-context learning: accuracy without examples, with one, and with a few, through the lm-eval harness.

    accelerate launch eval/in_context.py
    accelerate launch eval/in_context.py --model_name_or_path outputs/sft --tasks sentiment question --num_fewshot 0 8
    accelerate launch eval/in_context.py --tasks arc_easy hellaswag --limit 200 --model_name_or_path Qwen/Qwen2.5-0.5B
    accelerate launch eval/in_context.py --dataset_name my.jsonl --templates my.yaml --tasks mine.yaml starter

Needs `pip install -e '.[eval]'`. Without arguments it reads recipes/configs/in_context.yaml: the starter model on the
starter's tasks. --tasks takes their names, `starter` for all of them, names that lm-eval knows (their data comes from
the Hub) and YAML files in its format. Answers are ranked by log-likelihood (FLAN's rank classification).

For zero-shot accuracy before and after instruction tuning, run the untuned model first, then the tuned one with the
first run as --baseline_dir. Prompts are then written with all templates, in the form that the model was tuned on:

    accelerate launch eval/in_context.py --tasks reverse_words upper_case replace_word --num_fewshot 0 \
        --num_templates 10 --include_options true --apply_chat_template true --output_dir outputs/before
    (the same with --model_name_or_path outputs/sft-without-copying --baseline_dir outputs/before --output_dir ...)

Writes results.json (`tasks.<task>.<number of examples>`, `clusters`, `differences` between most and no examples, and
`against_baseline`, each {mean, low, high, n}), every answer in answers-<number of examples>.jsonl, in_context.png and
report.html. Intervals are 95% bootstrap intervals over test rows, and differences are paired. They don't cover the
choice of examples, which ten consecutive test rows share. After an interruption the same command continues.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__, baseline_dir="no such folder. Give that of a finished run.")

import dataclasses
import functools
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from trl import ModelConfig, ScriptArguments

from eval.report import write_report
from eval.stats.intervals import Interval, JsonObject
from rlhf.data.encoding import is_seq2seq
from rlhf.errors import InputError, report_errors
from rlhf.hub import public_base
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.run.files import write_json
from rlhf.run.folders import command, finish_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import PositiveInt, Range, Seed
from rlhf.starter.model import STARTER
from rlhf.starter.tasks import TASKS
from rlhf.tasks.instructions import TaskArguments, load_tasks, word_instructions

POOL = 200  # training rows per task that examples are drawn from


@dataclass
class InContextArguments:
    """What is asked, and with how many examples. rlhf.tasks.instructions.TaskArguments says which tasks."""

    output_dir: str = field(default="outputs/in-context", metadata={"help": "Folder for results.json and answers."})
    num_fewshot: list[Annotated[int, Range(low=0, high=POOL)]] = field(
        default_factory=lambda: [0, 1, 4, 8], metadata={"help": "Numbers of examples."}
    )
    limit: PositiveInt = field(default=100, metadata={"help": "Largest number of test rows per task."})
    num_templates: PositiveInt = field(
        default=1, metadata={"help": "How many of a task's templates are used, in turn."}
    )
    apply_chat_template: bool = field(default=False, metadata={"help": "Write prompts as turns of a chat."})
    baseline_dir: str | None = field(
        default=None, metadata={"help": "Finished run of another model on the same rows: adds paired differences."}
    )
    per_device_eval_batch_size: PositiveInt = field(default=16, metadata={"help": "Answers to score at once."})
    seed: Seed = field(default=42, metadata={"help": "Seed of the rows, the examples and the bootstrap."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})


def print_accuracies(results: JsonObject) -> None:
    """Print accuracy by number of examples, whether examples help, and differences to a baseline."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    numbers = [str(number) for number in results["num_fewshot"]]
    gains = {task: Interval.from_json(gain) for task, gain in results["differences"].items()}
    more = (f"{numbers[-1]} − {numbers[0]}", "examples help?") if gains else ()
    table = Table("task", "chance", *numbers, *more, title="Accuracy by number of examples; means with 95% intervals")
    for task, cells in results["tasks"].items():
        chance = results["chance"].get(task)
        table.add_row(
            task, "" if chance is None else f"{chance:.0%}",
            *(f"{Interval.from_json(cells[number]):.1%}" for number in numbers),
            *((f"{gains[task]:.1%}", verdict(gains[task])) if gains else ()),
        )  # fmt: skip
    console.print(table)
    if gains:
        better = [gain for gain in gains.values() if gain.mean > 0]
        worse = [gain for gain in gains.values() if gain.mean < 0]
        print(
            f"{numbers[-1]} examples beat {numbers[0]} on {len(better)} of {len(gains)} tasks (significantly on "
            f"{sum(gain.excludes_zero for gain in better)}); they are worse on {len(worse)} (significantly on "
            f"{sum(gain.excludes_zero for gain in worse)}). Significantly: the 95% interval excludes 0."
        )
    for kind, rows in results.get("against_baseline", {}).items():
        for name, cells in rows.items():
            for number, gain in cells.items():
                difference = f"{Interval.from_json(gain):.1%}"
                print(f"{kind} {name}, {number} examples: {difference} against {results['baseline']}")


def verdict(gain: Interval) -> str:
    """Whether examples help.

    >>> verdict(Interval(0.2, 0.1, 0.3)), verdict(Interval(-0.1, -0.3, 0.1))
    ('yes', 'no, not significant')
    """
    if gain.mean == 0:
        return "equal"
    word = "yes" if gain.mean > 0 else "no"
    return word if gain.excludes_zero else f"{word}, not significant"


def check_in_context(args: InContextArguments) -> None:
    """Refuse impossible numbers and a missing baseline, and say how to install lm-eval if it is missing.

    Args:
        args: its `num_fewshot` is in order.
    """
    if not args.num_fewshot:
        raise InputError(f"--num_fewshot: give numbers from 0 to {POOL}.")
    for number in args.num_fewshot if args.baseline_dir else []:
        file = Path(args.baseline_dir or "") / f"answers-{number}.jsonl"
        if not file.exists():
            raise InputError(
                f"--baseline_dir {args.baseline_dir}: has no {file.name}. Give a finished run with --num_fewshot "
                f"{number} among others."
            )
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise InputError("eval/in_context.py needs lm-eval. Install it with: pip install -e '.[eval]'") from None


def is_starter_task(task: str) -> bool:
    return task in {STARTER, *TASKS}


def word_questions(
    script_args: ScriptArguments, task_args: TaskArguments, args: InContextArguments
) -> dict[str, dict[str, list[JsonObject]]]:
    """The prompts of the starter's tasks and the user's own: by task, then by split (`train`, `test`).

    Raises:
        InputError: if a task has fewer training rows than --num_fewshot asks for.
    """
    if task_args.tasks == [] and script_args.dataset_name in (None, STARTER):
        return {}
    tasks = load_tasks(script_args, task_args, POOL, args.limit, args.seed)
    for task in tasks:
        if len(task.train) < args.num_fewshot[-1]:
            raise InputError(
                f"--num_fewshot {args.num_fewshot[-1]}: task {task.name!r} has {len(task.train)} training rows to draw "
                "examples from. Give at most as many."
            )
    word = functools.partial(
        word_instructions, num_templates=args.num_templates, include_options=task_args.include_options
    )
    return {task.name: {"train": word(task, task.train), "test": word(task, task.test)} for task in tasks}


def main() -> None:
    script_args, task_args, args, model_args = parse(
        __file__, ScriptArguments, TaskArguments, InContextArguments, ModelConfig
    )
    need_one_process(__file__)
    args.num_fewshot = sorted(set(args.num_fewshot))
    check_in_context(args)
    from eval.measuring import harness  # takes seconds, so mistakes above answer first

    trust = args.trust_remote_code
    source = resolve(model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=trust)
    names = task_args.tasks
    others = harness.find_tasks([name for name in names or [] if not is_starter_task(name)])
    ours = None if names is None else [name for name in names if is_starter_task(name)]
    rows = word_questions(script_args, dataclasses.replace(task_args, tasks=ours), args)
    baseline = harness.read_answers(args.baseline_dir, args.num_fewshot, rows) if args.baseline_dir else None
    tokenizer = load_tokenizer(source)
    if is_seq2seq(tokenizer):
        raise InputError(
            f"--model_name_or_path {source.name}: is an encoder-decoder; examples in the context are read by decoders. "
            "Give a decoder."
        )
    if not start_run(__file__, args.output_dir, script_args, task_args, args, model_args):
        return

    folder = Path(args.output_dir)
    model = load_causal_lm(source, model_args, tokenizer, trainable=False).eval()
    lm = harness.SharedPrefixLM(model, tokenizer, args.per_device_eval_batch_size)
    configs = [harness.write_task(name, splits, folder / "tasks") for name, splits in rows.items()]
    how = {"limit": args.limit, "apply_chat_template": args.apply_chat_template, "seed": args.seed}
    answers = {k: harness.answer(lm, [*configs, *others], k, folder, **how) for k in args.num_fewshot}
    gains = harness.compare_with_baseline(answers, baseline, args.seed) if baseline else {}
    results = {
        "model": public_base(source.name),
        "num_fewshot": args.num_fewshot,
        **harness.summarize_answers(answers, args.seed),
        "chance": {
            name: sum(1 / len(row["choices"]) for row in splits["test"]) / len(splits["test"])
            for name, splits in rows.items()
        },
        **({"baseline": Path(args.baseline_dir).name, "against_baseline": gains} if args.baseline_dir else {}),
        "commands": [command(__file__)],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "lm_eval")},
    }
    write_json(folder / "results.json", results)
    print_accuracies(results)
    print(f"Written: {folder / 'results.json'} and answers")
    finish_run(args.output_dir, {})
    write_report(args.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
