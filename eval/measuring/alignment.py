"""Models of one size before and after alignment: what they win, and what they pay for it.

The alignment tax is what a model gets worse at while PPO raises its reward (InstructGPT, https://arxiv.org/abs/2203.02155,
section 4.2): here the loss on people's replies, and accuracy on tasks in context. PPO-ptx mixes texts in to repair it.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.measuring.comparison import VALUES_FILE
from eval.stats.intervals import Interval, JsonObject, over_rows_and_seeds, share_repaired
from rlhf.data.paths import behind_name
from rlhf.errors import InputError
from rlhf.run.files import content_of, read_json, read_jsonl
from rlhf.run.folders import Run, read_run

IN_CONTEXT = "in_context"  # mean accuracy over the tasks
# whether more of it is worse
TAXED = {"human_loss": True, "human_bits_per_byte": True, IN_CONTEXT: False}


class Kind(NamedTuple):
    """A way of making a model: `base`, `prompted`, `sft`, `ppo`, `ppo_ptx` or `best_of_<n>`."""

    name: str
    ptx_coef: float = 0.0


SFT, PPO = Kind("sft"), Kind("ppo")


class SeedTable(NamedTuple):
    """Scores of the models of one kind, which differ in their seeds. S seeds, R prompts or questions."""

    scores: np.ndarray  # (S, R) float64
    weights: np.ndarray  # (S, R) float64; 0 where a model has no score

    def mean(self, seed: int) -> Interval:
        return over_rows_and_seeds(self.scores, self.weights, seed).cell


class Size(NamedTuple):
    """What was measured of all models of one size."""

    name: str
    models: dict[Kind, dict[int, str]]  # by kind and seed: the model's name in the comparison
    scores: dict[tuple[str, str], SeedTable]  # by model and metric; S is 1
    prompts: list
    chance: float | None  # accuracy in context of guessing; None without in-context runs
    few_shot: JsonObject | None  # content of few_shot.json

    def of(self, kind: Kind, metric: str, seeds: list[int] | None = None) -> SeedTable | None:
        """The scores of a kind's models, or of those with some seeds; None if one has none."""
        names = [name for seed, name in sorted(self.models[kind].items()) if seeds is None or seed in seeds]
        found = [self.scores[name, metric] for name in names if (name, metric) in self.scores]
        if not found or len(found) < len(names):
            return None
        return SeedTable(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    @property
    def ptx_coefs(self) -> list[float]:
        return sorted(kind.ptx_coef for kind in self.models if kind.name == "ppo_ptx")


def read_size(name: str, comparison: Path) -> Size:
    """Read a finished comparison, the in-context runs of its models and their few-shot prompts.

    Args:
        comparison: folder of a run of eval/compare.py; beside it lies `in-context`, with a run of eval/in_context.py
            for each model, under the model's name.

    Raises:
        InputError: if it is not finished, or `sft` or a model of PPO is missing.
    """
    where = f"--comparisons {name}={comparison}"
    run = read_run(comparison)
    if run is None or run["recipe"] != "compare" or not run["finished"]:
        raise InputError(f"{where}: no finished run of eval/compare.py.")
    if not (comparison / VALUES_FILE).exists():
        raise InputError(f"{where}: its {VALUES_FILE} is missing. Compare again in another folder.")
    samples = read_jsonl(comparison / "samples.jsonl")
    rows = read_jsonl(comparison / VALUES_FILE, model=str, metric=str, prompts=list, values=list, weights=list)
    with content_of(comparison / VALUES_FILE):
        scores = {(row["model"], row["metric"]): _over_prompts(row, len(samples)) for row in rows}
    models = _kinds(run, list(dict.fromkeys(row["model"] for row in rows)), where)
    for needed in (SFT, PPO):
        if needed not in models:
            raise InputError(f"{where}: has no model of {needed.name}. It needs the models of recipes/instructgpt.sh.")
    in_context, chance = _read_in_context(comparison.parent / "in-context", models)
    few_shot = next((behind_name(word) for word in run["settings"].get("few_shot", [])), None)
    found = read_json(few_shot.with_name("few_shot.json"), scores=list, chosen=int) if few_shot else None
    return Size(name, models, scores | in_context, [row["prompt"] for row in samples], chance, found)


def _over_prompts(row: JsonObject, count: int) -> SeedTable:
    """A row of values.jsonl as scores of all prompts."""
    scores, weights = np.zeros((1, count)), np.zeros((1, count))
    weights[0, row["prompts"]] = row["weights"]
    scores[0, row["prompts"]] = np.divide(row["values"], row["weights"])
    return SeedTable(scores, weights)


def _kinds(run: Run, names: list[str], where: str) -> dict[Kind, dict[int, str]]:
    """The models of a comparison by kind and seed.

    Args:
        names: of the models in its results.

    Raises:
        InputError: if another recipe made one, or two differ in nothing.
    """
    folders = dict(word.partition("=")[::2] for word in run["settings"]["models"])
    prompted = {word.partition("=")[0] for word in run["settings"].get("few_shot", [])}
    models: dict[Kind, dict[int, str]] = {}
    for name in names:
        made = read_run(Path(folders[name]).expanduser()) if name in folders else None
        seed = 0 if made is None else made["settings"].get("seed", 42)  # transformers' default
        if made is not None and made["recipe"] not in ("pretrain", "sft", "ppo"):
            raise InputError(f"{where}: {name} is made by {made['recipe']}.py. Compare models of pretrain.py, sft.py "
                             "and ppo.py.")  # fmt: skip
        kind = Kind(name if name not in folders else "prompted" if name in prompted else "base")
        if made is not None and made["recipe"] in ("sft", "ppo") and name not in prompted:
            coef = float(made["settings"].get("ptx_coef", 0.0))
            kind = Kind("ppo_ptx" if coef else made["recipe"], coef)
        if seed in models.setdefault(kind, {}):
            raise InputError(f"{where}: {name} is made as {models[kind][seed]} is, with the same seed. Leave one out.")
        models[kind][seed] = name
    return models


def _read_in_context(
    folder: Path, models: dict[Kind, dict[int, str]]
) -> tuple[dict[tuple[str, str], SeedTable], float | None]:
    """Each model's answers to all questions, and the accuracy of guessing. Every task counts as much as another.

    Raises:
        InputError: if two models were asked different questions.
    """
    found, asked, chance = {}, None, None
    for name in [name for by_seed in models.values() for name in by_seed.values()]:
        results = read_json(folder / name / "results.json", num_fewshot=list, chance=dict)
        if results is None:
            continue
        rows = read_jsonl(folder / name / f"answers-{max(results['num_fewshot'])}.jsonl", task=str, doc=dict)
        questions = [(row["task"], row["doc"]) for row in rows]
        asked = questions if asked is None else asked
        if questions != asked:
            raise InputError(f"{folder / name}: was asked other questions than the other models. Ask all the same.")
        tasks = [row["task"] for row in rows]
        weights = np.array([[1 / tasks.count(task) for task in tasks]])
        found[name, IN_CONTEXT] = SeedTable(np.array([[float(row["score"]) for row in rows]]), weights)
        chance = float(np.mean(list(results["chance"].values()))) if results["chance"] else None
    return found, chance


def wins(size: Size, opponent: SeedTable) -> dict[Kind, SeedTable]:
    """On which prompts the models of each kind have a higher gold score than an opponent; a tie counts half.

    Args:
        opponent: gold scores (1, R) of the same prompts.
    """
    found = {kind: size.of(kind, "gold_score") for kind in size.models}
    return {
        kind: SeedTable(0.5 + 0.5 * np.sign(scored.scores - opponent.scores), scored.weights)
        for kind, scored in found.items()
        if scored is not None
    }


def tax_of(size: Size, kind: Kind, seed: int) -> dict[str, Interval]:
    """How much worse than SFT a kind of model is, by metric of TAXED, paired by prompt or question.

    Args:
        seed: of the bootstrap.
    """
    taxes = {}
    for metric, more_is_worse in TAXED.items():
        sft, own = size.of(SFT, metric), size.of(kind, metric)
        if sft is not None and own is not None:
            worse = own.scores - sft.scores if more_is_worse else sft.scores - own.scores
            taxes[metric] = SeedTable(worse, own.weights).mean(seed)
    return taxes


class Repair(NamedTuple):
    """What PPO-ptx changes, beside PPO of the same seeds."""

    repaired: dict[str, Interval | None]  # by metric: share of PPO's tax that is gone; None: PPO pays no clear tax
    given_up: Interval  # gold score below PPO's
    given_up_share: Interval | None  # that, as a share of PPO's gain over SFT; None: PPO gains nothing clear

    def to_json(self) -> JsonObject:
        return {
            "repaired": {metric: cell and cell.to_json() for metric, cell in self.repaired.items()},
            "given_up": self.given_up.to_json(),
            "given_up_share": self.given_up_share and self.given_up_share.to_json(),
        }


def repair_of(size: Size, mixed: Kind, seed: int) -> Repair | None:
    """What a kind of PPO-ptx repairs, and what it gives up; None if no PPO has one of its seeds.

    Differences are paired by prompt or question, and by seed.

    Args:
        seed: of the bootstrap.
    """
    seeds = sorted({*size.models[mixed]} & {*size.models[PPO]})
    repaired: dict[str, Interval | None] = {}
    given_up = share = None
    for metric, more_is_worse in {**TAXED, "gold_score": True}.items():  # a higher gold score is what is given up
        sft, ppo, own = size.of(SFT, metric), size.of(PPO, metric, seeds), size.of(mixed, metric, seeds)
        if not seeds or sft is None or ppo is None or own is None:
            continue
        sign = 1 if more_is_worse else -1
        risen, undone = sign * (ppo.scores - sft.scores), sign * (ppo.scores - own.scores)
        if metric == "gold_score":
            given_up = SeedTable(undone, ppo.weights).mean(seed)
            share = share_repaired(risen, undone, ppo.weights, seed)
        else:
            repaired[metric] = share_repaired(risen, undone, ppo.weights, seed)
    return None if given_up is None else Repair(repaired, given_up, share)
