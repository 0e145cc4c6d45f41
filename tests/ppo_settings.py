"""PPO on the demo's models under many settings and seeds: value functions, rates, reward models, options.

    make settings                                        # all of them, after make demo; hours
    python tests/ppo_settings.py --demo outputs/demo --only head reward --seeds 1 2 3
    python tests/ppo_settings.py --demo outputs/demo --keep   # writes docs/results, from what has finished

Each run is the demo's PPO with the flags of its setting. Held-out prompts are scored after every second update, by the
reward model and by the starter's scorer, the gold score. Finished runs are not run again. Two settings are compared at
equal KL: the gold score of a run at a KL is interpolated between its evaluations. Intervals are Student's t over seeds.
"""

import argparse
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy.stats import t

ROOT = Path(__file__).resolve().parents[1]
GOLD = "eval_held_out/starter_reward"
EQUAL_KL = 3.0  # nats per completion at which settings are compared; every default run passes it
COLLAPSE = 0.1  # a run whose last gold score is this far below its best one has collapsed


class Setting(NamedTuple):
    """Flags beside those of the demo, and how many comparisons the reward model has learned from (None: the demo's)."""

    flags: str = ""
    comparisons: int | None = None


DEFAULT = "default"
TABLES: dict[str, dict[str, Setting]] = {
    "value_functions": {
        "head": Setting("--value_function head --total_episodes 640"),
        "reward": Setting("--value_function reward --total_episodes 640"),
        "reward, 6 updates": Setting("--value_function reward --total_episodes 384"),
        "none": Setting("--value_function head --vf_coef 0 --lam 1 --total_episodes 640"),  # a head that stays 0
    },
    "robustness": {
        DEFAULT: Setting(),
        "a third of the learning rate": Setting("--learning_rate 1e-4"),
        "three times the learning rate": Setting("--learning_rate 9e-4"),
        "200 comparisons": Setting(comparisons=200),
        "800 comparisons": Setting(comparisons=800),
        "3,000 comparisons": Setting(comparisons=3000),
    },
}


# ------------------------------------------------------------------------------------------------ runs


def recipe(name: str, *flags: Any) -> None:
    """Run a recipe to its end; a finished one says so and ends at once.

    Raises:
        SystemExit: if it fails.
    """
    done = subprocess.run([sys.executable, f"recipes/{name}.py", *map(str, flags)], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"error: recipes/{name}.py failed.")


def is_finished(folder: Path) -> bool:
    """Whether a recipe has finished in a folder."""
    file = folder / "run.json"
    return file.exists() and json.loads(file.read_text(encoding="utf-8"))["finished"]


def reward_model(demo: Path, output: Path, comparisons: int | None) -> Path:
    """The demo's reward model, or one that learns from so many comparisons of four replies per prompt."""
    if comparisons is None:
        return demo / "reward"
    pairs, part = output / "preferences", output / f"preferences-{comparisons}"
    if not is_finished(pairs):
        recipe("collect", "--model_name_or_path", demo / "sft", "--num_generations", 4, "--output_dir", pairs)
    part.mkdir(exist_ok=True)
    for split, most in (("train", comparisons), ("test", None)):
        rows = (pairs / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        random.Random(0).shuffle(rows)
        (part / f"{split}.jsonl").write_text("".join(rows[:most]), encoding="utf-8")
    found = output / f"reward-{comparisons}"
    if not is_finished(found):
        recipe("reward", "--model_name_or_path", demo / "sft", "--dataset_name", part, "--output_dir", found)
    return found


def train(demo: Path, output: Path, name: str, setting: Setting, seed: int) -> None:
    """One run of a setting."""
    recipe(
        "ppo", "--model_name_or_path", demo / "sft",
        "--reward_model_path", reward_model(demo, output, setting.comparisons), "--eval_strategy", "steps",
        "--eval_steps", 2, "--eval_reward_funcs", "starter", "--save_strategy", "no", "--num_sample_generations", 0,
        "--seed", seed, *setting.flags.split(), "--output_dir", run_folder(output, name, seed),
    )  # fmt: skip


def run_folder(output: Path, name: str, seed: int) -> Path:
    """Where a run is."""
    return output / name.replace(",", "").replace(" ", "-") / f"seed-{seed}"


# ------------------------------------------------------------------------------------------------ numbers


class Curve(NamedTuple):
    """What one run has measured."""

    kl: list[float]  # at each evaluation, nats per completion
    gold: list[float]  # at each evaluation
    explained: list[float]  # explained variance of each update

    @classmethod
    def of(cls, folder: Path) -> "Curve":
        history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        evaluations = [entry for entry in history if GOLD in entry]
        explained = [entry["val/explained_variance"] for entry in history if "val/explained_variance" in entry]
        return cls([entry["eval_kl"] for entry in evaluations], [entry[GOLD] for entry in evaluations], explained)

    def gold_at(self, kl: float) -> float:
        """The gold score where the run first reaches a KL; NaN if it never does, or begins above it."""
        for number in range(1, len(self.kl)):
            below, above = self.kl[number - 1], self.kl[number]
            if below <= kl <= above and above > below:
                share = (kl - below) / (above - below)
                return self.gold[number - 1] + share * (self.gold[number] - self.gold[number - 1])
        return math.nan

    @property
    def collapsed(self) -> bool:
        return max(self.gold) - self.gold[-1] > COLLAPSE


def over_seeds(values: list[float]) -> dict[str, float] | None:
    """Mean with Student's 95% interval; None without a value. One value has no interval."""
    values = [value for value in values if not math.isnan(value)]
    if len(values) < 2:
        return {"mean": values[0]} if values else None
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return {"mean": fmean(values), "low": fmean(values) - half, "high": fmean(values) + half}


def row(name: str, curves: dict[int, Curve], reference: dict[int, Curve]) -> dict[str, Any]:
    """One line of a table, from the curve of each seed.

    Args:
        reference: the curves of the setting that this one is compared with, by the same seeds.
    """
    at_equal_kl = {seed: curve.gold_at(EQUAL_KL) for seed, curve in curves.items()}
    differences = [at_equal_kl[seed] - reference[seed].gold_at(EQUAL_KL) for seed in curves if seed in reference]
    return {
        "setting": name,
        "seeds": ", ".join(map(str, sorted(curves))),
        "explained_variance": over_seeds([fmean(curve.explained[1:]) for curve in curves.values()]),
        "gold": over_seeds([curve.gold[-1] for curve in curves.values()]),
        "lowest": min(curve.gold[-1] for curve in curves.values()),
        "kl": over_seeds([curve.kl[-1] for curve in curves.values()]),
        "gold_at_equal_kl": over_seeds(list(at_equal_kl.values())),  # of the runs that reach it
        "difference": None if curves is reference else over_seeds(differences),
        "collapsed": f"{sum(curve.collapsed for curve in curves.values())} of {len(curves)}",
    }


COLUMNS = {
    "setting": ["setting", ""], "seeds": ["seeds", ""], "explained variance": ["explained_variance", ".2f"],
    "gold score at the end": ["gold", ".3f"], "lowest": ["lowest", ".3f"], "KL at the end": ["kl", ".1f"],
    f"gold score at a KL of {EQUAL_KL:g}": ["gold_at_equal_kl", ".3f"],
    "minus the first row's": ["difference", "+.3f"], "collapsed": ["collapsed", ""],
}  # fmt: skip


def rows_of(output: Path, table: str) -> list[dict[str, Any]]:
    """The lines of a table, of the runs that have finished."""
    found: dict[str, dict[int, Curve]] = {}
    for name in TABLES[table]:
        folders = [folder for folder in run_folder(output, name, 0).parent.glob("seed-*") if is_finished(folder)]
        curves = {int(folder.name.removeprefix("seed-")): Curve.of(folder) for folder in folders}
        found |= {name: curves} if curves else {}
    reference = next(iter(found.values()), {})
    return [row(name, curves, reference) for name, curves in found.items()]


def write_results(name: str, made_by: str, columns: dict[str, list[str]], rows: list[dict[str, Any]]) -> None:
    """Write docs/results/<name>.json, of which docs/tables.py makes a table."""
    sys.path.append(str(ROOT / "docs"))
    from tables import machine

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    about = {"source": f"{made_by} at commit {commit}", "machine": machine(), "commands": [made_by]}
    content = {**about, "columns": columns, "rows": rows}
    file = ROOT / "docs" / "results" / f"{name}.json"
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"Written: {file.relative_to(ROOT)}")


def main() -> None:
    names = [name for table in TABLES.values() for name in table]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "outputs" / "demo", help="a finished make demo")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "settings")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SETTING", help=", ".join(names))
    parser.add_argument("--seeds", type=int, nargs="+", help=f"1 to 3, and to 10 of {DEFAULT}, if not given")
    parser.add_argument("--keep", action="store_true", help="run nothing; write docs/results")
    arguments = parser.parse_args()
    if arguments.keep:
        for table in TABLES:
            if rows := rows_of(arguments.output_dir, table):
                write_results(table, "make settings", COLUMNS, rows)
        return
    if not is_finished(arguments.demo / "reward"):
        parser.error(f"--demo {arguments.demo}: has no finished reward model. Run make demo first.")
    for table, settings in TABLES.items():
        for name, setting in settings.items():
            if name in arguments.only:
                for seed in arguments.seeds or (range(1, 11) if name == DEFAULT else range(1, 4)):
                    train(arguments.demo.resolve(), arguments.output_dir.resolve(), name, setting, seed)
        for line in rows_of(arguments.output_dir, table):
            print(line)


if __name__ == "__main__":
    main()
