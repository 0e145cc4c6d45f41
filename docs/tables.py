"""The measured numbers of README.md and docs/: kept from finished runs, written as tables and as one picture.

    python docs/tables.py keep outputs/demo outputs/road outputs/instructgpt outputs/front
    python docs/tables.py write

`keep` reads the run folders of `make demo`, `make road`, `make instructgpt` and `make front` into
docs/results/<folder>.json: commands, metrics and results of every run, with versions and machine. `write` (`make docs`)
fills the regions between `<!-- table: name -->` and `<!-- end -->` from docs/results/*.json, and draws docs/demo.png
(with results of `make instructgpt` also docs/instructgpt.png and docs/tax.png; of `make front`, docs/front.png). The
other files of docs/results say where their numbers are from.
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure

from eval.drawing.figures import BLUE, GREEN, GREY, ORANGE, front_figure, save_figure, sizes_figure, tax_figure
from eval.drawing.tables import disagreement_line, front_rows, instructgpt_tables
from eval.metrics import FORMATS

Results = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/*.md")
# what is kept of a run beside its command and metrics, and which of its entries the tables have no use for
KEPT_FILES = ("results", "overoptimization", "evaluation", "transfer", "curves", "scaling", "rounds", "instructgpt",
              "front")  # fmt: skip
NOT_KEPT = {"values", "weights", "reliability", "by_length_difference", "x", "commands", "versions"}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "evaluate", "lm_eval")
SHOWN_FLAGS = ("avx2", "avx512_bf16", "amx_bf16", "sve_bf16")
SAMPLES = 5  # replies of the comparison that are kept word by word


# ------------------------------------------------------------------------------------------------ keep


def keep(folder: Path) -> Results:
    """What the tables need of the finished runs in a folder.

    Raises:
        SystemExit: if there is no run, or one is not finished.
    """
    files = sorted(folder.rglob("run.json"), key=lambda file: file.stat().st_mtime)
    outer = [file.parent for file in files if not any((up / "run.json").exists() for up in file.parent.parents)]
    if not outer:
        raise SystemExit(f"error: {folder}: no run here. Give the output folder of make demo or make road.")
    runs = {str(path.relative_to(folder)): read_run(path) for path in outer}
    if any("instructgpt" in run for run in runs.values()):  # one run has the numbers of the fifty others
        runs = {name: run if "instructgpt" in run else {"command": run["command"]} for name, run in runs.items()}
    day = datetime.fromtimestamp(max(file.stat().st_mtime for file in files), timezone.utc)
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    packages = {name: version(name) for name in PACKAGES if find_spec(name)}
    return {
        "source": f"make {folder.name} at commit {commit}",
        "date": day.date().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **packages},
        "runs": runs,
    }


def machine() -> Results:
    """Cores that this process may use, and the CPU's instructions that matter for speed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capable = torch.cpu.get_capabilities()
    flags = [name for name, has in capable.items() if has is True and name.startswith(("avx", "amx", "sve", "neon"))]
    memory = round(psutil.virtual_memory().total / 2**30)
    return {"cores": cores, "memory_gib": memory, "architecture": platform.machine(), "cpu_flags": flags}


def read_run(folder: Path) -> Results:
    """Command, metrics and result files of a run.

    Raises:
        SystemExit: if it is not finished.
    """
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if not run["finished"]:
        raise SystemExit(f"error: {folder}: not finished. Run its command again to continue: {run['command']}")
    kept = {"command": run["command"], "metrics": run["metrics"]}
    for name in KEPT_FILES:
        if (file := folder / f"{name}.json").exists():
            kept[name] = json.loads(file.read_text(encoding="utf-8"))
    if (file := folder / "samples.jsonl").exists() and "models" in kept.get("results", {}):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        kept["samples"] = rows[:SAMPLES]
        for name in kept["results"]["models"]:
            said = [row[name].lower() for row in rows if name in row]
            kept.setdefault("haha", {})[name] = sum("haha" in text for text in said) / max(1, len(said))
    return compact(kept)


def compact(value: Any) -> Any:
    """Without NOT_KEPT, and with six significant digits."""
    if isinstance(value, dict):
        return {key: compact(entry) for key, entry in value.items() if key not in NOT_KEPT}
    if isinstance(value, list):
        return [compact(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def dumps(value: Any, indent: int = 0) -> str:
    """JSON in which whatever fits into a line is one line."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(line) + indent <= 110:
        return line
    pairs = value.items() if isinstance(value, dict) else ((None, entry) for entry in value)
    texts = [("" if key is None else f"{json.dumps(key, ensure_ascii=False)}: ") + dumps(entry, indent + 1)
             for key, entry in pairs]  # fmt: skip
    start, end = "{}" if isinstance(value, dict) else "[]"
    return start + ",".join(f"\n{' ' * (indent + 1)}{text}" for text in texts) + f"\n{' ' * indent}{end}"


# ------------------------------------------------------------------------------------------------ cells


def show(value: Any, style: str = "") -> str:
    """A number, or `mean [low, high]` of a cell; empty for None. Style `points`: times 100, with a sign."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict):
        ends = [show(value[key], style) or "–" for key in ("low", "high") if key in value]
        return show(value["mean"], style) + (f" [{', '.join(ends)}]" if ends else "")
    text = f"{100 * value:+.1f}" if style == "points" else format(value, style)
    return re.sub(r"^-(?=[0.]+%?$)", "", text).replace("-", "−")  # no −0.00


def markdown(heading: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    lines = [f"| {' | '.join(row)} |" for row in (heading, ["-"] * len(heading), *rows)]
    return [re.sub(r"\|  (?=\|)", "| ", line) for line in lines]


def columns(rows: list[Results], layout: dict[str, tuple[str, str]]) -> list[str]:
    """A table with a row for each of `rows`; `layout` has key and style of each column, by heading."""
    return markdown(list(layout), [[show(row.get(key), style) for key, style in layout.values()] for row in rows])


def minus_signs(text: str) -> str:
    """A text with minus signs in front of its numbers, in place of hyphens."""
    return re.sub(r"(?<![\w.])-(?=[\d.])", "−", text)


def plain(text: str) -> str:
    """A reply as the text of a table's cell."""
    return re.sub(r"([\\`*_|<\[\]~])", r"\\\1", " ".join(text.split()))


def made_by(results: Results, *names: str) -> list[str]:
    """A line under a table: the commands, or where its numbers are from."""
    commands = [results["runs"][name]["command"] for name in names] if names else results["commands"]
    if not names and results["source"].startswith("make "):
        return ["", f"Source: {results['source']}."]
    source = "" if names else f"Transcribed from {results['source']}. "
    return ["", f"{source}Made by {', '.join(f'`{command}`' for command in commands)}."]


# ------------------------------------------------------------------------------------------------ demo


def setup(results: Results) -> list[str]:
    """Where the numbers of a page are from."""
    machine = results["machine"]
    flags = ", ".join(flag for flag in machine["cpu_flags"] if flag in SHOWN_FLAGS)
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return [
        f"Source: {results['source']}, {results['date']}. Machine: {machine['cores']} CPU cores ({flags}). "
        f"Versions: {versions}."
    ]


def comparison(results: Results, *metrics: str) -> list[str]:
    """The table of a comparison, or its rows of some metrics."""
    models, order = results["runs"]["comparison"]["results"]["models"], list(FORMATS)
    found = {metric for cells in models.values() for metric in cells}
    rows = [
        [f"`{name}`", *(show(cells.get(name), FORMATS[name.split("/")[0]]) for cells in models.values())]
        for name in sorted(found, key=lambda name: (order.index(name.split("/")[0]), name))
        if not metrics or name in metrics
    ]
    return markdown(["", *models], rows)


def demo_findings(results: Results) -> list[str]:
    """What the demo's comparison and preferences say beside the table of metrics."""
    run, pairs = results["runs"]["comparison"], results["runs"]["preferences"]["metrics"]
    models, judge = run["results"]["models"], run["results"]["reward_model"]
    base, sft = (models[name]["human_loss"]["mean"] for name in ("base", "sft"))
    haha = ", ".join(f"{name} {show(share, '.0%')}" for name, share in run["haha"].items())
    rows = [
        ["preference pairs to train on, and held out", f"{pairs['train pairs']}, {pairs['test pairs']}"],
        ["loss on human replies, SFT against base", show(sft / base - 1, "+.0%")],
        ['replies with "haha"', haha],
    ]
    if "n" in judge:  # in a small run, no two gold scores may differ
        said = f"reward model: {judge['n']:,} pairs of replies in the order of the gold score"
        rows.insert(2, [said, show(judge, ".0%")])
    return markdown(["", ""], rows)


def demo_samples(results: Results) -> list[str]:
    """Replies of three models to the first prompts."""
    rows = []
    for row in results["runs"]["comparison"]["samples"]:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        rows.append([plain(text) for text in (prompt, row["base"], row["sft"], row["ppo"])])
    return markdown(["prompt", "base", "sft", "ppo"], rows)


def demo_overoptimization(results: Results) -> list[str]:
    """Both scores of each checkpoint and of best-of-n, and the checkpoint to keep."""
    over = results["runs"]["overoptimization"]["overoptimization"]
    rows = [*over["ppo"], *over["best_of_n"]]
    layout = {"model": ("name", ""), "√KL": ("sqrt_kl", ".2f"), "gold score": ("gold", ".3f"),
              "reward model's score": ("proxy", ".3f")}  # fmt: skip
    note = f"{over['ppo'][0]['gold']['n']} prompts. Best by the gold score: {over['best']}. Keep {over['keep']}."
    return [*columns(rows, layout), "", f"{note} {over.get('note', '')}".rstrip()]


def own_table(results: Results) -> list[str]:
    """The table of a file that says itself which columns it has."""
    layout = {heading: (key, style) for heading, (key, style) in results["columns"].items()}
    return [*columns(results["rows"], layout), *made_by(results)]


def ppo_tasks(results: Results) -> list[str]:
    """A row for each task: the default's reward, and what each other setting adds to it."""
    by_task: dict[str, list[Results]] = {}
    for row in results["rows"]:
        by_task.setdefault(row["task"], []).append(row)
    rows = [
        [task, show(default["end"], ".3f"), show(default["explained"], ".2f"),
         *(show(other["end_difference"], "+.3f") for other in others)]
        for task, (default, *others) in by_task.items()
    ]  # fmt: skip
    settings = [row["setting"] for row in next(iter(by_task.values()))[1:]]
    return [*markdown(["task", "reward, default", "explained variance", *settings], rows), *made_by(results)]


# ------------------------------------------------------------------------------------------------ road


def road_tokenizer(results: Results) -> list[str]:
    """Bytes per token of the tokenizer made here and of the starter's."""
    found = results["runs"]["tokenizer"]["metrics"]
    rows = []
    for name, label, size in (("own", "learned here", found["vocab_size"]), ("starter", "the starter's", 49152)):
        keys = {"mean": name, "low": f"{name}_low", "high": f"{name}_high"}
        cell = {end: found[f"bytes_per_token/{key}"] for end, key in keys.items()}
        rows.append([label, f"{size:,}", show(cell, ".2f")])
    return [*markdown(["tokenizer", "tokens", "bytes per token"], rows), *made_by(results, "tokenizer")]


def road_compression(results: Results) -> list[str]:
    """Bits per byte of the models, xz and n-grams, the fewest first."""
    found = results["runs"]["compression"]["results"]["bits_per_byte"]
    rows = [[f"`{name}`", show(cell, ".3f")] for name, cell in sorted(found.items(), key=lambda item: item[1]["mean"])]
    return [*markdown(["", "bits per byte"], rows), *made_by(results, "pretrain", "compression")]


def road_objectives(results: Results) -> list[str]:
    """What the masked, replaced and span models find on held-out text."""
    masked, replaced, span = (results["runs"][f"pretrain-{name}"]["metrics"] for name in ("masked", "replaced", "span"))
    rows = [
        ["BERT", f"finds {show(masked['eval_masked_accuracy'], '.0%')} of the chosen tokens, tells "
         f"{show(masked['eval_next_sentence_accuracy'], '.0%')} of pairs of texts apart (50% is guessing)"],
        ["ELECTRA, on RoFormer", f"the generator's loss falls to {show(replaced['eval_generator_loss'], '.1f')} nats; "
         "the discriminator finds a replaced token more suspicious than an original one in "
         f"{show(replaced['eval_detection_auc'], '.0%')} of such pairs (50% is guessing)"],
        ["T5", f"guesses {show(span['eval_token_accuracy'], '.0%')} of the tokens of missing spans"],
    ]  # fmt: skip
    return markdown(["", "on held-out text"], rows)


def road_transfer(results: Results) -> list[str]:
    """Held-out score of each way of fine-tuning, and its difference to the reference."""
    transfer = results["runs"]["transfer"]["transfer"]
    rows = [
        [f"`{name}`", show(cell, ".1%"), show(transfer["differences"].get(name), "points")]
        for name, cell in transfer["models"].items()
    ]
    return markdown(["", transfer["score"], f"minus `{transfer['reference']}`, points"], rows)


def road_in_context(results: Results) -> list[str]:
    """Accuracy by number of examples, the task that gains most first, and on how many tasks examples help."""
    found = results["runs"]["in-context"]["results"]
    gains, numbers = found["differences"], [str(number) for number in found["num_fewshot"]]
    measured = numbers if found["tasks"] else []
    rows = []
    for task, gain in sorted(gains.items(), key=lambda item: -item[1]["mean"]):
        cells = [show(found["tasks"][task][number], ".0%") for number in measured]
        rows.append([f"`{task}`", *cells, show(gain, "points")])
    counts = found.get("counts") or count_gains(gains)
    equal = counts["tasks"] - counts["better"] - counts["worse"]
    note = (
        f"{numbers[-1]} examples beat {numbers[0]} on {counts['better']} of {counts['tasks']} tasks, on "
        f"{counts['significantly_better']} significantly. They are equal on {equal}. They are worse on "
        f"{counts['worse']}, on {counts['significantly_worse']} significantly. {found.get('note', '')}".rstrip()
    )
    heading = ["task", *measured, f"{numbers[-1]} − {numbers[0]}, points"]
    return [*markdown(heading, rows), "", note, *made_by(results, "in-context")]


def count_gains(gains: Results) -> dict[str, int]:
    """On how many tasks examples help or hurt; significantly: the interval excludes 0."""
    cells = list(gains.values())
    return {
        "tasks": len(cells),
        "better": sum(cell["mean"] > 0 for cell in cells),
        "significantly_better": sum(cell["low"] > 0 for cell in cells),
        "worse": sum(cell["mean"] < 0 for cell in cells),
        "significantly_worse": sum(cell["high"] < 0 for cell in cells),
    }


def road_instructions(results: Results, road: Results) -> list[str]:
    """Arithmetic as `make road` measures it; the other clusters are those of a file of their own."""
    before, after = (road["runs"][name]["results"] for name in ("zero-shot", "zero-shot-tuned"))
    measured = {"cluster": "arithmetic", "difference": after["against_baseline"]["cluster"]["arithmetic"]["0"]}
    for name, found in (("before", before), ("after", after)):
        measured[name] = found["clusters"]["arithmetic"]["0"]["mean"]
    rows = [measured, *(row for row in results["rows"] if row["cluster"] != "arithmetic")]
    layout = {heading: (key, style) for heading, (key, style) in results["columns"].items()}
    return [*columns(rows, layout), "", f"Arithmetic: {road['source']}. The other clusters: {results['source']}."]


def road_scaling(results: Results) -> list[str]:
    """The laws, the forecast with what came out, and the LSTM beside the Transformer."""
    summary = results["runs"]["scaling"]["scaling"]
    rows = []
    for law, name in (("N", "parameters"), ("D", "tokens"), ("C", "compute")):
        fit = summary["fits"][law]
        rows.append([f"loss by {name}", formula(law, fit), f"R² {fit['r2']:.4g}"])
    made, gaps = summary["forecast"], summary["positions"]["bins"]
    trained = f"{made['measured']['loss']:.3f} ({show(made['N']['error'], '+.1%')})"
    rows.append([f"forecast for {made['parameters']:,} parameters, outside the fit",
                 f"{show(made['N'], '.3f')} nats per token", f"trained: {trained}"])  # fmt: skip
    for gap in (gaps[0], gaps[-1]):
        difference = f"{show(gap['LSTM_minus_Transformer'], '+.2f')} nats per token"
        tokens = " to ".join(dict.fromkeys((str(gap["first"]), str(gap["last"]))))
        rows.append([f"LSTM − Transformer, tokens of context: {tokens}", difference, ""])
    return [*markdown(["", "", ""], rows), *made_by(results, "scaling")]


def formula(law: str, fit: Results) -> str:
    """A fitted law with its numbers, where they are known."""
    values = {key: cell["mean"] for key, cell in fit.get("parameters", {}).items()}
    if not values:
        return f"L({law})"
    constant = f"{values['E']:.2f} + " if "E" in values else ""
    return f"L({law}) = {constant}({math.exp(values['log_x_c']):.3g} / {law})^{values['alpha']:.2f}"


def road_rloo(results: Results) -> list[str]:
    """RLOO and PPO on held-out prompts."""
    found = results["runs"]["comparison"]["results"]
    gap = found["differences"]["rloo_minus_ppo"]
    rows = comparison(results, "gold_score", "win_rate/gold", "kl", "reply_length", "perplexity")
    note = f"Gold score, RLOO − PPO, paired by prompt: {show(gap['gold_score'], '+.3f')}."
    return [*rows, "", note, *made_by(results, "rloo", "ppo", "comparison")]


def road_star(results: Results) -> list[str]:
    """Problems that each round solves, and the base's baselines."""
    summary = results["runs"]["star"]["rounds"]
    rows = []
    for entry in summary["rounds"]:
        name = f"round {entry['round']}" if entry["round"] else "the base, four worked examples in the prompt"
        kept = f"{entry['solutions']} of {entry['problems']} problems" if entry["round"] else ""
        rows.append([name, show(entry["truth"], ".1%"), kept])
    rows += [[name, show(entry["truth"], ".1%"), ""] for name, entry in summary["baselines"].items()]
    return [*markdown(["", summary["truth_name"], "kept solutions"], rows), *made_by(results, "star")]


def readme_road(results: Results) -> list[str]:
    """A row for each recipe of the road: what it does, one number, a link."""
    runs = results["runs"]
    bits = runs["compression"]["results"]["bits_per_byte"]
    labels, gain = runs["transfer"]["transfer"]["models"], runs["zero-shot-tuned"]["results"]["against_baseline"]
    made, solved = (
        runs["scaling"]["scaling"]["forecast"],
        [e["truth"]["mean"] for e in runs["star"]["rounds"]["rounds"]],
    )
    scores = {name: cells["gold_score"]["mean"] for name, cells in runs["comparison"]["results"]["models"].items()}
    arithmetic = show(gain["cluster"]["arithmetic"]["0"]["mean"], "points")
    rows = [
        ["`tokenizer.py`", "byte-pair encoding from any text", "tokenizer",
         f"{runs['tokenizer']['metrics']['bytes_per_token/own']:.2f} bytes per token"],
        ["`pretrain.py`", "GPT, BERT, ELECTRA or T5 from nothing", "pretraining",
         f"{bits['pretrained']['mean']:.2f} bits per byte; xz -9 {bits['xz']['mean']:.2f}"],
        ["`finetune.py`", "labels of sentences, pairs, words, spans", "fine-tuning-with-labels",
         f"{labels['full']['mean']:.0%} on 300 labels; {labels['scratch']['mean']:.0%} from scratch"],
        ["`instructions.py`", "sixteen tasks worded as instructions", "instruction-tuning",
         f"{arithmetic} points on arithmetic, never trained on"],
        ["`scaling.py`", "laws from a sweep of small models", "scaling-laws",
         f"forecast {made['N']['mean']:.3f}, then trained: {made['measured']['loss']:.3f}"],
        ["`rloo.py`", "PPO's simplest relative", "rloo-beside-ppo",
         f"gold score {scores['rloo']:.3f}; PPO {scores['ppo']:.3f}"],
        ["`star.py`", "learning from its own right solutions", "star",
         f"{solved[0]:.0%} → {solved[-1]:.0%} of problems solved"],
    ]  # fmt: skip
    linked = [[recipe, what, f"[{text}](docs/road.md#{anchor})"] for recipe, what, anchor, text in rows]
    return markdown(["recipe", "what", "measured"], linked)


# ------------------------------------------------------------------------------------------------ instructgpt


def instructgpt_table(results: Results, title: str) -> list[str]:
    """One of the tables of instructgpt.json, with its note."""
    found = results["runs"]["figure"]["instructgpt"]
    table = next(table for table in instructgpt_tables(found) if table.title == title)
    return [*markdown(table.heading, [[minus_signs(cell) for cell in row] for row in table.rows]), "", table.note]


def instructgpt_figures(results: Results) -> list[str]:
    """The lines that show the two pictures."""
    names = ", ".join(results["runs"]["figure"]["instructgpt"]["sizes"])
    return [
        f"![Win rate against the largest SFT model, and mean rating, by model size ({names})](instructgpt.png)",
        "",
        "![What PPO and PPO-ptx make worse, against the gold score that they reach](tax.png)",
    ]


# ------------------------------------------------------------------------------------------------ two rewards


def find_front(results: Results) -> Results:
    """The content of front.json."""
    return next(run["front"] for run in results["runs"].values() if "front" in run)


def front(results: Results) -> list[str]:
    """The picture of two rewards, its numbers, and the reply that the rewards disagree on most."""
    found = find_front(results)
    heading, rows = front_rows(found)
    names = " and ".join(found["rewards"])
    return [
        f"![Models by {names}, with 95% intervals](front.png)",
        "",
        *markdown(heading, [[minus_signs(cell) for cell in row] for row in rows]),
        "",
        minus_signs(plain(disagreement_line(found))),
        "",
        *setup(results),
    ]


# ------------------------------------------------------------------------------------------------ write

# the picture: titles and styles of its panels, labels and colours of its models
PANELS = {"win_rate/gold": ("replies preferred to those of SFT", ".0%"), "kl": ("KL from SFT, nats per reply", ".1f")}
MODELS = {"base": ("base model", GREY), "sft": ("SFT", BLUE), "ppo": ("PPO", ORANGE), "best_of_4": ("best of 4", GREEN)}
HEADLINE = ("gold_score", "win_rate/gold", "kl", "human_loss")
# the tables by name: the results that each is made of, and its function
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., list[str]]]] = {
    "readme-demo": (("demo",), lambda results: comparison(results, *HEADLINE)),
    "readme-road": (("road",), readme_road),
    "demo-setup": (("demo",), setup),
    "demo-comparison": (("demo",), comparison),
    "demo-findings": (("demo",), demo_findings),
    "demo-samples": (("demo",), demo_samples),
    "demo-overoptimization": (("demo",), demo_overoptimization),
    "demo-seeds": (("seeds",), own_table),
    "length-control": (("demo",), lambda results: comparison(
        results, "win_rate/gold", "length_controlled_win_rate/gold", "reply_length")),
    "value-functions": (("value_functions",), own_table),
    "ppo-tasks": (("ppo_tasks",), ppo_tasks),
    "robustness": (("robustness",), own_table),
    "bench": (("bench",), own_table),
    "optimum": (("optimum",), own_table),
    "people": (("people",), own_table),
    "rounds": (("rounds",), own_table),
    "road-setup": (("road",), setup),
    "road-tokenizer": (("road",), road_tokenizer),
    "road-compression": (("road",), road_compression),
    "road-objectives": (("road",), road_objectives),
    "road-transfer": (("road",), road_transfer),
    "road-in-context": (("road",), road_in_context),
    "road-instructions": (("instructions", "road"), road_instructions),
    "road-scaling": (("road",), road_scaling),
    "road-rloo": (("road",), road_rloo),
    "road-star": (("road",), road_star),
    "front": (("front",), front),
    "instructgpt-setup": (("instructgpt",), setup),
    "instructgpt-figures": (("instructgpt",), instructgpt_figures),
    "instructgpt-sizes": (("instructgpt",), lambda results: instructgpt_table(results, "Models of several sizes")),
    "instructgpt-tax": (("instructgpt",), lambda results: instructgpt_table(results, "Alignment tax")),
    "instructgpt-few-shot": (("instructgpt",), lambda results: instructgpt_table(results, "Few-shot prompts")),
}  # fmt: skip


def load(name: str, root: Path = ROOT) -> Results:
    """Content of docs/results/<name>.json."""
    return json.loads((root / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def is_kept(name: str, root: Path = ROOT) -> bool:
    """Whether docs/results has the results of this name."""
    return (root / "docs" / "results" / f"{name}.json").exists()


def fill(page: str, root: Path = ROOT) -> str:
    """A page with its tables as the results say. A table without results says that it was not measured."""

    def region(match: re.Match) -> str:
        if match["name"] not in TABLES:
            raise SystemExit(f"error: <!-- table: {match['name']} -->: unknown. Tables are {', '.join(TABLES)}.")
        sources, table = TABLES[match["name"]]
        missing = [source for source in sources if not is_kept(source, root)]
        lines = ["Not measured yet."] if missing else table(*(load(source, root) for source in sources))
        return "\n".join([match["start"], *lines, "<!-- end -->"])

    return re.sub(r"(?P<start><!-- table: (?P<name>[\w-]+) -->)\n.*?<!-- end -->", region, page, flags=re.DOTALL)


def drawn(results: Results) -> Results:
    """What the picture shows: for each of the demo's models its win rate against SFT and its KL from it."""
    models = results["runs"]["comparison"]["results"]["models"]
    return {name: {metric: models[name][metric] for metric in PANELS} for name in MODELS}


def picture(cells: dict[str, Results]) -> Figure:
    """Bars with 95% intervals of what `drawn` returns."""
    figure = Figure(figsize=(8, 2.5), layout="constrained")
    end = {"win_rate/gold": 1.3, "kl": 1.35 * max(cell["kl"]["high"] for cell in cells.values())}
    for axis, (metric, (title, style)) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        for height, (name, (_, color)) in enumerate(MODELS.items()):
            cell = cells[name][metric]
            spread = [[cell["mean"] - cell["low"]], [cell["high"] - cell["mean"]]]
            axis.barh(height, cell["mean"], xerr=spread, color=color, height=0.62, capsize=3)
            axis.text(cell["high"] + 0.02 * end[metric], height, show(cell["mean"], style), va="center", fontsize=11)
        axis.set_yticks(range(len(MODELS)), [label for label, _ in MODELS.values()], fontsize=11)
        axis.set(xlim=(0, end[metric]))
        axis.set_title(title, fontsize=11, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.axes[0].axvline(0.5, color=GREY, linewidth=1, linestyle=":")
    figure.axes[0].set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    return figure


def write(root: Path = ROOT) -> list[Path]:
    """Fill the tables of all pages and draw the picture; returns the pages that changed."""
    changed = []
    for file in sorted(path for pattern in PAGES for path in root.glob(pattern)):
        before = file.read_text(encoding="utf-8")
        if (after := fill(before, root)) != before:
            file.write_text(after, encoding="utf-8")
            changed.append(file)
    cells = drawn(load("demo", root))
    about = {"Software": None, "Description": json.dumps(cells)}
    picture(cells).savefig(root / "docs" / "demo.png", dpi=120, metadata=about)
    if is_kept("instructgpt", root):
        found = load("instructgpt", root)["runs"]["figure"]["instructgpt"]
        for name, figure in (("instructgpt", sizes_figure(found)), ("tax", tax_figure(found))):
            save_figure(figure, root / "docs" / f"{name}.png")
    if is_kept("front", root):
        save_figure(front_figure(find_front(load("front", root))), root / "docs" / "front.png")
    return changed


def main() -> None:
    task, folders = (sys.argv[1] if len(sys.argv) > 1 else ""), [Path(word) for word in sys.argv[2:]]
    if task == "keep" and folders:
        for folder in folders:
            file = ROOT / "docs" / "results" / f"{folder.name}.json"
            file.write_text(dumps(keep(folder)) + "\n", encoding="utf-8")
            print(f"Written: {file.relative_to(ROOT)}")
    elif task == "write" and not folders:
        print("Changed:", ", ".join(str(file.relative_to(ROOT)) for file in write()) or "no page")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
