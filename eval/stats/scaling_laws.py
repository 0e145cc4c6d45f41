"""Scaling laws: the loss as a power law in model size, data and compute, fitted to a sweep, with intervals.

The forms, with x the number of parameters N, tokens D or floating-point operations C:

- `power`: L = (x_c / x)^alpha. Kaplan et al. 2020, equations 1.1 to 1.3 (https://arxiv.org/abs/2001.08361).
- `power_plus_constant`: L = E + (x_c / x)^alpha, where E is the loss that no x removes: the entropy of the text, and
  the share of the other quantity, which is held fixed. Henighan et al. 2020, equation 1.1
  (https://arxiv.org/abs/2010.14701).
- jointly: L = E + A / N^alpha + B / D^beta. Hoffmann et al. 2022, equation 2 (https://arxiv.org/abs/2203.15556).

All are least-squares fits of the loss itself. Intervals are profile-likelihood intervals (Bates and Watts 1988, chapter
6): all values for which the residuals, minimized over the other parameters, stay below the bound of an F-test. With the
few points of a sweep they are wider, and more honest, than a bootstrap, and for a straight line they are exact.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq, least_squares
from scipy.special import fdtrc, fdtri

from eval.stats.intervals import Interval, JsonObject

LEVEL = 0.95
SCALING_FILE = "scaling.json"


class Form(NamedTuple):
    """The form of a law."""

    formula: str
    parameters: tuple[str, ...]
    loss: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (parameters,), (points, columns) -> (points,)
    starts: Callable[[np.ndarray, np.ndarray], list[list[float]]]  # (points, columns), (points,) -> initial parameters


def _power(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.exp(np.clip(theta[1] * (theta[0] - np.log(x[:, 0])), -60, 60))


def _straight_line(x: np.ndarray, loss: np.ndarray) -> list[float]:
    """log x_c and alpha of a power law from the straight line through (log x, log L)."""
    slope, offset = np.polyfit(np.log(x), np.log(loss), 1)
    return [-offset / slope if slope else float(np.log(x).mean()), -slope]


def _joint(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    log_a, alpha, log_b, beta, constant = theta
    terms = np.stack([log_a - alpha * np.log(x[:, 0]), log_b - beta * np.log(x[:, 1])])
    return constant + np.exp(np.clip(terms, -60, 60)).sum(0)


def _shares(loss: np.ndarray) -> list[float]:
    """Values of the constant to start from."""
    return [float(share * loss.min()) for share in (0.0, 0.5, 0.8, 0.95)]


FORMS = {
    "power": Form("L = (x_c / x)^alpha", ("log_x_c", "alpha"), _power, lambda x, y: [_straight_line(x[:, 0], y)]),
    "power_plus_constant": Form(
        "L = E + (x_c / x)^alpha",
        ("log_x_c", "alpha", "E"),
        lambda theta, x: theta[2] + _power(theta, x),
        lambda x, y: [[*_straight_line(x[:, 0], y - constant), constant] for constant in _shares(y)],
    ),
    "joint": Form(
        "L = E + A / N^alpha + B / D^beta",
        ("log_A", "alpha", "log_B", "beta", "E"),
        _joint,
        lambda x, y: [
            [np.log((y.mean() - constant) / 2) + a * np.log(x[:, 0]).mean(), a,
             np.log((y.mean() - constant) / 2) + b * np.log(x[:, 1]).mean(), b, constant]
            for constant in _shares(y) for a in (0.2, 0.7) for b in (0.2, 0.7)
        ],
    ),
}  # fmt: skip
LARGEST_FORM = "power_plus_constant"  # the form in one quantity with the most parameters


class LawFit(NamedTuple):
    """A form that was fitted, and the points it was fitted to."""

    form: str  # name in FORMS
    parameters: dict[str, Interval]  # an end is infinite where the points don't bound it
    r2: float  # share of the variance of the loss that is explained
    rss: float  # residual sum of squares
    x: list[list[float]]  # (points, columns)
    loss: list[float]  # (points,)
    p_constant: float | None = None  # p-value of the F-test for the constant E; None if it wasn't tested

    @property
    def theta(self) -> np.ndarray:
        """(parameters,) as they were fitted."""
        return np.asarray([cell.mean for cell in self.parameters.values()])

    def to_json(self) -> JsonObject:
        return {
            "form": self.form,
            "formula": FORMS[self.form].formula,
            "parameters": {name: cell.to_json() for name, cell in self.parameters.items()},
            "r2": self.r2,
            "rss": self.rss,
            "n": len(self.loss),
            "x": self.x,
            "loss": self.loss,
            **({} if self.form == "joint" else {"p_constant": self.p_constant}),
        }

    @classmethod
    def from_json(cls, fit: JsonObject) -> "LawFit":
        parameters = {name: Interval.from_json(cell) for name, cell in fit["parameters"].items()}
        return cls(fit["form"], parameters, fit["r2"], fit["rss"], fit["x"], fit["loss"], fit.get("p_constant"))


# ---------------------------------------------------------------------------------------------- least squares


def _minimize(
    form: Form, x: np.ndarray, loss: np.ndarray, starts: Sequence[ArrayLike], fixed: dict[int, float]
) -> tuple[np.ndarray, float]:
    """Parameters with the smallest sum of squared residuals, some of them held fixed. E is never below 0."""
    free = [number for number in range(len(form.parameters)) if number not in fixed]
    lower = [0.0 if form.parameters[number] == "E" else -np.inf for number in free]
    full = np.zeros(len(form.parameters))
    best, best_rss = full, np.inf

    def fill(values: np.ndarray) -> np.ndarray:
        theta = full.copy()
        theta[free] = values
        for number, value in fixed.items():
            theta[number] = value
        return theta

    for start in starts:
        begin = np.maximum(np.asarray(start, dtype=float)[free], lower)
        found = least_squares(
            lambda values: form.loss(fill(values), x) - loss, begin, bounds=(lower, np.inf), x_scale="jac",
            ftol=1e-12, xtol=1e-12, gtol=1e-12, max_nfev=400,
        )  # fmt: skip
        if 2 * found.cost < best_rss:
            best, best_rss = fill(found.x), 2 * found.cost
    return best, best_rss


def _edge(excess: Callable[[float], float], point: float, step: float, end: float | None = None) -> float:
    """Where `excess` rises above 0 on one side of `point`; `end`, or infinity, if it never does."""
    inside = point
    for _ in range(40):
        outside = inside + step
        if end is not None and (outside - end) * step >= 0:
            return end if excess(end) <= 0 else float(brentq(excess, inside, end, xtol=1e-6))
        if excess(outside) > 0:
            return float(brentq(excess, inside, outside, xtol=1e-6 * abs(step)))
        inside, step = outside, 2 * step
    return math.copysign(math.inf, step)


def _threshold(rss: float, points: int, parameters: int) -> float:
    """How far the sum of squares may rise above its minimum within the interval; for one degree of freedom."""
    free = points - parameters
    return rss / free * float(fdtri(1, free, LEVEL))


def fit_form(name: str, x: ArrayLike, loss: ArrayLike) -> LawFit:
    """Fit one form.

    Args:
        name: in FORMS.
        x: (points,), or (points, 2) with N and D for the joint form; above 0.
        loss: (points,) nats per token.

    Raises:
        ValueError: with fewer points than parameters.
    """
    form = FORMS[name]
    y = np.asarray(loss, dtype=float)
    columns = np.asarray(x, dtype=float).reshape(len(y), -1)
    if len(y) < len(form.parameters):
        raise ValueError(f"{form.formula} has {len(form.parameters)} parameters; {len(y)} points don't determine it.")
    theta, rss = _minimize(form, columns, y, form.starts(columns, y), {})
    cells = {}
    for number, parameter in enumerate(form.parameters):
        low, high = -math.inf, math.inf
        if len(y) > len(form.parameters):
            bound = rss + _threshold(rss, len(y), len(form.parameters))

            def excess(value: float, number: int = number, bound: float = bound) -> float:
                return _minimize(form, columns, y, [theta], {number: value})[1] - bound

            step = 0.05 * max(abs(theta[number]), 0.1)
            low = _edge(excess, theta[number], -step, 0.0 if parameter == "E" else None)
            high = _edge(excess, theta[number], step)
        cells[parameter] = Interval(float(theta[number]), low, high)
    variation = float(((y - y.mean()) ** 2).sum())
    r2 = float(1 - rss / variation) if variation else 1.0
    return LawFit(name, cells, r2, float(rss), columns.tolist(), y.tolist())


def fit_law(x: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray) -> LawFit:
    """Fit a law in one quantity, with the constant E only if the points support it.

    They do if E lowers the sum of squares by more than chance would (F-test at 5%); this needs at least 4 points.
    """
    plain = fit_form("power", x, loss)
    if len(loss) <= len(FORMS[LARGEST_FORM].parameters):
        return plain
    constant = fit_form(LARGEST_FORM, x, loss)
    free = len(loss) - len(FORMS[LARGEST_FORM].parameters)
    gain = max(0.0, plain.rss - constant.rss)
    p_value = float(fdtrc(1, free, gain / max(constant.rss / free, 1e-300)))
    return (constant if p_value < 1 - LEVEL else plain)._replace(p_constant=p_value)


def predict(fit: LawFit, x: ArrayLike) -> np.ndarray:
    """(points,) the fitted loss at x, (points,) or (points, columns)."""
    columns = np.asarray(x, dtype=float).reshape(-1, len(fit.x[0]))
    return FORMS[fit.form].loss(fit.theta, columns)


def forecast(fit: LawFit, x: float | Sequence[float]) -> Interval:
    """Forecast the loss of one more point, with its 95% prediction interval.

    The interval holds every loss that, taken as one more point, would raise the fit's sum of squares by less than the
    bound of the F-test; for a linear model this is the ordinary prediction interval. Without more points than
    parameters it is unbounded.

    Args:
        x: N, D or C of the point, or (N, D) for the joint form.
    """
    form, theta, y, columns = FORMS[fit.form], fit.theta, np.asarray(fit.loss), np.asarray(fit.x)
    more = np.vstack([columns, np.reshape(x, (1, -1))])
    mean = float(form.loss(theta, more[-1:])[0])
    if len(y) <= len(theta):
        return Interval(mean, -math.inf, math.inf)
    bound = fit.rss + _threshold(fit.rss, len(y), len(theta))

    def excess(value: float) -> float:
        return _minimize(form, more, np.append(y, value), [theta], {})[1] - bound

    step = max(1e-6, float(np.sqrt(fit.rss / (len(y) - len(theta)))))
    return Interval(mean, _edge(excess, mean, -step), _edge(excess, mean, step))


# ---------------------------------------------------------------------------------------------- sweeps


def frontier(compute: Sequence[float], loss: Sequence[float]) -> list[int]:
    """Indices of the compute-efficient points, cheapest first: the lower convex hull of (log C, L) down to its lowest.

    A law L(C) is convex in log C, so a point above the line between two others spends compute worse than they do.

    >>> frontier([1, 2, 4], [5.0, 4.9, 3.0])
    [0, 2]
    """
    least = min(range(len(loss)), key=lambda number: (loss[number], compute[number]))
    hull: list[int] = []
    for number in sorted(range(len(loss)), key=lambda number: (compute[number], loss[number])):
        if hull and compute[number] == compute[hull[-1]]:
            continue
        while len(hull) > 1:
            first, middle = hull[-2:]
            share = np.log(compute[middle] / compute[first]) / np.log(compute[number] / compute[first])
            if loss[middle] < loss[first] + share * (loss[number] - loss[first]):
                break
            hull.pop()
        hull.append(number)
        if number == least:
            break
    return hull


def fit_sweep(points: list[JsonObject]) -> dict[str, LawFit | None]:
    """Fit all laws to the points of a sweep.

    Args:
        points: each with `parameters` (N = 12 n_layer d_model²), `tokens` (D), `compute` (C = 6 N D, FLOPs) and `loss`.

    Returns:
        by name, None where there are too few points: `N` (loss against size, at the largest budget), `D` (against
        tokens, at the largest size), `C` (against compute, on the frontier), `joint` (N and D, all points).
    """
    budget, size = max(p["tokens"] for p in points), max(p["parameters"] for p in points)
    chosen = {
        "N": [p for p in points if p["tokens"] == budget],
        "D": [p for p in points if p["parameters"] == size],
        "C": [points[number] for number in frontier([p["compute"] for p in points], [p["loss"] for p in points])],
    }
    keys = {"N": "parameters", "D": "tokens", "C": "compute"}
    fits: dict[str, LawFit | None] = {
        name: fit_law([p[keys[name]] for p in rows], [p["loss"] for p in rows]) if len(rows) > 2 else None
        for name, rows in chosen.items()
    }
    both = [[p["parameters"], p["tokens"]] for p in points]
    enough = len(points) > len(FORMS["joint"].parameters)
    fits["joint"] = fit_form("joint", both, [p["loss"] for p in points]) if enough else None
    return fits


def forecast_larger(points: list[JsonObject], fits: dict[str, LawFit | None], parameters: int) -> JsonObject:
    """Forecast the loss of a larger model on the largest budget.

    Returns:
        `parameters`, `tokens`, and the forecasts {mean, low, high} by L(N), `N`, and by the joint law, `joint`; None
        where there is no such fit.
    """
    tokens = max(point["tokens"] for point in points)
    at: dict[str, float | list[float]] = {"N": parameters, "joint": [parameters, tokens]}
    made = {law: forecast(fit, x).to_json() if (fit := fits[law]) else None for law, x in at.items()}
    return {"parameters": parameters, "tokens": tokens, **made}


def check_forecast(made: JsonObject, measured: JsonObject) -> JsonObject:
    """Add `measured`, the point that was trained, and to each forecast its `error`, (forecast - loss) / loss."""
    checked = {**made, "measured": measured}
    for law in ("N", "joint"):
        if made[law]:
            checked[law] = {**made[law], "error": float(made[law]["mean"] / measured["loss"] - 1)}
    return checked


# ---------------------------------------------------------------------------------------------- sentences and tables

SHOWN = ("alpha", "beta", "E")  # parameters that sentences and tables give beside the formula


def formula(law: str, fit: LawFit) -> str:
    """A fit as a formula with numbers: L(N) = 2.500 + (3.00e+04 / N)^0.500."""
    values = {name: cell.mean for name, cell in fit.parameters.items()}
    if law == "joint":
        a, b = (np.exp(values[name]) for name in ("log_A", "log_B"))
        return f"L(N, D) = {values['E']:.3f} + {a:.3g} / N^{values['alpha']:.3f} + {b:.3g} / D^{values['beta']:.3f}"
    constant = f"{values['E']:.3f} + " if "E" in values else ""
    return f"L({law}) = {constant}({np.exp(values['log_x_c']):.2e} / {law})^{values['alpha']:.3f}"


def read_fits(summary: JsonObject) -> dict[str, LawFit | None]:
    """The fits by law of scaling.json; None where there were too few points."""
    return {law: LawFit.from_json(fit) if fit else None for law, fit in summary["fits"].items()}


def scaling_verdicts(summary: JsonObject) -> list[str]:
    """The results of the sweep: one sentence per law and one per forecast.

    Args:
        summary: content of scaling.json.
    """
    sentences = []
    for law, fit in read_fits(summary).items():
        if fit is None:
            sentences.append(f"L({law}): too few points for a fit.")
            continue
        cells = [f"{name} {cell:.3f}" for name, cell in fit.parameters.items() if name in SHOWN]
        sentences.append(f"{formula(law, fit)}: R² {fit.r2:.4f}, {len(fit.loss)} points, {', '.join(cells)}.")
    made = summary["forecast"]
    for law in ("N", "joint"):
        if made[law]:
            name = "L(N)" if law == "N" else "L(N, D)"
            error = (
                f", measured {made['measured']['loss']:.3f}: {made[law]['error']:+.1%}" if "measured" in made else ""
            )
            cell = Interval.from_json(made[law])
            sentences.append(f"Forecast by {name} for {made['parameters']:,} parameters: {cell:.3f}{error}.")
    if positions := summary.get("positions"):
        first, last = positions["bins"][0], positions["bins"][-1]
        for end in (first, last):
            gap = Interval.from_json(end["LSTM_minus_Transformer"])
            sentences.append(
                f"LSTM − Transformer at {end['first']} to {end['last']} tokens of context: {gap:+.3f} nats per token."
            )
    return sentences


def results_of(summary: JsonObject) -> dict[str, float]:
    """The numbers that run.json keeps."""
    laws = {law: fit for law, fit in read_fits(summary).items() if fit}
    results = {f"r2/{law}": fit.r2 for law, fit in laws.items()}
    results |= {f"alpha/{law}": fit.parameters["alpha"].mean for law, fit in laws.items()}
    results |= {f"forecast_error/{law}": summary["forecast"][law]["error"] for law in ("N", "joint") if
                summary["forecast"][law]}  # fmt: skip
    return {"points": len(summary["points"]), **results}


def scaling_tables(summary: JsonObject) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """Tables of the laws and of all trained models: title, note, heading, rows."""
    laws = [
        [formula(law, fit), f"{fit.r2:.4f}", str(len(fit.loss)),
         *(f"{fit.parameters[name]:.3f}" if name in fit.parameters else "" for name in SHOWN)]
        for law, fit in read_fits(summary).items() if fit
    ]  # fmt: skip
    models = [*summary["points"], summary["forecast"].get("measured"), summary.get("lstm")]
    rows = [
        [model["name"], f"{model['parameters']:,}", f"{model['counted_parameters']:,}", f"{model['tokens']:,}",
         f"{model['compute']:.3g}", f"{model['measured_compute']:.3g}" if model["measured_compute"] else "",
         f"{model['tokens_per_second']:,.0f}", f"{model['learning_rate']:.2g}", f"{model['loss']:.4f}",
         f"{model['bits_per_byte']:.4f}"]
        for model in models if model
    ]  # fmt: skip
    heading = ["model", "N", "counted", "tokens D", "6 N D", "measured FLOPs", "tokens/s", "learning rate", "loss",
               "bits per byte"]  # fmt: skip
    note = (
        "N = 12 n_layer d_model² (Kaplan et al. 2020, equation 2.1), beside the non-embedding parameters as counted; "
        "measured FLOPs are counted by torch and include attention and the output projection."
    )
    return [
        ("Scaling laws", " ".join(scaling_verdicts(summary)[4:]), ["law", "R²", "points", "α", "β", "E"], laws),
        ("Models of the sweep", note, heading, rows),
    ]
