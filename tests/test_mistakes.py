"""A sample of `make mistakes` (tests/mistakes.py), and that its harness sees what is wrong."""

import math

import pytest
from mistake_inputs import make_inputs
from mistake_table import BASES, MISTAKES, Mistake
from mistakes import Answer, try_mistake, what_is_wrong, words_of

SAMPLE = (
    "numbers: recipes/ppo kl_coef=nan",
    "flags: a missing dataset",
    "yaml: bytes",
    "refused late: a schedule without its argument",
    "data: half a line",
    "stages: sft_config: an unknown key",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs") / "made", runs={})


@pytest.mark.parametrize("sample", SAMPLE)
def test_a_mistake_is_one_line_and_its_correction_runs(sample, made, tmp_path, monkeypatch):
    monkeypatch.setattr("mistakes.SECONDS", math.inf)  # make mistakes measures them
    [mistake] = [case for case in MISTAKES if f"{case.group}: {case.name}" == sample]
    result, _ = try_mistake(mistake, tmp_path, made)
    assert (result.wrong, result.corrected) == ("", ""), result.said


def test_the_table_covers_all_commands_and_every_case_changes_its_command():
    assert len(MISTAKES) >= 300
    assert {case.command for case in MISTAKES} == set(BASES)
    for case in MISTAKES:
        assert words_of(case, case.wrong) != words_of(case, case.right) or case.files != case.mend, case.name


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(0, "", None), "accepted"),
        (Answer(1, "Traceback (most recent call last):\nKeyError", None), "traceback"),
        (Answer(3, "", None), "exit code 3"),
        (Answer(2, "error: a\nerror: b\n", None), "2 lines"),
        (Answer(2, "error: --gamma 7\n", None), "line without ['must be']"),
        (Answer(2, "error: --gamma 7: must be\n", 3.0), "3.0 s"),
        (Answer(2, "a warning\nerror: --gamma 7: must be\n", 1.0), ""),
    ],
)
def test_the_harness_sees_what_is_wrong(answer, said):
    mistake = Mistake("numbers", "gamma", "recipes/ppo.py", "--gamma 7", ("--gamma", "must be"))
    assert what_is_wrong(mistake, answer) == said
