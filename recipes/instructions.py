"""Instruction tuning data: templates turn labelled tasks into instructions, which are mixed for sft.py.

    accelerate launch recipes/instructions.py
    accelerate launch recipes/instructions.py --held_out_clusters copying --output_dir outputs/without-copying
    accelerate launch recipes/sft.py --dataset_name outputs/without-copying --output_dir outputs/sft-without-copying
    accelerate launch recipes/instructions.py --dataset_name my.jsonl --templates my.yaml --tasks starter

Without arguments it reads recipes/configs/instructions.yaml: the sixteen tasks of rlhf/starter/tasks.py, ten templates
each (rlhf/tasks/templates/). Your own task is a dataset with a column `label` and a YAML file of templates (format:
rlhf/tasks/instructions.py). Tasks are mixed as in FLAN, §2.3 (https://arxiv.org/abs/2109.01652): in proportion to their
number of examples, with a cap. Clusters named by --held_out_clusters are excluded from training, so that
eval/in_context.py can measure a model on a kind of task it has never seen. No model is needed.

Output: train.jsonl and test.jsonl with `prompt` and `completion` (messages), `task`, `cluster` and `template`.
held_out.jsonl has the rows of held-out clusters.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from trl import ScriptArguments

from eval.report import write_report
from rlhf.errors import report_errors
from rlhf.run.files import write_jsonl
from rlhf.run.folders import finish_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import PositiveInt, Seed
from rlhf.tasks.instructions import TaskArguments, as_conversation, hold_out, load_tasks, word_instructions


@dataclass
class InstructionArguments:
    """How tasks are mixed. rlhf.tasks.instructions.TaskArguments says which tasks."""

    output_dir: str = field(default="outputs/instructions", metadata={"help": "Folder for train.jsonl and test.jsonl."})
    held_out_clusters: list[str] = field(default_factory=list, metadata={"help": "Clusters to exclude from training."})
    max_examples_per_task: PositiveInt = field(
        default=400, metadata={"help": "Largest number of training rows per task."}
    )
    max_test_examples_per_task: PositiveInt = field(
        default=20, metadata={"help": "Largest number of test rows per task."}
    )
    num_templates: PositiveInt | None = field(default=None, metadata={"help": "Templates per task; default: all."})
    seed: Seed = field(default=42, metadata={"help": "Seed of the tasks' rows and of their order."})


def main() -> None:
    # Arguments
    script_args, task_args, args = parse(__file__, ScriptArguments, TaskArguments, InstructionArguments)
    need_one_process(__file__)

    # Data
    tasks = load_tasks(
        script_args, task_args, args.max_examples_per_task, args.max_test_examples_per_task, seed=args.seed
    )
    trained_on, held_out = hold_out(tasks, args.held_out_clusters)
    wording = {"num_templates": args.num_templates, "include_options": task_args.include_options}
    rows = {
        "train": [row for task in trained_on for row in word_instructions(task, task.train, **wording)],
        "test": [row for task in trained_on for row in word_instructions(task, task.test, **wording)],
        "held_out": [row for task in held_out for row in word_instructions(task, task.test, **wording)],
    }
    if not start_run(__file__, args.output_dir, script_args, task_args, args):
        return
    random.Random(args.seed).shuffle(rows["train"])  # for trainers that don't shuffle

    # Save, report
    for split, instructions in rows.items():
        if instructions:
            write_jsonl(Path(args.output_dir) / f"{split}.jsonl", [as_conversation(row) for row in instructions])
    counts = Counter((row["cluster"], row["task"]) for row in rows["train"])
    for (cluster, task), count in counts.items():
        print(f"{cluster:12} {task:16} {count:6} rows, {count / len(rows['train']):.1%}")
    print(
        f"{args.output_dir}: {len(rows['train'])} instructions to train on, {len(rows['test'])} to test, "
        f"{len(rows['held_out'])} of held-out clusters ({', '.join(args.held_out_clusters) or 'none'})."
    )
    finish_run(args.output_dir, {f"{split} rows": len(instructions) for split, instructions in rows.items()})
    write_report(args.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
