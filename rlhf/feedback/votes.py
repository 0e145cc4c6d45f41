"""People's votes: one JSON line each, appended to a file that is never rewritten.

A vote ranks the completions of a task. A line adds a vote or takes one back. The lines read in order give the state, so
several servers, crashes and restarts can't disagree about it.
"""

import itertools
import json
import os
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock

from rlhf.comparisons import Comparison
from rlhf.errors import InputError

FIELDS = ("task", "labeler", "repeat", "ranks", "ratings", "skipped", "time")
LONGEST_NAME = 40


class Vote(NamedTuple):
    """One person's answer to one task."""

    task: str
    labeler: str
    repeat: bool  # a second answer of the same labeler, asked for to measure self-agreement
    ranks: list[int]  # by completion; 1 is the best, equal numbers are a tie
    ratings: list[int | None] | None  # by completion, 1 to 7, where asked for
    skipped: bool
    time: str  # ISO 8601, UTC

    @property
    def key(self) -> tuple[str, str, bool]:
        """(labeler, task, repeat): a labeler answers a task once, and once more as a repeat."""
        return self.labeler, self.task, self.repeat

    def comparisons(self) -> list[Comparison]:
        """All K(K-1)/2 pairs of a ranking of K completions; none if the task was skipped.

        >>> vote = Vote("task", "ada", False, [2, 1, 1], None, False, "2026-11-27T12:00:00+00:00")
        >>> [(pair.first, pair.second, pair.preferred) for pair in vote.comparisons()]
        [(0, 1, 'second'), (0, 2, 'second'), (1, 2, 'tie')]
        """
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
        InputError: if the file is unreadable or holds something other than votes.
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
        """Lock the file and read what was appended since."""
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
        """The votes that were not taken back, oldest first."""
        with self:
            return list(self._votes.values())

    def append(self, vote: Vote) -> bool:
        """Write a vote to the disk. Returns False, and writes nothing, if this labeler has answered already."""
        with self:
            if vote.key in self._votes:
                return False
            self._write(vote._asdict())
            return True

    def undo(self, vote: Vote) -> None:
        """Take a vote back. Both lines stay in the file."""
        with self:
            self._write({"undo": vote.task, "labeler": vote.labeler, "repeat": vote.repeat, "time": now()})

    def _write(self, line: dict[str, object]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._catch_up()

    def _catch_up(self) -> None:
        """Read what has been appended since. End a last line that a crash cut off; `_take` skips it."""
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
                return  # cut off by a crash and ended by the next server
            raise InputError(f"{where}: not a vote ({line[:40]!r}). Give a votes file of this project.") from None
        if isinstance(entry, dict) and "undo" in entry and "labeler" in entry:
            self._votes.pop((entry["labeler"], entry["undo"], entry.get("repeat", False)), None)
            return
        if not isinstance(entry, dict) or not set(FIELDS) <= set(entry):
            found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise InputError(f"{where}: not a vote; expected {', '.join(FIELDS)}, found {found}.")
        vote = Vote(**{name: entry[name] for name in FIELDS})
        self._votes.setdefault(vote.key, vote)


def check_labeler_name(name: object) -> str:
    """The name, trimmed.

    Raises:
        InputError: if the name is empty or too long, or has control characters.
    """
    name = name.strip() if isinstance(name, str) else ""
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise InputError(f"A labeler needs a name of 1 to {LONGEST_NAME} printable characters.")
    return name


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
