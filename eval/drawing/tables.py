"""Which tables a report has: the results of the runs, with intervals."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from eval.measuring.solving import solving_rows
from eval.metrics import table_rows
from eval.stats.fits import KEEP_RULE
from eval.stats.intervals import Interval, JsonObject
from eval.stats.scaling_laws import SCALING_FILE, scaling_tables
from rlhf.run.files import content_of, read_json


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
        for name, tables_in in TABLES.items():
            content = read_json(folder / name)
            # the newest comparison of several rounds includes the others' models
            if content is not None and not (
                in_rounds and "models" in content and name == "results.json" and content != newest
            ):
                with content_of(folder / name):
                    tables += tables_in(content, folder.name)
    return tables


def newest_results(folders: list[Path]) -> JsonObject | None:
    """Content of the newest results.json with models among the runs; None if there is none."""
    files = [folder / "results.json" for folder in folders if (folder / "results.json").exists()]
    found = [(file.stat().st_mtime, read_json(file)) for file in files]
    return max(((when, r) for when, r in found if "models" in r), key=lambda pair: pair[0], default=(0, None))[1]


def _results(results: JsonObject, folder: str) -> list[ReportTable]:
    kinds = {"models": _comparison, "bits_per_byte": _compression, "num_fewshot": _in_context}
    tables = [table_of(results, folder) for key, table_of in kinds.items() if key in results]
    if not tables:
        raise KeyError(" and ".join(kinds))
    return tables


def _rounds(rounds: JsonObject, folder: str) -> list[ReportTable]:
    if "baselines" not in rounds:  # rounds of PPO are drawn, not tabled
        return []
    note = "Means with 95% bootstrap intervals over held-out problems; rounds are solved greedily."
    return [ReportTable(f"Solved problems of {folder}", note, *solving_rows(rounds))]


def _transfer(transfer: JsonObject, _: str) -> list[ReportTable]:
    note = "Bootstrapped over held-out rows and seeds together; differences are paired by both."
    return [ReportTable("Ways of fine-tuning", note, *transfer_rows(transfer))]


def _few_shot(few_shot: JsonObject, folder: str) -> list[ReportTable]:
    note = f"{few_shot['num_fewshot']} examples each; scored by {few_shot['score']}; 95% intervals over the messages."
    return [ReportTable(f"Few-shot prompts of {folder}", note, *few_shot_rows(few_shot))]


def _agreement(agreement: JsonObject, folder: str) -> list[ReportTable]:
    rows = [[name, "-" if value is None else number(value)] for name, value in agreement.items()]
    return [ReportTable(f"Agreement of the labelers of {folder}", "", ["", ""], rows)]


def number(value: object) -> str:
    """A value with four digits, if it is a float.

    >>> number(0.123456), number(7)
    ('0.1235', '7')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(cell: JsonObject | None, style: str) -> str:
    """`mean [low, high]` of a cell; empty for none."""
    return f"{Interval.from_json(cell):{style}}" if cell else ""


def _comparison(results: JsonObject, _: str) -> ReportTable:
    names, rows = table_rows(results)
    note = f"Means with 95% bootstrap intervals; win rates and KL against {results.get('reference', 'sft')!r}."
    return ReportTable("Evaluation on held-out prompts", note, ["", *names], rows)


def _compression(results: JsonObject, _: str) -> ReportTable:
    rows = [[name, _write(cell, ".3f")] for name, cell in results["bits_per_byte"].items()]
    note = f"{results['texts']} held-out texts of {results['bytes']:,} bytes; 95% bootstrap intervals."
    return ReportTable("Compression", note, ["", "bits per byte"], rows)


def _in_context(results: JsonObject, name: str) -> ReportTable:
    numbers = [str(count) for count in results["num_fewshot"]]
    rows = [
        [task, *(_write(cells[count], ".1%") for count in numbers), _write(results["differences"].get(task), ".1%")]
        for task, cells in results["tasks"].items()
    ]
    for cluster, cells in results.get("against_baseline", {}).get("cluster", {}).items():
        rows.append([f"{cluster}, against {results['baseline']}", *(_write(cells[n], ".1%") for n in numbers), ""])
    heading = ["task", *(f"{count} examples" for count in numbers), f"{numbers[-1]} − {numbers[0]}"]
    if len(numbers) == 1:  # no difference
        heading, rows = heading[:-1], [row[:-1] for row in rows]
    note = "95% bootstrap intervals; differences are paired."
    return ReportTable(f"Accuracy in context: {name}", note, heading, rows)


def _overoptimization(over: JsonObject, _: str) -> list[ReportTable]:
    rows = [
        [point["name"], f"{point['sqrt_kl']:.2f}", _write(point["gold"], ".3f"), _write(point["proxy"], ".3f")]
        for point in (*over["ppo"], *over["best_of_n"])
    ]
    note = f"Best by the truth: {over['best']}. Keep {over['keep']}: {KEEP_RULE}."
    return [ReportTable("Over-optimization", note, ["model", "√KL", over["gold"], over["proxy"]], rows)]


def transfer_rows(transfer: JsonObject) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of transfer.json."""
    heading = ["", transfer["score"], "each seed", f"minus {transfer['reference']}"]
    rows = []
    for name, cell in transfer["models"].items():
        seeds = ", ".join(f"{value:.1%}" for value in cell["seeds"])
        rows.append([name, _write(cell, ".1%"), seeds, _write(transfer["differences"].get(name), "+.1%")])
    return heading, rows


def reward_bench_rows(results: JsonObject) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of reward_bench.json: the overall score, the categories, then their subsets."""
    cells = {**({"overall": results["overall"]} if results["overall"] else {}), **results["categories"]}
    cells |= {f"  {name}": cell for name, cell in results["subsets"].items() if name not in results["categories"]}
    return ["", "accuracy", "prompts"], [[name, _write(cell, ".1%"), str(cell["n"])] for name, cell in cells.items()]


def _reward_bench(results: JsonObject, _: str) -> list[ReportTable]:
    better = "scores the chosen reply higher" if results["replies"] == "pairs" else "scores the right reply highest"
    note = f"How often {results['model']} {better}; 95% bootstrap intervals over prompts. Overall: mean of categories."
    return [ReportTable("Accuracy of the reward model by category", note, *reward_bench_rows(results))]


def front_rows(front: JsonObject) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of front.json."""
    first, rewards = next(iter(front["models"])), front["rewards"]
    rows = []
    for name, cells in front["models"].items():
        gaps = front["differences"].get(f"{name}_minus_{first}", [None, None])
        numbers = [*(_write(cell, ".3f") for cell in cells), *(_write(gap, "+.3f") for gap in gaps)]
        rows.append([name, *numbers, "yes" if name in front["front"] else "no"])
    return ["", *rewards, *(f"{reward}, minus {first}" for reward in rewards), "on the front"], rows


def disagreement_line(front: JsonObject) -> str:
    """What front.json says of the reply that the rewards disagree on most."""
    found = front["disagreement"]
    if found is None:
        return "The two rewards agree on all replies."
    prompt = found["prompt"] if isinstance(found["prompt"], str) else found["prompt"][-1]["content"]
    places = [
        f"rank {rank:g} of {found['of']} by {reward} ({number(score)})"
        for rank, reward, score in sorted(zip(found["ranks"], front["rewards"], found["scores"], strict=True))
    ]
    said = f"{found['model']} replies to {prompt!r}: {found['reply']!r}"
    return f"The rewards disagree most here, {' and '.join(places)}: {said}"


def _front(front: JsonObject, _: str) -> list[ReportTable]:
    note = f"95% bootstrap intervals over prompts; differences are paired. {disagreement_line(front)}"
    return [ReportTable("Two rewards", note, *front_rows(front))]


def few_shot_rows(few_shot: JsonObject) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of few_shot.json."""
    rows = [
        [str(number), _write(cell, ".3f"), "chosen" if number == few_shot["chosen"] + 1 else ""]
        for number, cell in enumerate(few_shot["scores"], 1)
    ]
    return ["few-shot prompt", "score", ""], rows


def model_label(model: JsonObject) -> str:
    """The name of a kind of model; PPO-ptx with its coefficient.

    >>> model_label({"kind": "ppo_ptx", "ptx_coef": 0.5}), model_label({"kind": "sft", "ptx_coef": 0.0})
    ('ppo_ptx 0.5', 'sft')
    """
    return f"{model['kind']} {model['ptx_coef']:g}" if model["ptx_coef"] else model["kind"]


def instructgpt_tables(found: JsonObject) -> list[ReportTable]:
    """The tables of instructgpt.json: win rates and ratings, the alignment tax, and the few-shot prompts if any."""
    sizes = found["sizes"]
    columns = {"win_rate": ".1%", "win_rate/gold": ".1%", "rating": ".2f", "gold_score": ".3f", "kl": ".2f"}
    heading = ["size", "model", "seeds", f"beats the SFT model of {found['opponent']}", "beats its own SFT model",
               "rating, 1 to 7", "gold score", "KL from SFT"]  # fmt: skip
    rows = [
        [
            name,
            model_label(model),
            str(model["seeds"]),
            *(_write(model.get(key), style) for key, style in columns.items()),
        ]
        for name, size in sizes.items()
        for model in size["models"]
    ]
    counts = ", ".join(f"{name} {size['parameters']:,}" for name, size in sizes.items())
    note = f"Parameters: {counts}. Ratings are of --judges {found['rater']}. 95% intervals over prompts and seeds."
    tables = [ReportTable("Models of several sizes", note, heading, rows), _tax(sizes)]
    prompts = {name: size["few_shot"] for name, size in sizes.items() if size["few_shot"]}
    if prompts:
        longest = max(len(one["scores"]) for one in prompts.values())
        rows = [[str(n + 1), *(_score_of(one, n) for one in prompts.values())] for n in range(longest)]
        note = "Mean scores of the replies to training messages; the best is marked. 95% intervals over the messages."
        tables.append(ReportTable("Few-shot prompts", note, ["prompt", *prompts], rows))
    return tables


def _score_of(few_shot: JsonObject, number: int) -> str:
    score = _write(few_shot["scores"][number], ".3f") if number < len(few_shot["scores"]) else ""
    return f"{score} (chosen)" if number == few_shot["chosen"] else score


def _tax(sizes: JsonObject) -> ReportTable:
    columns = {"gold_score": ".3f", "human_loss": ".3f", "human_bits_per_byte": ".3f", "in_context": ".1%"}
    rows = []
    for name, size in sizes.items():
        repairs = {model_label(row): row["repair"] or {} for row in size["tax"]}
        for model in size["models"]:
            if "in_context" not in model and "human_loss" not in model:  # best of n: the weights are SFT's
                continue
            repair = repairs.get(model_label(model), {})
            shares = [_share(repair, key) for key in ("human_loss", "in_context")]
            given_up = _write(repair.get("given_up"), ".3f")
            cells = [_write(model.get(key), style) for key, style in columns.items()]
            rows.append([name, model_label(model), *cells, *shares, given_up])
    guessing = [
        f"{name}: guessing has {size['chance']:.1%} in context" + (", and SFT is not above it, so no tax can show there"
        if size["at_chance"] else "") for name, size in sizes.items() if size["chance"] is not None
    ]  # fmt: skip
    note = (
        "Repaired: share of what PPO lost against SFT that PPO-ptx does not lose; no tax: PPO lost nothing "
        f"significant. Given up: gold score below PPO's. {'; '.join(guessing)}. 95% intervals over prompts (questions) "
        "and seeds."
    )
    heading = ["size", "model", "gold score", "loss on people's replies", "bits per byte", "accuracy in context",
               "loss repaired", "accuracy repaired", "gold score given up"]  # fmt: skip
    return ReportTable("Alignment tax", note, heading, rows)


def _share(repair: JsonObject, metric: str) -> str:
    if metric not in repair.get("repaired", {}):
        return ""
    cell = repair["repaired"][metric]
    return _write(cell, ".0%") if cell else "no tax"


# the tables in each file of a run's folder, in the order of the page
TABLES: dict[str, Callable[[JsonObject, str], list[ReportTable]]] = {
    "results.json": _results,
    "overoptimization.json": _overoptimization,
    "transfer.json": _transfer,
    "reward_bench.json": _reward_bench,
    "front.json": _front,
    "rounds.json": _rounds,
    SCALING_FILE: lambda scaling, _: [ReportTable(*table) for table in scaling_tables(scaling)],
    "agreement.json": _agreement,
    "few_shot.json": _few_shot,
    "instructgpt.json": lambda found, _: instructgpt_tables(found),
}
