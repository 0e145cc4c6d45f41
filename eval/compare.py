"""Compare models on held-out prompts: replies side by side, and every metric with a 95% interval.

    accelerate launch eval/compare.py --models base=starter sft=outputs/sft ppo=outputs/ppo \
        --reward_model_path outputs/reward --output_dir outputs/comparison
    accelerate launch eval/compare.py --models base=Qwen/Qwen2.5-0.5B-Instruct mine=outputs/qwen-ppo --reference base
    accelerate launch eval/compare.py --models sft=outputs/sft ppo=outputs/ppo --judges gold human judge
    accelerate launch eval/compare.py --models base=starter prompted=starter sft=outputs/sft \
        --few_shot prompted=outputs/few-shot/prompt.json

Writes results.json (`models.<name>.<metric>` and `differences.<a>_minus_<b>.<metric>`, each {mean, low, high, n}),
values.jsonl (what the means are made of, prompt by prompt) and samples.jsonl. One reply per model and prompt, by pure
sampling at --temperature. `best_of_<n>` is, for each prompt, the best of n replies of the reference model by the reward
model. Intervals are bootstrapped over prompts (distinct-2: over groups of 20), and differences are paired.
Log-probabilities are those at temperature 1.

--judges compare each model's reply with the reference's, without knowing which is which: `gold` (the starter's hidden
score), `simulated` (three simulated people with scales of their own), `reward` (--reward_funcs, preferably a reward
model that no model was trained on; else --reward_model_path), `judge` (a model that follows --principle), `human`
(opens the voting page; after Ctrl-C the same command continues). `simulated`, and `human` with --ratings true, also
rate each reply from 1 to 7.

--few_shot gives a model turns of a chat to read in front of each prompt: name=file, as eval/few_shot.py writes it. Its
log-probabilities, the KL and human_loss are those with the turns.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

import dataclasses
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from eval.measuring.comparison import VALUES_FILE, ComparedModels, ComparisonPlan, compare, differences_of
from eval.measuring.few_shot import read_turns, with_turns
from eval.measuring.judges import JUDGES, make_judges
from eval.metrics import table_rows
from eval.report import write_report
from eval.stats.intervals import Interval, JsonObject
from rlhf.comparisons import Labeler, Messages
from rlhf.data.datasets import DatasetArguments, load_test_split
from rlhf.data.rows import prompt_rows
from rlhf.engines.arguments import SamplerArguments
from rlhf.engines.completions import make_sampler
from rlhf.errors import InputError, report_errors
from rlhf.feedback.labelers import LabelerSettings
from rlhf.models.generation import Sampling
from rlhf.models.sources import Source, context_length, named_models, refuse_single_model, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards import resolve_reward
from rlhf.run.files import write_json, write_jsonl
from rlhf.run.folders import finish_run, history_of, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import NonNegativeInt, PositiveInt, Seed, Temperature
from rlhf.starter.model import STARTER


@dataclass
class CompareArguments:
    """Which models are compared, and how they reply."""

    models: list[str] = field(
        default_factory=list, metadata={"help": "name=model pairs; a model is an id or a folder."}
    )
    reference: str = field(default="sft", metadata={"help": "Name of the model that others are compared with."})
    few_shot: list[str] | None = field(
        default=None,
        metadata={"help": "name=file pairs: turns that a model reads before each prompt (eval/few_shot.py)."},
    )
    reward_model_path: str | None = field(
        default=None, metadata={"help": "Reward model for reward_score and best-of-n."}
    )
    judges: list[str] | None = field(
        default=None,
        metadata={"help": "Who judges. Default: gold for the starter, else reward.", "choices": JUDGES},
    )
    best_of_n: NonNegativeInt = field(
        default=4, metadata={"help": "Replies per prompt to choose from; below 2: no best-of-n."}
    )
    output_dir: str = field(default="outputs/comparison", metadata={"help": "Folder for results.json, samples.jsonl."})
    max_new_tokens: PositiveInt = field(default=32, metadata={"help": "Longest reply, in tokens."})
    temperature: Temperature = field(default=1.0, metadata={"help": "Sampling temperature."})
    per_device_eval_batch_size: PositiveInt = field(default=64, metadata={"help": "Replies to sample at once."})
    seed: Seed = field(default=42, metadata={"help": "Seed of sampling, and of the bootstrap of differences."})
    max_prompts: PositiveInt = field(default=208, metadata={"help": "Use at most this many held-out prompts."})


def compared_models(arguments: CompareArguments) -> dict[str, str]:
    """The models of --models by name, the reference among them."""
    # the columns of samples.jsonl, and the row of best-of-n
    pairs = dict(named_models(arguments.models, taken=("prompt", f"best_of_{arguments.best_of_n}")))
    if arguments.reference not in pairs:
        raise InputError(f"--reference {arguments.reference}: not among --models; found {', '.join(pairs)}.")
    return pairs


def turns_of(arguments: CompareArguments) -> dict[str, Messages]:
    """The turns of --few_shot by model.

    Raises:
        InputError: if a name is not among --models, or a file holds no turns.
    """
    if not arguments.few_shot:
        return {}
    pairs = dict(named_models(arguments.few_shot, "--few_shot"))
    known = compared_models(arguments)
    if unknown := [name for name in pairs if name not in known]:
        raise InputError(f"--few_shot {unknown[0]}=...: not among --models; found {', '.join(known)}.")
    return {name: read_turns(file, f"--few_shot {name}={file}") for name, file in pairs.items()}


def rows_for_all(
    test: Dataset,
    dataset: str,
    models: dict[str, Source],
    reference: PreTrainedTokenizerBase,
    turns: dict[str, Messages],
    arguments: CompareArguments,
) -> Dataset:
    """The test rows as prompts.

    Args:
        reference: the reference's tokenizer.
        turns: of --few_shot, by model.

    Raises:
        InputError: if a model has another tokenizer, or a prompt with its turns and its reply don't fit into a model's
            context.
    """
    for name, source in models.items():
        tokenizer = load_tokenizer(source)
        if tokenizer.get_vocab() != reference.get_vocab():
            raise InputError(
                f"--models {name}=...: its tokenizer differs from that of {arguments.reference!r}, so neither KL nor "
                "perplexity could be compared. Compare models of one family."
            )
        sizes = (arguments.max_new_tokens, context_length(source))
        rows = prompt_rows(test, dataset, tokenizer, *sizes)
        if name in turns:
            longer = Dataset.from_list([{"prompt": with_turns(prompt, turns[name])} for prompt in rows["prompt"]])
            prompt_rows(longer, f"{dataset} with the turns of --few_shot {name}", tokenizer, *sizes)
    return rows


def judges_of(
    arguments: CompareArguments,
    settings: LabelerSettings,
    dataset: str,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Labeler]:
    """The judges that --judges names, else the default ones."""
    names = arguments.judges
    if names is None:
        rewarded = arguments.reward_model_path or settings.reward_funcs
        names = ["gold"] if dataset == STARTER else ["reward"] if rewarded else []
    if hidden := {"gold", "simulated"} & {*names} if dataset != STARTER else set():
        raise InputError(
            f"--judges {min(hidden)}: judges by the starter's hidden score, which no other dataset has. Give reward."
        )
    asked = settings
    if "reward" in names and settings.reward_funcs is None:
        if arguments.reward_model_path is None:
            raise InputError("--judges reward: needs --reward_funcs or --reward_model_path.")
        asked = dataclasses.replace(settings, reward_funcs=[arguments.reward_model_path])
    judges = make_judges(names, asked, model_args, tokenizer, arguments.output_dir, arguments.seed)
    settings.judge_model_name_or_path = asked.judge_model_name_or_path  # see resolve_judge
    return judges


def print_comparison(results: JsonObject, comparison: ComparedModels, reference: str) -> None:
    """The table of metrics, and five prompts with every model's reply."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    names, rows = table_rows(results)
    table = Table(title=f"Held-out prompts; means with 95% intervals; win rates and KL against '{reference}'")
    for heading in ("", *names):
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    samples = Table(title="Some held-out prompts", show_lines=True)
    for heading in ("prompt", *comparison.texts):
        samples.add_column(heading, ratio=1)
    for number in range(min(5, len(comparison.prompts))):
        prompt = comparison.prompts[number]
        samples.add_row(
            escape(prompt if isinstance(prompt, str) else prompt[-1]["content"]),
            *(escape(texts[number]) for texts in comparison.texts.values()),
        )
    console.print(samples)


def results_of_comparison(comparison: ComparedModels, arguments: CompareArguments) -> JsonObject:
    """The content of results.json."""

    def to_json(cells_by_name: dict[str, dict[str, Interval]]) -> JsonObject:
        return {
            name: {metric: cell.to_json() for metric, cell in cells.items()} for name, cells in cells_by_name.items()
        }

    commands, seeds = history_of([*compared_models(arguments).values(), arguments.reward_model_path or ""])
    return {
        "models": to_json(comparison.metrics),
        "differences": to_json(differences_of(comparison.metrics, arguments.seed)),
        "reference": arguments.reference,
        "reward_model": comparison.reward_accuracy,
        "commands": commands,
        "seeds": {**seeds, "comparison": arguments.seed},
        "versions": {
            name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
        },
    }


def main() -> None:
    script_args, arguments, settings, engine_args, model_args = parse(
        __file__, DatasetArguments, CompareArguments, LabelerSettings, SamplerArguments, ModelConfig
    )
    need_one_process(__file__)
    refuse_single_model(model_args)
    trust = settings.trust_remote_code
    models = {
        name: resolve(path, "--models", trust_remote_code=trust) for name, path in compared_models(arguments).items()
    }
    path = arguments.reward_model_path
    reward = resolve_reward(path, trust_remote_code=trust) if path else None
    test = load_test_split(script_args)
    test = test.select(range(min(len(test), arguments.max_prompts)))
    tokenizer = load_tokenizer(models[arguments.reference])
    turns = turns_of(arguments)
    rows = rows_for_all(test, script_args.dataset_name, models, tokenizer, turns, arguments)
    judges = judges_of(arguments, settings, script_args.dataset_name, model_args, tokenizer)
    if not start_run(__file__, arguments.output_dir, script_args, arguments, settings, engine_args, model_args):
        return

    folder = Path(arguments.output_dir)
    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.per_device_eval_batch_size, arguments.seed,
        make_sampler(engine_args, arguments.output_dir, list(models.values())),
    )  # fmt: skip
    plan = ComparisonPlan(
        sources=models,
        reference=arguments.reference,
        rows=rows,
        has_gold=script_args.dataset_name == STARTER,
        sampling=sampling,
        best_of_n=arguments.best_of_n if reward else 0,  # nothing else chooses
        model_args=model_args,
        folder=folder,
        turns=turns,
    )
    comparison = compare(plan, reward, judges)
    results = results_of_comparison(comparison, arguments)
    write_json(folder / "results.json", results)
    write_jsonl(folder / VALUES_FILE, comparison.values())
    write_jsonl(
        folder / "samples.jsonl",
        [
            {"prompt": prompt, **{name: texts[number] for name, texts in comparison.texts.items()}}
            for number, prompt in enumerate(comparison.prompts)
        ],
    )
    print_comparison(results, comparison, arguments.reference)
    print(f"Written: {folder / 'results.json'}, {VALUES_FILE} and samples.jsonl")
    if all(judge.finished for judge in judges.values()):
        finish_run(arguments.output_dir, {})
    write_report(arguments.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
