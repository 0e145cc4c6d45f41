"""Votes on a chat's replies, and the preference pairs they give."""

import json
from pathlib import Path
from typing import Literal

from rlhf.comparisons import PreferencePair, Task, preference_pairs
from rlhf.errors import InputError
from rlhf.feedback.sampling import TASKS_FILE, read_tasks
from rlhf.feedback.votes import VOTES_FILE, Vote, VoteFile, append_line, check_labeler_name, now
from rlhf.run.files import write_jsonl
from rlhf.run.folders import RUN_FILE, read_run
from rlhf.run.locks import LOCK_FILE

Pairs = dict[str, list[PreferencePair]]  # by split
Preferred = Literal["first", "second", "tie"]
RANKS: dict[Preferred, list[int]] = {"first": [1, 2], "second": [2, 1], "tie": [1, 1]}


class ChatVotes:
    """Votes on a chat's replies, in a folder of their own or in that of `recipes/collect.py --labeler human`.

    Raises:
        InputError: if the folder holds anything else, or the labeler's name is refused.
    """

    def __init__(self, folder: str, labeler: str) -> None:
        try:
            self.folder, self.labeler = Path(folder), check_labeler_name(labeler)
        except InputError as error:
            raise InputError(f"--labeler_name: {error}") from error
        check_folder(self.folder)
        self.file = VoteFile(self.folder / VOTES_FILE)
        self._stale = False
        self.tasks()

    def tasks(self) -> list[Task]:
        """The tasks on the disk, including those of a collection and of other processes."""
        with self.file:
            close_last_line(self.folder / TASKS_FILE)
            return read_tasks(str(self.folder)) or []

    def save(self, task: Task, preferred: Preferred) -> bool:
        """Write a vote to the disk, its task first. Returns False if this labeler had answered that task already.

        Raises:
            InputError: if it can't be written.
        """
        vote = Vote(task.id, self.labeler, False, RANKS[preferred], None, False, now())
        try:
            with self.file:
                if task.id not in {known.id for known in self.tasks()}:
                    # as ASCII: some readers of JSON lines end a line at U+2028
                    append_line(self.folder / TASKS_FILE, json.dumps(task._asdict()))
                self._stale = True
                return self.file.append(vote)
        except OSError as error:
            raise InputError(f"{self.folder}: not saved, can't be written ({error.strerror}).") from error

    def write_pairs(self) -> None:
        """Rewrite train.jsonl, and test.jsonl if there are test tasks, from all tasks and votes.

        Raises:
            InputError: if they can't be written.
        """
        if not self._stale:
            return
        try:
            with self.file:
                pairs = pairs_of(self.tasks(), self.file.votes)
                for split, rows in pairs.items():
                    file = self.folder / f"{split}.jsonl"
                    if rows or split == "train" or file.exists():  # an empty test split could not be loaded
                        write_jsonl(file, rows)
        except OSError as error:
            raise InputError(
                f"{self.folder}: all votes are saved, but their pairs can't be written ({error.strerror}). Make room; "
                "the next vote writes them."
            ) from error
        self._stale = False


def check_folder(folder: Path) -> None:
    """Accept a new folder, a chat's, or one of `recipes/collect.py --labeler human`.

    Raises:
        InputError: for any other folder.
    """
    if not folder.exists():
        return
    where = f"--output_dir {folder}"
    if not folder.is_dir():
        raise InputError(f"{where}: is a file. Give a folder.")
    found = {path.name for path in folder.iterdir()}
    if RUN_FILE in found:
        run = read_run(folder)
        assert run is not None
        if run["recipe"] != "collect" or run["settings"].get("labeler") != "human":
            raise InputError(
                f"{where}: holds another run (recipes/{run['recipe']}.py). Give a new folder, or that of "
                "recipes/collect.py --labeler human."
            )
        if TASKS_FILE not in found:  # collect.py would take the chat's tasks for its own and sample none
            raise InputError(
                f"{where}: recipes/collect.py has not sampled its replies yet. Run it first, or give a new folder."
            )
    elif VOTES_FILE not in found and not found <= {TASKS_FILE, LOCK_FILE, f"{VOTES_FILE}.lock"}:
        raise InputError(f"{where}: holds {', '.join(sorted(found)[:3])} and no {VOTES_FILE}. Give a new folder.")


def close_last_line(file: Path) -> None:
    """Remove a task that a crash cut off from tasks.jsonl. Its vote was never written."""
    if not file.exists():
        return
    with file.open("r+b") as opened:
        content = opened.read()
        end = content.rfind(b"\n") + 1
        last = content[end:]
        try:
            json.loads(last or b"{}")
        except ValueError:
            if last.startswith(b'{"id"') or b'{"id"'.startswith(last):  # read_tasks refuses any other line
                opened.truncate(end)


def pairs_of(tasks: list[Task], votes: list[Vote]) -> Pairs:
    """Preference pairs by split, in the format of recipes/collect.py. Repeated answers do not count."""
    pairs: Pairs = {"train": [], "test": []}
    answers: dict[str, list[Vote]] = {task.id: [] for task in tasks}
    for vote in votes:
        if vote.task in answers and not vote.repeat:
            answers[vote.task].append(vote)
    for task in tasks:
        for vote in answers[task.id]:
            if len(vote.ranks) == len(task.completions):
                pairs[task.split] += preference_pairs(task, vote.comparisons())
    return pairs
