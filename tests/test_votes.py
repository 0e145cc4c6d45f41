"""The votes file, who sees what, and agreement."""

import json
import math
import threading
import time
from collections import Counter

import pytest

from rlhf.comparisons import make_task
from rlhf.errors import InputError
from rlhf.feedback.agreement import measure_agreement
from rlhf.feedback.assignment import Assignment
from rlhf.feedback.votes import Vote, VoteFile, check_labeler_name


def tasks(count, replies=2):
    return [
        make_task("train", f"prompt {n}", [f"reply {n} {k}" for k in range(replies)], ["m"] * replies)
        for n in range(count)
    ]


def vote(task, labeler="ada", ranks=(1, 2), repeat=False, skipped=False):
    return Vote(task, labeler, repeat, list(ranks), None, skipped, "2026-01-01T00:00:00+00:00")


def test_a_ranking_of_four_gives_all_six_pairs():
    pairs = vote("t", ranks=(2, 1, 3, 3)).comparisons()
    assert [(p.first, p.second, p.preferred) for p in pairs] == [
        (0, 1, "second"), (0, 2, "first"), (0, 3, "first"), (1, 2, "first"), (1, 3, "first"), (2, 3, "tie"),
    ]  # fmt: skip
    assert vote("t", skipped=True).comparisons() == []


def test_votes_survive_a_restart_and_undo(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    assert file.append(vote("a"))
    assert not file.append(vote("a", ranks=(2, 1)))  # the same labeler, the same task
    assert file.append(vote("b"))
    file.undo(vote("a"))
    assert file.append(vote("a", ranks=(2, 1)))
    again = VoteFile(tmp_path / "votes.jsonl").votes
    assert [(v.task, v.ranks) for v in again] == [("b", [1, 2]), ("a", [2, 1])]
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 4  # nothing is ever rewritten


def test_a_line_cut_off_by_a_crash_is_passed_over_and_the_next_vote_is_whole(tmp_path):
    path = tmp_path / "votes.jsonl"
    VoteFile(path).append(vote("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"task": "b", "labe')
    file = VoteFile(path)
    assert [v.task for v in file.votes] == ["a"]
    file.append(vote("c"))
    assert [v.task for v in VoteFile(path).votes] == ["a", "c"]


@pytest.mark.parametrize("content", ["hello\n", '{"prompt": "x"}\n', "[1, 2]\n"])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "votes.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"votes.jsonl, line 1: not a vote"):
        VoteFile(path)
    assert path.read_text() == content


def test_two_servers_and_many_threads_lose_and_duplicate_nothing(tmp_path):
    files = [VoteFile(tmp_path / "votes.jsonl") for _ in range(2)]

    def cast(number):
        for n in range(25):
            files[number % 2].append(vote(f"task {n}", f"labeler {number}"))
            files[(number + 1) % 2].append(vote(f"task {n}", f"labeler {number}"))

    threads = [threading.Thread(target=cast, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    lines = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert len(lines) == 100
    assert len({(line["labeler"], line["task"]) for line in lines}) == 100


def label_all(assignment, labelers):
    """Everybody votes in turns until nobody has anything left; returns what each one saw."""
    seen = {labeler: [] for labeler in labelers}
    while shown := {labeler: assignment.next(labeler) for labeler in labelers}:
        shown = {labeler: what for labeler, what in shown.items() if what}
        if not shown:
            return seen
        for labeler, what in shown.items():
            seen[labeler].append((what.task.id, what.repeat))
            assignment.answer(vote(what.task.id, labeler, repeat=what.repeat))
    return seen


def test_nobody_is_done_while_somebody_looks_at_a_task(tmp_path):
    assignment = Assignment(tasks(5), VoteFile(tmp_path / "v.jsonl"), overlap=0.0, repeats=0.0)
    shown = assignment.next("ben")
    label_all(assignment, ["ada"])
    assert not assignment.everybody_is_done()  # ben's task isn't answered, and ada doesn't get it
    assignment.answer(vote(shown.task.id, "ben"))
    assert assignment.everybody_is_done()


def test_labelers_share_the_work_with_the_set_overlap(tmp_path):
    assignment = Assignment(tasks(40), VoteFile(tmp_path / "v.jsonl"), overlap=0.25, repeats=0.0)
    seen = label_all(assignment, ["ada", "ben", "cleo"])
    counts = Counter(task for answers in seen.values() for task, _ in answers)
    assert Counter(counts.values()) == {3: 10, 1: 30}
    assert assignment.everybody_is_done()
    assert assignment.progress("ada")["done"] == 40


def test_a_share_of_tasks_is_asked_twice_in_another_guise(tmp_path):
    assignment = Assignment(tasks(60, 4), VoteFile(tmp_path / "v.jsonl"), overlap=1.0, repeats=0.1)
    seen = []
    while what := assignment.next("ada"):
        seen.append((what.task.id, what.repeat, what.order))
        assignment.answer(vote(what.task.id, ranks=(1, 2, 3, 4), repeat=what.repeat))
    repeated = [(task, order) for task, repeat, order in seen if repeat]
    assert len(repeated) == 6
    first_orders = {task: order for task, repeat, order in seen if not repeat}
    assert any(first_orders[task] != order for task, order in repeated)
    for task, _ in repeated:
        positions = [n for n, (seen_task, *_) in enumerate(seen) if seen_task == task]
        assert positions[1] - positions[0] > 10


def test_a_task_that_somebody_looks_at_is_not_given_to_another_until_the_lease_ends(tmp_path):
    assignment = Assignment(tasks(1), VoteFile(tmp_path / "v.jsonl"), overlap=0.0, lease=0.2)
    shown = assignment.next("ada")
    assert assignment.next("ada").task == shown.task  # a reload shows it again
    assert assignment.next("ben") is None
    time.sleep(0.3)
    assert assignment.next("ben").task == shown.task


def test_undo_shows_the_task_again_with_the_answer(tmp_path):
    assignment = Assignment(tasks(3), VoteFile(tmp_path / "v.jsonl"))
    shown = assignment.next("ada")
    assignment.answer(vote(shown.task.id, ranks=(2, 1)))
    back = assignment.undo("ada")
    assert (back.task, back.order, back.earlier.ranks) == (shown.task, shown.order, [2, 1])
    assert assignment.progress("ada")["mine"] == 0
    assert assignment.undo("ada") is None


def test_wrong_votes_are_refused(tmp_path):
    assignment = Assignment(tasks(1), VoteFile(tmp_path / "v.jsonl"))
    task = assignment.next("ada").task.id
    with pytest.raises(InputError, match="no longer exists"):
        assignment.answer(vote("gone"))
    for ranks in ((1,), (1, 2, 3), (0, 1), ("1", 2)):
        with pytest.raises(InputError, match="doesn't fit"):
            assignment.answer(vote(task, ranks=ranks))
    with pytest.raises(InputError, match="doesn't fit"):
        assignment.answer(vote(task)._replace(ratings=[8, 1]))
    for name in ("", "  ", "x" * 41, "a\nb", "\x1b[31m", None):
        with pytest.raises(InputError, match="name of 1 to 40"):
            check_labeler_name(name)
    assert assignment.file.votes == []


def test_agreement_is_krippendorffs_alpha():
    ada = [1, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    ben = [2, 2, 2, 1, 1, 2, 1, 1, 2, 1]
    as_ranks = {1: (1, 2), 2: (2, 1)}
    votes = [vote(f"{n}", "ada", as_ranks[a]) for n, a in enumerate(ada)]
    votes += [vote(f"{n}", "ben", as_ranks[b]) for n, b in enumerate(ben)]
    result = measure_agreement(votes)
    # for two values and no gaps: 1 - observed disagreement / expected disagreement (Krippendorff 2004, section 11.3.1)
    disagreements = sum(a != b for a, b in zip(ada, ben, strict=True))
    ones = sum(v == 1 for v in ada + ben)
    expected = 1 - (disagreements / 10) / (2 * ones * (20 - ones) / (20 * 19))
    assert math.isclose(result.alpha, expected, abs_tol=1e-9)
    assert (result.pairs, result.labelers, result.repeats) == (10, 2, None)


def test_agreement_with_oneself():
    votes = [vote("a"), vote("b"), vote("a", repeat=True), vote("b", repeat=True, ranks=(2, 1))]
    result = measure_agreement(votes)
    assert (result.repeats, result.repeated_pairs, result.alpha) == (0.5, 2, None)
    assert measure_agreement([vote("a"), vote("a", "ben")]).alpha == 1.0
