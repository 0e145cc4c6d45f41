"""Which tables a report has: what the runs' result files say, with intervals."""

from pathlib import Path
from typing import Any, NamedTuple

from eval.measuring.solving import solving_rows
from eval.metrics import table_rows
from eval.stats.scaling_laws import SCALING_FILE, scaling_tables
from rlhf.run.files import read_json


class ReportTable(NamedTuple):
    """A table of texts."""

    title: str
    note: str
    heading: list[str]
    rows: list[list[str]]


def tables_of(folders: list[Path]) -> list[ReportTable]:
    """The tables of all runs, in the order of the runs."""
    in_rounds = any((path / "rounds.json").exists() for path in folders)
    newest = newest_results(folders)
    tables: list[ReportTable] = []
    for folder in folders:
        results = read_json(folder / "results.json") or {}
        # of several rounds the newest comparison has the others' models, too
        if "models" in results and (not in_rounds or results == newest):
            tables.append(_comparison(results))
        if "bits_per_byte" in results:
            tables.append(_compression(results))
        if "num_fewshot" in results:
            tables.append(_in_context(results, folder.name))
        if over := read_json(folder / "overoptimization.json"):
            tables.append(_overoptimization(over))
        if transfer := read_json(folder / "transfer.json"):
            note = "Bootstrapped over held-out rows and seeds together; differences are paired by both."
            tables.append(ReportTable("Ways of fine-tuning", note, *transfer_rows(transfer)))
        if (rounds := read_json(folder / "rounds.json")) and "baselines" in rounds:
            note = "Means with 95% bootstrap intervals over held-out problems; rounds are solved greedily."
            tables.append(ReportTable(f"Solved problems of {folder.name}", note, *solving_rows(rounds)))
        if scaling := read_json(folder / SCALING_FILE):
            tables += [ReportTable(*table) for table in scaling_tables(scaling)]
        if agreement := read_json(folder / "agreement.json"):
            rows = [[name, "-" if value is None else number(value)] for name, value in agreement.items()]
            tables.append(ReportTable(f"Agreement of the labelers of {folder.name}", "", ["", ""], rows))
    return tables


def newest_results(folders: list[Path]) -> Any:
    """Content of the newest results.json with models among the runs."""
    files = [folder / "results.json" for folder in folders if (folder / "results.json").exists()]
    found = [(file.stat().st_mtime, read_json(file)) for file in files]
    return max(((when, r) for when, r in found if "models" in r), key=lambda pair: pair[0], default=(0, None))[1]


def number(value: Any) -> str:
    """A value as it is shown."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def with_interval(cell: dict[str, Any] | None) -> str:
    """A share {mean, low, high} in percent; empty for none."""
    return f"{cell['mean']:.1%} [{cell['low']:.1%}, {cell['high']:.1%}]" if cell else ""


def _comparison(results: dict[str, Any]) -> ReportTable:
    names, rows = table_rows(results)
    note = f"Means with 95% bootstrap intervals; win rates and KL against {results.get('reference', 'sft')!r}."
    return ReportTable("Evaluation on held-out prompts", note, ["", *names], rows)


def _compression(results: dict[str, Any]) -> ReportTable:
    rows = [
        [name, *(f"{cell[key]:.3f}" for key in ("mean", "low", "high"))]
        for name, cell in results["bits_per_byte"].items()
    ]
    note = f"{results['texts']} held-out texts of {results['bytes']:,} bytes; 95% bootstrap intervals."
    return ReportTable("Compression", note, ["", "bits per byte", "low", "high"], rows)


def _in_context(results: dict[str, Any], name: str) -> ReportTable:
    numbers = [str(count) for count in results["num_fewshot"]]
    rows = [
        [task, *(with_interval(cells[count]) for count in numbers), with_interval(results["differences"].get(task))]
        for task, cells in results["tasks"].items()
    ]
    for cluster, cells in results.get("against_baseline", {}).get("cluster", {}).items():
        rows.append([f"{cluster}, against {results['baseline']}", *(with_interval(cells[n]) for n in numbers), ""])
    heading = ["task", *(f"{count} examples" for count in numbers), f"{numbers[-1]} − {numbers[0]}"]
    if len(numbers) == 1:  # nothing to take a difference of
        heading, rows = heading[:-1], [row[:-1] for row in rows]
    note = "95% bootstrap intervals; differences are paired."
    return ReportTable(f"Accuracy in context: {name}", note, heading, rows)


def _overoptimization(over: dict[str, Any]) -> ReportTable:
    rows = [
        [point["name"], f"{point['sqrt_kl']:.2f}",
         *("{mean:.3f} [{low:.3f}, {high:.3f}]".format(**point[score]) for score in ("gold", "proxy"))]
        for point in (*over["ppo"], *over["best_of_n"])
    ]  # fmt: skip
    note = f"Best by the truth: {over['best']}. Keep {over['keep']}: no worse beyond doubt, nearer the start."
    return ReportTable("Over-optimization", note, ["model", "√KL", over["gold"], over["proxy"]], rows)


def transfer_rows(transfer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of transfer.json."""
    heading = ["", transfer["score"], "each seed", f"minus {transfer['reference']}"]
    rows = []
    for name, cell in transfer["models"].items():
        gain = transfer["differences"].get(name)
        rows.append([
            name,
            "{mean:.1%} [{low:.1%}, {high:.1%}]".format(**cell),
            ", ".join(f"{value:.1%}" for value in cell["seeds"]),
            "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * gain[key] for key in ("mean", "low", "high"))) if gain else "",
        ])  # fmt: skip
    return heading, rows
