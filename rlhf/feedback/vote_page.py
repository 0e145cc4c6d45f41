"""The page on which people compare replies, and the labeler behind it."""

from pathlib import Path
from typing import Any

from rlhf.comparisons import Comparison, Prompt, Task
from rlhf.errors import InputError
from rlhf.feedback.serving import gr, serve, wait
from rlhf.feedback.votes import Assignment, Shown, Vote, VoteFile, agreement, check_labeler_name, now
from rlhf.run.files import write_json

HERE = Path(__file__).parent


class VotePage:
    """What the page asks its server. Every answer is plain data; errors come back as {"error": sentence}."""

    def __init__(self, assignment: Assignment, ratings: bool = False) -> None:
        self.assignment, self.ratings = assignment, ratings

    def open_task(self, labeler: str) -> dict[str, Any]:
        """The task for this labeler now."""
        return self._answer(labeler, lambda name: (self.assignment.next(name), f"Welcome, {name}."))

    def vote(self, labeler: str, answer: dict[str, Any]) -> dict[str, Any]:
        """Save an answer, and show the next task. The answer speaks of replies by their place on the page."""

        def save(name: str) -> tuple[Shown | None, str]:
            new = self.assignment.answer(self._vote_of(name, answer))
            thanks = "Skipped." if answer.get("skipped") else "Saved. Thank you!"
            return self.assignment.next(name), thanks if new else "That one was answered already."

        return self._answer(labeler, save)

    def undo(self, labeler: str) -> dict[str, Any]:
        """Take back the labeler's last answer, and show its task again."""

        def undo(name: str) -> tuple[Shown | None, str]:
            shown = self.assignment.undo(name)
            if shown is None:
                raise InputError("There is nothing to undo.")
            return shown, "Taken back. Answer again."

        return self._answer(labeler, undo)

    def _answer(self, labeler: str, act: Any) -> dict[str, Any]:
        try:
            name = check_labeler_name(labeler)
            shown, message = act(name)
        except InputError as error:
            return {"error": str(error)}
        progress = self.assignment.progress(name)
        return {"labeler": name, "task": shown and self._public(shown), "progress": progress, "message": message}

    def _vote_of(self, labeler: str, answer: Any) -> Vote:
        """A vote by completion, from an answer by place on the page."""
        try:
            task, repeat, skipped = str(answer["task"]), bool(answer["turn"]), bool(answer["skipped"])
            by_place = [answer["ranks"], answer["ratings"]]
            if not all(isinstance(values, list) for values in by_place):
                raise TypeError("ranks and ratings have to be lists")
        except (TypeError, KeyError) as error:
            raise InputError("The page sent something that is no answer. Reload it.") from error
        if task in self.assignment.tasks and not skipped:
            order = self.assignment.order(task, labeler, repeat)
            by_place = [
                [values[order.index(number)] for number in range(len(order))] if len(values) == len(order) else values
                for values in by_place
            ]
        ranks, ratings = by_place
        asked = self.ratings and not skipped
        return Vote(task, labeler, repeat, [] if skipped else ranks, ratings if asked else None, skipped, now())

    def _public(self, shown: Shown) -> dict[str, Any]:
        """What the page may know of a task: not which model wrote what."""
        earlier = shown.earlier
        count = len(shown.order)
        picks: list[list[int]] = []
        if earlier is not None and not earlier.skipped and (count > 2 or self.ratings):
            for rank in sorted(set(earlier.ranks)):
                picks.append([place for place, number in enumerate(shown.order) if earlier.ranks[number] == rank])
        given: list[int | None] = [None] * count
        if earlier is not None and earlier.ratings:
            given = [earlier.ratings[number] for number in shown.order]
        return {
            "id": shown.task.id,
            "turn": int(shown.repeat),
            "prompt": as_messages(shown.task.prompt),
            "replies": [shown.task.completions[number] for number in shown.order],
            "ratings": self.ratings,
            "picks": picks,
            "given": given,
        }

    def blocks(self) -> gr.Blocks:
        """The page itself."""

        def open_task(labeler: str) -> dict[str, Any]:  # Gradio marks the functions it is given; methods can't be
            return self.open_task(labeler)

        def vote(sent: dict[str, Any]) -> dict[str, Any]:
            return self.vote(sent["labeler"], sent["answer"])

        def undo(labeler: str) -> dict[str, Any]:
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
    """A prompt as messages of role and content."""
    if isinstance(prompt, str):
        return [{"role": "text", "content": prompt}]
    return [{"role": str(message["role"]), "content": str(message["content"])} for message in prompt]


class People:
    """Labeler `human`: serves the page until everybody has answered what there is for them, or Ctrl-C.

    Args:
        args: LabelerArguments.
        votes: file that votes are appended to; what is in it already counts.
    """

    name = "human"

    def __init__(self, args: Any, votes: Path, seed: int) -> None:
        for flag, share in (("overlap", args.overlap), ("repeats", args.repeats)):
            if not 0 <= share <= 1:
                raise InputError(f"--{flag} {share}: is a share, from 0 to 1.")
        self.args, self.path, self.seed = args, votes, seed
        self.finished = False

    def compare(self, tasks: list[Task]) -> list[list[Comparison]]:
        usable = [task for task in tasks if len(task.completions) > 1]
        file = VoteFile(self.path)
        assignment = Assignment(
            usable, file, overlap=self.args.overlap, repeats=self.args.repeats, seed=self.seed
        )  # fmt: skip
        blocks = VotePage(assignment, self.args.ratings).blocks()
        if not assignment.everybody_is_done():
            url = serve(blocks, self.args.server_name, self.args.server_port)
            print(f"Vote at {url} (Ctrl-C stops; the same command goes on). Votes: {self.path}", flush=True)
            wait(assignment.everybody_is_done)
            blocks.close(verbose=False)
        self.finished = assignment.everybody_is_done()
        return self._comparisons(tasks, file.votes, assignment)

    def _comparisons(self, tasks: list[Task], votes: list[Vote], assignment: Assignment) -> list[list[Comparison]]:
        known = {task.id: len(task.completions) for task in tasks}
        foreign = [vote for vote in votes if vote.task not in known]
        if foreign:
            print(f"{self.path}: {len(foreign)} votes are for replies that no longer exist; they are left alone.")
        votes = [vote for vote in votes if vote.task in known and (vote.skipped or len(vote.ranks) == known[vote.task])]
        result = agreement(votes)
        write_json(self.path.with_name("agreement.json"), result)
        alpha, repeats = result["alpha"], result["repeats"]
        print(
            f"{result['votes']} votes of {result['labelers']} labelers. Krippendorff's alpha: "
            + (f"{alpha:.2f} over {result['pairs']} pairs" if alpha is not None else "no pair was compared twice")
            + (f"; {repeats:.0%} of repeated answers were the same." if repeats is not None else ".")
        )
        answers: dict[str, list[Comparison]] = {task.id: [] for task in tasks}
        for vote in votes:
            if not vote.repeat:
                answers[vote.task] += vote.comparisons()
        if not self.finished:
            print("There is more to compare: the same command goes on.")
        return [answers[task.id] for task in tasks]
