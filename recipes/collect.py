"""Collect preferences: sample replies to each prompt, let a labeler compare them, write preference pairs.

    accelerate launch recipes/collect.py
    accelerate launch recipes/collect.py --model_name_or_path outputs/sft --output_dir outputs/preferences
    accelerate launch recipes/collect.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback-prompt --output_dir outputs/preferences-qwen

    accelerate launch recipes/collect.py --labeler human --max_prompts 100 --output_dir outputs/votes

Without arguments it reads recipes/configs/collect.yaml: replies of the starter to its preference prompts, compared by a
simulated labeler who prefers upbeat replies. `--labeler human` opens a page to vote on, `judge` asks a model, `reward`
a reward model or function. Output: train.jsonl and test.jsonl, of different prompts, with `prompt`, `chosen`,
`rejected`, `labeler`, `certainty` and `model`, which recipes/reward.py reads; tasks.jsonl has all sampled replies.
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig

from eval.report import write_report
from rlhf.comparisons import preference_pairs
from rlhf.data.datasets import DatasetArguments, load_splits
from rlhf.data.rows import prompt_rows
from rlhf.errors import need_at_least, report_errors
from rlhf.feedback.labelers import LabelerArguments, check_labeler_kind, make_labeler
from rlhf.feedback.sampling import read_tasks, sample_tasks, write_tasks
from rlhf.hub import push_dataset, take_push_request
from rlhf.models.generation import Sampling
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import context_length, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.run.arguments import parse
from rlhf.run.files import write_jsonl
from rlhf.run.folders import finish_run, start_run
from rlhf.run.processes import need_one_process


@dataclass
class CollectArguments:
    """What is sampled. Who compares: rlhf.feedback.labelers.LabelerArguments."""

    output_dir: str = field(default="outputs/preferences", metadata={"help": "Folder for train.jsonl and test.jsonl."})
    num_generations: int = field(default=4, metadata={"help": "Replies to sample per prompt; at least 2."})
    max_prompts: int | None = field(default=None, metadata={"help": "Use at most this many prompts of each split."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest reply, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Replies to sample at once."})
    seed: int = field(default=42, metadata={"help": "Seed of sampling and of the simulated labeler."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push the pairs to the Hub as a dataset."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Name of the Hub dataset, for example you/pairs."})
    hub_token: str | None = field(default=None, metadata={"help": "Hub token; default: the one you logged in with."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Make the Hub dataset private."})


def main() -> None:
    # Arguments
    script_args, collect_args, labeler_args, model_args = parse(
        __file__, DatasetArguments, CollectArguments, LabelerArguments, ModelConfig
    )
    need_one_process(__file__)
    push = take_push_request(collect_args)
    check_labeler_kind(labeler_args.labeler)
    need_at_least(collect_args, num_generations=2, max_prompts=1, max_new_tokens=1, temperature=1e-3)

    # Data
    train, test = load_splits(script_args, "preference")

    # Tokenizer
    source = resolve(model_args.model_name_or_path, revision=model_args.model_revision)
    tokenizer = load_tokenizer(source, trust_remote_code=collect_args.trust_remote_code)
    room = context_length(source, collect_args.trust_remote_code)
    splits = {
        name: prompt_rows(
            split.take(min(len(split), collect_args.max_prompts or len(split))),
            script_args.dataset_name,
            tokenizer,
            collect_args.max_new_tokens,
            room,
        )
        for name, split in (("train", train), ("test", test))
    }
    labeler = make_labeler(
        labeler_args.labeler, labeler_args, model_args, tokenizer, collect_args.output_dir, collect_args.seed
    )
    if not start_run(__file__, collect_args.output_dir, script_args, collect_args, labeler_args, model_args):
        return push_dataset(collect_args.output_dir, __file__, push, source)

    # Model and replies; those of an interrupted run are complete or not there
    tasks = read_tasks(collect_args.output_dir)
    if tasks is None:
        model = load_causal_lm(
            source, model_args, tokenizer, trainable=False, trust_remote_code=collect_args.trust_remote_code
        )
        sampling = Sampling(
            collect_args.max_new_tokens, collect_args.temperature, collect_args.per_device_eval_batch_size,
            collect_args.seed,
        )  # fmt: skip
        tasks = []
        for split, rows in splits.items():
            tasks += sample_tasks(model, tokenizer, split, rows, sampling, collect_args.num_generations, source.name)
        write_tasks(collect_args.output_dir, tasks)
        del model

    # Compare
    answers = labeler.compare(tasks)
    pairs: dict[str, list] = {"train": [], "test": []}
    for task, comparisons in zip(tasks, answers, strict=True):
        pairs[task.split] += preference_pairs(task, comparisons)

    # Save, card, push
    for split, rows in pairs.items():
        write_jsonl(Path(collect_args.output_dir) / f"{split}.jsonl", rows)
    counts = {f"{split} pairs": len(rows) for split, rows in pairs.items()}
    print(f"{collect_args.output_dir}: {counts['train pairs']} pairs to train on, {counts['test pairs']} held out.")
    if labeler.finished:
        finish_run(collect_args.output_dir, counts)
        write_report(collect_args.output_dir)
        push_dataset(collect_args.output_dir, __file__, push, source)


if __name__ == "__main__":
    with report_errors():
        main()
