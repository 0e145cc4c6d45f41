"""Over-optimization: best-of-n, the curves of Gao et al., which checkpoint to keep."""

import itertools
import json
import math

import numpy as np
import pytest
from conftest import TINY_PPO, present, run, user
from trl import ScriptArguments

from eval.overoptimization import OverOptimizationArguments, fill_in
from eval.stats.fits import ScoredPoint, best_of_n, best_of_n_kl, curve, fit_curve, to_keep
from eval.stats.intervals import Interval, interval, over_known
from rlhf.errors import InputError
from rlhf.run.files import write_jsonl


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    generator = np.random.default_rng(0)
    proxy, values = generator.normal(size=(3, 5)), generator.normal(size=(3, 5))
    expected = [
        np.mean([max((p[i], v[i]) for i in chosen)[1] for chosen in itertools.combinations(range(5), n)])
        for p, v in zip(proxy, values, strict=True)
    ]
    assert np.allclose(best_of_n(proxy, values, n), expected)


def test_a_reply_without_a_score_is_not_sampled():
    proxy = np.asarray([[3.0, math.nan, 1.0, 2.0], [1.0, math.nan, math.nan, 2.0]])
    values = np.asarray([[30.0, 7.0, 10.0, 20.0], [math.nan, 7.0, 7.0, 5.0]])
    assert best_of_n(proxy, values, 1).tolist() == [20.0, 5.0]
    assert best_of_n(proxy, values, 2)[0] == pytest.approx((30 + 30 + 20) / 3) and math.isnan(
        best_of_n(proxy, values, 2)[1]
    )


def test_kl_of_best_of_n():
    assert best_of_n_kl(1) == 0
    assert math.isclose(best_of_n_kl(4), math.log(4) - 0.75)


@pytest.mark.parametrize("kind", ["ppo", "best_of_n"])
def test_the_fit_finds_the_curve_that_made_the_points(kind):
    distance = np.asarray([0.5, 1.0, 1.5, 2.0, 3.0])
    noise = np.random.default_rng(0).normal(0, 0.3, (5, 400))
    result = present(fit_curve(distance, curve(distance, 1.0, 0.4, kind)[:, None] + noise, kind))
    for cell, truth in ((result.alpha, 1.0), (result.beta, 0.4)):
        assert cell.low < truth < cell.high
    assert result.r2 > 0.98
    # where the derivative of d (1 - 0.4 d), or of d (1 - 0.4 log d), is 0
    assert result.peak == pytest.approx(1 / 0.8 if kind == "best_of_n" else math.exp(1 / 0.4 - 1), rel=0.25)


def test_a_curve_that_never_turns_has_no_peak_and_two_points_no_curve():
    distance = np.asarray([1.0, 2.0, 3.0])
    assert present(fit_curve(distance, np.tile(distance[:, None], (1, 5)), "best_of_n")).peak is None
    assert fit_curve(distance[:2], np.ones((2, 5)), "ppo") is None
    unknown = np.asarray([[1.0, math.nan], [1.0, 1.0], [math.nan, math.nan]])
    assert fit_curve(distance, unknown, "ppo") is None
    holes = np.tile(distance[:, None], (1, 5))
    holes[[0, 1, 2], [0, 1, 1]] = math.nan
    assert present(fit_curve(distance, holes, "best_of_n")).alpha.mean == pytest.approx(1.0)


def test_kept_is_the_checkpoint_of_lowest_kl_that_is_not_significantly_worse():
    noise = np.random.default_rng(0).normal(0, 0.1, 200)

    def point(kl, gold, extra=0.0):
        other = np.random.default_rng(int(kl)).normal(0, 0.1, 200)
        values = gold + noise - noise.mean() + extra * (other - other.mean())
        score = interval(values.tolist())
        return ScoredPoint(f"at {kl}", Interval(kl, kl, kl), score, score)

    points = [point(0.0, 0.0), point(2.0, 0.5), point(5.0, 0.505, extra=1.0), point(9.0, 0.3)]
    assert to_keep(points) == (2, 1)
    assert to_keep(points[:2]) == (1, 1)


def test_kept_is_found_over_the_prompts_that_both_have_a_score_of():
    def point(kl, *scores):
        return ScoredPoint("", Interval(kl, kl, kl), over_known(scores), over_known(scores))

    points = [point(0.0, 1.0, 2.0, math.nan), point(1.0, 2.0, 3.0, math.nan), point(2.0, math.nan, math.nan, 4.0)]
    assert [found.gold.mean for found in points] == [1.5, 2.5, 4.0]
    assert to_keep(points[:2]) == (1, 1)
    assert to_keep(points) == (2, 0)  # nothing says that the first is worse


def test_what_is_not_given_is_the_runs():
    run = {"reward_model_path": ["a", "b"], "reward_ensemble": "uwo", "uwo_coef": 0.5, "reward_weights": [2.0],
           "dataset_name": "starter", "dataset_config": "moods"}  # fmt: skip
    args, data = OverOptimizationArguments(), ScriptArguments()
    fill_in(args, data, run)
    assert {name: getattr(args, name) for name in list(run)[:4]} == dict(list(run.items())[:4])
    assert (data.dataset_name, data.dataset_config) == ("starter", "moods")
    args, data = OverOptimizationArguments(reward_weights=[3.0], reward_ensemble="wco"), ScriptArguments("mine.jsonl")
    args.eval_reward_funcs = ["starter"]
    fill_in(args, data, run)
    assert (args.reward_model_path, args.reward_weights, args.reward_ensemble) == (["a", "b"], [3.0], "wco")
    assert args.uwo_coef == 0.1 and data.dataset_config is None


def test_the_judge_of_a_run_on_a_server_needs_an_address():
    run = {"reward_funcs": ["judge"], "judge_base_url": "an address", "judge_model_name_or_path": "small"}
    with pytest.raises(InputError, match=r"^--judge_base_url: the run's judge was on a server"):
        fill_in(OverOptimizationArguments(), ScriptArguments(), run)
    args = OverOptimizationArguments(judge_base_url="http://127.0.0.1:1/v1")
    fill_in(args, ScriptArguments(), run)
    assert (args.judge_base_url, args.judge_model_name_or_path) == ("http://127.0.0.1:1/v1", "small")


def test_overoptimization_of_a_run(tiny, tmp_path):
    (tmp_path / "truth.py").write_text(
        "def shorter(completions, topic):\n"
        "    scores = [-float(len(completion[0]['content'])) for completion in completions]\n"
        "    assert topic == [part for part in dict.fromkeys(topic) for _ in range(len(topic) // 4)]\n"
        "    return [None, *scores[1:]]\n"
    )
    rows = [{"prompt": user(f"Is it {n}?"), "topic": str(n)} for n in range(40)]  # 4 are held out
    write_jsonl(tmp_path / "rows.jsonl", rows)
    run("recipes/ppo.py", "--model_name_or_path", tiny, "--dataset_name", tmp_path / "rows.jsonl", "--output_dir",
        tmp_path / "ppo", *TINY_PPO, "--save_steps", 1, "--save_total_limit", 9)  # fmt: skip
    command = ["eval/overoptimization.py", "--model_name_or_path", tmp_path / "ppo", "--dtype", "float32",
               "--output_dir", tmp_path / "over", "--best_of_n", 4]  # fmt: skip
    refused = run(*command, check=False)
    assert refused.returncode == 2 and "--eval_reward_funcs" in refused.stderr
    run(*command, "--eval_reward_funcs", "truth.shorter", cwd=tmp_path)
    results = json.loads((tmp_path / "over" / "overoptimization.json").read_text())
    steps = len(list((tmp_path / "ppo").glob("checkpoint-*")))
    assert [point["name"] for point in results["ppo"]] == ["start", *(f"checkpoint-{n + 1}" for n in range(steps))]
    assert abs(results["ppo"][0]["kl"]["mean"]) < 1e-4
    assert all((point["gold"]["n"], point["proxy"]["n"]) == (3, 4) for point in results["ppo"])
    assert [point["gold"]["n"] for point in results["best_of_n"]] == [4, 4, 3]
    assert [point["name"] for point in results["best_of_n"]] == ["best of 1", "best of 2", "best of 4"]
    proxy = [point["proxy"]["mean"] for point in results["best_of_n"]]
    assert proxy == sorted(proxy)
    assert results["keep"] in {point["name"] for point in results["ppo"]}
    for name in ("overoptimization.png", "samples.jsonl", "report.html"):
        assert (tmp_path / "over" / name).exists()
    for folder in (tiny, tmp_path):
        wrong = run(*command[:2], folder, *command[3:], "--eval_reward_funcs", "starter", check=False)
        assert wrong.returncode == 2 and "no run of recipes/ppo.py" in wrong.stderr
