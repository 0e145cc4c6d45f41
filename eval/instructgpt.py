"""InstructGPT's first figure and its alignment tax, in small, from the finished runs of recipes/instructgpt.sh.

    accelerate launch eval/instructgpt.py --output_dir outputs/instructgpt/figure --comparisons \
        small=outputs/instructgpt/small/comparison starter=outputs/instructgpt/starter/comparison

Each of --comparisons is a run of eval/compare.py on the models of one size: a base, perhaps the base with a few-shot
prompt, SFT, and PPO and PPO-ptx (--ptx_coef above 0) with one or more seeds. Beside it lies `in-context` with a run of
eval/in_context.py for each model. What kind of model one is, is read from its own run.

Writes instructgpt.json and two pictures:

- instructgpt.png, as figure 1 of https://arxiv.org/abs/2203.02155: the share of prompts on which a model's reply beats
  that of the largest SFT model by the gold score, and the mean rating from 1 to 7, against the number of parameters;
- tax.png: the loss on people's replies and the accuracy in context that PPO costs, against the gold score that it
  gains, for each coefficient of PPO-ptx.

Intervals are 95% bootstrap intervals: prompts (or questions) and seeds are drawn with replacement, independently of
each other. Where there is one seed they cover prompts alone. Differences are paired by prompt and by seed.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__, comparisons="no finished run of eval/compare.py.")

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table
from trl import ModelConfig

from eval.drawing.tables import instructgpt_tables
from eval.measuring.alignment import IN_CONTEXT, PPO, SFT, Size, read_size, repair_of, tax_of, wins
from eval.report import write_report
from eval.stats.intervals import JsonObject
from rlhf.errors import InputError, report_errors
from rlhf.models.sources import Source, named_models, resolve
from rlhf.planning.models import language_model, parameters
from rlhf.run.files import write_json
from rlhf.run.folders import command, finish_run, read_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import PositiveFloat, Seed

FIGURE_FILE = "instructgpt.json"
MEANS = ("gold_score", "reward_score", "kl", "win_rate/gold", "human_loss", "human_bits_per_byte", IN_CONTEXT)


@dataclass
class InstructGPTArguments:
    """Which runs are drawn."""

    comparisons: list[str] = field(
        default_factory=list, metadata={"help": "name=folder pairs: a run of eval/compare.py for each size."}
    )
    rater: str = field(
        default="simulated", metadata={"help": "Whose ratings: simulated or human, one of the comparisons' --judges."}
    )
    ptx_coef: PositiveFloat | None = field(
        default=None, metadata={"help": "The PPO-ptx of instructgpt.png. Default: the one that all sizes have."}
    )
    output_dir: str = field(default="outputs/instructgpt/figure", metadata={"help": "Folder for the results."})
    seed: Seed = field(default=42, metadata={"help": "Seed of the bootstrap."})


def shared_ptx_coef(sizes: list[Size], asked: float | None) -> float | None:
    """The coefficient of the PPO-ptx that all sizes have; None if no size has any.

    Raises:
        InputError: if a size lacks it, or several are shared and none was asked for.
    """
    known = {size.name: size.ptx_coefs for size in sizes}
    if asked is None and not any(known.values()):
        return None
    shared = set.intersection(*(set(coefs) for coefs in known.values()))
    found = ", ".join(f"{name}: {' '.join(map(str, coefs)) or 'none'}" for name, coefs in known.items())
    if asked is not None and asked not in shared:
        raise InputError(f"--ptx_coef {asked}: not all sizes have it. Found {found}.")
    if asked is None and len(shared) != 1:
        raise InputError(f"--ptx_coef: needed, as the sizes share {len(shared)} coefficients. Found {found}.")
    return asked if asked is not None else shared.pop()


def count_parameters(comparison: str) -> int:
    """Parameters of the base of a comparison's reference, embeddings included, each shared weight once."""
    run = read_run(Path(comparison))
    assert run is not None  # `read_size` read it
    models = dict(word.partition("=")[::2] for word in run["settings"]["models"])
    base = resolve(models[run["settings"].get("reference", "sft")], "--comparisons").base
    whole = Source(base, base, None, None, None)
    return parameters(language_model(whole, ModelConfig(), on_cpu=False, trainable=False))[0]


def measure_size(size: Size, largest: Size, args: InstructGPTArguments) -> JsonObject:
    """What instructgpt.json says about one size.

    Args:
        largest: the size whose SFT model all play against.
    """
    opponent = largest.of(SFT, "gold_score")
    if opponent is None or largest.prompts != size.prompts:
        raise InputError(
            f"--comparisons: {size.name} and {largest.name} need gold scores of the same prompts. Compare with the "
            "same --max_prompts, on the starter's."
        )
    won = wins(size, opponent)
    models: list[JsonObject] = []
    for kind, by_seed in size.models.items():
        means = {metric: size.of(kind, metric) for metric in MEANS} | {
            "win_rate": won.get(kind), "rating": size.of(kind, f"rating/{args.rater}")
        }  # fmt: skip
        cells = {metric: scored.mean(args.seed).to_json() for metric, scored in means.items() if scored is not None}
        models.append({"kind": kind.name, "ptx_coef": kind.ptx_coef, "seeds": len(by_seed), **cells})
    if all("rating" not in model for model in models):
        raise InputError(f"--rater {args.rater}: {size.name} has no ratings of this judge. Compare with --judges "
                         f"{args.rater}{' and --ratings true' if args.rater == 'human' else ''}.")  # fmt: skip
    accuracy = next(model.get(IN_CONTEXT) for model in models if model["kind"] == SFT.name)
    return {
        "models": models,
        "tax": tax_rows(size, args.seed),
        "chance": size.chance,
        # whether SFT does no better in context than guessing, so that there is nothing to lose
        "at_chance": None if size.chance is None or accuracy is None else accuracy["low"] <= size.chance,
        "few_shot": size.few_shot and {key: size.few_shot[key] for key in ("score", "num_fewshot", "chosen", "scores")},
    }


def tax_rows(size: Size, seed: int) -> list[JsonObject]:
    """The tax of every PPO, the smallest coefficient first: `kind`, `ptx_coef`, `gold_score`, and `tax` by metric.

    PPO-ptx also has what `Repair` says, or None.
    """
    rows = []
    for kind in sorted(kind for kind in size.models if kind == PPO or kind.name == "ppo_ptx"):
        gold, repair = size.of(kind, "gold_score"), None if kind == PPO else repair_of(size, kind, seed)
        rows.append({
            "kind": kind.name, "ptx_coef": kind.ptx_coef, "gold_score": gold and gold.mean(seed).to_json(),
            "tax": {metric: cell.to_json() for metric, cell in tax_of(size, kind, seed).items()},
            "repair": repair and repair.to_json(),
        })  # fmt: skip
    return rows


def main() -> None:
    # Arguments
    (args,) = parse(__file__, InstructGPTArguments)
    need_one_process(__file__)

    # Data
    folders = dict(named_models(args.comparisons, "--comparisons"))
    sizes = {name: read_size(name, Path(folder).expanduser()) for name, folder in folders.items()}
    counts = {name: count_parameters(folder) for name, folder in folders.items()}
    ptx_coef = shared_ptx_coef(list(sizes.values()), args.ptx_coef)
    if not start_run(__file__, args.output_dir, args):
        return

    # Figure and tax
    largest = sizes[max(counts, key=counts.__getitem__)]
    result = {
        "opponent": largest.name,
        "rater": args.rater,
        "ptx_coef": ptx_coef,
        "sizes": {
            name: {"parameters": counts[name], **measure_size(sizes[name], largest, args)}
            for name in sorted(sizes, key=counts.__getitem__)
        },
        "commands": [command(__file__)],
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    write_json(Path(args.output_dir) / FIGURE_FILE, result)

    # Report
    for report_table in instructgpt_tables(result):
        table = Table(*report_table.heading, title=report_table.title, caption=report_table.note)
        for row in report_table.rows:
            table.add_row(*row)
        Console(width=160).print(table)
    finish_run(args.output_dir, {})
    write_report(args.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
