"""Transfer: the gain from pretraining, LoRA, a frozen body and the auxiliary objective, over seeds, on the same rows.

    accelerate launch eval/transfer.py --reference scratch --output_dir outputs/transfer \
        --models scratch=outputs/scratch-1 scratch=outputs/scratch-2 full=outputs/full-1 full=outputs/full-2

Reads finished runs of recipes/finetune.py. A name given several times is one way of training with several seeds
(labelled rows, order and new weights differ). Writes transfer.json, transfer.png and a page: the held-out score of
each, and its difference to --reference, paired by row and by seed. The score is accuracy (of words for tags, F1 for
spans). Intervals are bootstrapped over the held-out rows and the seeds together.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__, models="no finished run of recipes/finetune.py.")

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.drawing.tables import transfer_rows
from eval.report import write_report
from eval.stats.intervals import JsonObject, over_rows_and_seeds
from rlhf.errors import InputError, report_errors
from rlhf.models.sources import named_models
from rlhf.run.files import read_json, read_jsonl, write_json
from rlhf.run.folders import finish_run, read_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import Seed

TRANSFER_FILE = "transfer.json"
SCORES = {"spans": "F1", "tags": "accuracy per word"}


@dataclass
class TransferArguments:
    """Which runs are compared."""

    models: list[str] = field(
        default_factory=list, metadata={"help": "name=folder pairs; a name may be repeated, once per seed."}
    )
    reference: str = field(default="scratch", metadata={"help": "Name that others are compared with."})
    output_dir: str = field(default="outputs/transfer", metadata={"help": "Folder for transfer.json and the picture."})
    seed: Seed = field(default=42, metadata={"help": "Seed of the bootstrap."})


def read_runs(models: list[str], reference: str) -> tuple[dict[str, dict[int, Path]], str]:
    """The runs by name and seed, and the name of their score.

    Raises:
        InputError: if a word is no name=model pair, a folder is no finished fine-tuning run, two of a name have the
            same seed, seeds differ between names, or the reference is missing.
    """
    runs: dict[str, dict[int, Path]] = {}
    kinds = {}
    for name, folder in named_models(models, repeated=True):
        path = Path(folder).expanduser()
        run = read_run(path)
        if run is None or run["recipe"] != "finetune" or not run["finished"]:
            raise InputError(f"--models {name}={folder}: no finished run of recipes/finetune.py.")
        seed = run["settings"].get("seed", 42)  # transformers' default
        if seed in runs.setdefault(name, {}):
            raise InputError(
                f"--models {name}={folder}: {name} has a run with --seed {seed} already. Train with another seed."
            )
        runs[name][seed] = path
        evaluation = read_json(path / "evaluation.json", task=str)
        if evaluation is None:
            raise InputError(f"--models {name}={folder}: its evaluation.json is missing. Train again, or restore it.")
        kinds[folder] = evaluation["task"]
    if reference not in runs:
        raise InputError(f"--reference {reference}: not among --models; found {', '.join(runs)}.")
    for name, by_seed in runs.items():
        if set(by_seed) != set(runs[reference]):
            raise InputError(
                f"--models: {name} has the seeds {sorted(by_seed)}, {reference} {sorted(runs[reference])}. They are "
                "compared seed by seed: give the same seeds."
            )
    if len(set(kinds.values())) > 1:
        raise InputError(f"--models: runs on different kinds of tasks ({', '.join(sorted(set(kinds.values())))}).")
    return runs, SCORES.get(next(iter(kinds.values())), "accuracy")


def read_scores(runs: dict[str, dict[int, Path]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The scores of each name: (seeds, rows), float64, seeds in order; and the weight of each row, its number of tags.

    Raises:
        InputError: if two runs were not evaluated on the same rows.
    """
    first: list[JsonObject] | None = None
    scores: dict[str, list[list[float]]] = {}
    for name, by_seed in runs.items():
        scores[name] = []
        for _, path in sorted(by_seed.items()):
            rows = read_jsonl(path / "predictions.jsonl", score=float | int)
            inputs = [{key: value for key, value in row.items() if key not in ("prediction", "score")} for row in rows]
            first = inputs if first is None else first
            if inputs != first:
                raise InputError(
                    f"--models {name}={path}: was evaluated on other rows than the first run. Give runs on the same."
                )
            scores[name].append([row["score"] for row in rows])
    weights = [float(len(row.get("tags", "1"))) for row in first or []]
    return {name: np.asarray(values, dtype=float) for name, values in scores.items()}, np.asarray(weights)


def main() -> None:
    # Arguments
    (args,) = parse(__file__, TransferArguments)
    need_one_process(__file__)

    # Data
    runs, score = read_runs(args.models, args.reference)
    scores, weights = read_scores(runs)
    if not start_run(__file__, args.output_dir, args):
        return

    # Comparison
    reached = {name: over_rows_and_seeds(values, weights, args.seed) for name, values in scores.items()}
    gained = {name: over_rows_and_seeds(values - scores[args.reference], weights, args.seed)
              for name, values in scores.items() if name != args.reference}  # fmt: skip
    result = {
        "score": score,
        "reference": args.reference,
        "models": {name: one.to_json() for name, one in reached.items()},
        "differences": {name: one.to_json() for name, one in gained.items()},
    }
    write_json(Path(args.output_dir) / TRANSFER_FILE, result)

    # Report
    heading, rows = transfer_rows(result)
    table = Table(*heading, title=f"Held-out {score}, {len(runs[args.reference])} seeds; 95% intervals")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    finish_run(args.output_dir, {f"{score} of {name}": one.cell.mean for name, one in reached.items()})
    write_report(args.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
