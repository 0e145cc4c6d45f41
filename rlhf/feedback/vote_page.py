"""The page on which people compare replies, and the labeler behind it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.comparisons import Comparison, Prompt, Rating, Task
from rlhf.errors import InputError
from rlhf.feedback.agreement import measure_agreement
from rlhf.feedback.assignment import Assignment, NotAsked, TaskView, VotingSettings
from rlhf.feedback.serving import gr, need_free_port, serve, wait
from rlhf.feedback.votes import Vote, VoteFile, check_labeler_name, now
from rlhf.run.files import write_json
from rlhf.run.folders import is_finished
from rlhf.run.ranges import check_ranges

HERE = Path(__file__).parent
PlainData = dict[str, Any]  # what the page and its server exchange as JSON


class VotePage:
    """The requests of the page. Every answer is plain data; an error is {"error": sentence}.

    `session` is the browser that asks, as the server knows it.
    """

    def __init__(self, assignment: Assignment, ratings: bool = False) -> None:
        self.assignment, self.ratings = assignment, ratings

    def open_task(self, labeler: object, session: str = "") -> PlainData:
        """This labeler's task now."""
        return self._answer(labeler, lambda name: (self.assignment.next(name, session), f"Welcome, {name}."))

    def vote(self, labeler: object, answer: object, session: str = "") -> PlainData:
        """Save an answer (by place on the page) and show the next task."""

        def save(name: str) -> tuple[TaskView | None, str]:
            vote = self._vote_of(name, answer)
            try:
                new = self.assignment.answer(vote, session)
            except NotAsked as error:
                return self.assignment.next(name, session), str(error)
            thanks = "Skipped." if vote.skipped else "Saved. Thank you!"
            return self.assignment.next(name, session), thanks if new else "That one was answered already."

        return self._answer(labeler, save)

    def undo(self, labeler: object, session: str = "") -> PlainData:
        """Take back the labeler's last answer of this session and show its task again."""

        def undo(name: str) -> tuple[TaskView | None, str]:
            view = self.assignment.undo(name, session)
            if view is None:
                raise InputError("There is nothing to undo here.")
            return view, "Taken back. Answer again."

        return self._answer(labeler, undo)

    def _answer(self, labeler: object, act: Callable[[str], tuple[TaskView | None, str]]) -> PlainData:
        try:
            name = check_labeler_name(labeler)
            view, message = act(name)
            progress = self.assignment.progress(name)
        except InputError as error:
            return {"error": str(error)}
        return {"labeler": name, "task": view and self._public(view), "progress": progress, "message": message}

    def _vote_of(self, labeler: str, answer: object) -> Vote:
        """Turn an answer (by place on the page) into a vote (by completion)."""
        kinds = {"task": str, "turn": int, "ranks": list, "ratings": list, "skipped": bool}
        # type, because a bool is an int
        if not isinstance(answer, dict) or any(type(answer.get(key)) is not kind for key, kind in kinds.items()):
            raise InputError("The page sent no valid answer. Reload it.")
        task, repeat, skipped = answer["task"], answer["turn"] == 1, answer["skipped"]
        if answer["turn"] not in (0, 1):
            raise InputError("The page sent no valid answer. Reload it.")
        by_place = [answer["ranks"], answer["ratings"]]
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

        # Gradio sets attributes on these functions, which methods don't take, and fills in the request
        def open_task(labeler: object, request: gr.Request) -> PlainData:
            return self.open_task(labeler, request.state.session)

        def vote(sent: object, request: gr.Request) -> PlainData:
            given = sent if isinstance(sent, dict) else {}
            return self.vote(given.get("labeler"), given.get("answer"), request.state.session)

        def undo(labeler: object, request: gr.Request) -> PlainData:
            return self.undo(labeler, request.state.session)

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
    # a message that is only a tool call has no content
    return [{"role": str(message["role"]), "content": _text_of(message)} for message in prompt]


def _text_of(message: PlainData) -> str:
    content = message.get("content") or message.get("tool_calls") or ""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


class People:
    """Labeler `human`: serves the page until every labeler has answered all their tasks, or until Ctrl-C.

    Args:
        args: LabelerArguments.
        votes: file that gets the votes. Votes already in it count.
    """

    name = "human"

    def __init__(self, settings: VotingSettings, votes: Path, seed: int) -> None:
        check_ranges(settings)
        if not is_finished(votes.parent):
            need_free_port(settings.server_name, settings.server_port)
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

    def ratings(self, tasks: list[Task]) -> list[list[Rating]]:
        """The ratings in the votes file, first answers only; none where a person left a rating out."""
        given: dict[str, list[Rating]] = {task.id: [] for task in tasks}
        sizes = {task.id: len(task.completions) for task in tasks}
        for vote in VoteFile(self.path).votes:
            if vote.repeat or vote.skipped or len(vote.ratings or []) != sizes.get(vote.task):
                continue
            given[vote.task] += [
                Rating(number, rating, vote.labeler)
                for number, rating in enumerate(vote.ratings or [])
                if rating is not None
            ]
        return [given[task.id] for task in tasks]

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
