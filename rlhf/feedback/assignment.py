"""Which task a labeler gets next, and whether an answer fits its task."""

import math
import random
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from rlhf.comparisons import Task
from rlhf.errors import InputError
from rlhf.feedback.votes import Vote, VoteFile, check_labeler_name


@dataclass
class VotingSettings:
    """How people vote: the page's address, and which tasks they get."""

    server_name: str = field(default="127.0.0.1", metadata={"help": "For 'human': address of the page."})
    server_port: int = field(default=7860, metadata={"help": "For 'human': port of the page."})
    overlap: float = field(default=0.2, metadata={"help": "For 'human': share of tasks that every labeler gets."})
    repeats: float = field(default=0.05, metadata={"help": "For 'human': share of tasks asked twice, unannounced."})
    ratings: bool = field(default=False, metadata={"help": "For 'human': also rate each reply from 1 to 7."})


class TaskView(NamedTuple):
    """A task as one labeler sees it."""

    task: Task
    order: list[int]  # position on the page -> number of the completion
    repeat: bool
    earlier: Vote | None  # the vote that was just taken back


class Assignment:
    """Distributes tasks among labelers and takes their answers.

    A share `overlap` of the tasks goes to every labeler, so that agreement can be measured. Each other task goes to
    whoever comes first. A share `repeats` of a labeler's tasks are repeats of earlier ones, in another order.

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
        self._held: dict[str, tuple[str, float]] = {}  # task -> labeler, until when

    def next(self, labeler: str, hold: bool = True) -> TaskView | None:
        """This labeler's task now, the same one until it is answered; None if none is left.

        Args:
            hold: keep the task from other labelers for the lease.
        """
        with self.file:
            mine = self._votes_of(labeler)
            repeat = self._next_repeat(mine)
            if repeat is not None:
                return self._view(repeat, labeler, repeat=True)
            answered = {vote.task for vote in mine}
            taken = {vote.task for vote in self.file.votes if not vote.skipped} - self.shared
            moment = time.monotonic()
            taken |= {task for task, (who, until) in self._held.items() if who != labeler and until > moment}
            order = random.Random(f"{self.seed} {labeler}").sample(sorted(self.tasks), len(self.tasks))
            order.sort(key=lambda task: self._held.get(task, ("", 0.0))[0] != labeler)  # first what they last saw
            for task in order:
                if task not in answered and task not in taken:
                    if hold and task not in self.shared:
                        self._held[task] = (labeler, moment + self.lease)
                    return self._view(task, labeler, repeat=False)
            return None

    def answer(self, vote: Vote) -> bool:
        """Write a vote to the disk. Returns False if this labeler had answered already.

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

    def undo(self, labeler: str) -> TaskView | None:
        """Take back the labeler's last vote. Returns its task, or None if there is no vote."""
        with self.file:
            mine = self._votes_of(labeler)
            if not mine:
                return None
            last = mine[-1]
            self.file.undo(last)
            if last.task not in self.shared:
                self._held[last.task] = (labeler, time.monotonic() + self.lease)
            return self._view(last.task, labeler, last.repeat)._replace(earlier=last)

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
        if any(until > time.monotonic() for _, until in self._held.values()):
            return False
        return not self.tasks or (
            bool(labelers) and all(self.next(labeler, hold=False) is None for labeler in labelers)
        )

    def order(self, task: str, labeler: str, repeat: bool) -> list[int]:
        """Number of the completion at each position on the page: random, but the same at every call."""
        order = list(range(len(self.tasks[task].completions)))
        random.Random(f"{self.seed} {labeler} {task} {repeat}").shuffle(order)
        return order

    def _view(self, task: str, labeler: str, repeat: bool) -> TaskView:
        return TaskView(self.tasks[task], self.order(task, labeler, repeat), repeat, None)
