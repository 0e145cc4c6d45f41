"""Replies to compare: sampled from a model and kept in tasks.jsonl."""

from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.comparisons import Task, make_task
from rlhf.errors import InputError
from rlhf.models.generation import Sampling, sample_completions
from rlhf.models.tokenizers import end_ids, reply_text
from rlhf.run.files import read_jsonl, write_jsonl

TASKS_FILE = "tasks.jsonl"


def write_tasks(folder: str, tasks: list[Task]) -> None:
    """Write tasks.jsonl into a run's folder, complete or not at all."""
    write_jsonl(Path(folder) / TASKS_FILE, [task._asdict() for task in tasks])


def read_tasks(folder: str) -> list[Task] | None:
    """The tasks of a run's folder, or None without tasks.jsonl.

    Raises:
        InputError: if tasks.jsonl holds something else.
    """
    file = Path(folder) / TASKS_FILE
    if not file.exists():
        return None
    needed = {"id": str, "split": str, "prompt": str | list, "completions": list, "models": list}
    tasks = []
    for number, row in enumerate(read_jsonl(file, **needed), 1):
        texts = [*row["completions"], *row["models"]]
        messages = [] if isinstance(row["prompt"], str) else row["prompt"]
        fits = len(row["completions"]) == len(row["models"]) and all(isinstance(text, str) for text in texts)
        known = row["split"] in ("train", "test") and all(isinstance(m, dict) and "role" in m for m in messages)
        if set(row) != set(needed) or not fits or not known:
            raise InputError(f"{file}, task {number}: not a task of this project. Restore the file.")
        tasks.append(Task(**row))
    return tasks


def sample_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, Dataset],
    sampling: Sampling,
    num_generations: int,
    name: str,
) -> list[Task]:
    """Different replies to each prompt.

    Args:
        splits: rows with `prompt` and `input_ids`, by the name of their split.
        num_generations: replies per prompt; equal ones count once.
        name: of the model, recorded with each reply.
    """
    tasks, ends = [], end_ids(model, tokenizer)
    for split, rows in splits.items():
        completions = sample_completions(
            model, tokenizer, rows["input_ids"][:], sampling, num_return_sequences=num_generations,
            description=f"Sampling {split} replies",
        )  # fmt: skip
        for prompt, replies in zip(rows["prompt"], completions, strict=True):
            texts = [text for ids in replies if (text := reply_text(tokenizer, ids, ends).strip())]
            texts = list(dict.fromkeys(texts))
            tasks.append(make_task(split, prompt, texts, [Path(name).name] * len(texts)))
    return tasks
