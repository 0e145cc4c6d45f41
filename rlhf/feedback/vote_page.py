"""The page on which people compare replies, and the labeler behind it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.comparisons import Comparison, Prompt, Task
from rlhf.errors import InputError
from rlhf.feedback.agreement import measure_agreement
from rlhf.feedback.assignment import Assignment, TaskView, VotingSettings
from rlhf.feedback.serving import gr, serve, wait
from rlhf.feedback.votes import Vote, VoteFile, check_labeler_name, now
from rlhf.run.files import write_json

HERE = Path(__file__).parent
PlainData = dict[str, Any]  # what the page and its server exchange as JSON


class VotePage:
    """The requests of the page. Every answer is plain data; an error is {"error": sentence}."""

    def __init__(self, assignment: Assignment, ratings: bool = False) -> None:
        self.assignment, self.ratings = assignment, ratings

    def open_task(self, labeler: str) -> PlainData:
        """This labeler's task now."""
        return self._answer(labeler, lambda name: (self.assignment.next(name), f"Welcome, {name}."))

    def vote(self, labeler: str, answer: PlainData) -> PlainData:
        """Save an answer (by place on the page) and show the next task."""

        def save(name: str) -> tuple[TaskView | None, str]:
            new = self.assignment.answer(self._vote_of(name, answer))
            thanks = "Skipped." if answer.get("skipped") else "Saved. Thank you!"
            return self.assignment.next(name), thanks if new else "That one was answered already."

        return self._answer(labeler, save)

    def undo(self, labeler: str) -> PlainData:
        """Take back the labeler's last answer and show its task again."""

        def undo(name: str) -> tuple[TaskView | None, str]:
            view = self.assignment.undo(name)
            if view is None:
                raise InputError("There is nothing to undo.")
            return view, "Taken back. Answer again."

        return self._answer(labeler, undo)

    def _answer(self, labeler: str, act: Callable[[str], tuple[TaskView | None, str]]) -> PlainData:
        try:
            name = check_labeler_name(labeler)
            view, message = act(name)
        except InputError as error:
            return {"error": str(error)}
        progress = self.assignment.progress(name)
        return {"labeler": name, "task": view and self._public(view), "progress": progress, "message": message}

    def _vote_of(self, labeler: str, answer: PlainData) -> Vote:
        """Turn an answer (by place on the page) into a vote (by completion)."""
        try:
            task, repeat, skipped = str(answer["task"]), bool(answer["turn"]), bool(answer["skipped"])
            by_place = [answer["ranks"], answer["ratings"]]
            if not all(isinstance(values, list) for values in by_place):
                raise TypeError("ranks and ratings must be lists")
        except (TypeError, KeyError) as error:
            raise InputError("The page sent no valid answer. Reload it.") from error
        if task in self.assignment.tasks and not skipped:
            order = self.assignment.order(task, labeler, repeat)
            by_place = [
                [values[order.index(number)] for number in range(len(order))] if len(values) == len(order) else values
                for values in by_place
            ]
        ranks, ratings = by_place
        asked = self.ratings and not skipped
        return Vote(task, labeler, repeat, [] if skipped else ranks, ratings if asked else None, skipped, now())

    def _public(self, view: TaskView) -> PlainData:
        """The part of a task that the page gets. It does not get the models' names."""
        earlier = view.earlier
        count = len(view.order)
        picks: list[list[int]] = []
        if earlier is not None and not earlier.skipped and (count > 2 or self.ratings):
            for rank in sorted(set(earlier.ranks)):
                picks.append([place for place, number in enumerate(view.order) if earlier.ranks[number] == rank])
        given: list[int | None] = [None] * count
        if earlier is not None and earlier.ratings:
            given = [earlier.ratings[number] for number in view.order]
        return {
            "id": view.task.id,
            "turn": int(view.repeat),
            "prompt": as_messages(view.task.prompt),
            "replies": [view.task.completions[number] for number in view.order],
            "ratings": self.ratings,
            "picks": picks,
            "given": given,
        }

    def blocks(self) -> gr.Blocks:
        """The page itself."""

        def open_task(labeler: str) -> PlainData:  # Gradio sets attributes on these functions; methods take none
            return self.open_task(labeler)

        def vote(sent: PlainData) -> PlainData:
            return self.vote(sent["labeler"], sent["answer"])

        def undo(labeler: str) -> PlainData:
            return self.undo(labeler)

        with gr.Blocks(title="Compare replies", analytics_enabled=False) as blocks:
            gr.HTML(
                html_template=(HERE / "vote.html").read_text(encoding="utf-8"),
                css_template=(HERE / "vote.css").read_text(encoding="utf-8"),
                js_on_load=(HERE / "vote.js").read_text(encoding="utf-8"),
                server_functions=[open_task, vote, undo],
                apply_default_css=False,
            )
        return blocks


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as messages of role and content.

    >>> as_messages("Once upon a time")
    [{'role': 'text', 'content': 'Once upon a time'}]
    """
    if isinstance(prompt, str):
        return [{"role": "text", "content": prompt}]
    return [{"role": str(message["role"]), "content": str(message["content"])} for message in prompt]


class People:
    """Labeler `human`: serves the page until every labeler has answered all their tasks, or until Ctrl-C.

    Args:
        args: LabelerArguments.
        votes: file that gets the votes. Votes already in it count.
    """

    name = "human"

    def __init__(self, settings: VotingSettings, votes: Path, seed: int) -> None:
        for flag, share in (("overlap", settings.overlap), ("repeats", settings.repeats)):
            if not 0 <= share <= 1:
                raise InputError(f"--{flag} {share}: must be a share from 0 to 1.")
        self.settings, self.path, self.seed = settings, votes, seed
        self.finished = False

    def compare(self, tasks: list[Task]) -> list[list[Comparison]]:
        usable = [task for task in tasks if len(task.completions) > 1]
        file = VoteFile(self.path)
        settings = self.settings
        assignment = Assignment(usable, file, overlap=settings.overlap, repeats=settings.repeats, seed=self.seed)
        blocks = VotePage(assignment, settings.ratings).blocks()
        if not assignment.everybody_is_done():
            url = serve(blocks, settings.server_name, settings.server_port)
            print(
                f"Vote at {url} (Ctrl-C stops; run the same command again to continue). Votes: {self.path}", flush=True
            )
            wait(assignment.everybody_is_done)
            blocks.close(verbose=False)
        self.finished = assignment.everybody_is_done()
        return self._comparisons(tasks, file.votes, assignment)

    def _comparisons(self, tasks: list[Task], votes: list[Vote], assignment: Assignment) -> list[list[Comparison]]:
        known = {task.id: len(task.completions) for task in tasks}
        foreign = [vote for vote in votes if vote.task not in known]
        if foreign:
            print(f"{self.path}: {len(foreign)} votes are for replies that no longer exist. They do not count.")
        votes = [vote for vote in votes if vote.task in known and (vote.skipped or len(vote.ranks) == known[vote.task])]
        found = measure_agreement(votes)
        write_json(self.path.with_name("agreement.json"), found._asdict())
        alpha = "no pair was compared twice" if found.alpha is None else f"{found.alpha:.2f} over {found.pairs} pairs"
        same = "." if found.repeats is None else f"; {found.repeats:.0%} of repeated answers were the same."
        print(f"{found.votes} votes of {found.labelers} labelers. Krippendorff's alpha: {alpha}{same}")
        answers: dict[str, list[Comparison]] = {task.id: [] for task in tasks}
        for vote in votes:
            if not vote.repeat:
                answers[vote.task] += vote.comparisons()
        if not self.finished:
            print("There is more to compare. Run the same command again to continue.")
        return [answers[task.id] for task in tasks]
