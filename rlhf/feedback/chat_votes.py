"""Votes on a chat's replies, and the preference pairs that they make."""

import json
import os
from pathlib import Path
from typing import Literal

from rlhf.comparisons import PreferencePair, Task, preference_pairs
from rlhf.errors import InputError
from rlhf.feedback.sampling import TASKS_FILE, read_tasks
from rlhf.feedback.votes import Vote, VoteFile, check_labeler_name, now
from rlhf.run.files import read_json, write_jsonl
from rlhf.run.folders import RUN_FILE

VOTES_FILE = "votes.jsonl"
Preferred = Literal["first", "second", "tie"]
RANKS: dict[Preferred, list[int]] = {"first": [1, 2], "second": [2, 1], "tie": [1, 1]}


class ChatVotes:
    """Votes on a chat's replies, in a folder of their own or in that of a collection by people.

    Raises:
        InputError: if the folder holds anything else, or the labeler's name can't be one.
    """

    def __init__(self, folder: str, labeler: str) -> None:
        self.folder, self.labeler = Path(folder), check_labeler_name(labeler)
        check_folder(self.folder)
        self.file = VoteFile(self.folder / VOTES_FILE)
        self._stale = False
        self.tasks()

    def tasks(self) -> list[Task]:
        """The tasks on the disk, those of a collection among them; other processes may have added some."""
        with self.file:
            close_last_line(self.folder / TASKS_FILE)
            return read_tasks(str(self.folder)) or []

    def save(self, task: Task, preferred: Preferred) -> bool:
        """Put an answer on the disk, its task first; False if this labeler had answered that task already.

        Raises:
            InputError: if the disk doesn't take it.
        """
        vote = Vote(task.id, self.labeler, False, RANKS[preferred], None, False, now())
        try:
            with self.file:
                if task.id not in {known.id for known in self.tasks()}:
                    self._append(task)
                self._stale = True
                return self.file.append(vote)
        except OSError as error:
            raise InputError(f"{self.folder}: not saved, can't be written ({error.strerror}).") from error

    def _append(self, task: Task) -> None:
        with (self.folder / TASKS_FILE).open("ab") as file:
            # escaped: read_tasks also ends lines at U+2028 and its like
            file.write(json.dumps(task._asdict()).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def write_pairs(self) -> None:
        """Write train.jsonl, and test.jsonl where there are such tasks, anew from all tasks and votes."""
        if not self._stale:
            return
        with self.file:
            pairs = pairs_of(self.tasks(), self.file.votes)
            for split, rows in pairs.items():
                file = self.folder / f"{split}.jsonl"
                if rows or split == "train" or file.exists():  # an empty test split could not be loaded
                    write_jsonl(file, rows)
        self._stale = False


def check_folder(folder: Path) -> None:
    """Refuse an output folder that is neither new, nor a chat's, nor a collection's by people.

    Raises:
        InputError: if it is another.
    """
    if not folder.exists():
        return
    where = f"--output_dir {folder}"
    if not folder.is_dir():
        raise InputError(f"{where}: is a file. Give a folder.")
    found = {path.name for path in folder.iterdir()}
    if RUN_FILE in found:
        run = read_json(folder / RUN_FILE)
        if run["recipe"] != "collect" or run["settings"].get("labeler") != "human":
            raise InputError(
                f"{where}: holds another run (recipes/{run['recipe']}.py). Give a new folder, or that of "
                "recipes/collect.py --labeler human."
            )
        if TASKS_FILE not in found:  # it would take the chat's tasks for its own, and sample none
            raise InputError(f"{where}: recipes/collect.py has not sampled its replies yet. Let it, or give another.")
    elif VOTES_FILE not in found and not found <= {TASKS_FILE, f"{VOTES_FILE}.lock"}:
        raise InputError(f"{where}: holds {', '.join(sorted(found)[:3])} and no {VOTES_FILE}. Give a new folder.")


def close_last_line(file: Path) -> None:
    """Take a task that a crash cut off out of tasks.jsonl: its vote was never written."""
    if not file.exists():
        return
    with file.open("r+b") as opened:
        content = opened.read()
        end = content.rfind(b"\n") + 1
        last = content[end:]
        try:
            if last:
                json.loads(last)
                opened.write(b"\n")
        except ValueError:
            if last.startswith(b'{"id"') or b'{"id"'.startswith(last):  # anything else is no task; read_tasks says so
                opened.truncate(end)


def pairs_of(tasks: list[Task], votes: list[Vote]) -> dict[str, list[PreferencePair]]:
    """Preference pairs by split, as recipes/collect.py writes them: second answers to a task don't count."""
    pairs: dict[str, list[PreferencePair]] = {"train": [], "test": []}
    answers: dict[str, list[Vote]] = {task.id: [] for task in tasks}
    for vote in votes:
        if vote.task in answers and not vote.repeat:
            answers[vote.task].append(vote)
    for task in tasks:
        for vote in answers[task.id]:
            if len(vote.ranks) == len(task.completions):
                pairs[task.split] += preference_pairs(task, vote.comparisons())
    return pairs
