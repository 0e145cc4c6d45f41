"""Report: one self-contained HTML page about a run, and its pictures as PNG.

    accelerate launch eval/report.py --output_dir outputs/ppo
    accelerate launch eval/report.py --output_dir outputs/demo

Takes the folder of any run, or a folder of runs. The page has what was made from what, curves with the monitor's
remarks, the reward model's accuracy and calibration, win rates with intervals, over-optimization, replies side by side,
and commands and versions to repeat it. It needs no network and no other file. The recipes write it when they finish.
"""

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from eval.figures import (
    calibration_figure,
    comparison_figure,
    compression_figure,
    data_uri,
    overoptimization_figure,
    rounds_figure,
    save_figure,
    training_figure,
    transfer_figure,
)
from eval.metrics import table_rows
from rlhf.arguments import RUN_FILE, checkpoints, main_process, parse
from rlhf.errors import InputError, report_errors
from rlhf.hub import is_local, public_base

REPORT = "report.html"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "evaluate")
LOG_FILES = ("trainer_state.json", "ppo_state.json")
# which setting names what a run was made from, in the order of the road
SOURCES = (
    "model_name_or_path", "sft_model_path", "models", "dataset_name", "ptx_dataset_name", "reward_model_path",
    "reward_funcs", "eval_reward_funcs", "tokenizer_name",
)  # fmt: skip

# those of the trainers' held-out metrics that the lineage shows
RESULTS = {
    "eval_loss": "held-out loss", "eval_accuracy": "held-out accuracy", "eval_margin": "held-out margin",
    "eval_masked_accuracy": "held-out accuracy on masked tokens", "eval_token_accuracy": "held-out token accuracy",
    "eval_next_sentence_accuracy": "held-out next-sentence accuracy",
    "eval_detection_precision": "held-out precision on replaced tokens",
    "eval_detection_recall": "held-out recall on replaced tokens", "eval_generator_loss": "held-out generator loss",
}  # fmt: skip


@dataclass
class ReportArguments:
    """What is reported on."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder of a run, or a folder of runs."})


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _public(value: Any) -> str:
    """A setting without this machine's paths."""
    words = value if isinstance(value, list) else [value]
    return ", ".join(_public_word(word) if isinstance(word, str) else f"{word}" for word in words)


def _public_word(word: str) -> str:
    name, equals, path = word.rpartition("=")
    return name + equals + (public_base(path) if is_local(path) else path)


def find_runs(folder: Path) -> list[Path]:
    """Run folders to report on, what a run was made from before the run.

    Args:
        folder: of a run, or one whose subfolders (and theirs) are runs.

    Raises:
        InputError: if there is none.
    """
    starts = [folder] if (folder / RUN_FILE).exists() else []
    starts += sorted(
        (file.parent for pattern in ("*/", "*/*/") for file in folder.glob(pattern + RUN_FILE)),
        key=lambda path: (path / RUN_FILE).stat().st_ctime,
    )
    if not starts:
        raise InputError(f"--output_dir {folder}: no run in it ({RUN_FILE} is missing). Give the folder of a run.")
    found: dict[Path, Path] = {}

    def follow(path: Path) -> None:
        run = _read(path / RUN_FILE)
        if run is None or path.resolve() in found:
            return
        found[path.resolve()] = path  # holds its place, against circles
        for key in SOURCES:
            values = run["settings"].get(key) or []
            for value in [values] if isinstance(values, str) else values:
                follow(Path(str(value).rpartition("=")[2]).expanduser())
        found[path.resolve()] = found.pop(path.resolve())

    for start in starts:
        follow(start)
    return list(found.values())


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The log of a training run: of its end, or of its newest checkpoint."""
    for place in (folder, *reversed(checkpoints(str(folder)))):
        for name in LOG_FILES:
            state = _read(place / name)
            if state is not None:
                return state.get("log_history") or state.get("log") or []
    return []


def draw(folder: Path) -> list[tuple[Path, str]]:
    """Draw the pictures of one run into its folder.

    Returns:
        file and caption of each.
    """
    run = _read(folder / RUN_FILE)
    figures: list[tuple[str, Figure | None, str]] = [
        ("training.png", training_figure(run["recipe"], read_log(folder)), "Training of " + folder.name + ".")
    ]
    evaluation, results = _read(folder / "evaluation.json"), _read(folder / "results.json")
    if evaluation and "reliability" in evaluation:
        caption = f"On {evaluation['n']} held-out pairs: is the reward model right as often as it is sure?"
        figures.append(("calibration.png", calibration_figure(evaluation), caption))
    if results and "models" in results:
        figures.append(("comparison.png", comparison_figure(results), "Win rates with 95% intervals."))
        if "reliability" in results.get("reward_model", {}):
            caption = f"The reward model beside the gold score, on {results['reward_model']['n']} held-out pairs."
            figures.append(("calibration.png", calibration_figure(results["reward_model"]), caption))
    if over := _read(folder / "overoptimization.json"):
        caption = (
            "Scores against distance from the start, with 95% intervals and the curves of Gao et al. (2022). Where the "
            "gold score turns down while the proxy rises, the reward model has stopped telling the truth."
        )
        figures.append(("overoptimization.png", overoptimization_figure(over), caption))
    if results and "bits_per_byte" in results:
        caption = "Bits per byte of held-out text, with 95% intervals: fewer is better prediction."
        figures.append(("compression.png", compression_figure(results), caption))
    if rounds := _read(folder / "rounds.json"):
        figures.append(("rounds.png", rounds_figure(rounds), "Held-out scores after each round, with 95% intervals."))
    if transfer := _read(folder / "transfer.json"):
        caption = f"Held-out {transfer['score']}, and its difference to {transfer['reference']}, with 95% intervals."
        figures.append(("transfer.png", transfer_figure(transfer), caption))
    drawn = []
    for name, figure, caption in figures:
        if figure is not None:
            save_figure(figure, folder / name)
            drawn.append((folder / name, caption))
    return drawn


def describe(folder: Path, metrics: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the page says about one run.

    Args:
        metrics: its results, if run.json hasn't got them yet.
    """
    run = _read(folder / RUN_FILE)
    settings = {key: value for key, value in run["settings"].items() if "token" not in key}
    results = metrics or run.get("metrics") or {}
    return {
        "name": folder.resolve().name,
        "recipe": run["recipe"],
        "finished": run["finished"] or metrics is not None,
        "made_from": [_public(settings[key]) for key in SOURCES if settings.get(key)],
        "results": [(RESULTS.get(name, name), _number(value)) for name, value in results.items()
                    if name in RESULTS or not name.startswith(("eval_", "epoch"))],
        "pictures": [{"data": data_uri(file), "caption": caption} for file, caption in draw(folder)],
        "remarks": [entry for entry in read_log(folder) if "remark" in entry],
        "settings": sorted((key, _public(value)) for key, value in settings.items() if " " not in key),
    }  # fmt: skip


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def newest_results(folders: list[Path]) -> Any:
    """Content of the newest results.json among the runs."""
    files = [folder / "results.json" for folder in folders if (folder / "results.json").exists()]
    return _read(max(files, key=lambda file: file.stat().st_mtime)) if files else None


def tables_of(folders: list[Path]) -> list[dict[str, Any]]:
    """Tables of the comparisons, over-optimization and rounds among the runs."""
    tables = []
    for folder in folders:
        if (results := _read(folder / "results.json")) and "models" in results:
            names, rows = table_rows(results)
            if any((path / "rounds.json").exists() for path in folders) and results != newest_results(folders):
                continue  # each round's comparison holds the ones before
            note = f"Means with 95% bootstrap intervals; win rates and KL against {results.get('reference', 'sft')!r}."
            tables.append(("Evaluation on held-out prompts", note, ["", *names], rows))
        if results and "bits_per_byte" in results:
            rows = [
                [name, *(f"{cell[key]:.3f}" for key in ("mean", "low", "high"))]
                for name, cell in results["bits_per_byte"].items()
            ]
            note = f"{results['texts']} held-out texts of {results['bytes']:,} bytes; 95% bootstrap intervals."
            tables.append(("Compression", note, ["", "bits per byte", "low", "high"], rows))
        if over := _read(folder / "overoptimization.json"):
            rows = [
                [point["name"], f"{point['sqrt_kl']:.2f}", *(f"{point[s]['mean']:.3f} [{point[s]['low']:.3f}, "
                 f"{point[s]['high']:.3f}]" for s in ("gold", "proxy"))]
                for point in (*over["ppo"], *over["best_of_n"])
            ]  # fmt: skip
            note = f"Best by the truth: {over['best']}. Keep {over['keep']}: no worse beyond doubt, nearer the start."
            tables.append(("Over-optimization", note, ["model", "√KL", over["gold"], over["proxy"]], rows))
        if transfer := _read(folder / "transfer.json"):
            note = "Bootstrapped over held-out rows and seeds together; differences are paired by both."
            tables.append(("Ways of fine-tuning", note, *transfer_rows(transfer)))
        if agreement := _read(folder / "agreement.json"):
            rows = [[name, "-" if value is None else _number(value)] for name, value in agreement.items()]
            tables.append((f"Agreement of the labelers of {folder.name}", "", ["", ""], rows))
    return [
        {"id": f"table-{number}", "title": title, "note": note, "heading": heading, "rows": rows}
        for number, (title, note, heading, rows) in enumerate(tables, 1)
    ]


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


def samples_of(folders: list[Path]) -> dict[str, Any] | None:
    """Prompts with the models' replies, from the newest comparison, or else the newest run that has some."""
    newest_first = folders[::-1]
    for folder in sorted(newest_first, key=lambda path: not (path / "results.json").exists()):
        if (folder / "samples.jsonl").exists():
            lines = [json.loads(line) for line in (folder / "samples.jsonl").open(encoding="utf-8")]
            rows = [
                {"prompt": row["prompt"] if isinstance(row["prompt"], str) else
                 "\n".join(message["content"] for message in row["prompt"]),
                 "replies": {name: text for name, text in row.items() if name != "prompt"}}
                for row in lines
            ]  # fmt: skip
            return {"models": list(rows[0]["replies"]), "rows": rows} if rows else None
    return None


def write_report(output_dir: str, metrics: dict[str, Any] | None = None) -> Path | None:
    """Draw the pictures of a run and of what it was made from, and write report.html. Only the main process writes.

    Args:
        metrics: results of the run, if run.json hasn't got them yet.
    """
    if not main_process():
        return None
    folder = Path(output_dir)
    folders = find_runs(folder)
    runs = [describe(path, metrics if path.resolve() == folder.resolve() else None) for path in folders]
    tables, samples = tables_of(folders), samples_of(folders)
    sections = [("lineage", "Lineage"), *((table["id"], table["title"]) for table in tables)]
    sections += [(f"run-{number}", run["name"]) for number, run in enumerate(
        [run for run in runs if run["pictures"] or run["remarks"]], 1)]  # fmt: skip
    sections += [("replies", "Replies")] if samples else []
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    page = template.render(
        title=f"{folder.resolve().name}: report",
        summary=f"{len(runs)} runs, the last one of recipe {runs[-1]['recipe']}.",
        sections=[*sections, ("repeat", "To repeat it")],
        runs=runs,
        tables=tables,
        samples=samples,
        commands=[_read(path / RUN_FILE)["command"] for path in folders],
        versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
    )
    (folder / REPORT).write_text(page, encoding="utf-8")
    return folder / REPORT


def main() -> None:
    (arguments,) = parse(__file__, ReportArguments)
    print(f"Report: {write_report(arguments.output_dir)}")


if __name__ == "__main__":
    with report_errors():
        main()
