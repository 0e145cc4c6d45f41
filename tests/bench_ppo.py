"""Time and memory of an update, ours beside stock TRL 1.12, in one run: `make bench`.

Both train a LoRA adapter of the starter on the starter's prompts: batch 32, 48 new tokens, two PPO epochs of two
minibatches as in recipes/configs/ppo.yaml (--num_ppo_epochs changes it), microbatches of 8, the same reward adapter.
TRL's class gets torch's attention, as everywhere. Two processes take turns, one update each, so that other load of the
machine slows both. The first update is a warm-up and doesn't count. At the end the ratios are compared with those of
benchmarks/ppo.json, which --keep (`make bench KEEP=1`) replaces.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_file import FOLDER, compare, measured, read_benchmark, write_benchmark

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "num_mini_batches": 2, "num_ppo_epochs": 2,
    "response_length": 48, "temperature": 1.0, "learning_rate": 1e-4, "stop_token": "eos", "logging_steps": 1,
    "num_sample_generations": 0, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    "activation_checkpointing": False, "local_rollout_forward_batch_size": 32,
}  # fmt: skip


# --------------------------------------------------------------------------------------------- one of the two


def worker(which: str, updates: int) -> tuple[Any, Callable[[], dict[str, float]]]:
    """The trainer, ready to run, and a function that gives the seconds of each phase of the last update."""
    from trl import ModelConfig

    from rlhf.data.rows import prompt_rows
    from rlhf.models.sources import resolve
    from rlhf.models.tokenizers import load_tokenizer
    from rlhf.run.processes import cpu_has_bfloat16
    from rlhf.starter.conversations import starter_dataset

    has_bf16 = cpu_has_bfloat16()
    lora = ModelConfig(
        dtype="bfloat16" if has_bf16 else "float32", use_peft=True, lora_r=16, lora_alpha=32, lora_dropout=0.0,
        lora_target_modules=["all-linear"], attn_implementation="sdpa" if which == "trl" else None,
    )  # fmt: skip
    tokenizer = load_tokenizer(resolve("starter"))
    rows = prompt_rows(starter_dataset("ppo")["train"], "starter", tokenizer, 48, None).select(range(32 * updates))
    return trainer_of(which, "starter", lora, rows, {**SETTINGS, "bf16": has_bf16, "total_episodes": 32 * updates})


def trainer_of(
    which: str, model: str, model_args: Any, rows: Any, settings: dict[str, Any]
) -> tuple[Any, Callable[[], dict[str, float]]]:
    """A trainer of ours or of TRL, ready to run, and a function that gives the seconds of each phase of an update.

    With LoRA, ours gets a reward adapter of the same base, which the value function reads by default; else both get a
    reward model and a value model.

    Args:
        which: `ours` or `trl`.
        model: name or folder.
        model_args: a ModelConfig.
        rows: prompts with `input_ids`.
        settings: of PPOConfig; ours is told `activation_checkpointing`, TRL's the older name of it.
    """
    from peft.tuners.lora import Linear
    from trl import ModelConfig

    from rlhf.models.fused_lora import FusedLora
    from rlhf.models.loading import load_causal_lm, load_reward_model
    from rlhf.models.sources import resolve
    from rlhf.models.tokenizers import load_tokenizer

    source, folder = resolve(model), tempfile.mkdtemp()
    tokenizer = load_tokenizer(source)
    tokenizer.padding_side = "left"  # which stock TRL leaves to the user
    policy = load_causal_lm(source, model_args, tokenizer)
    settings = {**settings, "output_dir": folder}
    whole = ModelConfig(dtype=model_args.dtype, attn_implementation=model_args.attn_implementation)
    if which == "ours":
        from rlhf.models.adapters import REWARD
        from rlhf.ppo import PPOConfig, PPOTrainer
        from rlhf.rewards import load_reward, resolve_reward

        load_reward_model(source, model_args, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reward = load_reward(resolve_reward(folder), model_args, policy=policy)
        assert not model_args.use_peft or REWARD in policy.peft_config
        value = None if model_args.use_peft else load_reward_model(source, whole, tokenizer)
        trainer = PPOTrainer(
            PPOConfig(**settings), tokenizer, policy, train_dataset=rows, reward_funcs=[reward], value_model=value
        )
        return trainer, lambda: {
            name.removeprefix("time/"): value for name, value in trainer.state.log_history[-1].items()
            if name.startswith("time/")
        }  # fmt: skip
    from rlhf.ppo.upstream import TRLPPOConfig, TRLPPOTrainer, need_trl_ppo

    need_trl_ppo()
    for module in policy.modules():
        if type(module) is FusedLora:
            module.__class__ = Linear  # PEFT's own, which users of stock TRL have
    value, reward_model = (load_reward_model(source, whole, tokenizer) for _ in range(2))
    reward_model.requires_grad_(False)
    rows = rows.select_columns(["input_ids"])
    checkpoints = settings.pop("activation_checkpointing")
    args = TRLPPOConfig(**settings, gradient_checkpointing=checkpoints)
    reference = None if model_args.use_peft else load_causal_lm(source, model_args, tokenizer)
    trainer = TRLPPOTrainer(args, tokenizer, policy, reference, reward_model, rows, value)
    return trainer, time_stock(trainer)


def clock() -> float:
    """Seconds, once a GPU has done what it was given."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def time_stock(trainer: Any) -> Callable[[], dict[str, float]]:
    """TRL logs no time per phase: note when sampling ends and when the first step of the update begins."""
    module: Any = sys.modules[type(trainer).__module__]
    marks: dict[str, float] = {}
    generation, accumulate = module.batch_generation, trainer.accelerator.accumulate

    def timed_generation(*args: Any, **kwargs: Any) -> Any:
        marks["start"] = clock()
        marks.pop("update", None)
        result = generation(*args, **kwargs)
        marks["sampled"] = clock()
        return result

    def timed_accumulate(*args: Any, **kwargs: Any) -> Any:
        marks.setdefault("update", clock())
        return accumulate(*args, **kwargs)

    module.batch_generation, trainer.accelerator.accumulate = timed_generation, timed_accumulate
    return lambda: {
        "rollout": marks["sampled"] - marks["start"],
        "reward+logprobs": marks["update"] - marks["sampled"],
        "update": clock() - marks["update"],
    }


def run_worker(which: str, updates: int, epochs: int, profile: bool) -> None:
    """Train, one update for every line on standard input, and print what it took."""
    from transformers import TrainerCallback

    SETTINGS["num_ppo_epochs"] = epochs
    trainer, phases = worker(which, updates)
    started = [0.0]

    def wait() -> None:
        if not sys.stdin.readline():
            sys.exit()
        started[0] = time.perf_counter()

    class Turns(TrainerCallback):
        """Reports after each update and waits for the next turn."""

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            entry = state.log_history[-1]
            if "objective/kl" not in entry:
                return
            report = {
                "seconds": time.perf_counter() - started[0],
                "phases": phases(),
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
            print("BENCH " + json.dumps(report), flush=True)
            wait()  # after the last one too: what a trainer does at its end must not disturb the other's last update

    trainer.add_callback(Turns())
    print("BENCH ready", flush=True)
    wait()
    floors = count_floor(trainer, trainer.args.bf16) if profile else {}
    trainer.train()
    if profile:
        print("BENCH " + json.dumps(floors), flush=True)


def count_floor(trainer: Any, has_bf16: bool) -> dict[str, float]:
    """Seconds that the matrix products of each phase need at the rate of this machine; filled in while it trains.

    Sampling multiplies a row for each completion with the weights, the other phases whole sequences.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    dtype = torch.bfloat16 if has_bf16 else torch.float32
    rates = {rows: product_rate(rows, dtype) for rows in (32, 256)}
    timed, floors = trainer._timed, {}

    @contextmanager
    def counted(phase: str) -> Iterator[None]:
        in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
        with timed(phase), FlopCounterMode(display=False, custom_mapping=in_place) as count:
            yield
        floors[phase] = count.get_total_flops() / rates[32 if phase == "rollout" else 256]

    trainer._timed = counted
    return floors


def product_rate(rows: int, dtype: Any) -> float:
    """Floating-point operations per second of a product of `rows` hidden states with weights of the starter's size."""
    import torch

    inputs, weights, rate = torch.randn(rows, 576).to(dtype), torch.randn(1536, 576).to(dtype), 0.0
    for _ in range(5):  # the best of five, the first of which warm up
        start = time.perf_counter()
        for _ in range(200):
            torch.nn.functional.linear(inputs, weights)
        rate = max(rate, 200 * 2 * rows * 576 * 1536 / (time.perf_counter() - start))
    return rate


# ------------------------------------------------------------------------------------------------ both of them


def read(process: subprocess.Popen) -> Any:
    """The next report of a worker."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("BENCH "):
            return line[6:].strip() if line[6:].strip() == "ready" else json.loads(line[6:])
    raise SystemExit(f"A worker ended without a report (exit code {process.wait()}); its errors are above.")


def start(which: str, updates: int, epochs: int, *more: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--worker", which, "--updates", str(updates)]
    command += ["--num_ppo_epochs", str(epochs), *more]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert read(process) == "ready"
    return process


def turn(process: subprocess.Popen) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return read(process)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=6, help="updates of each, the first to warm up")
    parser.add_argument("--num_ppo_epochs", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="write the ratios to benchmarks/ppo.json")
    parser.add_argument("--worker", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return run_worker(arguments.worker, arguments.updates, arguments.num_ppo_epochs, arguments.profile)
    epochs = arguments.num_ppo_epochs
    workers = {name: start(name, arguments.updates, epochs) for name in ("trl", "ours")}
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in range(arguments.updates):
        for name, process in workers.items():
            reports[name].append(turn(process))
            print(
                f"update {number + 1} of {arguments.updates}, {name}: {reports[name][-1]['seconds']:.1f} s", flush=True
            )
    for process in workers.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    reports = {name: report[1:] for name, report in reports.items()}
    rows = table_rows(reports)
    print_table(rows, reports)
    command = f"python tests/bench_ppo.py --updates {arguments.updates} --num_ppo_epochs {epochs}"
    compare_and_keep(FOLDER / "ppo.json", command, rows, arguments.keep)
    profiled = start("ours", 1, epochs, "--profile")
    turn(profiled)
    print_shares(turn(profiled), reports["ours"])


class Row(NamedTuple):
    """One line of the table."""

    name: str
    trl: float
    ours: float
    ratio: float


def table_rows(reports: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Means over the updates (of memory the peak), and the ratios ours / TRL's.

    Args:
        reports: by `trl` and `ours`, what each update took: `seconds` and `peak`, in GiB.
    """
    seconds = {name: mean([r["seconds"] for r in report]) for name, report in reports.items()}
    rates = {name: mean([32 / r["seconds"] for r in report]) for name, report in reports.items()}
    peaks = {name: max(r["peak"] for r in report) for name, report in reports.items()}
    return [
        Row("episodes/s", rates["trl"], rates["ours"], seconds["trl"] / seconds["ours"]),
        Row("s per update", seconds["trl"], seconds["ours"], seconds["ours"] / seconds["trl"]),
        Row("peak memory, GiB", peaks["trl"], peaks["ours"], peaks["ours"] / peaks["trl"]),
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def print_table(rows: list[Row], reports: dict[str, list[dict[str, Any]]]) -> None:
    """The table, and the mean time of each phase."""
    print(f"\n{'':24}{'TRL 1.12':>12}{'ours':>12}{'ratio':>10}    (means of {len(reports['ours'])} updates)")
    for row in rows:
        print(f"{row.name:24}{row.trl:12.2f}{row.ours:12.2f}{row.ratio:9.2f}x")
    for name, report in reports.items():
        phases = {phase: mean([r["phases"][phase] for r in report]) for phase in report[0]["phases"]}
        print(f"{name:>4}: " + ", ".join(f"{phase} {value:.1f} s" for phase, value in phases.items()))


def print_shares(floors: dict[str, float], reports: list[dict[str, Any]]) -> None:
    """How much of each phase the matrix products of the unmodified algorithm would need.

    Args:
        floors: seconds by phase.
        reports: what each of our updates took.
    """
    times = {phase: mean([report["phases"][phase] for report in reports]) for phase in floors}
    parts = [
        f"{phase} {floors[phase]:.1f} of {time:.1f} s ({floors[phase] / time:.0%})" for phase, time in times.items()
    ]
    print(f"Matrix products alone, at this machine's rate: {', '.join(parts)}; in all "
          f"{sum(floors.values()) / sum(times.values()):.0%}.")  # fmt: skip


def compare_and_keep(file: Path, command: str, rows: list[Row], keep: bool) -> None:
    """Print the ratios beside the kept ones, then replace those if asked to."""
    new = measured(command, {row.name: row.ratio for row in rows})
    print("\n".join(compare(new, read_benchmark(file) if file.exists() else None)))
    if keep:
        write_benchmark(file, new)
        print(f"Wrote {file}.")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
