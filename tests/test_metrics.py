"""The evaluate modules and their intervals."""

import json
import math
import os
import subprocess
import sys
from typing import Literal

import evaluate
import numpy as np
import pytest
import torch
from conftest import ROOT, present
from peft import PeftModel
from transformers import AutoModelForCausalLM

from eval.measuring.comparison import agreement_with_gold, differences_of
from eval.measuring.judges import ask, judge_replies, rate, win_rates
from eval.measuring.replies import Replies, reply_logprobs
from eval.metrics import metric, metric_results, table_rows
from eval.stats.intervals import Interval, interval, over_rows_and_seeds, share_repaired
from rlhf.comparisons import Comparison, make_task
from rlhf.starter.labeler import Scale, SimulatedLabeler, SimulatedRaters


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [
        ("gold_score", {"predictions": ["I love it!", "a table"]}, (0.6696 + 0.0) / 2),
        ("reward_score", {"predictions": [1.0, 3.0]}, 2.0),
        ("win_rate", {"predictions": [1.0, 2.0, 0.0, 5.0], "references": [0.0, 2.0, 3.0, 1.0]}, 2.5 / 4),
        ("kl", {"predictions": [-1.0, -4.0], "references": [-2.0, -5.0]}, 1.0),
        ("reply_length", {"predictions": [3, 5]}, 4.0),
        ("distinct_2", {"predictions": ["a b a b", "c d"]}, 3 / 4),
        ("perplexity", {"predictions": [-2.0, -4.0], "references": [1, 2]}, math.exp(6 / 3)),
        ("bits_per_byte", {"predictions": [-math.log(4.0), -math.log(2.0)], "references": [1, 3]}, 3 / 4),
        ("repetition", {"predictions": ["a b c d a b c d", "a b c"]}, (1 / 5 + 0) / 2),
        ("reward_accuracy", {"predictions": [1.0, 2.0, 0.0, 5.0], "references": [0.0, 2.0, 3.0, 1.0]}, 2.5 / 4),
        ("accuracy", {"predictions": [1, 0, 1], "references": [1, 1, 1]}, 2 / 3),
        ("f1", {"predictions": [1, 0, 1, 0], "references": [1, 1, 0, 0]}, 1 / 2),
        ("rouge", {"predictions": ["the cat sat", "no"], "references": ["the cat ran", "no"]}, (2 / 3 + 1) / 2),
    ],
)
def test_modules_load_from_their_folder_and_compute(name, inputs, expected):
    result = evaluate.load(f"eval/metrics/{name}").compute(**inputs)
    assert math.isclose(result["mean"], expected, rel_tol=1e-4)
    assert result["low"] <= result["mean"] <= result["high"]


def test_modules_load_offline():
    code = "from evaluate import load; "
    code += "print(load('eval/metrics/win_rate').compute(predictions=[1.], references=[0.])['mean'])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "1.0"


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered = sum(
        result.low <= 0.0 <= result.high for result in (interval(list(generator.normal(size=60))) for _ in range(150))
    )
    assert 0.88 <= covered / 150 <= 1.0


def test_paired_differences_are_sharper_than_unpaired_intervals():
    generator = np.random.default_rng(1)
    common = generator.normal(size=200)
    first, second = interval(list(common + 0.2)), interval(list(common + 0.01 * generator.normal(size=200)))
    result = first.minus(second)
    assert math.isclose(result.mean, first.mean - second.mean)
    assert result.high - result.low < 0.02 < first.high - first.low
    assert result.low > 0.15 and result.excludes_zero and not first.minus(first).excludes_zero
    one_fit = Interval(0.5, 0.4, 0.6, 200)  # a length-controlled win rate
    differences = differences_of(
        {"a": {"m": first, "fit": one_fit}, "b": {"m": second, "fit": one_fit, "only b's": first}}, 0
    )
    assert {pair: list(cells) for pair, cells in differences.items()} == {"b_minus_a": ["m"]}
    with pytest.raises(ValueError, match="needs two samples of one size"):
        first.minus(one_fit)


def test_an_interval_as_text_and_as_json():
    cell = interval([0.0, 1.0, 0.0, 1.0])
    assert f"{Interval(0.5, 0.25, 0.75, 4):.1%}" == "50.0% [25.0%, 75.0%]"
    assert Interval.from_json(json.loads(json.dumps(cell.to_json()))) == cell
    assert set(cell.to_json()) == {"mean", "low", "high", "n"} and present(cell.sample).values == [0.0, 1.0, 0.0, 1.0]
    open_end = Interval(1.0, -math.inf, 2.0)
    assert open_end.to_json() == {"mean": 1.0, "low": None, "high": 2.0}
    assert Interval.from_json(open_end.to_json()) == open_end and f"{open_end:+.2f}" == "+1.00 [-, +2.00]"


def test_a_metric_and_all_its_results():
    inputs = {"predictions": [1.0, 2.0, 0.0], "references": [0.0, 2.0, 3.0]}
    cell, results = metric("win_rate", **inputs), metric_results("win_rate", **inputs)
    assert (cell.mean, cell.low, cell.high, cell.n) == tuple(results[key] for key in ("mean", "low", "high", "n"))
    assert results["ties"] == 1 / 3 and present(cell.sample).values == results["values"] == [1.0, 0.5, 0.0]


def test_perplexity_difference_resamples_ratios():
    first = interval([2.0, 4.0], [1, 2], "exp")
    second = interval([1.0, 2.0], [1, 2], "exp")
    result = first.minus(second)
    assert math.isclose(result.mean, math.exp(2) - math.exp(1))
    assert math.isclose(result.low, result.mean)


def test_reward_accuracy_counts_pairs_that_gold_tells_apart():
    texts = ["love love", "a table", "a chair", "hate", "good", "bad"]
    replies = Replies([[1] * len(text) for text in texts], texts)
    result = agreement_with_gold(replies, [[3.0, 2.0, 1.0], [0.0, 1.0, 5.0]])
    # first prompt: 2 of 2 right (table and chair tie); second: hate < bad < good in gold, 1 < 5 is wrong for good, bad
    assert result["n"] == 5
    assert math.isclose(result["mean"], 4 / 5)
    assert sum(quarter["n"] for quarter in result["by_length_difference"]) == 5


def test_calibration_of_a_model_that_is_as_sure_as_it_is_right():
    # says 73% (margin 1) on four pairs and is right on three; says 95% (margin 3) on two and is right on one
    margins = [1.0, 1.0, 1.0, -1.0, 3.0, -3.0]
    result = evaluate.load("eval/metrics/reward_accuracy").compute(predictions=margins, references=[0.0] * 6)
    low, high = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    assert [bin["n"] for bin in result["reliability"]] == [4, 2]
    assert math.isclose(result["calibration_error"], (4 * abs(low - 0.75) + 2 * abs(high - 0.5)) / 6)
    assert math.isclose(result["log_loss"], np.mean(np.log1p(np.exp(-np.asarray(margins)))))


def test_accuracy_by_length_difference_finds_a_taste_for_length():
    length = np.arange(-20, 20)
    result = evaluate.load("eval/metrics/reward_accuracy").compute(
        predictions=length.astype(float).tolist(), references=[0.0] * 40, length_differences=length.tolist()
    )
    quarters = result["by_length_difference"]
    assert [quarter["mean"] for quarter in quarters] == [0.0, 0.0, 0.95, 1.0]
    assert (quarters[0]["shortest"], quarters[-1]["longest"]) == (-20, 19)


def test_equal_length_differences_are_one_group():
    result = evaluate.load("eval/metrics/reward_accuracy").compute(
        predictions=[1.0] * 8, references=[0.0] * 8, length_differences=[1, 1, 1, 1, 1, 1, 4, 4]
    )
    groups = [(group["shortest"], group["longest"], group["n"]) for group in result["by_length_difference"]]
    assert groups == [(1, 1, 6), (4, 4, 2)]


def test_length_control_ranks_a_padded_model_right_where_the_plain_win_rate_does_not():
    generator = np.random.default_rng(0)
    better = generator.normal(-0.4, 1.0, 400)  # by how much the padded reply is better: it is worse on average
    longer = np.maximum(0, generator.normal(6, 6, 400)).round()
    judged = better + 0.15 * longer  # a judge who also likes length
    inputs = {"predictions": judged.tolist(), "references": [0.0] * 400}
    lengths = {"prediction_lengths": (10 + longer).tolist(), "reference_lengths": [10] * 400}
    plain = evaluate.load("eval/metrics/win_rate").compute(**inputs)
    controlled = evaluate.load("eval/metrics/length_controlled_win_rate").compute(**inputs, **lengths)
    assert plain["low"] > 0.5 > controlled["high"]


def test_length_control_changes_nothing_where_length_does_not_matter():
    generator = np.random.default_rng(1)
    inputs = {"predictions": generator.normal(0.3, 1, 500).tolist(), "references": [0.0] * 500}
    lengths = {"prediction_lengths": generator.integers(5, 30, 500).tolist(), "reference_lengths": [15] * 500}
    plain = evaluate.load("eval/metrics/win_rate").compute(**inputs)["mean"]
    controlled = evaluate.load("eval/metrics/length_controlled_win_rate").compute(**inputs, **lengths)
    assert abs(controlled["mean"] - plain) < 0.02
    same = evaluate.load("eval/metrics/length_controlled_win_rate").compute(
        predictions=[1.0, 0.0, 1.0], references=[0.0, 1.0, 1.0], prediction_lengths=[3] * 3, reference_lengths=[3] * 3
    )
    assert same["mean"] == 0.5


class Panel:
    """Two people who disagree on the first question, agree on the second, and skip the third."""

    name, finished = "panel", True

    def compare(self, tasks):
        assert [task.completions for task in tasks] == [["a", "x"], ["b", "y"], ["c", "z"]]
        said: list[list[Literal["first", "second"]]] = [["first", "second"], ["first", "first"], []]
        return [[Comparison(0, 1, preferred, None, "p") for preferred in answers] for answers in said]


def test_judges_are_asked_about_different_replies_only():
    texts = {"mine": ["a", "b", "c", "same"], "sft": ["x", "y", "z", "same"]}
    verdicts = ask(Panel(), ["1", "2", "3", "4"], {"mine": texts["mine"], "sft": texts["sft"]}, "sft")
    assert verdicts["mine"].prompts == [0, 1, 3]
    assert win_rates(verdicts["mine"], [1] * 4, [1] * 4)["win_rate"].mean == (0.5 + 1 + 0.5) / 3
    assert win_rates(verdicts["sft"], [1] * 4, [1] * 4)["win_rate"].mean == 0.5
    gold = ask(SimulatedLabeler(temperature=0.0), ["1"], {"up": ["I love it"], "sft": ["I hate it"]}, "sft")
    assert win_rates(gold["up"], [3], [3])["win_rate"] == Interval(1.0, 1.0, 1.0, 1)


def test_ratings_are_means_over_raters_and_cover_what_was_rated():
    texts = {"mine": ["good", "bad", "same"], "other": ["good", "fine", "same"], "sft": ["so", "so", "same"]}
    scores = {"good": 0.65, "bad": -0.7, "fine": 0.31, "so": 0.0, "same": 0.0}

    def score(completions):
        return [scores[text] for text in completions]

    scales = (Scale("Ada", 0.0, 0.5, noise=0.0), Scale("Ben", 0.4, 1.0, noise=0.0))
    judge = SimulatedRaters(scales=scales, score=score)
    # Ada cuts at -0.5, -0.3, -0.1, 0.1, 0.3, 0.5; Ben, 0.4 milder, at -1, -0.6, -0.2, 0.2, 0.6, 1.0
    assert rate(judge, ["1", "2", "3"], texts, "sft") == {
        "mine": {0: (7 + 7) / 2, 1: (1 + 3) / 2},
        "other": {0: 7.0, 1: (6 + 6) / 2},
        "sft": {0: (4 + 5) / 2, 1: (4 + 5) / 2},
    }
    judged = judge_replies(judge, ["1", "2", "3"], texts, {name: [1] * 3 for name in texts}, "sft")
    assert judged["mine"].metrics["rating"].mean == (7 + 2) / 2 and judged["mine"].prompts["rating"] == [0, 1]
    assert judged["other"].metrics["win_rate"].mean == (1 + 1 + 0.5) / 3
    noisy = SimulatedRaters(seed=1, score=score)
    again = [rating.rating for found in noisy.ratings(TASKS) for rating in found]
    assert again == [rating.rating for found in noisy.ratings(TASKS) for rating in found]
    assert again != [rating.rating for found in SimulatedRaters(seed=2, score=score).ratings(TASKS) for rating in found]


TASKS = [make_task("test", f"{number}", ["so", "fine"], ["m", "m"]) for number in range(20)]


def test_share_of_a_loss_that_is_made_good():
    tax = np.array([[1.0, 3.0, 0.0], [3.0, 1.0, 4.0]])  # of two seeds and three rows
    weights = np.array([1.0, 1.0, 0.5])
    cell = present(share_repaired(tax, tax / 4, weights, 0))
    assert (cell.mean, cell.low, cell.high) == pytest.approx((0.25, 0.25, 0.25))  # row by row a quarter
    other = present(share_repaired(tax, np.ones((2, 3)), weights, 0))
    assert other.mean == pytest.approx((2 * 2.5) / (4 + 4 + 0.5 * 4)) and other.low < other.mean < other.high
    assert share_repaired(np.array([[1.0, -1.0, 0.5]]), np.ones((1, 3)), np.ones(3), 0) is None  # no tax


def test_a_seed_without_a_score_of_a_row_does_not_count_there():
    cell, seeds = over_rows_and_seeds(np.array([[1.0, 0.0], [0.0, 9.0]]), np.array([[1.0, 1.0], [1.0, 0.0]]), 0)
    assert seeds == [0.5, 0.0] and cell.mean == pytest.approx(1 / 3) and cell.high <= 1


def test_the_table_has_one_row_per_metric_and_judge():
    cell = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    models = {"sft": {"kl": cell, "win_rate/human": cell, "win_rate/gold": cell}, "ppo": {"kl": cell}}
    names, rows = table_rows({"models": models})
    assert names == ["sft", "ppo"]
    assert [row[0] for row in rows] == ["win_rate/gold", "win_rate/human", "kl"]
    assert rows[0][1:] == ["50.0% [40.0%, 60.0%]", ""]


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in (ROOT / "eval" / "metrics").glob("*/__init__.py")), ids=str
)
def test_every_metric_has_a_card_whose_example_runs(folder):
    card = (folder / "README.md").read_text()
    for section in ("## Use", "## Returns", "## Limits"):
        assert section in card
    code = card.split("```python")[1].split("```")[0].replace("metric.compute", "result = metric.compute")
    found: dict = {}
    exec(code, found)
    assert found["result"]["low"] <= found["result"]["mean"] <= found["result"]["high"]


@pytest.mark.parametrize("adapted", [False, True])
def test_reply_logprobs_equal_the_models_whatever_the_padding(adapted, tiny, sft, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    model = PeftModel.from_pretrained(model, sft).eval() if adapted else model
    prompts, replies = [[5, 6, 7, 8], [9], [4, 5]], [[10, 11], [12, 13, 14, 2], []]
    result = reply_logprobs(model, tokenizer, prompts, replies)
    assert result.tokens == [2, 4, 0]
    for prompt, reply, total in zip(prompts, replies, result.sums, strict=True):
        logprobs = torch.log_softmax(model(torch.tensor([prompt + reply])).logits[0], -1)
        expected = sum(float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(reply))
        assert math.isclose(total, expected, abs_tol=1e-4)
