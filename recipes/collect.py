"""Collect preferences: sample replies to each prompt, let a labeler compare them, write preference pairs.

    accelerate launch recipes/collect.py
    accelerate launch recipes/collect.py --model_name_or_path outputs/sft --output_dir outputs/preferences
    accelerate launch recipes/collect.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback-prompt --output_dir outputs/preferences-qwen
    accelerate launch recipes/collect.py --labeler human --max_prompts 100 --output_dir outputs/votes

Without arguments it reads recipes/configs/collect.yaml: replies of the starter to its preference prompts, compared by a
simulated labeler who prefers upbeat replies. `--labeler human` opens a voting page, `judge` asks a model, `reward` a
reward model or function. Output: train.jsonl and test.jsonl with different prompts, for recipes/reward.py. Rows have
`prompt`, `chosen`, `rejected`, `labeler`, `certainty` and `model`. tasks.jsonl has all sampled replies.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig

from eval.report import write_report
from rlhf.comparisons import preference_pairs
from rlhf.data.datasets import DatasetArguments, load_splits
from rlhf.data.rows import prompt_rows
from rlhf.engines.arguments import SamplerArguments
from rlhf.engines.completions import make_sampler
from rlhf.errors import InputError, report_errors
from rlhf.feedback.labelers import LabelerArguments, labeler_flags, make_labeler
from rlhf.feedback.sampling import read_tasks, sample_tasks, write_tasks
from rlhf.hub import prepare_repo, push_dataset, take_push_request
from rlhf.models.generation import Sampling
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import context_length, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.run.files import write_jsonl
from rlhf.run.folders import finish_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import AtLeastTwo, PositiveInt, Seed, Temperature


@dataclass
class CollectArguments:
    """How replies are sampled. rlhf.feedback.labelers.LabelerArguments says who compares them."""

    output_dir: str = field(default="outputs/preferences", metadata={"help": "Folder for train.jsonl and test.jsonl."})
    num_generations: AtLeastTwo = field(default=4, metadata={"help": "Replies to sample per prompt."})
    max_prompts: PositiveInt | None = field(default=None, metadata={"help": "Most prompts of each split; None: all."})
    max_new_tokens: PositiveInt = field(default=32, metadata={"help": "Longest reply, in tokens."})
    temperature: Temperature = field(default=1.0, metadata={"help": "Sampling temperature."})
    per_device_eval_batch_size: PositiveInt = field(default=64, metadata={"help": "Replies to sample at once."})
    seed: Seed = field(default=42, metadata={"help": "Seed of sampling and of the simulated labeler."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push the pairs to the Hub as a dataset."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Name of the Hub dataset, for example you/pairs."})
    hub_token: str | None = field(default=None, metadata={"help": "Hub token; default: the one you logged in with."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Make the Hub dataset private."})


def main() -> None:
    # Arguments
    script_args, args, labeler_args, engine_args, model_args = settings = parse(
        __file__, DatasetArguments, CollectArguments, LabelerArguments, SamplerArguments, ModelConfig
    )
    need_one_process(__file__)
    push = take_push_request(args)

    # Data
    train, test = load_splits(script_args, "preference")

    # Tokenizer
    trust = labeler_args.trust_remote_code
    source = resolve(model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=trust)
    tokenizer = load_tokenizer(source)
    room = context_length(source)
    splits = {}
    for split, rows in (("train", train), ("test", test)):
        few = rows.take(min(len(rows), args.max_prompts or len(rows)))
        splits[split] = prompt_rows(few, script_args.dataset_name, tokenizer, args.max_new_tokens, room)
    labeler = make_labeler(labeler_args.labeler, labeler_args, model_args, tokenizer, args.output_dir, args.seed)
    open_flags = labeler_flags(args.output_dir)
    if not start_run(__file__, args.output_dir, *settings, open_flags=open_flags):
        return push_dataset(args.output_dir, __file__, push, source)
    prepare_repo(push, "dataset")

    # Model, replies: an interrupted run has all of them or none
    tasks = read_tasks(args.output_dir)
    if tasks is None:
        size, engine = args.per_device_eval_batch_size, make_sampler(engine_args, args.output_dir, [source])
        sampling = Sampling(args.max_new_tokens, args.temperature, size, args.seed, engine)
        model = load_causal_lm(source, model_args, tokenizer, trainable=False)
        tasks = sample_tasks(model, tokenizer, splits, sampling, args.num_generations, source.name)
        write_tasks(args.output_dir, tasks)
        del model

    # Compare
    pairs: dict[str, list] = {"train": [], "test": []}
    for task, comparisons in zip(tasks, labeler.compare(tasks), strict=True):
        pairs[task.split] += preference_pairs(task, comparisons)

    # Save, card, push
    for split, rows in pairs.items():
        write_jsonl(Path(args.output_dir) / f"{split}.jsonl", rows)
    counts = {f"{split} pairs": len(rows) for split, rows in pairs.items()}
    print(f"{args.output_dir}: {counts['train pairs']} pairs to train on, {counts['test pairs']} held out, from the "
          f"replies to {len(tasks)} prompts. A tie makes no pair.")  # fmt: skip
    if labeler.finished and not pairs["train"]:
        raise InputError(f"--labeler {labeler_args.labeler}: prefers no reply to another: there is nothing to learn. "
                         "Give other replies (--temperature, --max_new_tokens, another --output_dir).")  # fmt: skip
    if labeler.finished:
        finish_run(args.output_dir, counts)
        write_report(args.output_dir)
        push_dataset(args.output_dir, __file__, push, source)


if __name__ == "__main__":
    with report_errors():
        main()
