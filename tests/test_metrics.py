"""The evaluate modules and their intervals."""

import math
import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from eval.intervals import difference, interval
from eval.measure import _reward_accuracy, differences_of
from eval.replies import reply_logprobs


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
    ],
)
def test_modules_load_from_their_folder_and_compute(name, inputs, expected):
    result = evaluate.load(f"eval/{name}").compute(**inputs)
    assert math.isclose(result["mean"], expected, rel_tol=1e-4)
    assert result["low"] <= result["mean"] <= result["high"]


def test_modules_load_offline():
    code = "import evaluate; print(evaluate.load('eval/win_rate').compute(predictions=[1.], references=[0.])['mean'])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "1.0"


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered = sum(
        result["low"] <= 0.0 <= result["high"]
        for result in (interval(list(generator.normal(size=60))) for _ in range(150))
    )
    assert 0.88 <= covered / 150 <= 1.0


def test_paired_differences_are_sharper_than_unpaired_intervals():
    generator = np.random.default_rng(1)
    common = generator.normal(size=200)
    first, second = interval(list(common + 0.2)), interval(list(common + 0.01 * generator.normal(size=200)))
    result = difference(first, second)
    assert math.isclose(result["mean"], first["mean"] - second["mean"])
    assert result["high"] - result["low"] < 0.02 < first["high"] - first["low"]
    assert result["low"] > 0.15
    assert set(differences_of({"a": {"m": first}, "b": {"m": second, "x": first}}, 0)) == {"b_minus_a"}


def test_perplexity_difference_resamples_ratios():
    first = interval([2.0, 4.0], [1, 2], "exp")
    second = interval([1.0, 2.0], [1, 2], "exp")
    result = difference(first, second)
    assert math.isclose(result["mean"], math.exp(2) - math.exp(1))
    assert math.isclose(result["low"], result["mean"])


def test_reward_accuracy_counts_pairs_that_gold_tells_apart():
    texts = ["love love", "a table", "a chair", "hate", "good", "bad"]
    result = _reward_accuracy(texts, [[3.0, 2.0, 1.0], [0.0, 1.0, 5.0]])
    # first prompt: 2 of 2 right (table and chair tie); second: hate < bad < good in gold, 1 < 5 is wrong for good, bad
    assert result["pairs"] == 5
    assert math.isclose(result["accuracy"]["mean"], 4 / 5)


def test_reply_logprobs_equal_the_models_whatever_the_padding(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    prompts, replies = [[5, 6, 7, 8], [9], [4, 5]], [[10, 11], [12, 13, 14, 2], []]
    result = reply_logprobs(model, tokenizer, prompts, replies)
    assert result.tokens == [2, 4, 0]
    for prompt, reply, total in zip(prompts, replies, result.sums, strict=True):
        logprobs = torch.log_softmax(model(torch.tensor([prompt + reply])).logits[0], -1)
        expected = sum(float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(reply))
        assert math.isclose(total, expected, abs_tol=1e-4)
