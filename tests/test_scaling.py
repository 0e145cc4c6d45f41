"""Scaling laws: fits of known laws, intervals, forecasts."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import present, run
from scipy.stats import linregress, t
from transformers import AutoConfig, AutoModelForCausalLM

from eval.measuring.loss_by_position import compare_positions, position_bins, position_losses
from eval.stats.scaling_laws import LawFit, fit_form, fit_law, fit_sweep, forecast, frontier, predict
from rlhf.errors import InputError
from rlhf.models.lstm import lstm_parameters
from rlhf.pretraining.scaling import (
    ScalingArguments,
    check_sweep,
    cut_texts,
    forecast_point,
    lstm_point,
    measured_flops,
    sweep_points,
    training_compute,
    transformer_parameters,
    write_texts,
)
from rlhf.pretraining.tokenization import train_tokenizer
from rlhf.run.files import write_jsonl
from rlhf.run.folders import start_run

SIZES = np.asarray([2e4, 5e4, 1e5, 2e5, 4e5, 8e5])
NOISE = np.random.default_rng(0).normal(0, 0.003, len(SIZES))


def test_a_power_law_is_found_again_and_the_constant_left_out():
    fit = fit_law(SIZES, (8.8e13 / SIZES) ** 0.076 + NOISE)  # Kaplan et al.'s L(N)
    assert fit.form == "power" and present(fit.p_constant) > 0.05
    alpha, scale = fit.parameters["alpha"], fit.parameters["log_x_c"]
    assert alpha.low < 0.076 < alpha.high < alpha.low + 0.01
    assert scale.low < math.log(8.8e13) < scale.high
    assert 0.999 < fit.r2 < 1


def test_a_constant_is_found_where_there_is_one():
    fit = fit_law(SIZES, 2.5 + (3e4 / SIZES) ** 0.5 + NOISE)
    assert fit.form == "power_plus_constant" and present(fit.p_constant) < 0.01
    for name, truth in (("alpha", 0.5), ("E", 2.5), ("log_x_c", math.log(3e4))):
        assert fit.parameters[name].low < truth < fit.parameters[name].high, name
    exact = fit_form("power_plus_constant", SIZES, 2.5 + (3e4 / SIZES) ** 0.5)
    assert exact.theta.tolist() == pytest.approx([math.log(3e4), 0.5, 2.5], rel=1e-4)


def test_the_joint_law_is_found_again():
    grid = [(n, d) for n in SIZES[:4] for d in (2.5e5, 5e5, 1e6, 2e6)]
    noise = np.random.default_rng(1).normal(0, 0.002, len(grid))
    # Hoffmann et al.'s exponents
    loss = [1.7 + 40 / n**0.34 + 50 / d**0.28 + e for (n, d), e in zip(grid, noise, strict=True)]
    fit = fit_form("joint", grid, loss)
    for name, truth in (("alpha", 0.34), ("beta", 0.28), ("E", 1.7), ("log_A", math.log(40)), ("log_B", math.log(50))):
        assert fit.parameters[name].low < truth < fit.parameters[name].high, name
    assert predict(fit, [8e5, 2e6])[0] == pytest.approx(1.7 + 40 / 8e5**0.34 + 50 / 2e6**0.28, rel=0.01)


def test_intervals_of_a_nearly_straight_law_are_those_of_linear_regression():
    # with relative noise this small, log L = alpha (log x_c - log x) is a straight line in both
    noise = 1e-6 * np.random.default_rng(2).normal(size=len(SIZES))
    loss = (1e6 / SIZES) ** 1e-3 * (1 + noise)
    fit = fit_form("power", SIZES, loss)
    line = linregress(np.log(SIZES), np.log(loss))
    half = t.ppf(0.975, len(SIZES) - 2) * line.stderr
    alpha = fit.parameters["alpha"]
    assert [alpha.mean, alpha.low, alpha.high] == pytest.approx(
        [-line.slope, -line.slope - half, -line.slope + half], rel=1e-3
    )
    x, centre = math.log(2e6), np.log(SIZES) - np.log(SIZES).mean()
    rest = np.log(loss) - line.intercept - line.slope * np.log(SIZES)
    spread = math.sqrt((rest**2).sum() / (len(SIZES) - 2))
    leverage = 1 + 1 / len(SIZES) + (x - np.log(SIZES).mean()) ** 2 / (centre**2).sum()
    half = t.ppf(0.975, len(SIZES) - 2) * spread * math.sqrt(leverage)
    cell = forecast(fit, 2e6)
    assert cell.mean == pytest.approx(math.exp(line.intercept + line.slope * x), abs=1e-8)
    assert (cell.high - cell.low) / 2 == pytest.approx(half, rel=1e-2)


def test_95_percent_intervals_hold_the_truth_about_95_percent_of_the_time():
    generator = np.random.default_rng(3)
    inside = {"alpha": 0, "forecast": 0}
    for _ in range(40):
        loss = 2.5 + (3e4 / SIZES) ** 0.5 + generator.normal(0, 0.003, len(SIZES))
        fit = fit_form("power_plus_constant", SIZES, loss)
        alpha, cell = fit.parameters["alpha"], forecast(fit, 3e6)
        inside["alpha"] += alpha.low < 0.5 < alpha.high
        inside["forecast"] += cell.low < 2.5 + (3e4 / 3e6) ** 0.5 + generator.normal(0, 0.003) < cell.high
    assert all(count >= 35 for count in inside.values()), inside


def test_too_few_points():
    with pytest.raises(ValueError, match="3 parameters; 2 points"):
        fit_form("power_plus_constant", SIZES[:2], SIZES[:2])
    fit = fit_form("power", SIZES[:2], [4.0, 3.0])
    assert fit.parameters["alpha"].low == -math.inf and forecast(fit, 1e6).high == math.inf
    assert fit.to_json()["parameters"]["alpha"]["low"] is None and LawFit.from_json(fit.to_json()) == fit
    assert f"{fit.parameters['alpha']:.3f}".endswith(" [-, -]")
    assert fit_law(SIZES[:3], [4.0, 3.5, 3.3]).form == "power"


def test_the_frontier_by_hand():
    # at log2 C = 0 to 4: 4.5 is above the line from 5 to 3.5 at its place; what costs more than the best is cut off
    assert frontier([1, 2, 4, 8, 16, 4], [5.0, 4.5, 3.5, 3.0, 3.2, 3.9]) == [0, 2, 3]
    assert frontier([4, 2, 1], [2.0, 3.0, 4.5]) == [2, 1, 0]
    assert frontier([1, 2], [2.0, 3.0]) == [0]


def test_a_sweep_is_cut_into_its_laws():
    points = [
        {"parameters": n, "tokens": d, "compute": 6 * n * d, "loss": 1 + 40 / n**0.34 + 50 / d**0.28}
        for n in SIZES[:4]
        for d in (2.5e5, 5e5, 1e6)
    ]
    fits = fit_sweep(points)
    assert present(fits["N"]).x == [[n] for n in SIZES[:4]] and present(fits["D"]).x == [[2.5e5], [5e5], [1e6]]
    assert present(fits["joint"]).parameters["beta"].mean == pytest.approx(0.28, abs=1e-3)
    assert fit_sweep(points[:4])["joint"] is None


# ---------------------------------------------------------------------------------------------- the sweep


def test_counted_parameters_and_flops_against_their_formulas(tmp_path):
    depth, width, length, vocabulary = 3, 32, 24, 50
    sizes = {"num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": 2, "vocab_size": vocabulary}
    config = AutoConfig.for_model("gpt2", **sizes, max_position_embeddings=length, bos_token_id=0,
                                  eos_token_id=0)  # fmt: skip
    config.save_pretrained(tmp_path)
    counted = AutoModelForCausalLM.from_config(config).num_parameters(exclude_embeddings=True)
    biases_and_norms = depth * (4 * width + width + 4 * width + width + 4 * width - width) + 2 * width
    assert counted == transformer_parameters(width, depth) + biases_and_norms
    # matrix products of one token: the layers, the scores and sums of attention over the context, and the vocabulary
    forward = 2 * (transformer_parameters(width, depth) + 2 * depth * length * width + vocabulary * width)
    assert measured_flops(tmp_path, length) == pytest.approx(3 * forward, rel=0.01)
    assert training_compute(100, 7) == 4200


def sweep(**changes):
    settings = {
        "hidden_sizes": [16, 32, 48, 64], "num_hidden_layers": [1, 1, 1, 2], "token_budgets": [300, 600, 900],
        "forecast_hidden_size": 64, "forecast_num_hidden_layers": 3, "learning_rate": 0.01, "head_dim": 16,
    }  # fmt: skip
    return ScalingArguments(**{**settings, **changes})


def test_the_points_and_their_learning_rates():
    points = sweep_points(sweep(hidden_sizes=[32, 16, 64], num_hidden_layers=[1, 1, 2]))
    assert [point.name for point in points[:4]] == ["gpt2-16x1/300", "gpt2-16x1/600", "gpt2-16x1/900", "gpt2-32x1/300"]
    assert {point.hidden_size: point.learning_rate for point in points} == {16: 0.01, 32: 0.005, 64: 0.0025}
    assert forecast_point(sweep()) == ("gpt2", 64, 3, 900, 0.0025)
    lstm = lstm_point(sweep(), 24_000)
    assert abs(lstm_parameters(lstm.hidden_size, lstm.num_hidden_layers) / 24_000 - 1) < 0.02


def test_budgets_are_cut_from_the_same_text(tokenizer, tmp_path):
    texts = [f"This is text number {number}, and it goes on and on." for number in range(200)]
    cut = cut_texts(texts, texts[:50], tokenizer, sweep(max_eval_tokens=100))
    each = [sum(len(tokenizer(text)["input_ids"]) + 1 for text in cut[budget]["train"]) for budget in (300, 600, 900)]
    assert all(budget <= tokens < budget + 25 for budget, tokens in zip((300, 600, 900), each, strict=True))
    assert cut[300]["train"] == cut[900]["train"][: len(cut[300]["train"])] and cut[300]["test"] == cut[900]["test"]
    folders = write_texts(cut, str(tmp_path))
    assert json.loads((folders[300] / "train.jsonl").read_text().splitlines()[1])["text"] == texts[1]
    with pytest.raises(InputError, match="--token_budgets 99999: the training text has"):
        cut_texts(texts, texts, tokenizer, sweep(token_budgets=[300, 600, 99999]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_sizes": [16, 32], "num_hidden_layers": [1, 1]}, "--hidden_sizes: 2 different models"),
        ({"hidden_sizes": [32, 64, 128], "num_hidden_layers": [16, 4, 1]}, "--hidden_sizes: 1 different models (by"),
        ({"lstm_num_hidden_layers": -1}, "--lstm_num_hidden_layers -1: must be at least 0"),
        ({"token_budgets": [300, 300, 600]}, "--token_budgets: 2 different numbers, fewer than the 3 parameters"),
        ({"num_hidden_layers": [1, 1]}, "--num_hidden_layers: 2 numbers for 4 --hidden_sizes"),
        ({"forecast_hidden_size": 48}, "--forecast_hidden_size 48: with 3 layers no larger"),
        ({"head_dim": 12}, "--head_dim 12: must divide every width; found 16"),
        ({"token_budgets": [0, 1, 2]}, "--token_budgets 0: must be at least 1"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_fitted_is_refused(changes, said):
    with pytest.raises(InputError) as error:
        check_sweep(sweep(**changes))
    assert str(error.value).startswith(said)


# ---------------------------------------------------------------------------------------------- loss by position


def test_position_bins_cover_all_positions_once():
    for length in (1, 2, 3, 7, 40, 127, 128, 255):
        covered = [position for first, last in position_bins(length) for position in range(first, last + 1)]
        assert covered == list(range(1, length + 1))
    assert position_bins(127) == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127)]


def test_losses_by_position_are_those_of_the_model_and_pairs_are_compared(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    blocks = torch.randint(0, 50, (6, 10), generator=torch.Generator().manual_seed(0))
    losses = position_losses(model, blocks, batch_size=4)
    assert losses.shape == (6, 9)
    for row, column in ((0, 0), (5, 8), (3, 4)):
        logits = model(blocks[row : row + 1, : column + 1]).logits[0, -1]
        expected = -logits.log_softmax(-1)[blocks[row, column + 1]].item()
        assert losses[row, column] == pytest.approx(expected, abs=1e-4)
    result = compare_positions({"one": tiny, "same": tiny}, blocks)
    for entry, columns in zip(result["bins"], ([0], [1, 2], [3, 4, 5, 6, 7, 8]), strict=True):
        assert entry["one"]["mean"] == pytest.approx(losses[:, columns].mean(), abs=1e-6)
        assert entry["one"]["low"] < entry["one"]["mean"] < entry["one"]["high"]
        assert entry["same_minus_one"] == {"mean": 0, "low": 0, "high": 0, "n": 6}


# ---------------------------------------------------------------------------------------------- the recipe

TEXT = "".join(chr(97 + number % 7) * (number % 3 + 1) + " " for number in range(400))


@pytest.fixture(scope="module")
def swept(tokenizer, tmp_path_factory):
    """Folder, command and output of a tiny sweep."""
    folder = tmp_path_factory.mktemp("scaling")
    write_jsonl(folder / "text.jsonl", [{"text": TEXT[number:]} for number in range(20)])
    train_tokenizer([TEXT], 300, extra_ids=0).save_pretrained(folder / "tokenizer")
    command = [
        "recipes/scaling.py", "--dataset_name", folder / "text.jsonl", "--tokenizer_name", folder / "tokenizer",
        "--hidden_sizes", 16, 16, 32, "--num_hidden_layers", 1, 2, 1, "--token_budgets", 500, 1000, 1500,
        "--forecast_hidden_size", 32, "--forecast_num_hidden_layers", 2, "--lstm_num_hidden_layers", 1,
        "--max_eval_tokens", 600, "--max_workers", 2, "--output_dir", folder / "out",
    ]  # fmt: skip
    return folder, command, run(*command)


def test_a_sweep_from_text_to_report(swept):
    folder, _, first = swept
    summary = json.loads((folder / "out" / "scaling.json").read_text())
    assert [(p["parameters"], p["hidden_size"]) for p in summary["points"][::3]] == [
        (3072, 16),
        (6144, 16),
        (12288, 32),
    ]
    assert [p["tokens"] // 128 * 128 for p in summary["points"]] == [p["tokens"] for p in summary["points"]]
    for point in summary["points"]:
        run_file = json.loads((folder / "out" / "points" / point["name"] / "run.json").read_text())
        assert point["loss"] == run_file["metrics"]["eval_loss"]
        assert point["compute"] == 6 * point["parameters"] * point["tokens"]
        assert run_file["settings"]["learning_rate"] == point["learning_rate"]
        assert (
            1 < point["measured_compute"] / point["compute"] < 6
        )  # attention and vocabulary weigh most in tiny models
        assert point["counted_parameters"] / point["parameters"] == pytest.approx(1, abs=0.1)
    made = summary["forecast"]
    assert made["parameters"] == made["measured"]["parameters"] == 24576
    assert made["N"]["mean"] == predict(LawFit.from_json(summary["fits"]["N"]), [24576])[0]
    assert made["N"]["error"] == pytest.approx(made["N"]["mean"] / made["measured"]["loss"] - 1)
    # 8 (h² + h) is 12,480 at h = 39 and 13,120 at 40: the nearest to the Transformer's own
    assert (summary["lstm"]["counted_parameters"], summary["points"][-1]["counted_parameters"]) == (12480, 12768)
    assert summary["positions"]["models"] == ["Transformer", "LSTM"]
    for name in ("scaling.png", "positions.png"):
        assert (folder / "out" / name).stat().st_size > 10_000
    page = (folder / "out" / "report.html").read_text()
    assert "Scaling laws" in page and "gpt2-32x2/1500" in page and str(folder) not in page
    assert "Forecast by L(N) for 24,576 parameters" in first.stdout and "LSTM − Transformer" in first.stdout


def test_an_interrupted_sweep_goes_on_and_a_finished_one_is_left_alone(swept):
    folder, command, first = swept
    assert first.stdout.count("===") == 11
    before = json.loads((folder / "out" / "scaling.json").read_text())
    run_file = folder / "out" / "run.json"
    run_file.write_text(json.dumps({**json.loads(run_file.read_text()), "finished": False}))
    (folder / "out" / "points" / "gpt2-16x2/1000").rename(folder / "gone")
    again = run(*command)
    assert again.stdout.count("===") == 1 and "gpt2-16x2/1000" in again.stdout
    after = json.loads((folder / "out" / "scaling.json").read_text())
    assert [p["loss"] for p in after["points"]] == [p["loss"] for p in before["points"]]  # the seed is the same
    assert after["fits"] == before["fits"]
    last = run(*command)
    assert "already finished" in last.stdout and "===" not in last.stdout
    other = run(*command, "--token_budgets", 500, 1000, check=False)
    assert other.returncode == 2 and "--token_budgets: is given twice" in other.stderr


def test_a_base_config_may_be_corrected_until_a_point_is_trained(swept):
    folder, command, _ = swept
    point = Path(ScalingArguments().base_config).read_text()
    (folder / "base.yaml").write_text(point.replace("weight_decay: 0.1", "weight_decay: 0.03"))
    words = [*command, "--base_config", folder / "base.yaml", "--output_dir", folder / "other"]
    shutil.copytree(folder / "out", folder / "other")
    unfinish = lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), "finished": False}))  # noqa: E731
    unfinish(folder / "other" / "run.json")
    refused = run(*words, check=False)
    assert refused.returncode == 2 and "these differ: base_config" in refused.stderr and "===" not in refused.stdout
    for file in (folder / "other" / "points").rglob("run.json"):
        unfinish(file)
    # now the recipe goes on, and the point that was begun with another weight decay says so
    begun = run(*words, check=False)
    assert begun.returncode == 2 and "these differ: weight_decay" in begun.stderr and "===" in begun.stdout


def test_an_edited_base_config_makes_another_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = tmp_path / ScalingArguments().base_config  # also where it is not given
    default.parent.mkdir(parents=True)
    for given in ({}, {"base_config": str(tmp_path / "mine.yaml")}):
        file = Path(given.get("base_config", default))
        file.write_text("warmup_steps: 1")
        args = sweep(output_dir=str(tmp_path / f"out-{file.stem}"), **given)
        assert start_run("recipes/scaling.py", args.output_dir, args)
        assert start_run("recipes/scaling.py", args.output_dir, args)
        write_jsonl(Path(args.output_dir) / "scaling.jsonl", [])  # a result
        file.write_text("warmup_steps: 2")
        with pytest.raises(InputError, match=f"these differ: content of .*{file.name}"):
            start_run("recipes/scaling.py", args.output_dir, args)


def test_a_point_that_fails_stops_the_sweep(tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(f"""
from pathlib import Path
from rlhf.run.stages import run_all

if __name__ == "__main__":
    runs = {{Path({str(tmp_path)!r}) / name: {{"model_type": "nothing"}} for name in ("first", "second")}}
    run_all(Path("recipes/pretrain.py"), "recipes/configs/scaling_point.yaml", runs, 1)
""")
    done = run(script, check=False)
    assert "--model_type nothing: unknown" in done.stderr
    assert done.stdout.count("===") == 1  # the second was not begun
