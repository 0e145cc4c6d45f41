"""Report: one self-contained HTML page about a run, and its pictures as PNG.

    accelerate launch eval/report.py --output_dir outputs/ppo
    accelerate launch eval/report.py --output_dir outputs/demo

Takes the folder of any run, or a folder of runs. The page shows what each run was made from, curves with the monitor's
remarks, the reward model's accuracy and calibration, win rates with intervals, over-optimization, replies side by side,
and commands and versions to repeat it. It needs no network and no other file. The recipes write it when they finish.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__, output_dir="no run in it (run.json is missing). Give the folder of a run.")

from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import jinja2

from eval.drawing.figures import data_uri, save_figure, training_figure
from eval.drawing.pictures import draw_pictures
from eval.drawing.tables import number, tables_of
from eval.stats.intervals import JsonObject
from rlhf.data.paths import behind_name
from rlhf.errors import InputError, report_errors
from rlhf.hub import public_value
from rlhf.run.checkpoints import checkpoints
from rlhf.run.files import content_of, read_json, read_jsonl
from rlhf.run.folders import RUN_FILE, Run, read_run
from rlhf.run.processes import main_process

REPORT = "report.html"
MANY_RUNS = 12
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "evaluate")
LOG_FILES = ("trainer_state.json", "ppo_state.json")
# the settings that name what a run was made from, in the order of the stages, and their names on the page
SOURCES = {
    "model_name_or_path": "model", "sft_model_path": "SFT model", "models": "models", "dataset_name": "data",
    "ptx_dataset_name": "SFT data", "reward_model_path": "reward model", "reward_funcs": "reward functions",
    "eval_reward_funcs": "held-out reward functions", "tokenizer_name": "tokenizer",
}  # fmt: skip

# the trainers' held-out metrics that the lineage shows
RESULTS = {
    "eval_loss": "held-out loss", "eval_accuracy": "held-out accuracy", "eval_margin": "held-out margin",
    "eval_masked_accuracy": "held-out accuracy on masked tokens", "eval_token_accuracy": "held-out token accuracy",
    "eval_next_sentence_accuracy": "held-out next-sentence accuracy",
    "eval_detection_auc": "held-out area under the ROC curve on replaced tokens",
    "eval_detection_precision": "held-out precision on replaced tokens",
    "eval_detection_recall": "held-out recall on replaced tokens", "eval_generator_loss": "held-out generator loss",
}  # fmt: skip


@dataclass
class ReportArguments:
    """What is reported on."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder of a run, or a folder of runs."})


def find_runs(folder: Path) -> list[Path]:
    """Run folders to report on; the sources of a run come before it.

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
        run = read_run(path)
        if run is None or path.resolve() in found:
            return
        found[path.resolve()] = path  # marked as found first, so that cycles end
        for key in SOURCES:
            values = run["settings"].get(key) or []
            for value in [values] if isinstance(values, str) else values:
                follow(behind_name(str(value)))
        found[path.resolve()] = found.pop(path.resolve())

    for start in starts:
        follow(start)
    return list(found.values())


def run_of(folder: Path) -> Run:
    """The run of a folder that `find_runs` found."""
    run = read_run(folder)
    assert run is not None
    return run


def read_log(folder: Path) -> list[JsonObject]:
    """The log of a training run: the final one, or that of its newest checkpoint."""
    for place in (folder, *reversed(checkpoints(str(folder)))):
        for name in LOG_FILES:
            state = read_json(place / name)
            if state is not None:
                log = state.get("log_history") or state.get("log") or []
                with content_of(place / name):
                    return [dict(entry) for entry in log]
    return []


def draw_run(folder: Path) -> list[tuple[Path, str]]:
    """Draw the pictures of one run into its folder: how its training went, and what its results show.

    Returns:
        file and caption of each.
    """
    training = training_figure(run_of(folder)["recipe"], read_log(folder))
    if training is None:
        return draw_pictures(folder)
    save_figure(training, folder / "training.png")
    return [(folder / "training.png", f"Training of {folder.name}."), *draw_pictures(folder)]


def run_names(folders: list[Path]) -> dict[Path, str]:
    """The name of each run on the page: its folder's, with the parent folder's where two runs share it."""
    paths = [folder.resolve() for folder in folders]
    count = Counter(path.name for path in paths)
    return {path: path.name if count[path.name] == 1 else "/".join(path.parts[-2:]) for path in paths}


def describe(folder: Path, names: dict[Path, str], metrics: dict[str, float] | None = None) -> JsonObject:
    """What the page says about one run.

    Args:
        names: what the page calls each run, by folder.
        metrics: its results, if run.json doesn't have them yet.
    """
    run = run_of(folder)
    settings = {key: value for key, value in run["settings"].items() if not key.endswith("hub_token")}
    results = metrics or run.get("metrics") or {}
    pictures = draw_run(folder)
    return {
        "name": names[folder.resolve()],
        "recipe": run["recipe"],
        "finished": run["finished"] or metrics is not None,
        "made_from": [f"{what} {public_value(settings[key], names)}" for key, what in SOURCES.items()
                      if settings.get(key)],
        "results": [(RESULTS.get(name, name), number(value)) for name, value in results.items()
                    if name in RESULTS or not name.startswith(("eval_", "epoch"))],
        "pictures": [{"data": data_uri(file), "caption": caption} for file, caption in pictures],
        "training_only": {file.name for file, _ in pictures} == {"training.png"},
        "remarks": [entry for entry in read_log(folder) if "remark" in entry],
        "settings": sorted((key, public_value(value)) for key, value in settings.items() if " " not in key),
    }  # fmt: skip


def samples_of(folders: list[Path]) -> JsonObject | None:
    """Prompts with the models' replies, from the newest comparison, or else the newest run that has some."""
    newest_first = folders[::-1]
    for folder in sorted(newest_first, key=lambda path: not (path / "results.json").exists()):
        if (folder / "samples.jsonl").exists():
            with content_of(folder / "samples.jsonl"):
                rows = [
                    {"prompt": row["prompt"] if isinstance(row["prompt"], str) else
                     "\n".join(message["content"] for message in row["prompt"]),
                     "replies": {name: text for name, text in row.items()
                                 if name != "prompt" and isinstance(text, str)}}  # the front's have scores too
                    for row in read_jsonl(folder / "samples.jsonl")
                ]  # fmt: skip
            return {"models": list(rows[0]["replies"]), "rows": rows} if rows else None
    return None


def _summary(recipes: list[str]) -> str:
    """How many runs of which recipes are on the page."""
    if len(recipes) == 1:
        return f"One run of {recipes[0]}."
    counts = ", ".join(f"{count} of {recipe}" for recipe, count in Counter(recipes).items())
    return f"{len(recipes)} runs: {counts}."


def write_report(output_dir: str, metrics: dict[str, float] | None = None) -> Path | None:
    """Draw the pictures of a run and of what it was made from, write report.html and print where it is.

    Only the main process does.

    Args:
        metrics: results of the run, if run.json doesn't have them yet.
    """
    if not main_process():
        return None
    folder = Path(output_dir)
    folders = find_runs(folder)
    names = run_names(folders)
    runs = [describe(path, names, metrics if path.resolve() == folder.resolve() else None) for path in folders]
    samples = samples_of(folders)
    tables = [{"id": f"table-{n}", **table._asdict()} for n, table in enumerate(tables_of(folders), 1)]
    sections = [("lineage", "Lineage"), *((table["id"], table["title"]) for table in tables)]
    shown = [run for run in runs if run["pictures"] or run["remarks"]]
    # with many runs on the page, runs that have only training curves are folded up at its end
    folded = [run for run in shown if len(runs) > MANY_RUNS and run["training_only"]]
    shown = [run for run in shown if run not in folded]
    sections += [(f"run-{number}", run["name"]) for number, run in enumerate(shown, 1)]
    sections += [("training", "Training curves")] if folded else []
    sections += [("replies", "Replies")] if samples else []
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "drawing" / "report.html").read_text(encoding="utf-8"))
    page = template.render(
        title=f"{folder.resolve().name}: report",
        summary=_summary([run["recipe"] for run in runs]),
        sections=[*sections, ("repeat", "To repeat it")],
        runs=runs,
        shown=shown,
        folded=folded,
        chained=len(runs) <= MANY_RUNS,
        tables=tables,
        samples=samples,
        commands=[run_of(path)["command"] for path in folders],
        versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
    )
    (folder / REPORT).write_text(page, encoding="utf-8")
    print(f"Report: {folder / REPORT}")
    return folder / REPORT


def main() -> None:
    (arguments,) = parse(__file__, ReportArguments)
    write_report(arguments.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
