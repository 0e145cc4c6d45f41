"""People's votes: one JSON line each, appended to a file that is never rewritten.

A vote ranks the completions of a task. A line adds a vote or takes one back. The lines read in order give the state, so
several servers, crashes and restarts can't disagree about it.
"""

import codecs
import itertools
import json
import os
import threading
import unicodedata
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, NamedTuple

import regex
from filelock import FileLock

from rlhf.comparisons import Comparison
from rlhf.errors import InputError

VOTES_FILE = "votes.jsonl"
FIELDS = ("task", "labeler", "repeat", "ranks", "ratings", "skipped", "time")
LONGEST_NAME = 40  # grapheme clusters
BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols without ink
# invisible characters that come along with a pasted name, and joiners where they shape nothing
USELESS = (
    r"[\u00ad\u061c\u200b\u200e\u200f\u2060\ufeff]|(?<=[\u200c\u200d])[\u200c\u200d]|[\u200c\u200d]+$|"
    r"(?<=^|[\s\p{P}\p{Nd}\p{Latin}\p{Greek}\p{Cyrillic}\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}])[\u200c\u200d]"
)
# control characters, line ends, what is no character, and embeddings that turn the text around them
UNFIT = r"[\p{Cc}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}\u202a-\u202e\u2066-\u2069]"


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

    def is_well_formed(self) -> bool:
        """Whether every field has its type, and ranks and ratings are in range. Their number is the task's matter."""
        ranks, ratings = self.ranks, [] if self.ratings is None else self.ratings
        texts = all(isinstance(value, str) for value in (self.task, self.labeler, self.time))
        flags = all(isinstance(value, bool) for value in (self.repeat, self.skipped))
        lists = isinstance(ranks, list) and isinstance(ratings, list)
        # type, because a bool is an int
        return texts and flags and lists and (self.skipped or bool(ranks)) and (
            all(type(rank) is int and rank >= 1 for rank in ranks)
            and all(value is None or (type(value) is int and 1 <= value <= 7) for value in ratings)
        )  # fmt: skip

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

    A line that is no vote, such as one that a crash or a full disk cut off, is passed over and reported.

    Raises:
        InputError: if the file is unreadable, or holds something else and not a single vote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._votes: dict[tuple[str, str, bool], Vote] = {}
        self._read = self._lines = 0  # bytes and lines of the file that `_votes` knows
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
        """Write a vote to the disk. Returns False, and writes nothing, if this labeler has answered already.

        Raises:
            InputError: if it can't be written. Then no part of it is kept.
        """
        with self:
            if vote.key in self._votes:
                return False
            self._write(vote._asdict())
            return True

    def undo(self, vote: Vote) -> None:
        """Take a vote back. Both lines stay in the file.

        Raises:
            InputError: if that can't be written. Then the vote stays.
        """
        with self:
            self._write({"undo": vote.task, "labeler": vote.labeler, "repeat": vote.repeat, "time": now()})

    def _write(self, line: dict[str, object]) -> None:
        try:
            append_line(self.path, json.dumps(line, ensure_ascii=False))
        except OSError as error:
            raise InputError(f"{self.path}: not saved, can't be written ({error.strerror}).") from error
        self._catch_up()

    def _catch_up(self) -> None:
        """Read what has been appended since, also a last line without an end. `append_line` ends such a line."""
        if not self.path.exists():
            return
        if self.path.stat().st_size < self._read:  # somebody shortened the file
            self._votes, self._read, self._lines = {}, 0, 0
        with self.path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        if not content:
            return
        lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
        wrong = [number for number, line in enumerate(lines, self._lines + 1) if line.strip() and not self._take(line)]
        foreign = [number for number in wrong if not _is_cut(lines[number - self._lines - 1])]
        if self._read == 0 and foreign and len(wrong) == sum(bool(line.strip()) for line in lines):
            line = lines[foreign[0] - 1].decode(errors="replace")
            raise InputError(f"{self.path}, line {foreign[0]}: not a vote ({line[:60]!r}). Give a votes file.")
        self._read += len(content)
        self._lines += len(lines) - 1
        if wrong:
            numbers = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
            print(f"{self.path}: {len(wrong)} damaged line(s) passed over (line {numbers}); all others count.")

    def _take(self, line: bytes) -> bool:
        """Apply a line. Returns False if it is neither a vote nor takes one back."""
        try:
            entry = json.loads(line.decode())
        except (ValueError, RecursionError):
            return False
        if not isinstance(entry, dict) or not isinstance(entry.get("labeler"), str):
            return False
        if "undo" in entry:
            task, repeat = entry["undo"], entry.get("repeat", False)
            if isinstance(task, str) and isinstance(repeat, bool):
                self._votes.pop((entry["labeler"], task, repeat), None)
                return True
            return False
        if not set(FIELDS) <= set(entry):
            return False
        vote = Vote(**{name: entry[name] for name in FIELDS})
        if not vote.is_well_formed():
            return False
        self._votes.setdefault(vote.key, vote)
        return True


def append_line(file: Path, line: str) -> None:
    """Append a line to a file and wait until the disk has it. A last line without an end is ended first.

    Raises:
        OSError: if it can't be written. Then the file is as long as before.
    """
    with file.open("a+b", buffering=0) as opened:
        length = opened.seek(0, os.SEEK_END)
        before = os.pread(opened.fileno(), 1, length - 1) if length else b"\n"
        content = (b"" if before == b"\n" else b"\n") + line.encode() + b"\n"
        try:
            while content:  # a disk that is almost full takes a part and refuses the rest
                content = content[opened.write(content) :]
            os.fsync(opened.fileno())
        except BaseException:
            opened.truncate(length)
            raise


def _is_cut(line: bytes) -> bool:
    """Whether a line may be the beginning of one of `VoteFile`'s, or blank space that a crash left."""
    starts = (b'{"task"', b'{"undo"')
    try:
        json.loads(line.decode())
    except (ValueError, RecursionError):
        return line.startswith(starts) or any(start.startswith(line) for start in starts) or not line.strip(b"\0 ")
    return False


def check_labeler_name(name: object) -> str:
    r"""The name in one spelling: NFC, trimmed, single spaces, without characters that nobody can see.

    >>> check_labeler_name("  Zoe\u0308\u200b  B. ")
    'Zoë B.'

    Joiners stay where they shape a script or an emoji. Length is counted in grapheme clusters.

    Raises:
        InputError: if the name has no visible character, too many, or control characters.
    """
    need = f"A labeler needs a name of 1 to {LONGEST_NAME} characters"
    if not isinstance(name, str):
        raise InputError(f"{need}.")
    name = str(regex.sub(r"\p{Zs}+", " ", regex.sub(USELESS, "", name.strip())))
    name = unicodedata.normalize("NFC", name).strip()
    if unfit := regex.search(UNFIT, name):
        raise InputError(f"{need}; U+{ord(unfit[0]):04X} can't be in one. Leave it out.")
    if not any(unicodedata.category(c)[0] in "LNPS" and c not in BLANK for c in name):
        raise InputError(f"{need}, at least one of them visible.")
    if len(regex.findall(r"\X", name)) > LONGEST_NAME or len(name) > 10 * LONGEST_NAME:
        raise InputError(f"{need}, each of a few code points. Shorten this one.")
    return name


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
