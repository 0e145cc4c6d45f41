"""Scaling laws: fits of known laws, intervals, forecasts."""

import math

import numpy as np
import pytest
from scipy.stats import linregress, t

from eval.scaling_laws import fit_form, fit_law, fit_sweep, forecast, frontier, predict

SIZES = np.asarray([2e4, 5e4, 1e5, 2e5, 4e5, 8e5])
NOISE = np.random.default_rng(0).normal(0, 0.003, len(SIZES))


def test_a_power_law_is_found_again_and_the_constant_left_out():
    fit = fit_law(SIZES, (8.8e13 / SIZES) ** 0.076 + NOISE)  # Kaplan et al.'s L(N)
    assert fit["form"] == "power" and fit["p_constant"] > 0.05
    alpha, scale = fit["parameters"]["alpha"], fit["parameters"]["log_x_c"]
    assert alpha["low"] < 0.076 < alpha["high"] < alpha["low"] + 0.01
    assert scale["low"] < math.log(8.8e13) < scale["high"]
    assert 0.999 < fit["r2"] < 1


def test_a_constant_is_found_where_there_is_one():
    fit = fit_law(SIZES, 2.5 + (3e4 / SIZES) ** 0.5 + NOISE)
    assert fit["form"] == "power_plus_constant" and fit["p_constant"] < 0.01
    for name, truth in (("alpha", 0.5), ("E", 2.5), ("log_x_c", math.log(3e4))):
        assert fit["parameters"][name]["low"] < truth < fit["parameters"][name]["high"], name
    exact = fit_form("power_plus_constant", SIZES, 2.5 + (3e4 / SIZES) ** 0.5)
    assert [cell["mean"] for cell in exact["parameters"].values()] == pytest.approx([math.log(3e4), 0.5, 2.5], rel=1e-4)


def test_the_joint_law_is_found_again():
    grid = [(n, d) for n in SIZES[:4] for d in (2.5e5, 5e5, 1e6, 2e6)]
    noise = np.random.default_rng(1).normal(0, 0.002, len(grid))
    # Hoffmann et al.'s exponents
    loss = [1.7 + 40 / n**0.34 + 50 / d**0.28 + e for (n, d), e in zip(grid, noise, strict=True)]
    fit = fit_form("joint", grid, loss)
    for name, truth in (("alpha", 0.34), ("beta", 0.28), ("E", 1.7), ("log_A", math.log(40)), ("log_B", math.log(50))):
        assert fit["parameters"][name]["low"] < truth < fit["parameters"][name]["high"], name
    assert predict(fit, [8e5, 2e6])[0] == pytest.approx(1.7 + 40 / 8e5**0.34 + 50 / 2e6**0.28, rel=0.01)


def test_intervals_of_a_nearly_straight_law_are_those_of_linear_regression():
    # with relative noise this small, log L = alpha (log x_c - log x) is a straight line in both
    noise = 1e-6 * np.random.default_rng(2).normal(size=len(SIZES))
    loss = (1e6 / SIZES) ** 1e-3 * (1 + noise)
    fit = fit_form("power", SIZES, loss)
    line = linregress(np.log(SIZES), np.log(loss))
    half = t.ppf(0.975, len(SIZES) - 2) * line.stderr
    alpha = fit["parameters"]["alpha"]
    assert [alpha["mean"], alpha["low"], alpha["high"]] == pytest.approx(
        [-line.slope, -line.slope - half, -line.slope + half], rel=1e-3
    )
    x, centre = math.log(2e6), np.log(SIZES) - np.log(SIZES).mean()
    rest = np.log(loss) - line.intercept - line.slope * np.log(SIZES)
    spread = math.sqrt((rest**2).sum() / (len(SIZES) - 2))
    leverage = 1 + 1 / len(SIZES) + (x - np.log(SIZES).mean()) ** 2 / (centre**2).sum()
    half = t.ppf(0.975, len(SIZES) - 2) * spread * math.sqrt(leverage)
    cell = forecast(fit, 2e6)
    assert cell["mean"] == pytest.approx(math.exp(line.intercept + line.slope * x), abs=1e-8)
    assert (cell["high"] - cell["low"]) / 2 == pytest.approx(half, rel=1e-2)


def test_95_percent_intervals_hold_the_truth_about_95_percent_of_the_time():
    generator = np.random.default_rng(3)
    inside = {"alpha": 0, "forecast": 0}
    for _ in range(40):
        loss = 2.5 + (3e4 / SIZES) ** 0.5 + generator.normal(0, 0.003, len(SIZES))
        fit = fit_form("power_plus_constant", SIZES, loss)
        alpha, cell = fit["parameters"]["alpha"], forecast(fit, 3e6)
        inside["alpha"] += alpha["low"] < 0.5 < alpha["high"]
        inside["forecast"] += cell["low"] < 2.5 + (3e4 / 3e6) ** 0.5 + generator.normal(0, 0.003) < cell["high"]
    assert all(count >= 35 for count in inside.values()), inside


def test_too_few_points():
    with pytest.raises(ValueError, match="3 parameters; 2 points"):
        fit_form("power_plus_constant", SIZES[:2], SIZES[:2])
    fit = fit_form("power", SIZES[:2], [4.0, 3.0])
    assert fit["parameters"]["alpha"]["low"] is None and forecast(fit, 1e6)["high"] is None
    assert fit_law(SIZES[:3], [4.0, 3.5, 3.3])["form"] == "power"


def test_the_frontier_by_hand():
    # the third costs more than the first and reaches no more; the last is the cheapest of its loss
    assert frontier([1, 2, 3, 4, 2], [5.0, 4.0, 4.5, 3.0, 4.2]) == [0, 1, 3]


def test_a_sweep_is_cut_into_its_laws():
    points = [
        {"parameters": n, "tokens": d, "compute": 6 * n * d, "loss": 1 + 40 / n**0.34 + 50 / d**0.28}
        for n in SIZES[:4]
        for d in (2.5e5, 5e5, 1e6)
    ]
    fits = fit_sweep(points)
    assert fits["N"]["x"] == [[n] for n in SIZES[:4]] and fits["D"]["x"] == [[2.5e5], [5e5], [1e6]]
    assert fits["joint"]["parameters"]["beta"]["mean"] == pytest.approx(0.28, abs=1e-3)
    assert fit_sweep(points[:4])["joint"] is None
