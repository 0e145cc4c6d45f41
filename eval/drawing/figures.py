"""The pictures of a run: training curves, calibration, win rates, over-optimization, two rewards, rounds, in context.

Each function takes plain data from the run's folder and returns a matplotlib Figure.
"""

import base64
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.stats.fits import CurveKind, curve
from eval.stats.intervals import Interval, JsonObject
from eval.stats.scaling_laws import LawFit, formula, predict, read_fits

Log = list[JsonObject]
# Okabe and Ito's colours, distinct for every kind of colour vision (https://jfly.uni-koeln.de/color/)
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#777777"
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE)
# (title, {label: metric}) of each panel; a panel without logged metrics is left out
PANELS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "ppo": [
        ("score", {"training": "objective/raw_scores", "held out": "eval_score"}),
        ("KL to the reference, nats per reply", {"training": "objective/kl", "held out": "eval_kl"}),
        ("entropy, nats per token", {"entropy": "policy/entropy_avg"}),
        ("reply length, tokens", {"training": "completions/mean_length", "held out": "eval_length"}),
        ("value function: explained variance", {"explained variance": "val/explained_variance"}),
        ("seconds per update", {"rollout": "time/rollout", "reward": "time/reward", "logprobs": "time/logprobs",
                                "update": "time/update"}),
    ],
    "rloo": [
        ("reward", {"training": "reward", "held out": "eval_reward"}),
        ("KL to the reference, nats per reply", {"training": "objective/kl", "held out": "eval_objective/kl"}),
        ("entropy, nats per token", {"training": "entropy", "held out": "eval_entropy"}),
        ("reply length, tokens", {"training": "completions/mean_length", "held out": "eval_completions/mean_length"}),
        ("share of prompts whose rewards are all equal", {"share": "frac_reward_zero_std"}),
        ("seconds per update", {"update": "step_time"}),
    ],
    "reward": [
        ("loss", {"training": "loss", "held out": "eval_loss"}),
        ("accuracy", {"training": "accuracy", "held out": "eval_accuracy"}),
        ("margin", {"training": "margin", "held out": "eval_margin"}),
    ],
    "pretrain": [
        ("loss", {"training": "loss", "held out": "eval_loss"}),
        ("gradient norm", {"gradient norm": "grad_norm"}),
        ("learning rate", {"learning rate": "learning_rate"}),
    ],
    "sft": [
        ("loss per token", {"training": "loss", "held out": "eval_loss"}),
        ("token accuracy", {"training": "mean_token_accuracy", "held out": "eval_mean_token_accuracy"}),
        ("learning rate", {"learning rate": "learning_rate"}),
    ],
    "finetune": [
        ("loss", {"training": "loss", "held out": "eval_loss"}),
        ("accuracy", {"held out": "eval_accuracy"}),
        ("language model loss per token", {"training": "lm_loss"}),
    ],
}  # fmt: skip


def _grid(count: int, columns: int = 3, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.6 * columns, height * rows), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes


def _even_margins(figure: Figure) -> None:
    """The same room around every panel: to measure their labels takes twice as long as to draw them."""
    grid = figure.axes[0].get_gridspec()
    assert grid is not None  # `subplots` made it
    (width, height), left, right, edge, across = figure.get_size_inches(), 0.6, 0.15, 0.4, 0.75  # inches
    panel = (width - left - right + across) / grid.ncols - across, (height - edge) / grid.nrows - across
    figure.set_layout_engine(None)
    figure.subplots_adjust(
        left / width, edge / height, 1 - right / width, 1 - edge / height, across / panel[0], across / panel[1]
    )


def _means_and_errors(cells: Iterable[JsonObject]) -> tuple[np.ndarray, np.ndarray]:
    """(P,) means of P cells {mean, low, high}, and (2, P) distances to their ends, as `errorbar` takes them."""
    intervals = [Interval.from_json(cell) for cell in cells]
    means = np.asarray([cell.mean for cell in intervals])
    errors = [[cell.mean - cell.low for cell in intervals], [cell.high - cell.mean for cell in intervals]]
    return means, np.maximum(0, errors)


def training_figure(recipe: str, log: Log) -> Figure | None:
    """Curves of a training run, the monitor's remarks marked and numbered on them; None if nothing was logged.

    Args:
        log: the trainer's log_history; entries with `remark` are the monitor's.
    """
    panels = []
    for title, metrics in PANELS.get(recipe, []):
        lines = {
            label: [(entry["step"], entry[key]) for entry in log if "step" in entry and key in entry]
            for label, key in metrics.items()
        }
        if any(lines.values()):
            panels.append((title, lines))
    if not panels:
        return None
    remarks = [entry for entry in log if "remark" in entry]
    figure, axes = _grid(len(panels))
    _even_margins(figure)
    for axis, (title, lines) in zip(axes, panels, strict=False):
        for color, (label, points) in zip(COLORS, lines.items(), strict=False):
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, color=color, label=label, marker="o" if len(points) < 15 else "", markersize=3)
        for number, remark in enumerate(remarks, 1):
            axis.axvline(remark["step"], color=RED, linestyle=":", linewidth=1)
            axis.text(remark["step"], 1.0, str(number), color=RED, fontsize=8, transform=axis.get_xaxis_transform())
        axis.set_title(title, fontsize=9, y=1.02)  # a place of its own: to find one takes as long as to draw the rest
        axis.set_xlabel("step", fontsize=8, labelpad=1)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.yaxis.set_major_locator(MaxNLocator(5))
        low, high = axis.get_ylim()
        least = 0.01 * max(abs(low), abs(high))  # less of a change is drawn as none
        if high - low < least:
            axis.set_ylim((low + high - least) / 2, (low + high + least) / 2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        if len(lines) > 1:
            axis.legend(fontsize=7, frameon=False)
    return figure


def calibration_figure(accuracy: JsonObject) -> Figure:
    """Reliability of a reward model, and its accuracy by length difference.

    Args:
        accuracy: result of the metric reward_accuracy.
    """
    quarters = accuracy.get("by_length_difference", [])
    figure, axes = _grid(2 if quarters else 1, height=3.2)
    bins = accuracy["reliability"]
    sure, right = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    sizes = [20 + 200 * b["n"] / max(1, accuracy["n"]) for b in bins]
    axes[0].plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, label="as sure as right")
    axes[0].plot(sure, right, color=BLUE, linewidth=1)
    axes[0].scatter(sure, right, sizes, color=BLUE, label="area: number of pairs")
    axes[0].set(xlabel="how sure the reward model is", ylabel="how often it is right", xlim=(0.48, 1.02))
    error = accuracy["calibration_error"]
    axes[0].set_title(f"accuracy {accuracy['mean']:.1%}, calibration error {error:.3f}", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False)
    if quarters:
        _intervals(axes[1], [f"{q['shortest']:+.0f} to {q['longest']:+.0f}" for q in quarters], quarters, BLUE)
        axes[1].axvline(0.5, color=GREY, linewidth=1)
        axes[1].set_title("accuracy by length of chosen − rejected", fontsize=9)
    return figure


def _intervals(axis: Axes, labels: list[str], cells: list[JsonObject], color: str, shift: float = 0.0) -> None:
    """Means with intervals, one below the other."""
    heights = [number + shift for number in range(len(cells))]
    means, errors = _means_and_errors(cells)
    axis.errorbar(means, heights, xerr=errors, fmt="o", color=color, capsize=3, markersize=4)
    if not shift:
        axis.set_yticks(range(len(cells)), labels)
        axis.invert_yaxis()


def comparison_figure(results: JsonObject) -> Figure | None:
    """Win rates of a comparison, plain and length-controlled, one panel per judge; scores if there are no judges.

    Args:
        results: content of results.json.
    """
    models = {name: cells for name, cells in results["models"].items() if name != results.get("reference")}
    judges = sorted({key.split("/")[1] for cells in models.values() for key in cells if key.startswith("win_rate/")})
    if not judges or not models:
        return None
    figure, axes = _grid(len(judges), height=1.2 + 0.4 * len(models))
    for axis, judge in zip(axes, judges, strict=False):
        for shift, color, kind in ((0.0, BLUE, "win_rate"), (0.25, ORANGE, "length_controlled_win_rate")):
            known = [name for name in models if f"{kind}/{judge}" in models[name]]
            _intervals(axis, known, [models[name][f"{kind}/{judge}"] for name in known], color, shift)
            axis.plot([], [], color=color, marker="o", label=kind.replace("_", " "))
        axis.axvline(0.5, color=GREY, linewidth=1)
        axis.set(xlim=(0, 1), title=f"against {results.get('reference', 'the reference')}, judged by {judge}")
        axis.title.set_fontsize(9)
        axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return figure


def overoptimization_figure(results: JsonObject) -> Figure:
    """Gold and proxy score against the square root of the KL, for PPO's checkpoints and best-of-n, with fitted curves.

    Args:
        results: content of overoptimization.json.
    """
    figure, axes = _grid(2, height=3.6)
    kinds: tuple[tuple[CurveKind, str], ...] = (("ppo", BLUE), ("best_of_n", ORANGE))
    for axis, score in zip(axes, ("gold", "proxy"), strict=True):
        for kind, color in kinds:
            points = results[kind]
            if not points:
                continue
            distance = np.asarray([point["sqrt_kl"] for point in points])
            means, errors = _means_and_errors(point[score] for point in points)
            axis.errorbar(distance, means, errors, fmt="o", color=color, capsize=2, markersize=4,
                          label=kind.replace("_", " ").replace("ppo", "PPO"))  # fmt: skip
            fit = (results["fits"][kind] or {}).get(score)
            if fit:
                smooth = np.linspace(1e-3, max(distance) * 1.15, 100)
                axis.plot(smooth, means[0] + curve(smooth, fit["alpha"]["mean"], fit["beta"]["mean"], kind),
                          color=color, linewidth=1)  # fmt: skip
        keep = next((point for point in results["ppo"] if point["name"] == results["keep"]), None)
        if keep:
            axis.axvline(keep["sqrt_kl"], color=GREEN, linestyle="--", linewidth=1, label=f"keep {keep['name']}")
        axis.set(xlabel="√KL to the model at the start", title=f"{score}: {results[score]}")
        axis.title.set_fontsize(9)
        axis.legend(fontsize=7, frameon=False)
    return figure


def curves_figure(curves: list[JsonObject]) -> Figure:
    """Reward and KL against episodes, and reward against the square root of the KL, of several runs.

    Args:
        curves: `name` of the method and `points`, a list of {episode, reward, kl}; runs of one method share a colour.
    """
    figure, axes = _grid(3, height=3.2)
    names = list(dict.fromkeys(curve["name"] for curve in curves))
    for name, color in zip(names, COLORS * len(names), strict=False):
        runs = [curve["points"] for curve in curves if curve["name"] == name]
        shared = sorted(set.intersection(*({point["episode"] for point in points} for points in runs)))
        at = [{point["episode"]: point for point in points} for points in runs]
        mean = [{key: float(np.mean([run[episode][key] for run in at])) for key in ("episode", "reward", "kl")}
                for episode in shared]  # fmt: skip
        for points, width in [*((points, 0.6) for points in runs if len(runs) > 1), (mean, 2.0)]:
            mean_label = f"{name}, mean of {len(runs)}" if len(runs) > 1 else name
            episodes, rewards, kls = ([p[key] for p in points] for key in ("episode", "reward", "kl"))
            lines = ((episodes, rewards), (episodes, kls), ([max(0.0, kl) ** 0.5 for kl in kls], rewards))
            for axis, (x, y) in zip(axes, lines, strict=True):
                axis.plot(x, y, color=color, linewidth=width, label=mean_label if points is mean else None)
    for axis, title in zip(axes, ("reward", "KL to the reference, nats per reply", "reward against √KL"), strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("√KL" if axis is axes[2] else "episodes", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def front_figure(results: JsonObject) -> Figure:
    """Models by two rewards; the front, which no other model dominates, is a line.

    Args:
        results: content of front.json.
    """
    figure, (axis,) = _grid(1, height=3.6)
    figure.set_figwidth(6)
    models, on_front = results["models"], results["front"]
    for name, (first, second) in models.items():
        (x, across), (y, along) = _means_and_errors([first]), _means_and_errors([second])
        color = BLUE if name in on_front else GREY
        axis.errorbar(x, y, along, across, fmt="o", markersize=4, linewidth=0.9, color=color, capsize=2)
        axis.annotate(name, (x[0], y[0]), xytext=(4, 4), textcoords="offset points", fontsize=8, color=color)
    line = sorted([cell["mean"] for cell in models[name]] for name in on_front)
    axis.plot([x for x, _ in line], [y for _, y in line], color=BLUE, linewidth=1, zorder=0)
    axis.set_xlabel(results["rewards"][0], fontsize=8)
    axis.set_ylabel(results["rewards"][1], fontsize=8)
    return figure


def rounds_figure(summary: JsonObject) -> Figure:
    """The truth, the proxy and the KL after each round.

    Args:
        summary: content of rounds.json: `rounds`, a list with `round` and cells {mean, low, high} by name; perhaps
            `baselines`, the same cells of the baselines by name.
    """
    names = [name for name in ("truth", "proxy", "kl") if any(entry.get(name) for entry in summary["rounds"])]
    figure, axes = _grid(len(names), height=3.0)
    for axis, name, color in zip(axes, names, COLORS, strict=False):
        known = [entry for entry in summary["rounds"] if entry.get(name)]
        means, errors = _means_and_errors(entry[name] for entry in known)
        axis.errorbar([entry["round"] for entry in known], means, errors, marker="o", color=color, capsize=3)
        axis.set_xticks([entry["round"] for entry in known])
        for style, (label, cell) in zip(("--", ":", "-."), summary.get("baselines", {}).items(), strict=False):
            axis.axhline(cell[name]["mean"], color=GREY, linestyle=style, linewidth=1, label=label)
        if summary.get("baselines"):
            axis.legend(fontsize=7, frameon=False)
        axis.set(xlabel="round", title=summary.get(f"{name}_name", name))
        axis.title.set_fontsize(9)
    return figure


def scaling_figure(summary: JsonObject) -> Figure:
    """Loss against size, tokens and compute, with the fitted laws and the forecast.

    Args:
        summary: content of scaling.json.
    """
    points, fits = summary["points"], read_fits(summary)
    figure, axes = _grid(3, height=4.2)
    keys = {"N": "parameters", "D": "tokens", "C": "compute"}
    lines = {"N": ("tokens", "D = {}"), "D": ("parameters", "N = {}"), "C": ("parameters", "")}
    names = ("non-embedding parameters N", "tokens D", "compute C = 6 N D, FLOPs")
    for axis, (law, key), name in zip(axes, keys.items(), names, strict=True):
        other, label = lines[law]
        values = sorted({point[other] for point in points})
        for number, value in enumerate(values):
            row = [point for point in points if point[other] == value]
            axis.plot([p[key] for p in row], [p["loss"] for p in row], "o" if law != "C" else ".-", markersize=4,
                      linewidth=0.7, label=label.format(_short(value)) if label else None, color=BLUE,
                      alpha=0.35 + 0.65 * (number + 1) / len(values))  # fmt: skip
        if fit := fits[law]:
            _law(axis, law, fit, summary["forecast"]["parameters"] if law == "N" else None)
        axis.set(xscale="log", xlabel=name)
        if law != "C":
            more = [summary["forecast"]["parameters"]] if law == "N" else []
            _ticks(axis, {value: _short(value) for value in [*(point[key] for point in points), *more]})
    _forecast(axes[0], summary["forecast"])
    axes[0].set_ylabel("held-out loss, nats per token")
    for axis in axes:
        axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    return figure


def _short(count: float) -> str:
    """1234567 as 1.2M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.{0 if count >= 10 * unit else 1}f}{name}"
    return f"{count:.0f}"


def _ticks(axis: Axes, labels: dict[float, str]) -> None:
    """Ticks of a logarithmic axis at these values only."""
    axis.set_xticks(list(labels), list(labels.values()))
    axis.minorticks_off()


def _law(axis: Axes, law: str, fit: LawFit, end: float | None) -> None:
    """A fitted law, drawn over its points and on to `end`."""
    used = [x[0] for x in fit.x]
    smooth = np.geomspace(min(used), max(*used, end or 0), 100)
    axis.plot(smooth, predict(fit, smooth), color=ORANGE, linewidth=1.2, label=f"fit, R² {fit.r2:.4f}")
    axis.set_title(formula(law, fit), fontsize=8)


def _forecast(axis: Axes, made: JsonObject) -> None:
    """A forecast with its interval, and the measured loss."""
    means, errors = _means_and_errors([made["N"]])
    x = made["parameters"]
    if np.isfinite(errors).all():
        axis.errorbar([x], means, errors, fmt="_", color=ORANGE, capsize=3, label="forecast, 95%")
    if "measured" in made:
        error = f"measured: forecast {made['N']['error']:+.1%}"
        axis.plot([x], [made["measured"]["loss"]], "*", color=GREEN, markersize=8, label=error)


def positions_figure(positions: JsonObject) -> Figure:
    """Loss by position in the context, and the difference to the first model, with 95% intervals.

    Args:
        positions: result of eval.measuring.loss_by_position.compare_positions.
    """
    first, *others = positions["models"]
    bins = positions["bins"]
    at = np.asarray([np.sqrt(b["first"] * b["last"]) for b in bins])
    figure, axes = _grid(2, height=3.2)
    panels = (
        (axes[0], [(name, name) for name in (first, *others)], list(COLORS)),
        (axes[1], [(f"{name}_minus_{first}", f"{name} − {first}") for name in others], list(COLORS[1:])),
    )
    for axis, lines, colors in panels:
        for (key, label), color in zip(lines, colors, strict=False):
            means, errors = _means_and_errors(b[key] for b in bins)
            axis.errorbar(at, means, errors, marker="o", markersize=4, color=color, capsize=2, label=label)
        axis.set(xscale="log", xlabel="tokens of context", ylabel="nats per token")
        _ticks(axis, {x: f"{b['first']}–{b['last']}" for x, b in zip(at, bins, strict=True)})
        axis.tick_params(axis="x", labelsize=7)
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_title("loss by position in the context", fontsize=9)
    axes[1].set_title("difference, paired by text", fontsize=9)
    axes[1].axhline(0, color=GREY, linewidth=1)
    return figure


def compression_figure(results: JsonObject) -> Figure:
    """Bits per byte as bars with intervals, the fewest first.

    Args:
        results: content of compression's results.json.
    """
    cells = sorted(results["bits_per_byte"].items(), key=lambda item: item[1]["mean"])
    figure, axes = _grid(1, height=1.0 + 0.4 * len(cells))
    figure.set_figwidth(6)
    means, errors = _means_and_errors(cell for _, cell in cells)
    bars = axes[0].barh([name for name, _ in cells], means, xerr=errors, color=BLUE, ecolor=GREY, capsize=3)
    axes[0].bar_label(bars, [f"{mean:.2f}" for mean in means], fontsize=8, padding=4)
    axes[0].invert_yaxis()
    axes[0].margins(x=0.12)
    axes[0].set_xlabel("bits per byte of held-out text")
    return figure


def in_context_figure(results: JsonObject) -> Figure:
    """Accuracy against the number of examples, one panel per task, with intervals and the level of chance.

    Args:
        results: content of the results.json of eval/in_context.py.
    """
    tasks, numbers = results["tasks"], results["num_fewshot"]
    figure, axes = _grid(len(tasks), columns=4, height=2.2)
    for axis, (task, cells) in zip(axes, tasks.items(), strict=False):
        means, errors = _means_and_errors(cells[str(number)] for number in numbers)
        axis.errorbar(range(len(numbers)), means, errors, marker="o", color=BLUE, capsize=3, markersize=4)
        if task in results["chance"]:
            axis.axhline(results["chance"][task], color=GREY, linestyle=":", linewidth=1)
        axis.set_xticks(range(len(numbers)), numbers)
        axis.set(ylim=(-0.03, 1.03), title=task)
        axis.title.set_fontsize(9)
    figure.supxlabel("number of examples (dotted: chance)", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    return figure


def transfer_figure(transfer: JsonObject) -> Figure:
    """Ways of fine-tuning: the score of each with its seeds as dots, and the difference to the reference.

    Args:
        transfer: content of transfer.json.
    """
    figure, axes = _grid(2, height=1.2 + 0.35 * len(transfer["models"]))
    for axis, color, cells in zip(axes, (BLUE, ORANGE), (transfer["models"], transfer["differences"]), strict=True):
        _intervals(axis, list(cells), list(cells.values()), color)
        for height, cell in enumerate(cells.values()):
            axis.scatter(cell["seeds"], [height] * len(cell["seeds"]), 8, color=GREY, zorder=0)
    axes[0].set_title(f"held-out {transfer['score']}; dots: seeds", fontsize=9)
    axes[1].axvline(0, color=GREY, linewidth=1)
    axes[1].set_title(f"difference to {transfer['reference']}, paired", fontsize=9)
    return figure


def reward_bench_figure(results: JsonObject) -> Figure:
    """A reward model's accuracy by category, and overall.

    Args:
        results: content of reward_bench.json.
    """
    cells = {**results["categories"], **({"overall": results["overall"]} if results["overall"] else {})}
    figure, axes = _grid(1, height=1.0 + 0.35 * len(cells))
    figure.set_figwidth(6)
    _intervals(axes[0], list(cells), list(cells.values()), BLUE)
    axes[0].set(xlim=(-0.02, 1.04), xlabel=f"accuracy of {results['model']}")
    return figure


# of the models of instructgpt.json
KINDS = {"base": ("base", GREY), "prompted": ("base, few-shot prompt", PURPLE), "sft": ("SFT", BLUE),
         "ppo": ("PPO", ORANGE), "ppo_ptx": ("PPO-ptx", RED), "best": ("SFT, best of {}", GREEN)}  # fmt: skip
MARKS = {"ppo_ptx": "s"}  # its colour is near PPO's


def sizes_figure(found: JsonObject) -> Figure:
    """Win rate against the largest SFT model, and mean rating, by model size; one line per kind of model.

    Args:
        found: content of instructgpt.json.
    """
    figure, axes = _grid(2, height=3.9)
    figure.set_figwidth(9.6)
    sizes = found["sizes"]
    counts = {name: size["parameters"] for name, size in sizes.items()}
    decades = np.log10(max(counts.values()) / min(counts.values())) or 1.0
    titles = {"win_rate": f"beats the SFT model of {_short(counts[found['opponent']])}, by the gold score",
              "rating": f"rating from 1 to 7 ({found['rater']})"}  # fmt: skip
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for number, (kind, (label, color)) in enumerate(KINDS.items()):
            points = [
                (size["parameters"] * 10 ** (0.012 * decades * (number - 2.5)), model)  # beside each other
                for size in sizes.values()
                for model in size["models"]
                if model["kind"].partition("_of_")[0] == kind and metric in model
                and (kind != "ppo_ptx" or model["ptx_coef"] == found["ptx_coef"])
            ]  # fmt: skip
            if points:
                means, errors = _means_and_errors(model[metric] for _, model in points)
                name = label.format(points[0][1]["kind"].rpartition("_")[2])
                axis.errorbar([x for x, _ in points], means, errors, marker=MARKS.get(kind, "o"), markersize=4,
                              linewidth=1.2, color=color, capsize=2, label=name)  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel("parameters", fontsize=8)
        axis.set_title(title, fontsize=9)
        _ticks(axis, {count: f"{_short(count)}\n{name}" for name, count in counts.items()})
    axes[0].axhline(0.5, color=GREY, linewidth=1, linestyle=":")
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=6)
    return figure


def tax_figure(found: JsonObject) -> Figure:
    """What PPO and PPO-ptx cost against the gold score that they reach: loss on people's replies, accuracy in context.

    Args:
        found: content of instructgpt.json.
    """
    sizes = found["sizes"]
    panels = (("human_loss", 1.0, "loss on people's replies, nats per token above SFT"),
              ("in_context", 100.0, "accuracy in context, points below SFT"))  # fmt: skip
    figure, axes = _grid(2 * len(sizes), columns=2, height=2.5)
    figure.set_figwidth(9.6)
    for place, (name, size) in enumerate(sizes.items()):
        start = [model["gold_score"] for model in size["models"] if model["kind"] == "sft"]
        for axis, (metric, unit, title) in zip(axes[2 * place :], panels, strict=False):
            axis.axhline(0, color=GREY, linewidth=1)
            x, spread = _means_and_errors(start)
            axis.errorbar(x, [0.0], xerr=spread, fmt="o", markersize=4, color=BLUE, capsize=2, label="SFT")
            rows = [row for row in size["tax"] if metric in row["tax"]]
            _draw_taxes(axis, rows, metric, unit)
            guesses = "; SFT guesses" if metric == "in_context" and size["at_chance"] else ""
            axis.set_title(f"{name} ({_short(size['parameters'])}): {title}{guesses}", fontsize=9)
            axis.set_xlabel("gold score", fontsize=8)
            axis.sharex(axes[0])
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return figure


def _draw_taxes(axis: Axes, rows: list[JsonObject], metric: str, unit: float) -> None:
    """PPO and PPO-ptx by coefficient, joined in this order; each PPO-ptx has its coefficient beside it."""
    x, across = _means_and_errors(row["gold_score"] for row in rows)
    y, along = (unit * part for part in _means_and_errors(row["tax"][metric] for row in rows))
    axis.plot(x, y, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    for kind in ("ppo", "ppo_ptx"):
        label, color = KINDS[kind]
        label += ", with its coefficient" if kind == "ppo_ptx" else ""
        at = [number for number, row in enumerate(rows) if row["kind"] == kind]
        axis.errorbar(x[at], y[at], along[:, at], across[:, at], fmt=MARKS.get(kind, "o"), markersize=4,
                      linewidth=0.9, color=color, capsize=2, label=label)  # fmt: skip
    for number, row in enumerate(rows):
        if row["ptx_coef"]:
            axis.annotate(f"{row['ptx_coef']:g}", (x[number], y[number]), xytext=(-5, 4), textcoords="offset points",
                          fontsize=8, color=RED, horizontalalignment="right")  # fmt: skip


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG. `savefig` would lay it out twice."""
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def data_uri(path: Path) -> str:
    """A PNG as a data: address, so that a page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
