"""STaR: solutions that end with the right answer become training data (Zelikman et al. 2022,
https://arxiv.org/abs/2203.14465, algorithm 1).
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.comparisons import Messages
from rlhf.data.datasets import check_messages, need_columns
from rlhf.data.encoding import encode_messages
from rlhf.errors import InputError
from rlhf.models.generation import Sampling, sample_completions
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import Source
from rlhf.models.tokenizers import end_ids, load_tokenizer, reply_text
from rlhf.run.files import write_jsonl
from rlhf.run.ranges import NonNegativeInt, PositiveInt, Seed, Temperature, check_ranges
from rlhf.starter.model import STARTER
from rlhf.tasks.problems import Row, few_shot, final_answer, known_answer, majority, question

# flags of recipes/star.py that recipes/sft.py gets
PASSED_ON = {"model_name_or_path", "model_revision", "dtype", "attn_implementation"}


@dataclass
class StarArguments:
    """How solutions are sampled, and which are kept."""

    rounds: PositiveInt = field(default=3, metadata={"help": "Number of rounds; may be raised after a run."})
    num_generations: PositiveInt = field(default=4, metadata={"help": "Solutions sampled for each problem."})
    num_fewshot: NonNegativeInt = field(
        default=4, metadata={"help": "Worked examples in the base's prompt; later models: none."}
    )
    max_new_tokens: PositiveInt = field(default=48, metadata={"help": "Longest solution, in tokens."})
    temperature: Temperature = field(
        default=0.7, metadata={"help": "Sampling temperature; held-out solutions are greedy."}
    )
    rationalize: bool = field(default=False, metadata={"help": "Reveal the answer to problems that were not solved."})
    majority_vote: bool = field(
        default=False, metadata={"help": "Take the majority's answer instead of the dataset's."}
    )
    max_train_samples: PositiveInt = field(default=384, metadata={"help": "Use at most this many training problems."})
    max_eval_samples: PositiveInt = field(default=200, metadata={"help": "Use at most this many held-out problems."})
    per_device_eval_batch_size: PositiveInt = field(default=64, metadata={"help": "Solutions to sample at once."})
    sft_config: str = field(default="recipes/configs/star_sft.yaml", metadata={"help": "YAML of sft.py."})
    output_dir: str = field(default="outputs/star", metadata={"help": "Folder for the rounds."})
    seed: Seed = field(default=42, metadata={"help": "Seed of round 1; each further round adds 1."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})


def check_star(args: StarArguments, model_args: ModelConfig) -> None:
    """Refuse numbers outside their range, and flags that would be ignored.

    Raises:
        InputError: naming the flag.
    """
    check_ranges(args)
    if args.majority_vote and args.rationalize:
        raise InputError(
            "--rationalize true: gives the answer to problems that were not solved, but --majority_vote true reads no "
            "answers. Drop one of the two."
        )
    for flag in dataclasses.fields(model_args):
        value = getattr(model_args, flag.name)
        if flag.name not in PASSED_ON and value != flag.default:
            raise InputError(
                f"--{flag.name} {value}: would not reach the training, which is recipes/sft.py with its own "
                f"settings. Write it into the YAML of --sft_config ({args.sft_config})."
            )


def sft_flags(args: StarArguments, model_args: ModelConfig, solutions: Path, number: int) -> dict[str, Any]:
    """The flags with which recipes/sft.py trains the base on solutions of the model of round `number`."""
    return {
        "model_name_or_path": model_args.model_name_or_path or STARTER, "model_revision": model_args.model_revision,
        "dataset_name": solutions, "seed": args.seed + number, "dtype": model_args.dtype,
        "bf16": model_args.dtype == "bfloat16", "attn_implementation": model_args.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
    }  # fmt: skip


def problem_rows(
    train: Dataset,
    test: Dataset,
    name: str,
    args: StarArguments,
    context: int | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Row], list[Row], list[Row]]:
    """Examples for the prompt, problems to train on and held-out problems. `reference` is the answer, or None.

    The examples are the first `num_fewshot` rows of train with a `solution` and an answer.

    Args:
        name: of the dataset, for messages.
        context: the model's longest context, in tokens.

    Raises:
        InputError: if columns or examples are missing, a problem is in both splits, or a prompt is too long.
    """
    for split in (train, test):
        need_columns(split, name, [{"prompt"}])
        check_messages(split, name, {"prompt"})
    rows = [{**row, "reference": known_answer(row)} for row in train]
    known = [number for number, row in enumerate(rows) if row["reference"] is not None and row.get("solution")]
    if len(known) < args.num_fewshot:
        raise InputError(
            f"--num_fewshot {args.num_fewshot}: {name} has {len(known)} training problems with 'answer' and 'solution' "
            "to use as examples. Add some, or give a smaller number."
        )
    chosen = set(known[: args.num_fewshot])
    examples = [rows[number] for number in sorted(chosen)]
    problems = [row for number, row in enumerate(rows) if number not in chosen][: args.max_train_samples]
    if args.majority_vote:
        problems = [{**row, "reference": None} for row in problems]
    held_out = [{**row, "reference": known_answer(row)} for row in test][: args.max_eval_samples]
    _refuse_overlap(name, [*examples, *problems], held_out)
    if not problems:
        raise InputError(f"--dataset_name {name}: no problem is left to train on beside the examples. Add some.")
    tokens = max(len(prompt) for prompt in encode_problems(tokenizer, examples, [*problems, *held_out]))
    if context is not None and tokens + args.max_new_tokens > context:
        raise InputError(
            f"--num_fewshot {args.num_fewshot}: the longest prompt has {tokens} tokens and the solution up to "
            f"{args.max_new_tokens}, more than the model's context of {context}. Lower one of them."
        )
    return examples, problems, held_out


def _refuse_overlap(name: str, train: list[Row], held_out: list[Row]) -> None:
    """Raise InputError if a held-out problem is also trained on, up to spaces and capitals."""
    texts = [{" ".join(question(row["prompt"])[-1]["content"].lower().split()) for row in rows}
             for rows in (train, held_out)]  # fmt: skip
    if both := sorted(texts[0] & texts[1]):
        raise InputError(
            f"--dataset_name {name}: {len(both)} held-out problems are in the training split too. Example: "
            f"{both[0][:80]!r}. Remove them from one of the splits."
        )


def encode_problems(
    tokenizer: PreTrainedTokenizerBase, examples: list[Row], rows: list[Row], hint: bool = False
) -> list[list[int]]:
    """Token ids of the prompts for `rows`, each with the examples in front."""
    return [encode_messages(tokenizer, few_shot(examples, row, hint), add_generation_prompt=True) for row in rows]


class Solver:
    """A model that solves problems. It is loaded at the first call.

    Args:
        examples: worked examples in front of each problem.
        sampling: all settings but the seed, which each call gives.
    """

    def __init__(self, source: Source, examples: list[Row], model_args: ModelConfig, sampling: Sampling) -> None:
        self.source, self.examples, self.model_args, self.sampling = source, examples, model_args, sampling

    @functools.cached_property
    def _loaded(self) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        tokenizer = load_tokenizer(self.source)
        return load_causal_lm(self.source, self.model_args, tokenizer, trainable=False).eval(), tokenizer

    def __call__(
        self, rows: list[Row], what: str, *, count: int = 1, seed: int | None = None, hints: list[Row] | None = None
    ) -> list[list[str]]:
        """`count` solutions of each problem, as texts.

        Args:
            what: for the progress bar.
            seed: of sampling. Without it the solution is the most likely one.
            hints: worked examples in place of the solver's own. With them, every prompt gives its answer as a hint.
        """
        model, tokenizer = self._loaded
        examples = self.examples if hints is None else hints
        completions = sample_completions(
            model,
            tokenizer,
            encode_problems(tokenizer, examples, rows, hint=hints is not None),
            self.sampling._replace(seed=seed or 0),
            do_sample=seed is not None,
            num_return_sequences=count,
            description=f"{self.source.name}: {what}",
        )
        ends = end_ids(model, tokenizer)
        return [[reply_text(tokenizer, ids, ends).strip() for ids in several] for several in completions]


def keep(rows: list[Row], solutions: list[list[str]], kind: str) -> list[Row]:
    """The different solutions whose final answer is the reference, or the majority's answer if that is unknown.

    Args:
        solutions: of each row.
        kind: `sampled` or `rationalized`.

    Returns:
        rows {`prompt`: messages, `completion`: messages, `answer`, `kind`}, the training data of recipes/sft.py.
    """
    kept = []
    for row, texts in zip(rows, solutions, strict=True):
        answers = [final_answer(text) for text in texts]
        right = row["reference"] if row["reference"] is not None else majority(answers)
        for text in dict.fromkeys(t for t, answer in zip(texts, answers, strict=True) if answer == right is not None):
            reply: Messages = [{"role": "assistant", "content": text}]
            kept.append({"prompt": question(row["prompt"]), "completion": reply, "answer": right, "kind": kind})
    return kept


def gather_solutions(solver: Solver, rows: list[Row], examples: list[Row], args: StarArguments, seed: int) -> list[Row]:
    """One round's training data: right samples, and rationalizations of the problems without a right sample.

    Args:
        examples: of the rationalizations.

    Raises:
        InputError: if no solution is right.
    """
    kept = keep(rows, solver(rows, "sampling", count=args.num_generations, seed=seed), "sampled")
    solved = [row["prompt"] for row in kept]
    missed = [row for row in rows if row["reference"] is not None and question(row["prompt"]) not in solved]
    if args.rationalize and missed:
        kept += keep(missed, solver(missed, "rationalizing", seed=seed, hints=examples), "rationalized")
    if not kept:
        raise InputError(
            f"--num_generations {args.num_generations}: none of the solutions of {len(rows)} problems ends with the "
            "right answer, so there is no training data. Give easier problems, more generations, more examples "
            "(--num_fewshot), or --rationalize true."
        )
    return kept


def write_solutions(folder: Path, kept: list[Row]) -> None:
    """Write the kept solutions as a dataset. Its split `test` has the solutions of every tenth problem.

    Solutions of one problem stay in one split, so that no held-out solution has a sibling in training.
    """
    problems = list(dict.fromkeys(str(row["prompt"]) for row in kept))
    held_out = set(problems[::10])
    test = [row for row in kept if str(row["prompt"]) in held_out]
    train = [row for row in kept if str(row["prompt"]) not in held_out]
    if train:
        write_jsonl(folder / "test.jsonl", test)
    write_jsonl(folder / "train.jsonl", train or test)  # a single problem is not held out


def solve_held_out(solver: Solver, rows: list[Row], count: int, seed: int) -> list[Row]:
    """Rows {`prompt`, `reference`, `solution`}: the most likely solution of each held-out problem.

    Args:
        count: samples of each problem, which go into `samples`; 0 for none.
    """
    solutions = solver(rows, "held out")
    solved = [{"prompt": row["prompt"], "reference": row["reference"], "solution": texts[0]}
              for row, texts in zip(rows, solutions, strict=True)]  # fmt: skip
    if count:
        samples = solver(rows, "held out, samples", count=count, seed=seed)
        solved = [{**row, "samples": texts} for row, texts in zip(solved, samples, strict=True)]
    return solved
