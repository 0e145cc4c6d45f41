"""STaR: solutions that end with the right answer become training data (Zelikman et al. 2022,
https://arxiv.org/abs/2203.14465, algorithm 1).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.comparisons import Messages
from rlhf.data.datasets import check_messages, need_columns
from rlhf.data.encoding import encode_messages
from rlhf.errors import InputError
from rlhf.models.generation import Sampling, sample_completions
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import Source
from rlhf.models.tokenizers import load_tokenizer
from rlhf.run.files import write_jsonl
from rlhf.tasks.problems import few_shot, final_answer, known_answer, majority, question

Row = dict[str, Any]
# what recipes/star.py hands to recipes/sft.py
PASSED_ON = {"model_name_or_path", "model_revision", "dtype", "attn_implementation"}


def check_star(args: Any, model_args: ModelConfig) -> None:
    """Refuse flags that would be ignored.

    Args:
        args: has `majority_vote`, `rationalize` and `sft_config`.

    Raises:
        InputError: naming the flag.
    """
    if args.majority_vote and args.rationalize:
        raise InputError(
            "--rationalize true: tells the answer of what was not solved; with --majority_vote true no answer is "
            "looked at, so there is none to tell. Leave one of them off."
        )
    for field in dataclasses.fields(model_args):
        value = getattr(model_args, field.name)
        if field.name not in PASSED_ON and value != field.default:
            raise InputError(
                f"--{field.name} {value}: would not reach the training, which is recipes/sft.py with its own "
                f"settings. Write it into the YAML of --sft_config ({args.sft_config})."
            )


def problem_rows(
    train: Dataset, test: Dataset, name: str, args: Any, longest: int | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Row], list[Row], list[Row]]:
    """Examples for the prompt, problems to train on and held-out problems; `reference` is the answer, or None.

    The examples are the first `args.num_fewshot` rows of train with a `solution` and an answer.

    Args:
        args: has `num_fewshot`, `max_train_samples`, `max_eval_samples`, `max_new_tokens`, `majority_vote`.
        longest: the model's context, in tokens.

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
            "to show as examples. Add some, or give a smaller number."
        )
    shown = set(known[: args.num_fewshot])
    examples = [rows[number] for number in sorted(shown)]
    problems = [row for number, row in enumerate(rows) if number not in shown][: args.max_train_samples]
    if args.majority_vote:
        problems = [{**row, "reference": None} for row in problems]
    held_out = [{**row, "reference": known_answer(row)} for row in test][: args.max_eval_samples]
    _refuse_overlap(name, [*examples, *problems], held_out)
    if not problems:
        raise InputError(f"--dataset_name {name}: no problem is left to train on beside the examples.")
    tokens = max(len(prompt) for prompt in encode_problems(tokenizer, examples, [*problems, *held_out]))
    if longest is not None and tokens + args.max_new_tokens > longest:
        raise InputError(
            f"--num_fewshot {args.num_fewshot}: the longest prompt has {tokens} tokens and the solution up to "
            f"{args.max_new_tokens}, more than the model's context of {longest}. Lower one of them."
        )
    return examples, problems, held_out


def _refuse_overlap(name: str, train: list[Row], held_out: list[Row]) -> None:
    """Raise InputError if a held-out problem is trained on, however it is spaced or capitalized."""
    texts = [{" ".join(question(row["prompt"])[-1]["content"].lower().split()) for row in rows}
             for rows in (train, held_out)]  # fmt: skip
    if both := sorted(texts[0] & texts[1]):
        raise InputError(
            f"--dataset_name {name}: {len(both)} held-out problems are in the training split too, for example "
            f"{both[0][:80]!r}. Remove them from one of the splits."
        )


def encode_problems(
    tokenizer: PreTrainedTokenizerBase, examples: list[Row], rows: list[Row], hint: bool = False
) -> list[list[int]]:
    """Token ids of the prompts for `rows`, behind the examples."""
    return [encode_messages(tokenizer, few_shot(examples, row, hint), add_generation_prompt=True) for row in rows]


class Solver:
    """A model that solves problems, loaded when it is first asked.

    Args:
        source: the model.
        examples: shown before each problem.
        sampling: its seed is that of no call.
    """

    def __init__(self, source: Source, examples: list[Row], model_args: ModelConfig, sampling: Sampling) -> None:
        self.source, self.examples, self.model_args, self.sampling = source, examples, model_args, sampling

    @functools.cached_property
    def _loaded(self) -> tuple[Any, PreTrainedTokenizerBase]:
        tokenizer = load_tokenizer(self.source)
        return load_causal_lm(self.source, self.model_args, tokenizer, trainable=False).eval(), tokenizer

    def __call__(
        self, rows: list[Row], what: str, *, count: int = 1, seed: int | None = None, told: list[Row] | None = None
    ) -> list[list[str]]:
        """Solutions of each problem as texts.

        Args:
            what: for the progress bar.
            count: how many samples, if there is a `seed`; without, it is the most likely solution.
            told: examples to show instead, and the answers are told.
        """
        model, tokenizer = self._loaded
        examples = self.examples if told is None else told
        completions = sample_completions(
            model,
            tokenizer,
            encode_problems(tokenizer, examples, rows, hint=told is not None),
            self.sampling._replace(seed=seed or 0),
            do_sample=seed is not None,
            num_return_sequences=count,
            description=f"{self.source.name}: {what}",
        )
        return [[tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in several] for several in completions]


def keep(rows: list[Row], solutions: list[list[str]], kind: str) -> list[Row]:
    """The different solutions whose final answer is right; where it is unknown, is the majority's.

    Args:
        solutions: those of each row.
        kind: `sampled` or `rationalized`.

    Returns:
        rows {`prompt`: messages, `completion`: messages, `answer`, `kind`}: what recipes/sft.py trains on.
    """
    kept = []
    for row, texts in zip(rows, solutions, strict=True):
        answers = [final_answer(text) for text in texts]
        right = row["reference"] if row["reference"] is not None else majority(answers)
        for text in dict.fromkeys(t for t, answer in zip(texts, answers, strict=True) if answer == right is not None):
            reply: Messages = [{"role": "assistant", "content": text}]
            kept.append({"prompt": question(row["prompt"]), "completion": reply, "answer": right, "kind": kind})
    return kept


def gather_solutions(solver: Solver, rows: list[Row], examples: list[Row], args: Any, seed: int) -> list[Row]:
    """One round's training data: samples that end with the right answer, and rationalizations of problems without one.

    Args:
        examples: shown when the answer is told.
        args: has `num_generations` and `rationalize`.

    Raises:
        InputError: if no solution is right.
    """
    kept = keep(rows, solver(rows, "sampling", count=args.num_generations, seed=seed), "sampled")
    solved = [row["prompt"] for row in kept]
    missed = [row for row in rows if row["reference"] is not None and question(row["prompt"]) not in solved]
    if args.rationalize and missed:
        kept += keep(missed, solver(missed, "rationalizing", seed=seed, told=examples), "rationalized")
    if not kept:
        raise InputError(
            f"--num_generations {args.num_generations}: none of the solutions of {len(rows)} problems ends with the "
            "right answer, so there is nothing to train on. Give easier problems, more generations, more examples "
            "(--num_fewshot), or --rationalize true."
        )
    return kept


def write_solutions(folder: Path, kept: list[Row]) -> None:
    """Write what was kept as a dataset whose split `test` has the solutions of every tenth problem.

    Solutions of one problem stay together: beside its siblings in training, none would be held out.
    """
    problems = list(dict.fromkeys(str(row["prompt"]) for row in kept))
    held_out = set(problems[::10])
    test = [row for row in kept if str(row["prompt"]) in held_out]
    train = [row for row in kept if str(row["prompt"]) not in held_out]
    if train:
        write_jsonl(folder / "test.jsonl", test)
    write_jsonl(folder / "train.jsonl", train or test)  # of a single problem there is nothing to hold out


def solve_held_out(solver: Solver, rows: list[Row], count: int, seed: int) -> list[Row]:
    """Rows {`prompt`, `reference`, `solution`}: the most likely solution of each held-out problem.

    Args:
        count: if above 0, so many samples of each come along in `samples`.
    """
    solutions = solver(rows, "held out")
    solved = [{"prompt": row["prompt"], "reference": row["reference"], "solution": texts[0]}
              for row, texts in zip(rows, solutions, strict=True)]  # fmt: skip
    if count:
        samples = solver(rows, "held out, samples", count=count, seed=seed)
        solved = [{**row, "samples": texts} for row, texts in zip(solved, samples, strict=True)]
    return solved
