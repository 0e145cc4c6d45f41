"""Disturb runs of every recipe, run the same command again, and compare with an undisturbed run.

    python tests/kill_runs.py --count 5
    python tests/kill_runs.py --count 20 --seed 7 --recipes ppo --disturbances kill

Four disturbances, each at random: SIGKILL; SIGTERM; a full disk; a damaged file of the newest checkpoint (or, without
checkpoints, of what the run goes on from). A run is disturbed and started again until it finishes; then the next run
starts, until there were --count disturbances. All weights, data and logged numbers must be equal to those of the
undisturbed run, byte for byte. A damaged run may end with one line instead. After SIGKILL and SIGTERM no process of the
run may be left. A full disk is a real one, of a small tmpfs, which only root can mount.

The table at the end counts how the disturbed runs ended: identical / in one line / wrong. After a wrong one the next
kind is tried; its folder is kept with --keep, and the exit code is 1. Results are kept in --results_dir, and a second
run goes on where the first one ended, also with a larger --count; what was wrong, or had another --seed, begins anew
(--again: all). The table of all recipes goes to docs/kills.md.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
DISTURBANCES = {"kill": "SIGKILL", "term": "SIGTERM", "disk": "full disk", "damage": "damaged file"}
RECIPES = ("sft", "reward", "ppo", "rloo", "pretrain", "finetune", "collect", "instructions", "tokenizer", "rounds",
           "star", "scaling")  # fmt: skip
ENDINGS = ("identical", "one line", "wrong")
# ACCELERATE_USE_CPU would let a recipe use all cores, whose threads wait for each other where others use them too
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
               "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}  # fmt: skip
PLAIN = ["--dtype", "float32"]
TRAINING = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "8", "--logging_steps", "1",
            "--bf16", "false", "--save_steps", "2", "--save_total_limit", "3", "--max_steps", "8", *PLAIN]  # fmt: skip
LORA = ["--lora_r", "4", "--learning_rate", "1e-2"]
PPO = [
    "--total_episodes", "32", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1",
    "--num_mini_batches", "2", "--num_ppo_epochs", "2", "--response_length", "8", "--bf16", "false", "--save_steps",
    "1", "--save_total_limit", "3", "--adaptive_kl_target", "1.0", "--value_function", "adapter", "--eval_strategy",
    "steps", "--eval_steps", "4", *PLAIN, *LORA,
]  # fmt: skip
NEW = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "4", "--block_size", "32"]
# parts of the names of logged numbers that no two runs have in common
TIMES = ("runtime", "per_second", "time/", "step_time", "seconds")
FULL = ("disk is full", "are free on that disk")  # the second before it trains: checkpoints have no room
WEIGHTS = (
    "*.safetensors",
    "*.jsonl",
    "tokenizer.json",
    "rounds.json",
    "scaling.json",
    "run.json",
    "trainer_state.json",
)


Act = Callable[[Any, Path, Path], bool]  # of a process, its run folder and its log: whether it was disturbed


class Case(NamedTuple):
    """A recipe, its flags without --output_dir, the seed of its disturbances, and the folder that it starts in."""

    script: str
    words: list[str]
    seed: int = 0
    cwd: str = str(ROOT)


# ---------------------------------------------------------------------------------------------- processes


def _alone(*arguments: Any) -> None:
    """A recipe in a process group of its own, to find its children by."""
    import recipe_process

    os.setpgid(0, 0)
    recipe_process._run(*arguments)


def start(case: Case, folder: Path, log: Path) -> Any:
    """The recipe, in a process of its own whose errors go to `log`."""
    import recipe_process

    environment = {**os.environ, **ENVIRONMENT}
    words = [str(ROOT / case.script), *case.words, "--output_dir", str(folder)]
    log.write_text("")
    context: Any = recipe_process.start(environment)
    process = context.Process(target=_alone, args=(words, environment, case.cwd, os.devnull, str(log)))
    process.start()
    return process


def alive(group: int) -> list[int]:
    """Processes of a group that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def complete(case: Case, folder: Path, log: Path) -> float:
    """Run to the end; returns the seconds it took."""
    began, process = time.monotonic(), start(case, folder, log)
    process.join()
    if process.exitcode:
        raise SystemExit(f"{folder}: ended with exit code {process.exitcode}.\n{log.read_text()[-3000:]}")
    return time.monotonic() - began


def finished(folder: Path) -> bool:
    file = folder / "run.json"
    return file.exists() and json.loads(file.read_text())["finished"]


def one_line(log: Path) -> bool:
    """Whether the process said what is wrong in one line, without a traceback."""
    said = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in said.splitlines() if line.startswith(("error: ", "Ended by ", "Interrupted."))]
    return len(lines) == 1 and "Traceback" not in said


# ---------------------------------------------------------------------------------------------- what must be equal


def timeless(content: Any) -> Any:
    """JSON without times, and without the entry of the log that is about one session."""
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if key != "eps" and not any(part in key for part in TIMES)}
        return {key: timeless(value) for key, value in kept.items() if key not in ("command", "total_flos")}
    if isinstance(content, list):
        return [timeless(value) for value in content if not (isinstance(value, dict) and "train_runtime" in value)]
    return content


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, by path: bytes of weights and data, JSON without times."""
    found: dict[str, Any] = {}
    for pattern in WEIGHTS:
        for file in folder.rglob(pattern):
            name = file.relative_to(folder).as_posix()
            if "checkpoint-" in name:
                continue
            found[name] = timeless(json.loads(file.read_text())) if file.suffix == ".json" else file.read_bytes()
            if file.name == "trainer_state.json":
                found[name] = found[name]["log_history"]
            if file.name == "run.json":
                found[name] = found[name].get("metrics")
    return found


def compare(case: Case, run: Path, expected: dict[str, Any]) -> None:
    """Raise SystemExit if a run left something else than the undisturbed one."""
    got = outcome(run)
    differ = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
    if differ:
        raise SystemExit(f"{case.script}: {run} differs from the undisturbed run in {differ}.")


# ---------------------------------------------------------------------------------------------- disturbances


def disturb(
    case: Case, folder: Path, expected: dict[str, Any], duration: float, count: int, act: Act
) -> Iterator[float]:
    """Start runs and disturb them with `act`, until it says `count` times that it did; the moments, in seconds."""
    generator, done, number = random.Random(f"{case.script} {folder.name} {case.seed}"), 0, 0
    folder.mkdir(exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")  # not on a disk that gets full
    while done < count:
        number += 1
        run, moments = folder / f"run-{number}", []
        while not finished(run):
            if done == count:
                complete(case, run, log)
                break
            moment = generator.uniform(0.05 * duration, 0.95 * duration)
            began, process = time.monotonic(), start(case, run, log)
            process.join(moment)
            if process.exitcode is None and act(process, run, log):
                done += 1
                moments.append(moment)
                continue
            process.join()
            if process.exitcode:
                raise SystemExit(f"{run}: after {moments} it ended by itself: {log.read_text()[-3000:]}")
            duration = min(duration, time.monotonic() - began)
        compare(case, run, expected)
        shutil.rmtree(run)
        yield from moments


def signalled(number: int) -> Act:
    def act(process: Any, _run: Path, log: Path) -> bool:
        group = process.pid
        os.kill(process.pid, number)
        process.join()
        if process.exitcode == 0:
            return False  # it had ended
        deadline = time.monotonic() + 60
        while left := alive(group):
            if time.monotonic() > deadline:
                raise SystemExit(f"after {signal.Signals(number).name} these processes still run: {left}")
            time.sleep(0.1)
        # SIGTERM while it still imports, before the recipe can answer, ends it without a word
        if number == signal.SIGTERM and log.read_text() and not one_line(log) and process.exitcode != -number:
            raise SystemExit(f"SIGTERM: {log.read_text()[-3000:]}")
        return True

    return act


def full_disk(process: Any, run: Path, log: Path) -> bool:
    """Fill the disk of a run, and empty it again once the run has ended."""
    filler = run.parent / "filler"
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(descriptor, b"\0" * 4096)
    os.close(descriptor)
    process.join()
    filler.unlink()
    if process.exitcode == 0:
        return False  # it had written everything
    if not one_line(log) or not any(said in log.read_text() for said in FULL):
        raise SystemExit(f"full disk: {log.read_text()[-3000:]}")
    return True


def damage(case: Case, whole: Path, folder: Path, expected: dict[str, Any], count: int) -> Iterator[str]:
    """Damage copies of a finished run that say they are not finished, and run them; what happened each time."""
    generator, log = random.Random(f"{case.script} {folder.name} {case.seed}"), folder / "log"
    folder.mkdir()
    for number in range(count):
        run = folder / f"damaged-{number}"
        shutil.copytree(whole, run)
        places = sorted(path.parent for path in run.rglob("run.json") if any(path.parent.glob("checkpoint-*")))
        place = generator.choice(places or [run])
        for owner in {place, run}:
            state = json.loads((owner / "run.json").read_text())
            (owner / "run.json").write_text(json.dumps({**state, "finished": False}))
        newest = max(place.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), default=None)
        files = sorted(path for path in (newest or place).iterdir() if path.is_file() and path.suffix != ".md")
        if newest is None:
            files = [path for path in files if path.name in ("run.json", "tasks.jsonl")]
        file = generator.choice(files)
        how = generator.choice(["flipped", "cut", "removed"] if newest else ["flipped", "cut"])
        content = file.read_bytes()
        middle = generator.randrange(len(content))
        if file.name == "tasks.jsonl":
            how = "cut"  # every text could be a reply
        if how == "flipped":
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :])
        elif how == "cut":
            file.write_bytes(content[:middle])
        else:
            file.unlink()
        process = start(case, run, log)
        process.join()
        if process.exitcode == 0:
            compare(case, run, expected)
        elif process.exitcode != 2 or not one_line(log):
            raise SystemExit(f"{file} {how}: {log.read_text()[-3000:]}")
        yield f"{file.relative_to(run)} {how}: {'identical' if process.exitcode == 0 else 'one line'}"
        shutil.rmtree(run)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 64 MB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def endings(
    name: str, kind: str, case: Case, folder: Path, expected: dict[str, Any], duration: float, count: int
) -> Iterator[str]:
    """Disturb a recipe `count` times in one way; how each disturbance ended: identical, one line, or wrong."""
    try:
        with contextlib.ExitStack() as stack:
            if kind == "damage":
                said: Iterator[Any] = damage(case, folder / "whole", folder / kind, expected, count)
            elif kind == "disk":
                disk = stack.enter_context(small_disk(folder / kind))
                said = disturb(case, disk, expected, duration, count, full_disk)
            else:
                number = signal.SIGKILL if kind == "kill" else signal.SIGTERM
                said = disturb(case, folder / kind, expected, duration, count, signalled(number))
            for what in said:
                line = what if isinstance(what, str) else f"after {what:.1f} s"
                print(f"{name} {kind}: {line}", flush=True)
                yield "one line" if line.endswith("one line") else "identical"
    except SystemExit as fault:
        print(f"{name} {kind}: WRONG: {fault}", flush=True)
        yield "wrong"


def try_recipe(
    name: str, case: Case, folder: Path, count: int, done: dict[str, int]
) -> Iterator[tuple[str, Counter[str]]]:
    """Disturb a recipe in each way, until there were `count` with those that are `done`; how the new ones ended."""
    if min(done.values()) >= count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    duration = complete(case, folder / "whole", folder / "log")
    expected = outcome(folder / "whole")
    print(f"{name}: {duration:.1f} s undisturbed", flush=True)
    for kind, before in done.items():
        if before < count:
            others = case._replace(seed=1000 * case.seed + before)  # than those before
            yield kind, Counter(endings(name, kind, others, folder, expected, duration, count - before))


# ---------------------------------------------------------------------------------------------- results

WAYS = """- **SIGKILL** and **SIGTERM** go to the recipe's process alone. No process that it started may be left.
- **Full disk:** a tmpfs of 64 MB is filled. The run must end in one line that says so. Then there is room again.
- **Damaged file:** a byte of a file in the newest checkpoint is changed, or the file is cut or removed. Where there are
  no checkpoints, it is a file that the run goes on from.
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """How some disturbances ended, as it is kept in a file."""

    ended: dict[str, int]  # by ENDINGS
    seed: int
    time: str  # when they had ended
    code: str  # as `code_digest` gives it
    versions: str


Results = dict[str, dict[str, list[Result]]]  # by recipe and kind, oldest first


def code_digest() -> str:
    """Of the project's code, without tests."""
    sha = hashlib.sha256()
    for file in sorted(file for name in ("rlhf", "recipes", "eval") for file in (ROOT / name).rglob("*.py")):
        sha.update(file.read_bytes())
    return sha.hexdigest()[:12]


def versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "trl", "peft"))


def read_results(folder: Path) -> Results:
    found = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    return {
        recipe: {kind: [Result(**result) for result in results] for kind, results in kinds.items()}
        for recipe, kinds in found.items()
    }


def keep_results(folder: Path, recipe: str, kind: str, results: list[Result]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = {**read_results(folder).get(recipe, {}), kind: results}
    content = {kind: [dataclasses.asdict(result) for result in results] for kind, results in kept.items()}
    (folder / f"{recipe}.json").write_text(json.dumps(content, indent=2))


def counted(results: list[Result]) -> Counter[str]:
    return sum((Counter(result.ended) for result in results), Counter[str]())


def still_good(results: list[Result], seed: int) -> list[Result]:
    """Those to go on from: none if one was wrong."""
    same = [result for result in results if result.seed == seed]
    return [] if counted(same)["wrong"] else same


def table(results: Results, kinds: list[str]) -> str:
    """Identical / one line / wrong, by recipe and kind."""
    lines = [f"{'':>13}" + "".join(f"{kind:>12}" for kind in kinds)]
    for recipe, of_kinds in results.items():
        counts = [counted(of_kinds[kind]) for kind in kinds]
        cells = ["/".join(str(count[how]) for how in ENDINGS) for count in counts]
        lines.append(f"{recipe:>13}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join([*lines, " / ".join(ENDINGS)])


def page(results: Results, recipes: Sequence[str]) -> str:
    """The page docs/kills.md.

    Args:
        results: some of the recipes, and kinds, may be missing.
        recipes: all that there are, in order.
    """
    every = [result for kinds in results.values() for of_kind in kinds.values() for result in of_kind]
    every.sort(key=lambda result: result.time)
    facts = [(result.time[:10], result.versions, str(result.seed), result.code) for result in every]
    dates, with_versions, seeds, codes = (list(dict.fromkeys(fact)) for fact in zip(*facts, strict=True))
    counts = counted(every)
    said = (
        f"Written by `make kills` (tests/kill_runs.py) with {', and with '.join(with_versions)}, on "
        f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, seed {' and '.join(seeds)}. Small runs of "
        f"{len(results)} of {len(recipes)} recipes were disturbed {counts.total()} times, each at a random moment, and "
        "continued with the same command: "
        + ", ".join(f"{counts[how]} {how}" for how in ENDINGS)
        + ". *Identical*: all weights, data and logged numbers are those of an undisturbed run, byte for byte. *One "
        "line*: the run refused in one line to go on from what was damaged. *Wrong*: anything else."
    )
    text = io.StringIO()
    print("# Disturbed runs\n", file=text)
    print(textwrap.fill(said, 120, break_on_hyphens=False), WAYS, sep="\n\n", file=text)
    print("| recipe | " + " | ".join(DISTURBANCES.values()) + " |", file=text)
    print("|-|" + "-|" * len(DISTURBANCES), file=text)
    for recipe in recipes:
        cells = [_cell(results.get(recipe, {}).get(kind, []), codes[-1]) for kind in DISTURBANCES]
        print(f"| {recipe} | " + " | ".join(cells) + " |", file=text)
    if len(codes) > 1:
        print("\n\\* all or in part with earlier code of the project than the others", file=text)
    return text.getvalue()


def _cell(results: list[Result], code: str) -> str:
    counts = counted(results)
    said = ", ".join(f"{counts[how]} {how}" for how in ENDINGS if counts[how]) or "not tried"
    return said if all(result.code == code for result in results) else f"{said} \\*"


def write_page(folder: Path) -> None:
    (ROOT / "docs" / "kills.md").write_text(page(read_results(folder), RECIPES), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- the recipes


def words_of(**flags: Any) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def config(file: Path, words: list[str], **more: Any) -> str:
    """A YAML file of flags given as words."""
    flags = dict(zip((word[2:] for word in words[::2]), map(yaml.safe_load, words[1::2]), strict=True))
    file.write_text(yaml.safe_dump({**flags, **more}))
    return str(file)


def make_cases(folder: Path, tiny: str, sft: str, guesser: str, tokenizer: str) -> dict[str, Case]:
    """Every recipe that writes a run folder, small.

    Args:
        folder: gets the data.
        tiny, sft, guesser, tokenizer: a model, an adapter of it, a model that answers problems, and a tokenizer.
    """
    from conftest import assistant, user

    words = ["tea", "rain", "the cat", "music", "a long walk", "pizza", "snow", "chess"]
    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": user(f"Do you like {w}?"), "completion": assistant(f"I love {w}!")} for w in words * 5],
        "pairs": [{"prompt": user(f"What about {w}?"), "chosen": assistant("Great, love it"),
                   "rejected": assistant("Awful, hate it")} for w in words * 5],
        "prompts": [{"prompt": user(f"Tell me about {w}.")} for w in words * 2],
        "text": [{"text": f"I like {w} and {v}, but not {v} and {w}. " * 4} for w in words for v in words],
        "labels": [{"text": f"I {'love' if number % 2 else 'hate'} {w}", "label": ["bad", "good"][number % 2]}
                   for w in words for number in range(6)],
        "problems": [{"prompt": f"What is in the red box number {n}?", "answer": str(n % 2 + 1)} for n in range(24)],
    }  # fmt: skip
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    on = lambda name, model=tiny: words_of(model_name_or_path=model, dataset_name=files[name])  # noqa: E731
    sample = [*PLAIN, "--max_new_tokens", "6"]
    text = words_of(dataset_name=files["text"], tokenizer_name=tokenizer)
    small = [word for word in TRAINING if word not in PLAIN]
    rounds = words_of(
        collect_config=config(folder / "collect.yaml", sample, labeler="reward", num_generations=3),
        reward_config=config(folder / "reward.yaml", [*TRAINING, *LORA], use_peft=True),
        ppo_config=config(folder / "ppo.yaml", PPO, use_peft=True),
        compare_config=config(folder / "compare.yaml", sample, best_of_n=1),
    )
    star = config(folder / "star.yaml", [*TRAINING, *LORA, "--lora_target_modules", "all-linear"], use_peft=True)
    point = config(folder / "point.yaml", [*small, "--block_size", "32"])
    sweep = ["--hidden_sizes", "16", "16", "32", "--num_hidden_layers", "1", "2", "1", "--token_budgets", "500", "900",
             "1300", "--forecast_hidden_size", "32", "--forecast_num_hidden_layers", "2", "--lstm_num_hidden_layers",
             "1", "--max_eval_tokens", "400", "--max_workers", "2"]  # fmt: skip
    best = ["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "2"]
    return {
        "sft": Case("recipes/sft.py", [*on("sft"), *TRAINING, *LORA, *best]),
        "reward": Case("recipes/reward.py", [*on("pairs"), *TRAINING, *LORA]),
        "ppo": Case("recipes/ppo.py", [*on("prompts", sft), *PPO]),
        "rloo": Case("recipes/rloo.py", [*on("prompts", sft), *TRAINING, *LORA, "--gradient_accumulation_steps", "1",
                     "--num_generations", "4", "--max_completion_length", "6"]),
        "pretrain": Case("recipes/pretrain.py", [*text, *NEW, *small]),
        "finetune": Case("recipes/finetune.py", [*on("labels"), *TRAINING, *LORA]),
        "collect": Case("recipes/collect.py", [*on("prompts", sft), *sample, "--labeler", "simulated"]),
        "instructions": Case("recipes/instructions.py", ["--max_examples_per_task", "40",
                             "--tasks", "sort_numbers", "subtraction"]),
        "tokenizer": Case("recipes/tokenizer.py", words_of(dataset_name=files["text"], vocab_size=400, extra_ids=0)),
        "rounds": Case("recipes/rounds.py", [*on("sft", sft), *rounds, "--rounds", "1"]),
        "star": Case("recipes/star.py", [*on("problems", guesser), *sample, "--num_fewshot", "0", "--temperature", "1",
                     "--rounds", "2", "--sft_config", star]),
        "scaling": Case("recipes/scaling.py", [*text, *sweep, "--base_config", point]),
    }  # fmt: skip


def main() -> None:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from conftest import make_adapter, save_guesser, save_tiny
    from transformers import AutoTokenizer

    from rlhf.pretraining.tokenization import train_tokenizer
    from rlhf.starter.model import starter_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5, help="disturbances of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the damages")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, help="these alone; docs/ is left as it is")
    parser.add_argument("--disturbances", nargs="+", default=list(DISTURBANCES), choices=DISTURBANCES)
    parser.add_argument("--again", action="store_true", help="try all anew")
    parser.add_argument("--keep", help="a new folder for everything written; default: a temporary one")
    parser.add_argument("--results_dir", type=Path, default=ROOT / "outputs" / "kills")
    parser.add_argument("--page", action="store_true", help="only write docs/kills.md, from what --results_dir has")
    arguments = parser.parse_args()
    if arguments.page:
        write_page(arguments.results_dir)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(arguments.keep or name)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(starter_model())
        tiny = save_tiny(folder / "tiny", tokenizer)
        sft = make_adapter(tiny, tokenizer, folder / "sft")
        guesser = save_guesser(folder / "guesser", tokenizer)
        train_tokenizer(["I like tea and the cat, but not snow and rain."], 300, extra_ids=0).save_pretrained(
            folder / "tokenizer"
        )
        cases = make_cases(folder, tiny, sft, guesser, str(folder / "tokenizer"))
        recipes = arguments.recipes or RECIPES
        for recipe in recipes:
            kept = {} if arguments.again else read_results(arguments.results_dir).get(recipe, {})
            good = {kind: still_good(kept.get(kind, []), arguments.seed) for kind in arguments.disturbances}
            done = {kind: counted(results).total() for kind, results in good.items()}
            case = cases[recipe]._replace(seed=arguments.seed)
            for kind, ended in try_recipe(recipe, case, folder / "runs" / recipe, arguments.count, done):
                now = datetime.datetime.now().isoformat(timespec="seconds")
                result = Result(dict(ended), arguments.seed, now, code_digest(), versions())
                keep_results(arguments.results_dir, recipe, kind, [*good[kind], result])
    results = read_results(arguments.results_dir)
    print(table({recipe: results[recipe] for recipe in recipes}, arguments.disturbances))
    if not arguments.recipes:
        write_page(arguments.results_dir)
    if any(counted(of_kind)["wrong"] for recipe in recipes for of_kind in results[recipe].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
