"""People's votes: one JSON line each, appended to a file that is never rewritten; who sees what next; agreement.

A vote ranks the completions of a task. A line is either a vote or the undoing of one; what is true is what the lines
say when read in order, so several servers, crashes and restarts can't make them disagree.
"""

import itertools
import json
import math
import os
import random
import threading
import time
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

import krippendorff
from filelock import FileLock

from rlhf.comparisons import Comparison, Task
from rlhf.errors import InputError

FIELDS = ("task", "labeler", "repeat", "ranks", "ratings", "skipped", "time")
LONGEST_NAME = 40


class Vote(NamedTuple):
    """One person's answer to one task."""

    task: str
    labeler: str
    repeat: bool  # the same labeler's second answer to a task, asked to see whether they agree with themselves
    ranks: list[int]  # by completion; 1 is the best, equal numbers are a tie
    ratings: list[int | None] | None  # by completion, 1 to 7, where asked for
    skipped: bool
    time: str  # ISO 8601, UTC

    @property
    def key(self) -> tuple[str, str, bool]:
        """A labeler answers a task once, and once more if it is repeated."""
        return self.labeler, self.task, self.repeat

    def comparisons(self) -> list[Comparison]:
        """All K(K-1)/2 pairs of a ranking of K completions (none of a skipped one)."""
        if self.skipped:
            return []
        answers = []
        for first, second in itertools.combinations(range(len(self.ranks)), 2):
            difference = self.ranks[first] - self.ranks[second]
            preferred: Literal["first", "second", "tie"]
            preferred = "tie" if difference == 0 else "first" if difference < 0 else "second"
            answers.append(Comparison(first, second, preferred, None, self.labeler))
        return answers


class VoteFile:
    """Votes in a file that several threads and processes may append to.

    Raises:
        InputError: for a file that is unreadable, or holds something other than votes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._votes: dict[tuple[str, str, bool], Vote] = {}
        self._read = 0  # bytes of the file that `_votes` knows
        self._thread_lock = threading.RLock()
        self._file_lock = FileLock(str(self.path) + ".lock")
        with self:
            pass

    def __enter__(self) -> "VoteFile":
        """Hold the file, and know everything that is in it."""
        self._thread_lock.acquire()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file_lock.acquire()
            self._catch_up()
        except OSError as error:
            self.__exit__()
            raise InputError(f"{self.path}: can't be read ({error.strerror}).") from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file_lock.release()
        self._thread_lock.release()

    @property
    def votes(self) -> list[Vote]:
        """What counts, oldest first."""
        with self:
            return list(self._votes.values())

    def append(self, vote: Vote) -> bool:
        """Put a vote on the disk; False if this labeler has answered already, and then nothing is written."""
        with self:
            if vote.key in self._votes:
                return False
            self._write(vote._asdict())
            return True

    def undo(self, vote: Vote) -> None:
        """Take a vote back; both lines stay in the file."""
        with self:
            self._write({"undo": vote.task, "labeler": vote.labeler, "repeat": vote.repeat, "time": now()})

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._catch_up()

    def _catch_up(self) -> None:
        """Read what has been appended since. A last line cut off by a crash is closed and passed over."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        lines = content.decode(errors="replace").split("\n")
        for number, line in enumerate(lines):
            if line.strip():
                self._take(line, number + 1 if self._read == 0 else None)
        self._read += len(content)
        if lines[-1]:
            with self.path.open("ab") as file:
                self._read += file.write(b"\n")

    def _take(self, line: str, number: int | None) -> None:
        where = f"{self.path}" + (f", line {number}" if number else "")
        try:
            entry = json.loads(line)
        except ValueError:
            if line.startswith('{"task"') or line.startswith('{"undo"'):
                return  # cut off by a crash, and closed by the next server
            raise InputError(f"{where}: not a vote ({line[:40]!r}). Give a votes file of this project.") from None
        if isinstance(entry, dict) and "undo" in entry and "labeler" in entry:
            self._votes.pop((entry["labeler"], entry["undo"], entry.get("repeat", False)), None)
            return
        if not isinstance(entry, dict) or not set(FIELDS) <= set(entry):
            found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise InputError(f"{where}: not a vote; expected {', '.join(FIELDS)}, found {found}.")
        vote = Vote(**{name: entry[name] for name in FIELDS})
        self._votes.setdefault(vote.key, vote)


class Shown(NamedTuple):
    """What a labeler sees."""

    task: Task
    order: list[int]  # position on the page -> completion
    repeat: bool
    earlier: Vote | None  # the answer that was just taken back


class Assignment:
    """Shares tasks among labelers, and takes their answers.

    A share `overlap` of the tasks goes to every labeler, so that agreement can be measured; each of the others goes to
    whoever comes first. A share `repeats` of what a labeler sees are earlier tasks of theirs, in another order.

    Args:
        lease: seconds after which a task that was shown but not answered may go to somebody else.
    """

    def __init__(
        self,
        tasks: list[Task],
        file: VoteFile,
        *,
        overlap: float = 0.2,
        repeats: float = 0.05,
        seed: int = 0,
        lease: float = 900.0,
    ) -> None:
        self.tasks = {task.id: task for task in tasks}
        self.file, self.repeats, self.seed, self.lease = file, repeats, seed, lease
        shuffled = random.Random(seed).sample(sorted(self.tasks), len(self.tasks))
        self.shared = set(shuffled[: math.ceil(overlap * len(shuffled))])
        self._held: dict[str, tuple[str, float]] = {}  # task -> labeler, until when

    def next(self, labeler: str, hold: bool = True) -> Shown | None:
        """The task for this labeler now (the same one until it is answered), or None if there is nothing left.

        Args:
            hold: keep it from other labelers while this one looks at it.
        """
        with self.file:
            mine = self._votes_of(labeler)
            again = self._to_repeat(mine)
            if again is not None:
                return self._show(again, labeler, repeat=True)
            answered = {vote.task for vote in mine}
            taken = {vote.task for vote in self.file.votes if not vote.skipped} - self.shared
            now_ = time.monotonic()
            taken |= {task for task, (who, until) in self._held.items() if who != labeler and until > now_}
            order = random.Random(f"{self.seed} {labeler}").sample(sorted(self.tasks), len(self.tasks))
            order.sort(key=lambda task: self._held.get(task, ("", 0.0))[0] != labeler)  # what they were looking at
            for task in order:
                if task not in answered and task not in taken:
                    if hold and task not in self.shared:
                        self._held[task] = (labeler, now_ + self.lease)
                    return self._show(task, labeler, repeat=False)
            return None

    def answer(self, vote: Vote) -> bool:
        """Put a vote on the disk; False if this labeler had answered already.

        Raises:
            InputError: if the vote doesn't fit its task.
        """
        check_labeler_name(vote.labeler)
        task = self.tasks.get(vote.task)
        if task is None:
            raise InputError("This vote is for a reply that no longer exists. Reload the page.")
        count = len(task.completions)
        ranks_fit = len(vote.ranks) == count and all(isinstance(rank, int) and rank >= 1 for rank in vote.ranks)
        ratings = vote.ratings or []
        ratings_fit = len(ratings) in (0, count) and all(
            value is None or (isinstance(value, int) and 1 <= value <= 7) for value in ratings
        )
        if not (vote.skipped or ranks_fit) or not ratings_fit:
            raise InputError(f"This vote doesn't fit its {count} replies. Reload the page.")
        new = self.file.append(vote)
        self._held.pop(vote.task, None)
        return new

    def undo(self, labeler: str) -> Shown | None:
        """Take back the labeler's last vote, and show its task again."""
        with self.file:
            mine = self._votes_of(labeler)
            if not mine:
                return None
            last = mine[-1]
            self.file.undo(last)
            if last.task not in self.shared:
                self._held[last.task] = (labeler, time.monotonic() + self.lease)
            return self._show(last.task, labeler, last.repeat)._replace(earlier=last)

    def progress(self, labeler: str) -> dict[str, int]:
        """How many votes this labeler and everybody cast, and for how many tasks there is at least one."""
        votes = [vote for vote in self.file.votes if vote.task in self.tasks]
        done = {vote.task for vote in votes if not vote.skipped}
        return {
            "mine": sum(vote.labeler == labeler for vote in votes),
            "done": len(done),
            "tasks": len(self.tasks),
        }

    def _votes_of(self, labeler: str) -> list[Vote]:
        return [vote for vote in self.file.votes if vote.labeler == labeler and vote.task in self.tasks]

    def _to_repeat(self, mine: list[Vote]) -> str | None:
        """A task to ask again: one after every 1 / repeats votes, and not one of the last ten."""
        wanted = int((len(mine) + 1) * self.repeats)
        repeated = {vote.task for vote in mine if vote.repeat}
        if len(repeated) >= wanted:
            return None
        old = [v.task for v in mine[:-10] if not v.skipped and not v.repeat and v.task not in repeated]
        return old[0] if old else None

    def everybody_is_done(self) -> bool:
        """Whether somebody voted, nobody who did has anything left, and nobody is looking at a task."""
        labelers = {vote.labeler for vote in self.file.votes if vote.task in self.tasks}
        if any(until > time.monotonic() for _, until in self._held.values()):
            return False
        return not self.tasks or (
            bool(labelers) and all(self.next(labeler, hold=False) is None for labeler in labelers)
        )

    def order(self, task: str, labeler: str, repeat: bool) -> list[int]:
        """Position on the page -> completion: random, and the same whenever it is asked."""
        order = list(range(len(self.tasks[task].completions)))
        random.Random(f"{self.seed} {labeler} {task} {repeat}").shuffle(order)
        return order

    def _show(self, task: str, labeler: str, repeat: bool) -> Shown:
        return Shown(self.tasks[task], self.order(task, labeler, repeat), repeat, None)


def check_labeler_name(name: Any) -> str:
    """The name, trimmed.

    Raises:
        InputError: for an empty or overlong name, or one with control characters.
    """
    name = name.strip() if isinstance(name, str) else ""
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise InputError(f"A labeler needs a name of 1 to {LONGEST_NAME} printable characters.")
    return name


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def agreement(votes: list[Vote]) -> dict[str, Any]:
    """How far labelers agree with each other and with themselves.

    Returns:
        `alpha`: Krippendorff's alpha over pairs of replies that at least two labelers compared, with first < tie <
        second as an ordinal scale: 1 is perfect agreement, 0 is chance; None without such pairs. `repeats`: share of
        the strict preferences that a labeler gave again when asked a second time, None without repeats. `pairs`,
        `repeated_pairs`: over how many pairs.

    Source: Krippendorff, Content Analysis (2004), ch. 11, as computed by the package krippendorff.
    """
    scale = {"first": 0, "tie": 1, "second": 2}
    answers: dict[tuple[str, bool], dict[tuple[str, int, int], int]] = defaultdict(dict)
    for vote in votes:
        for pair in vote.comparisons():
            answers[vote.labeler, vote.repeat][vote.task, pair.first, pair.second] = scale[pair.preferred]
    first_answers = [given for (_, repeat), given in answers.items() if not repeat]
    units = sorted({unit for given in first_answers for unit in given})
    units = [unit for unit in units if sum(unit in given for given in first_answers) > 1]
    table = [[given.get(unit, math.nan) for unit in units] for given in first_answers]
    values = {value for row in table for value in row if not math.isnan(value)}
    alpha = None
    if units:  # where everybody always says the same, alpha is 0/0 and agreement perfect
        alpha = 1.0 if len(values) == 1 else float(krippendorff.alpha(table, level_of_measurement="ordinal"))
    same = [
        answers[labeler, False][unit] == value
        for (labeler, repeat), given in list(answers.items())
        if repeat
        for unit, value in given.items()
        if value != 1 and answers[labeler, False].get(unit, 1) != 1
    ]
    return {
        "alpha": alpha,
        "pairs": len(units),
        "repeats": sum(same) / len(same) if same else None,
        "repeated_pairs": len(same),
        "labelers": len({vote.labeler for vote in votes}),
        "votes": len(votes),
    }
