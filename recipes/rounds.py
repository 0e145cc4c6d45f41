"""Rounds: samples → comparisons → reward model → PPO → new samples, repeated.

    accelerate launch recipes/rounds.py --model_name_or_path outputs/sft --rounds 2
    accelerate launch recipes/rounds.py --model_name_or_path outputs/sft --rounds 3 --collect_config people.yaml

In each round a labeler compares replies of the newest policy, a reward model is trained on all comparisons so far, PPO
continues from the newest policy, and every round's policy is compared on held-out prompts. The reference of PPO stays
the SFT model, so the KL is the distance from it. The stages are the other recipes with their own configurations. To ask
people, give a collect.yaml with `labeler: human`. Output: round-<r>/{preferences,comparisons,reward,ppo,comparison},
rounds.json, rounds.png and report.html. The same command continues after an interruption, also with more --rounds.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.report import write_report
from rlhf.errors import report_errors
from rlhf.feedback.rounds import (
    ROUNDS_FILE,
    check_reward_functions,
    check_start,
    gather_comparisons,
    round_verdicts,
    summarize_rounds,
)
from rlhf.models.sources import resolve
from rlhf.run.folders import finish_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import PositiveInt, Seed
from rlhf.run.stages import check_stage, run_stage

HERE = Path(__file__).resolve().parent


@dataclass
class RoundsArguments:
    """The loop's start, its length, and the configurations of its stages."""

    model_name_or_path: str = field(default="outputs/sft", metadata={"help": "SFT model, from which round 1 starts."})
    rounds: PositiveInt = field(default=2, metadata={"help": "Number of rounds; may be raised after a run."})
    dataset_name: str = field(default="starter", metadata={"help": "Prompts of all stages."})
    output_dir: str = field(default="outputs/rounds", metadata={"help": "Folder for the rounds."})
    seed: Seed = field(default=42, metadata={"help": "Seed of round 1; each further round adds 1."})
    collect_config: str = field(default="recipes/configs/collect.yaml", metadata={"help": "YAML of collect.py."})
    reward_config: str = field(default="recipes/configs/reward.yaml", metadata={"help": "YAML of reward.py."})
    ppo_config: str = field(default="recipes/configs/ppo.yaml", metadata={"help": "YAML of ppo.py."})
    compare_config: str = field(default="recipes/configs/compare.yaml", metadata={"help": "YAML of compare.py."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})


def stages_of(args: RoundsArguments, number: int) -> dict[str, tuple[Path, Path, dict[str, Any]]]:
    """The stages of a round: script, output folder and flags, by the name of the recipe."""
    rounds = [Path(args.output_dir) / f"round-{r}" for r in range(1, number + 1)]
    folder, sft, seed = rounds[-1], args.model_name_or_path, args.seed + number - 1
    newest = str(rounds[-2] / "ppo") if number > 1 else sft
    trust = {"trust_remote_code": True} if args.trust_remote_code else {}  # a stage's configuration may say it too
    data = {"dataset_name": args.dataset_name, "seed": seed, **trust}
    models = [f"sft={sft}", *(f"round_{r}={path / 'ppo'}" for r, path in enumerate(rounds, 1))]
    scorer = {"reward_model_path": str(folder / "reward")}
    reward = {"model_name_or_path": sft, "dataset_name": str(folder / "comparisons"), "seed": seed, **trust}
    ppo = {"model_name_or_path": newest, "sft_model_path": sft if number > 1 else None, **scorer, **data}
    compare = {"models": models, "reference": "sft", **scorer, **data, "seed": args.seed}
    return {
        "collect": (HERE / "collect.py", folder / "preferences", {"model_name_or_path": newest, **data}),
        "reward": (HERE / "reward.py", folder / "reward", reward),
        "ppo": (HERE / "ppo.py", folder / "ppo", ppo),
        "compare": (HERE.parent / "eval" / "compare.py", folder / "comparison", compare),
    }


def run_round(args: RoundsArguments, number: int) -> bool:
    """One round, stage by stage. Returns False if people have more to compare."""
    for name, (script, folder, flags) in stages_of(args, number).items():
        if name == "reward":
            rounds = [Path(args.output_dir) / f"round-{r}" for r in range(1, number + 1)]
            counts = gather_comparisons(rounds, rounds[-1] / "comparisons")
            print(f"Round {number}: {counts['train']} comparisons so far, {counts['test']} held out.")
        if not run_stage(script, getattr(args, f"{name}_config"), folder, flags) and name in ("collect", "compare"):
            return False
    return True


def main() -> None:
    # Arguments
    (args,) = parse(__file__, RoundsArguments)
    need_one_process(__file__)
    for number in sorted({1, args.rounds}):  # the others have flags between theirs
        for name, (script, folder, flags) in stages_of(args, number).items():
            stage = check_stage(script, f"--{name}_config", getattr(args, f"{name}_config"), folder, flags)
            check_reward_functions(stage, f"--{name}_config")

    # Model
    start = resolve(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    check_start(start, args.ppo_config, args.rounds)
    more = not (Path(args.output_dir) / f"round-{args.rounds}" / "comparison" / "results.json").exists()
    if not start_run(__file__, args.output_dir, args, more=more, open_flags=vars(args)):  # the stages check them
        return

    # Rounds
    for number in range(1, args.rounds + 1):
        if not run_round(args, number):
            return print(f"Round {number} waits for more comparisons. Run the same command again to continue.")
        summary = summarize_rounds(args.output_dir, number)

    # Report
    print("\n".join(["", *round_verdicts(summary), f"Written: {Path(args.output_dir) / ROUNDS_FILE}"]))
    truth = summary["rounds"][-1]["truth"]
    finish_run(args.output_dir, {"rounds": args.rounds, summary["truth_name"]: truth and truth["mean"]})
    write_report(args.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
