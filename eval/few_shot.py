"""Few-shot prompts for a base model: several are drawn, and the one whose replies score best is kept.

    accelerate launch eval/few_shot.py
    accelerate launch eval/few_shot.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name my.jsonl \
        --reward_funcs outputs/reward --output_dir outputs/few-shot-qwen
    accelerate launch eval/compare.py --models base=starter prompted=starter sft=outputs/sft \
        --few_shot prompted=outputs/few-shot/prompt.json

A prompt is --num_fewshot training conversations as turns of a chat in front of the user's message. The model replies to
--max_prompts other training messages behind each of --num_prompts such prompts, and --reward_funcs score the replies
(default: the starter's hidden score). Held-out rows are not read, only measured: the turns leave room in the model's
context for the longest held-out prompt.

Writes prompt.json (the best prompt's turns, `messages`) and few_shot.json (every prompt's score, {mean, low, high, n},
with 95% intervals over the messages; replies without a score don't count). The best of several is partly luck, so its
own score is too high; compare.py measures it on other prompts.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

import functools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from eval.drawing.tables import few_shot_rows
from eval.measuring.few_shot import conversations_of, draw_turns, with_turns
from eval.measuring.replies import Replies, sample_replies, use_model
from eval.report import write_report
from eval.stats.intervals import Interval, over_known
from rlhf.comparisons import Messages, Prompt, as_message
from rlhf.data.datasets import DatasetArguments, load_splits, load_test_split
from rlhf.data.encoding import encode_prompt
from rlhf.data.rows import prompt_rows
from rlhf.errors import InputError, report_errors
from rlhf.models.generation import Sampling
from rlhf.models.sources import context_length, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards import (
    JUDGE,
    JudgeArguments,
    RewardSource,
    call_rewards,
    load_reward,
    need_scores,
    resolve_reward_functions,
    reward_columns,
    total_scores,
)
from rlhf.rewards.judge import refuse_judge_flags
from rlhf.run.files import write_json
from rlhf.run.folders import command, finish_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import PositiveInt, Seed, Temperature
from rlhf.starter.model import STARTER

FEW_SHOT_FILE = "few_shot.json"
PROMPT_FILE = "prompt.json"


@dataclass
class FewShotArguments(JudgeArguments):
    """How many prompts there are, and how they are tried."""

    num_prompts: PositiveInt = field(default=10, metadata={"help": "Few-shot prompts to try."})
    num_fewshot: PositiveInt = field(default=4, metadata={"help": "Examples in each of them."})
    max_prompts: PositiveInt = field(default=64, metadata={"help": "Training messages to reply to behind each."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "What scores the replies: reward models (folder or Hub id), functions, or 'judge'."},
    )
    output_dir: str = field(default="outputs/few-shot", metadata={"help": "Folder for prompt.json and the scores."})
    max_new_tokens: PositiveInt = field(default=32, metadata={"help": "Longest reply, in tokens."})
    temperature: Temperature = field(default=1.0, metadata={"help": "Sampling temperature."})
    per_device_eval_batch_size: PositiveInt = field(default=64, metadata={"help": "Replies to sample at once."})
    seed: Seed = field(default=42, metadata={"help": "Seed of the draw of rows, and of sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})


def split_training_rows(
    script_args: DatasetArguments, args: FewShotArguments, rng: random.Random
) -> tuple[Dataset, Dataset]:
    """Two parts of the training rows: those whose messages are replied to, and those that examples are drawn from.

    Raises:
        InputError: if too few rows are left as examples.
    """
    train, _ = load_splits(script_args, "sft")
    if len(train) < args.max_prompts + args.num_fewshot:
        raise InputError(
            f"--max_prompts {args.max_prompts}: of {len(train)} training rows, {args.num_fewshot} must be left as "
            "examples. Give fewer."
        )
    order = rng.sample(range(len(train)), len(train))
    return train.select(order[: args.max_prompts]), train.select(order[args.max_prompts :])


def reply_behind(
    drawn: list[Messages],
    prompts: list[Prompt],
    sampling: Sampling,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Replies]:
    """One reply to each prompt behind each few-shot prompt's turns."""
    replies = []
    for number, turns in enumerate(drawn, 1):
        ids = [encode_prompt(tokenizer, with_turns(prompt, turns)) for prompt in prompts]
        replies.append(sample_replies(model, tokenizer, ids, 1, sampling, f"prompt {number} of {len(drawn)}"))
    return replies


def score_replies(
    sources: list[RewardSource],
    replies: list[Replies],
    prompts: list[Prompt],
    model_args: ModelConfig,
    batch_size: int,
    columns: Mapping[str, list[Any]],
) -> list[list[float]]:
    """Scores of each few-shot prompt's replies; several rewards are added. NaN: no reward scores it.

    Args:
        replies: of each few-shot prompt, one to each message.
        prompts: the messages without turns, as the rewards see them.
        columns: the dataset's other columns, see `reward_columns`.

    Raises:
        RewardError: if a few-shot prompt has no scored reply.
    """
    functions = [load_reward(source, model_args, batch_size=batch_size) for source in sources]
    scores = []
    for one in replies:
        completions = [as_message(prompt, text) for prompt, text in zip(prompts, one.texts, strict=True)]
        answers = call_rewards(functions, prompts, completions, one.ids, **columns)
        scores.append(total_scores(functions, answers, [1.0] * len(functions), completions, need_all=False))
        if all(map(math.isnan, scores[-1])):
            need_scores(functions, 0, len(completions))
    return scores


def print_scores(cells: list[Interval], chosen: int, turns: Messages) -> None:
    """The table of scores, and the best prompt's turns."""
    heading, rows = few_shot_rows({"scores": [cell.to_json() for cell in cells], "chosen": chosen})
    table = Table(*heading, title="Few-shot prompts: mean score of their replies; 95% intervals over the messages")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for message in turns:
        console.print(f"{message['role']}: {message['content']}", markup=False, highlight=False)


def main() -> None:
    # Arguments
    script_args, args, model_args = parse(__file__, DatasetArguments, FewShotArguments, ModelConfig)
    need_one_process(__file__)
    name, trust = script_args.dataset_name, args.trust_remote_code
    if args.reward_funcs is None and name != STARTER:
        raise InputError("--reward_funcs: needed for data other than the starter's. Give a reward model or a function.")
    rewards = args.reward_funcs or [STARTER]
    if JUDGE not in rewards:
        refuse_judge_flags(args)

    # Data
    rng = random.Random(args.seed)
    asked, examples = split_training_rows(script_args, args, rng)
    conversations = conversations_of(examples, name)
    scorers = resolve_reward_functions(
        rewards, "--reward_funcs", columns=asked.column_names, trust_remote_code=trust, judge=args
    )

    # Tokenizer
    source = resolve(model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=trust)
    tokenizer = load_tokenizer(source)
    sizes = (args.max_new_tokens, context_length(source))
    rows = prompt_rows(asked, name, tokenizer, *sizes)
    held_out = prompt_rows(load_test_split(script_args), name, tokenizer, *sizes)
    longest = max((*rows, *held_out), key=lambda row: len(row["input_ids"]))["prompt"]
    drawn = [
        draw_turns(conversations, args.num_fewshot, longest, tokenizer, *sizes, rng) for _ in range(args.num_prompts)
    ]
    if not start_run(__file__, args.output_dir, script_args, args, model_args):
        return

    # Replies
    sampling = Sampling(args.max_new_tokens, args.temperature, args.per_device_eval_batch_size, args.seed)
    prompts: list[Prompt] = rows["prompt"][:]
    replies = use_model(source, model_args, functools.partial(reply_behind, drawn, prompts, sampling))

    # Scores, report
    size = args.per_device_eval_batch_size
    scores = score_replies(scorers, replies, prompts, model_args, size, reward_columns(rows))
    cells = [over_known(values) for values in scores]
    chosen = max(range(len(cells)), key=lambda number: cells[number].mean)
    result = {
        "score": " + ".join(Path(reward).name for reward in rewards),
        "num_fewshot": args.num_fewshot,
        "chosen": chosen,
        "scores": [cell.to_json() for cell in cells],
        "prompts": drawn,
        "commands": [command(__file__)],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    write_json(Path(args.output_dir) / FEW_SHOT_FILE, result)
    write_json(Path(args.output_dir) / PROMPT_FILE, {"messages": drawn[chosen]})
    print_scores(cells, chosen, drawn[chosen])
    print(f"Written: {Path(args.output_dir) / PROMPT_FILE} and {FEW_SHOT_FILE}")
    finish_run(args.output_dir, {"score": cells[chosen].mean})
    write_report(args.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
