"""The simulated labeler and the pairs made of its answers."""

import math

import pytest
from conftest import user

from rlhf.comparisons import Comparison, make_task, preference_pairs
from rlhf.errors import InputError
from rlhf.starter.labeler import SimulatedLabeler

SCORES = {"a": 0.0, "b": 0.5, "c": 0.5}


def labeler(**settings):
    return SimulatedLabeler(score=lambda texts: [SCORES[text] for text in texts], **settings)


def ask(labeler, prompt, completions):
    return labeler.compare([make_task("train", prompt, completions, ["m"] * len(completions))])[0]


def test_answers_follow_bradley_terry():
    answers = [ask(labeler(temperature=0.25, seed=seed), "p", ["a", "b"])[0] for seed in range(3000)]
    expected = 1 / (1 + math.exp(-0.5 / 0.25))
    share = sum(answer.preferred == "second" for answer in answers) / len(answers)
    assert abs(share - expected) < 0.03
    for answer in answers:
        certainty = expected if answer.preferred == "second" else 1 - expected
        assert math.isclose(answer.certainty, certainty)


def test_without_noise_it_never_errs_and_equal_scores_tie():
    answers = ask(labeler(temperature=0), "p", ["a", "b", "c"])
    assert [(a.first, a.second, a.preferred) for a in answers] == [
        (0, 1, "second"),
        (0, 2, "second"),
        (1, 2, "tie"),
    ]


def test_same_seed_same_answers():
    texts = ["a", "b"]
    first = [ask(labeler(seed=1), str(n), texts) for n in range(50)]
    assert first == [ask(labeler(seed=1), str(n), texts) for n in range(50)]
    assert first != [ask(labeler(seed=2), str(n), texts) for n in range(50)]


def test_negative_noise_is_refused():
    with pytest.raises(InputError, match="--labeler_temperature"):
        labeler(temperature=-1)


def test_pairs_record_who_decided_and_how_sure():
    answers = [Comparison(0, 1, "second", 0.9, "ada"), Comparison(0, 2, "tie", 0.5, "ada")]
    rows = preference_pairs(make_task("train", user("hi"), ["x", "y", "z"], ["model"] * 3), answers)
    assert rows == [
        {
            "prompt": user("hi"),
            "chosen": [{"role": "assistant", "content": "y"}],
            "rejected": [{"role": "assistant", "content": "x"}],
            "labeler": "ada",
            "certainty": 0.9,
            "model": "model",
        }
    ]
    as_text = make_task("train", "hi", ["x", "y"], ["one", "other"])
    (row,) = preference_pairs(as_text, answers[:1])
    assert (row["chosen"], row["model"]) == ("y", "other, one")


def test_a_task_is_named_after_its_content():
    assert make_task("train", "hi", ["x", "y"], ["m", "m"]).id == make_task("train", "hi", ["x", "y"], ["m", "m"]).id
    assert make_task("train", "hi", ["x", "y"], ["m", "m"]).id != make_task("train", "hi", ["y", "x"], ["m", "m"]).id
