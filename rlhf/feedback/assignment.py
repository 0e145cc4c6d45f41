"""Which task a labeler gets next, and whether an answer fits its task."""

import math
import random
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from rlhf.comparisons import Task
from rlhf.errors import InputError
from rlhf.feedback.votes import Vote, VoteFile, check_labeler_name
from rlhf.run.ranges import Port, Share

VoteKey = tuple[str, str, bool]  # of Vote.key
NEWCOMERS = 0.25  # share of the tasks
MOST_SHOWN = 100_000  # questions that are remembered as asked; older ones are asked again


@dataclass
class VotingSettings:
    """How people vote: the page's address, and which tasks they get."""

    server_name: str = field(default="127.0.0.1", metadata={"help": "For 'human': address of the page."})
    server_port: Port = field(default=7860, metadata={"help": "For 'human': port of the page."})
    overlap: Share = field(default=0.2, metadata={"help": "For 'human': share of tasks that every labeler gets."})
    repeats: Share = field(default=0.05, metadata={"help": "For 'human': share of tasks asked twice, unannounced."})
    ratings: bool = field(default=False, metadata={"help": "For 'human': also rate each reply from 1 to 7."})


class NotAsked(InputError):
    """The answer is to a question that this session was not asked."""


class TaskView(NamedTuple):
    """A task as one labeler sees it."""

    task: Task
    order: list[int]  # position on the page -> number of the completion
    repeat: bool
    earlier: Vote | None  # the vote that was just taken back


class Hold(NamedTuple):
    """Who looks at a task."""

    labeler: str
    session: str
    until: float  # of time.monotonic


class Assignment:
    """Distributes tasks among labelers and takes their answers.

    A share `overlap` of the tasks goes to every labeler, so that agreement can be measured. Each other task goes to
    whoever comes first. A share `repeats` of a labeler's tasks are repeats of earlier ones, in another order.

    A session is a browser, as its server knows it. It answers what it was shown, and takes back what it answered. A
    task that somebody looks at is kept from others: one for each session, and `NEWCOMERS` of the tasks for all who have
    not answered anything yet.

    Args:
        lease: seconds for which a task shown to one labeler is kept from the others.
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
        self._held: dict[str, Hold] = {}
        self._shown: dict[tuple[str, VoteKey], None] = {}  # session and what it was shown, oldest first
        self._cast: dict[VoteKey, str] = {}  # the session that cast a vote

    def next(self, labeler: str, session: str = "", hold: bool = True) -> TaskView | None:
        """This labeler's task now, the same one until it is answered; None if none is left.

        Args:
            hold: note that the task is shown, and keep it from other labelers for the lease.
        """
        with self.file:
            mine = self._votes_of(labeler)
            repeat = self._next_repeat(mine)
            if repeat is not None:
                return self._view(repeat, labeler, True, session if hold else None)
            answered = {vote.task for vote in mine}
            taken = {vote.task for vote in self.file.votes if not vote.skipped} - self.shared
            taken |= self._kept_from(labeler)
            order = random.Random(f"{self.seed} {labeler}").sample(sorted(self.tasks), len(self.tasks))
            free = [task for task in order if task not in answered and task not in taken]
            if not free:
                return None
            # first what they last saw, last what others look at
            task = min(
                free, key=lambda task: 1 if task not in self._held else 2 * (self._held[task].labeler != labeler)
            )
            if hold and task not in self.shared:
                self._held = {
                    other: held for other, held in self._held.items() if held.session != session or not session
                }
                self._held[task] = Hold(labeler, session, time.monotonic() + self.lease)
            return self._view(task, labeler, False, session if hold else None)

    def _kept_from(self, labeler: str) -> set[str]:
        """The tasks that others look at. Those who have not answered anything yet keep the few latest of theirs."""
        voters = {vote.labeler for vote in self.file.votes}
        moment = time.monotonic()
        self._held = {task: held for task, held in self._held.items() if held.until > moment}
        others = {task: held for task, held in self._held.items() if held.labeler != labeler}
        newcomers = sorted((held.until, task) for task, held in others.items() if held.labeler not in voters)
        most = max(1, int(NEWCOMERS * len(self.tasks)))
        return set(others) - {task for _, task in newcomers[:-most]}

    def answer(self, vote: Vote, session: str = "") -> bool:
        """Write a vote to the disk. Returns False if this labeler had answered already.

        Raises:
            InputError: if the vote doesn't fit its task, its task was not shown to this session, or it can't be
                written.
        """
        if vote.task not in self.tasks:
            raise InputError("This vote is for a reply that no longer exists. Reload the page.")
        count = len(self.tasks[vote.task].completions)
        fits = vote.is_well_formed() and len(vote.ratings or []) in (0, count)
        # places 1, 2, ... without a gap
        if not fits or not (
            vote.skipped or (len(vote.ranks) == count and {*vote.ranks} == {*range(1, max(vote.ranks) + 1)})
        ):
            raise InputError(f"This vote doesn't fit its {count} replies. Reload the page.")
        check_labeler_name(vote.labeler)
        with self.file:
            if (session, vote.key) not in self._shown:
                raise NotAsked("This question was not asked here since the server was started. Answer the one below.")
            new = self.file.append(vote)
            if new:
                self._cast[vote.key] = session
            self._held.pop(vote.task, None)
        return new

    def undo(self, labeler: str, session: str = "") -> TaskView | None:
        """Take back the last vote of this labeler and session. Returns its task, or None if there is no vote.

        Raises:
            InputError: if that can't be written.
        """
        with self.file:
            mine = [vote for vote in self._votes_of(labeler) if self._cast.get(vote.key) == session]
            if not mine:
                return None
            last = mine[-1]
            self.file.undo(last)
            if last.task not in self.shared:
                self._held[last.task] = Hold(labeler, session, time.monotonic() + self.lease)
            return self._view(last.task, labeler, last.repeat, session)._replace(earlier=last)

    def progress(self, labeler: str) -> dict[str, int]:
        """`mine`: votes of this labeler; `done`: tasks with at least one vote; `tasks`: all tasks."""
        votes = [vote for vote in self.file.votes if vote.task in self.tasks]
        done = {vote.task for vote in votes if not vote.skipped}
        return {
            "mine": sum(vote.labeler == labeler for vote in votes),
            "done": len(done),
            "tasks": len(self.tasks),
        }

    def _votes_of(self, labeler: str) -> list[Vote]:
        return [vote for vote in self.file.votes if vote.labeler == labeler and vote.task in self.tasks]

    def _next_repeat(self, mine: list[Vote]) -> str | None:
        """A task to ask again: one in every 1 / repeats votes, and none of the last ten tasks."""
        wanted = int((len(mine) + 1) * self.repeats)
        repeated = {vote.task for vote in mine if vote.repeat}
        if len(repeated) >= wanted:
            return None
        old = [v.task for v in mine[:-10] if not v.skipped and not v.repeat and v.task not in repeated]
        return old[0] if old else None

    def everybody_is_done(self) -> bool:
        """Whether somebody has voted, every voter has no task left, and nobody is looking at a task."""
        labelers = {vote.labeler for vote in self.file.votes if vote.task in self.tasks}
        if any(held.until > time.monotonic() for held in self._held.values()):
            return False
        return not self.tasks or (
            bool(labelers) and all(self.next(labeler, hold=False) is None for labeler in labelers)
        )

    def order(self, task: str, labeler: str, repeat: bool) -> list[int]:
        """Number of the completion at each position on the page: random, but the same at every call."""
        order = list(range(len(self.tasks[task].completions)))
        random.Random(f"{self.seed} {labeler} {task} {repeat}").shuffle(order)
        return order

    def _view(self, task: str, labeler: str, repeat: bool, session: str | None) -> TaskView:
        """Args: session: the one that it is shown to, or None."""
        if session is not None:
            self._shown[session, (labeler, task, repeat)] = None
            if len(self._shown) > MOST_SHOWN:
                del self._shown[next(iter(self._shown))]
        return TaskView(self.tasks[task], self.order(task, labeler, repeat), repeat, None)
