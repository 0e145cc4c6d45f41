"""The share of held-out problems solved in each round, and by voting and choosing among the base's samples."""

import sys
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from eval.stats.intervals import Interval, JsonObject, interval
from rlhf.feedback.rounds import ROUNDS_FILE
from rlhf.run.files import read_jsonl, write_json
from rlhf.tasks.problems import final_answer, majority

HELD_OUT_FILE = "held_out.jsonl"  # of a round: `prompt`, `reference`, `solution`, and of round 0 `samples`
SOLUTIONS = "solutions"  # folder of a round: the solutions that were kept, as splits for SFT


def references_of(rows: list[JsonObject]) -> tuple[list[str | None], str]:
    """The answers that held-out solutions are compared with, and the name of the share that equals them.

    Args:
        rows: of round 0. If no answer is known, the majority of the base's samples is the reference.
    """
    known = [row["reference"] for row in rows]
    if any(answer is not None for answer in known):
        return known, "held-out accuracy"
    voted = [majority([final_answer(text) for text in row["samples"]]) for row in rows]
    return voted, "agreement with the base's majority"


def solved_share(
    solutions: list[list[str]], references: list[str | None], how: Literal["mean", "majority", "best"] = "mean"
) -> Interval:
    """Share of problems solved, with its interval over problems; problems without a reference are left out.

    Args:
        solutions: a list for each problem.
        how: `mean` over the solutions; `majority`, their most common answer (self-consistency, Wang et al. 2022,
            https://arxiv.org/abs/2203.11171); or `best`, whether any is right, which is best-of-n by a perfect judge.
    """
    values = []
    for texts, reference in zip(solutions, references, strict=True):
        if reference is None:
            continue
        answers = [final_answer(text) for text in texts]
        right = [float(answer == reference) for answer in answers]
        voted = float(majority(answers) == reference)
        values.append({"mean": sum(right) / len(right), "majority": voted, "best": max(right)}[how])
    return interval(values)


def summarize_solving(output_dir: str, count: int) -> JsonObject:
    """The shares of held-out problems that rounds 0 to `count` solve; written to rounds.json.

    Returns:
        `rounds`: for each the cell {mean, low, high, n} `truth`, and from round 1 on `difference` to round 0, paired by
        problem, `solutions`, the number kept, and `problems`, the number of problems that they solve; `baselines`: the
        same cells of the base's samples; `truth_name`.
    """
    folder = Path(output_dir)
    rows = [read_jsonl(folder / f"round-{number}" / HELD_OUT_FILE) for number in range(count + 1)]
    references, name = references_of(rows[0])
    samples = [row["samples"] for row in rows[0]]
    cells = [solved_share([[row["solution"]] for row in found], references) for found in rows]
    size = len(samples[0])
    others = {
        "base, one sample": solved_share(samples, references),
        f"base, majority of {size}": solved_share(samples, references, "majority"),
        f"base, best of {size} (any right)": solved_share(samples, references, "best"),
    }
    rounds = [{"round": number, **_entry(cell, cells[0] if number else None)} for number, cell in enumerate(cells)]
    for entry in rounds[1:]:
        files = sorted((folder / f"round-{entry['round']}" / SOLUTIONS).glob("*.jsonl"))
        kept = [row for file in files for row in read_jsonl(file)]
        entry["solutions"] = len(kept)
        entry["problems"] = len({str(row["prompt"]) for row in kept})
        entry["rationalized"] = sum(row["kind"] == "rationalized" for row in kept)
    baselines = {label: _entry(cell, cells[0]) for label, cell in others.items()}
    summary = {"rounds": rounds, "baselines": baselines, "truth_name": name}
    write_json(folder / ROUNDS_FILE, summary)
    return summary


def _entry(cell: Interval, first: Interval | None) -> JsonObject:
    return {"truth": cell.to_json(), **({"difference": cell.minus(first).to_json()} if first else {})}


def solving_rows(summary: JsonObject) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table: rounds, then baselines.

    Args:
        summary: content of a STaR run's rounds.json.
    """
    named = [("base (round 0)" if not entry["round"] else f"round {entry['round']}", entry)
             for entry in summary["rounds"]]  # fmt: skip
    rows = []
    for label, entry in [*named, *summary["baselines"].items()]:
        change = entry.get("difference")
        kept = f"{entry['solutions']} solutions of {entry['problems']} problems" if "solutions" in entry else ""
        rows.append([
            label,
            f"{Interval.from_json(entry['truth']):.1%}",
            f"{Interval.from_json(change):+.1%}" if change else "",
            kept + (f", {entry['rationalized']} rationalized" if entry.get("rationalized") else ""),
        ])  # fmt: skip
    return ["", summary["truth_name"], "less round 0, paired", "kept"], rows


def print_solving(summary: JsonObject) -> None:
    """Print the table in the terminal."""
    headings, rows = solving_rows(summary)
    table = Table(title="Held-out problems; means with 95% intervals")
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
