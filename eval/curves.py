"""Training curves of several runs in one picture: reward and KL against episodes, and reward against KL.

    accelerate launch eval/curves.py --models ppo=outputs/ppo rloo=outputs/rloo
    accelerate launch eval/curves.py --models ppo=outputs/ppo ppo=outputs/ppo-1 rloo=outputs/rloo rloo=outputs/rloo-1

A name given more than once is one method with several seeds: thin lines are runs, the thick one is their mean. The runs
must start from the same model and have the same data and reward. Writes curves.json and curves.png.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__, models="no finished run of recipes/ppo.py or recipes/rloo.py.")

from dataclasses import dataclass, field
from pathlib import Path

from eval.report import read_log, write_report
from eval.stats.intervals import JsonObject
from rlhf.errors import InputError, report_errors
from rlhf.models.sources import named_models
from rlhf.run.files import content_of, write_json
from rlhf.run.folders import finish_run, read_run, start_run
from rlhf.run.processes import need_one_process

# the name of the raw reward in each recipe's log; all of them log `episode` and `objective/kl`, in nats per completion
REWARDS = {"ppo": "objective/raw_scores", "rloo": "reward"}
SAME = ("model_name_or_path", "dataset_name", "dataset_config", "reward_model_path", "reward_funcs", "reward_weights")


@dataclass
class CurvesArguments:
    """Which runs are drawn."""

    models: list[str] = field(default_factory=list, metadata={"help": "name=folder pairs; a name may be repeated."})
    output_dir: str = field(default="outputs/curves", metadata={"help": "Folder for curves.json and curves.png."})


def read_curves(models: list[str]) -> list[JsonObject]:
    """The curves of runs: `name`, `folder`, and `points`, a list of {episode, reward, kl}.

    Args:
        models: `name=folder` pairs.

    Raises:
        InputError: if a folder has no finished run of PPO or RLOO, or the runs differ in model, data or reward.
    """
    curves, first = [], None
    for name, path in named_models(models, repeated=True):
        run = read_run(Path(path))
        if run is None or not run["finished"] or run["recipe"] not in REWARDS:
            raise InputError(f"--models {name}={path}: no finished run of recipes/ppo.py or recipes/rloo.py.")
        settings = {key: run["settings"].get(key) for key in SAME}
        settings |= {key: value for key, value in run["settings"].items() if key.startswith("content of ")}
        first = settings if first is None else first
        if different := sorted(key for key in {*first, *settings} if first.get(key) != settings.get(key)):
            raise InputError(
                f"--models {name}={path}: differs from {models[0]} in {', '.join(different)}. Compare runs that start "
                "from the same model and have the same data and reward."
            )
        reward = REWARDS[run["recipe"]]
        keys = {"episode": "episode", "reward": reward, "kl": "objective/kl"}
        with content_of(Path(path)):
            points = [{name: float(entry[key]) for name, key in keys.items()}
                      for entry in read_log(Path(path)) if set(keys.values()) <= set(entry)]  # fmt: skip
        if not points:
            raise InputError(
                f"--models {name}={path}: no reward and KL in its log. RLOO logs a KL with --beta above 0."
            )
        curves.append({"name": name, "folder": Path(path).name, "points": points})
    return curves


def main() -> None:
    (arguments,) = parse(__file__, CurvesArguments)
    need_one_process(__file__)
    curves = read_curves(arguments.models)
    if not start_run(__file__, arguments.output_dir, arguments):
        return
    write_json(Path(arguments.output_dir) / "curves.json", {"curves": curves})
    for curve in curves:
        first, last = curve["points"][0], curve["points"][-1]
        print(f"{curve['name']} ({curve['folder']}): reward {first['reward']:.3f} → {last['reward']:.3f}, "
              f"KL {last['kl']:.2f} nats per completion, {last['episode']:.0f} episodes.")  # fmt: skip
    finish_run(arguments.output_dir, {})
    write_report(arguments.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
