"""The votes file, who sees what, and agreement."""

import json
import math
import resource
import socket
import threading
import time
from collections import Counter

import pytest
from conftest import present

from eval.measuring.judges import judge_replies
from rlhf.comparisons import Prompt, Rating, make_task
from rlhf.errors import InputError
from rlhf.feedback.agreement import measure_agreement
from rlhf.feedback.assignment import Assignment, NotAsked, VotingSettings
from rlhf.feedback.vote_page import People
from rlhf.feedback.votes import Vote, VoteFile, check_labeler_name


def tasks(count, replies=2):
    return [
        make_task("train", f"prompt {n}", [f"reply {n} {k}" for k in range(replies)], ["m"] * replies)
        for n in range(count)
    ]


def vote(task, labeler="ada", ranks=(1, 2), repeat=False, skipped=False):
    return Vote(task, labeler, repeat, list(ranks), None, skipped, "2026-01-01T00:00:00+00:00")


LINE = vote("b")._asdict()


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


def test_a_line_cut_anywhere_is_passed_over_and_said_and_all_others_count(tmp_path, capsys):
    path = tmp_path / "votes.jsonl"
    file = VoteFile(path)
    for task in "abc":
        file.append(vote(task, "Zoë"))
    first, middle, last = path.read_bytes().splitlines(keepends=True)
    for cut in range(1, len(middle) - 1):
        path.write_bytes(first + middle[:cut] + b"\n" + last)
        assert [v.task for v in VoteFile(path).votes] == ["a", "c"], middle[:cut]
        assert "1 damaged line(s) passed over (line 2)" in capsys.readouterr().out
        path.write_bytes(first + last + middle[:cut])  # and the next vote begins a line of its own
        again = VoteFile(path)
        assert again.append(vote("d"))
        assert [v.task for v in VoteFile(path).votes] == [v.task for v in again.votes] == ["a", "c", "d"], middle[:cut]
    path.write_bytes(middle[:30])  # the very first one
    assert VoteFile(path).append(vote("d"))
    path.write_bytes(b"\xef\xbb\xbf" + first + middle.rstrip())  # an editor's mark; a last line that only lacks its end
    assert len(VoteFile(path).votes) == 2


@pytest.mark.parametrize(
    "damaged",
    [{**LINE, "task": {"a": 1}}, {**LINE, "task": None}, {**LINE, "labeler": 3}, {**LINE, "ranks": ["1", "2"]},
     {**LINE, "ranks": [True, True]}, {**LINE, "ranks": [0, 1]}, {**LINE, "ranks": [1.0, 2.0]}, {**LINE, "ranks": []},
     {**LINE, "ranks": {"1": 2}}, {**LINE, "ratings": [8, 1]}, {**LINE, "ratings": "7"}, {**LINE, "skipped": 1},
     {**LINE, "repeat": None}, {"undo": ["a"], "labeler": "ada"}, {"undo": "a", "labeler": ["ada"]},
     {"undo": "a", "labeler": "ada", "repeat": 0}, {"task": "b"}, [1], 3, None, "\\",
     b'{"task": "b", "labeler": "\xff"', b'"\xff"', b"\0" * 40, b"[" * 5000],
    ids=str,
)  # fmt: skip
def test_a_line_of_wrong_types_is_passed_over_beside_votes_and_refused_alone(tmp_path, damaged, capsys):
    line = damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode()
    path = tmp_path / "votes.jsonl"
    VoteFile(path).append(vote("a"))
    path.write_bytes(path.read_bytes() + line + b"\n")
    file = VoteFile(path)
    assert "1 damaged line(s) passed over (line 2)" in capsys.readouterr().out
    file.append(vote("c"))
    assert [v.task for v in VoteFile(path).votes] == ["a", "c"]
    if not (line.startswith(b'{"task"') and line.endswith(b'"')) and line.strip(b"\0"):  # those may be our own, cut off
        path.write_bytes(line + b"\n")
        with pytest.raises(InputError, match=r"votes.jsonl, line 1: not a vote"):
            VoteFile(path)
        assert path.read_bytes() == line + b"\n"


def test_a_full_disk_refuses_a_vote_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "votes.jsonl"
    file = VoteFile(path)
    file.append(vote("a"))
    size, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1, 30):  # the system takes a part of the line and refuses the rest
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
        try:
            with pytest.raises(InputError, match="not saved, can't be written"):
                file.append(vote("b"))
            with pytest.raises(InputError, match="not saved, can't be written"):
                file.undo(vote("a"))
            assert [v.task for v in file.votes] == ["a"]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.stat().st_size == size
    assert file.append(vote("b"))
    assert [v.task for v in VoteFile(path).votes] == ["a", "b"]


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
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert len(lines) == 100
    assert len({(line["labeler"], line["task"]) for line in lines}) == 100


def label_all(assignment, labelers):
    """Everybody votes in turns until nobody has anything left; returns what each one saw."""
    seen: dict[str, list[tuple[str, bool]]] = {labeler: [] for labeler in labelers}
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
    shown = present(assignment.next("ben"))
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
    shown = present(assignment.next("ada"))
    assert present(assignment.next("ada")).task == shown.task  # a reload shows it again
    assert assignment.next("ben") is None
    time.sleep(0.3)
    assert present(assignment.next("ben")).task == shown.task


def test_undo_shows_the_task_again_with_the_answer(tmp_path):
    assignment = Assignment(tasks(3), VoteFile(tmp_path / "v.jsonl"))
    shown = present(assignment.next("ada"))
    assignment.answer(vote(shown.task.id, ranks=(2, 1)))
    back = present(assignment.undo("ada"))
    assert (back.task, back.order, present(back.earlier).ranks) == (shown.task, shown.order, [2, 1])
    assert assignment.progress("ada")["mine"] == 0
    assert assignment.undo("ada") is None


def test_wrong_votes_are_refused(tmp_path):
    assignment = Assignment(tasks(1), VoteFile(tmp_path / "v.jsonl"))
    task = present(assignment.next("ada")).task.id
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


def test_a_vote_counts_only_for_what_was_shown_to_its_session(tmp_path):
    assignment = Assignment(tasks(2), VoteFile(tmp_path / "v.jsonl"), overlap=1.0)
    shown = present(assignment.next("ada", "phone"))
    other = next(task for task in assignment.tasks if task != shown.task.id)
    for forged, session in (
        (vote(shown.task.id), "stranger"), (vote(shown.task.id, repeat=True), "phone"), (vote(other), "phone"),
        (vote(shown.task.id, "eve"), "phone"),
    ):  # fmt: skip
        with pytest.raises(NotAsked):
            assignment.answer(forged, session)
    for ranks in ((True, True), (5, 900), (1, 3), (2, 2), (1.0, 2.0), (float("nan"), 1), (1,), (), (-1, 1), (None, 1)):
        with pytest.raises(InputError, match="doesn't fit"):
            assignment.answer(vote(shown.task.id, ranks=ranks), "phone")
    assert assignment.file.votes == []
    assert assignment.answer(vote(shown.task.id), "phone")
    assert not assignment.answer(vote(shown.task.id, ranks=(2, 1)), "phone")  # a double click, a retry
    assert assignment.undo("ada", "stranger") is None
    assert [v.ranks for v in assignment.file.votes] == [[1, 2]]
    assert present(assignment.undo("ada", "phone")).task == shown.task


def test_names_that_never_vote_starve_nobody(tmp_path):
    assignment = Assignment(tasks(24), VoteFile(tmp_path / "v.jsonl"), overlap=0.0, repeats=0.0)
    for number in range(24):
        assignment.next(f"nobody {number}", f"session {number}")
    seen = label_all(assignment, ["ada"])
    assert len(seen["ada"]) == 24 - 6  # the rest when their lease ends
    alone = Assignment(tasks(24), VoteFile(tmp_path / "w.jsonl"), overlap=0.0, repeats=0.0)
    for number in range(24):
        alone.next(f"nobody {number}", "one session")
    assert len(label_all(alone, ["ada"])["ada"]) == 23


@pytest.mark.parametrize(
    ("given", "kept"),
    [("  Ada  Lovelace ", "Ada Lovelace"), ("Zoe\u0308", "Zoë"), ("می\u200cخواهم", "می\u200cخواهم"),
     ("क\u094d\u200dष", "क\u094d\u200dष"), ("क्\u200cष", "क्\u200cष"), ("র\u200d\u09cdয",) * 2,
     ("王小明", "王小明"), ("👩🏽\u200d🚀", "👩🏽\u200d🚀"), ("👨\u200d👩\u200d👧" * 40, "👨\u200d👩\u200d👧" * 40),
     ("🏴\U000e0067\U000e0062\U000e007f",) * 2, ("a\u200dd\u200ba\u200d", "ada"), ("\u200eעדה\u200f", "עדה"),
     ("ada\u3000b", "ada b"), ("ᠠᠢ\u180eᠠ", "ᠠᠢ\u180eᠠ"), ("é" * 40, "é" * 40)],
)  # fmt: skip
def test_names_of_every_script_have_one_spelling(given, kept):
    assert check_labeler_name(given) == kept == check_labeler_name(kept)


@pytest.mark.parametrize(
    "name", ["\u200b\u200d", "\u3164", "\u2800 \u2800", "\ufe0f", "a\u202eb", "\u2066a", "a\0", "a\u2028b", "\ud800",
             "\uffff", "a" + "\u0301" * 500, "é" * 41, ["ada"], 3],
)  # fmt: skip
def test_names_that_nobody_could_see_or_that_turn_the_page_are_refused(name):
    with pytest.raises(InputError, match="name of 1 to 40 characters"):
        check_labeler_name(name)


def test_ratings_of_the_page_are_read_beside_its_votes(tmp_path):
    prompts: list[Prompt] = ["one", "two", "three"]
    texts = {"ppo": ["a", "b", "c"], "other": ["a", "x", "c"], "sft": ["s", "s", "c"]}  # to the third all reply alike
    pairs = {
        (name, number): make_task("test", prompts[number], [texts[name][number], "s"], [name, "sft"])
        for name in ("ppo", "other")
        for number in (0, 1)
    }
    file = VoteFile(tmp_path / "votes.jsonl")
    given: list[tuple] = [
        (("ppo", 0), "ada", (1, 2), [7, 2]),
        (("ppo", 1), "ada", (2, 1), [3, None]),  # one left out
        (("other", 0), "ada", (1, 2), [5, 4]),  # the same reply as ppo's
        (("other", 1), "ada", (1, 1), None),
        (("ppo", 0), "ben", (1, 2), [6, 3]),
    ]
    for (name, number), labeler, ranks, ratings in given:
        file.append(vote(pairs[name, number].id, labeler, ranks)._replace(ratings=ratings))
    file.append(vote(pairs["ppo", 0].id, repeat=True)._replace(ratings=[1, 1]))  # a repeat does not count
    file.append(vote(pairs["ppo", 1].id, "ben", (), skipped=True))
    for name, number in (("other", 0), ("other", 1)):
        file.append(vote(pairs[name, number].id, "ben", (), skipped=True))
    people = People(VotingSettings(overlap=0.0, repeats=0.0, server_port=free_port()), tmp_path / "votes.jsonl", 0)
    assert people.ratings([pairs["ppo", 1]]) == [[Rating(0, 3, "ada")]]
    judged = judge_replies(people, prompts, texts, {name: [1] * 3 for name in texts}, "sft")
    assert people.finished
    assert judged["ppo"].metrics["rating"].mean == ((7 + 6 + 5) / 3 + 3) / 2 and judged["ppo"].prompts["rating"] == [
        0,
        1,
    ]
    assert judged["other"].metrics["rating"].mean == 6.0 and judged["other"].prompts["rating"] == [0]
    assert judged["sft"].metrics["rating"].mean == (2 + 3 + 4) / 3
    assert judged["ppo"].metrics["win_rate"].mean == (1 + 0 + 0.5) / 3
    unrated = People(VotingSettings(server_port=free_port()), tmp_path / "none.jsonl", 0)
    assert unrated.ratings([pairs["ppo", 0]]) == [[]]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    assert math.isclose(present(result.alpha), expected, abs_tol=1e-9)
    assert (result.pairs, result.labelers, result.repeats) == (10, 2, None)


def test_agreement_with_oneself():
    votes = [vote("a"), vote("b"), vote("a", repeat=True), vote("b", repeat=True, ranks=(2, 1))]
    result = measure_agreement(votes)
    assert (result.repeats, result.repeated_pairs, result.alpha) == (0.5, 2, None)
    assert measure_agreement([vote("a"), vote("a", "ben")]).alpha == 1.0
