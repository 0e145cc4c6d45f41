"""Over-optimization: where the reward model no longer agrees with the truth, and which checkpoint of a PPO run to keep.

    accelerate launch eval/overoptimization.py --model_name_or_path outputs/ppo
    accelerate launch eval/overoptimization.py --model_name_or_path outputs/qwen-ppo \
        --eval_reward_funcs Skywork/Skywork-Reward-V2-Qwen3-0.6B --output_dir outputs/qwen-overoptimization

Every checkpoint of the run replies to held-out prompts, and its replies are scored by its training reward (the proxy)
and by the truth: the starter's gold score, or for other datasets the first of --eval_reward_funcs. Best-of-n of the
model that the run started from is scored the same way. Writes overoptimization.json, with both scores against sqrt(KL),
the curves of Gao et al. 2022 fitted to them, and the checkpoint to keep; samples.jsonl; and a picture. Keep checkpoints
with --save_total_limit when training. Flags that are not given are taken from the run. Replies without a score don't
count.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__, model_name_or_path="no run of recipes/ppo.py. Give its output folder.")

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments

from eval.drawing.figures import overoptimization_figure, save_figure
from eval.measuring.replies import ModelReplies, Replies, reply_logprobs, sample_replies, use_model
from eval.report import write_report
from eval.stats.fits import KEEP_RULE, CurveKind, ScoredPoint, best_of_n, best_of_n_kl, fit_curve, to_keep
from eval.stats.intervals import Interval, JsonObject, interval, over_known
from rlhf.comparisons import Prompt, as_message
from rlhf.data.datasets import load_test_split, refuse_columns
from rlhf.data.encoding import OPTION_COLUMNS, encode_prompt
from rlhf.data.rows import prompt_rows
from rlhf.engines.arguments import SamplerArguments
from rlhf.engines.completions import make_sampler
from rlhf.errors import InputError, report_errors
from rlhf.models.generation import Sampling
from rlhf.models.sources import Source, context_length, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.ppo import PPOConfig
from rlhf.rewards import (
    JUDGE,
    Combination,
    EnsembleFlags,
    JudgeArguments,
    RewardSource,
    call_rewards,
    load_reward,
    load_rewards,
    need_scores,
    resolve_reward_functions,
    resolve_rewards,
    reward_columns,
    reward_model_paths,
    total_scores,
)
from rlhf.run.checkpoints import checkpoints
from rlhf.run.files import write_json, write_jsonl
from rlhf.run.folders import finish_run, read_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveInt, Seed, Temperature
from rlhf.starter.model import STARTER


@dataclass
class OverOptimizationArguments(JudgeArguments):
    """What is sampled and scored. Rewards, reply length and temperature default to the run's."""

    output_dir: str = field(default="outputs/overoptimization", metadata={"help": "Folder for the results."})
    reward_model_path: list[str] | None | str = field(  # noqa: RUF036 - the parser reads the first
        default=None, metadata={"help": "The proxy; several are an ensemble. Default: the run's reward."}
    )
    reward_ensemble: Combination = field(
        default="mean", metadata={"help": "How several reward models are combined, as in ppo.py."}
    )
    uwo_coef: NonNegativeFloat = field(default=0.1, metadata={"help": "Weight of the variance in uwo."})
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Further rewards of the proxy, as in ppo.py."}
    )
    reward_weights: list[FiniteFloat] | None = field(default=None, metadata={"help": "Weight of each reward."})
    eval_reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "The truth: a reward that was not trained on. Default: the starter's gold."}
    )
    best_of_n: NonNegativeInt = field(default=16, metadata={"help": "Largest n of best-of-n; below 2: none."})
    max_new_tokens: PositiveInt | None = field(default=None, metadata={"help": "Longest reply, in tokens."})
    temperature: Temperature | None = field(default=None, metadata={"help": "Sampling temperature."})
    per_device_eval_batch_size: PositiveInt = field(default=64, metadata={"help": "Replies to sample at once."})
    max_prompts: PositiveInt = field(default=208, metadata={"help": "Use at most this many held-out prompts."})
    seed: Seed = field(default=42, metadata={"help": "Seed of sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})

    def __post_init__(self) -> None:
        if isinstance(self.reward_model_path, list) and len(self.reward_model_path) == 1:
            (self.reward_model_path,) = self.reward_model_path  # as in PPOConfig


def read_ppo_run(folder: str | None) -> JsonObject:
    """Settings of the PPO run in a folder.

    Raises:
        InputError: if there is none, or it has no checkpoints.
    """
    run = read_run(Path(folder)) if folder else None
    if run is None or run["recipe"] != "ppo":
        raise InputError(f"--model_name_or_path {folder}: no run of recipes/ppo.py. Give its output folder.")
    if not checkpoints(str(folder)):
        raise InputError(
            f"--model_name_or_path {folder}: no checkpoints in it. Train with --save_steps and --save_total_limit."
        )
    return run["settings"]


def fill_in(arguments: OverOptimizationArguments, script_args: ScriptArguments, run: JsonObject) -> None:
    """Set the flags that were not given to the run's settings."""
    if not arguments.reward_model_path and not arguments.reward_funcs:
        for name in ("reward_model_path", "reward_funcs", "reward_weights", "reward_ensemble", "uwo_coef"):
            typed = getattr(arguments, name) != getattr(OverOptimizationArguments, name)
            if not typed and (name != "uwo_coef" or arguments.reward_ensemble == "uwo"):
                setattr(arguments, name, run.get(name, getattr(PPOConfig, name, None)))  # earlier runs lack some
        judged = JUDGE in (arguments.reward_funcs or [])
        if judged and arguments.judge_base_url is None and "judge_base_url" in run:
            raise InputError("--judge_base_url: the run's judge was on a server. Give its address.")
        for flag in dataclasses.fields(JudgeArguments):
            if judged and flag.name != "judge_base_url" and getattr(arguments, flag.name) == flag.default:
                setattr(arguments, flag.name, run.get(flag.name, flag.default))
    arguments.max_new_tokens = arguments.max_new_tokens or run.get("response_length", PPOConfig.response_length)
    arguments.temperature = arguments.temperature or run.get("temperature", PPOConfig.temperature)
    if script_args.dataset_name is None:
        script_args.dataset_name = run.get("dataset_name", STARTER)
        script_args.dataset_config = script_args.dataset_config or run.get("dataset_config")
    if script_args.dataset_name == STARTER:
        arguments.eval_reward_funcs = arguments.eval_reward_funcs or [STARTER]
    if not arguments.eval_reward_funcs:
        raise InputError("--eval_reward_funcs: give a reward that the run was not trained on, to stand for the truth.")


def proxy_name(proxies: list[RewardSource], flags: EnsembleFlags) -> str:
    """What the proxy is called: `reward`, `a + b` of a sum, `wco of a, b` of an ensemble."""
    names, count = [Path(proxy.name).name for proxy in proxies], len(reward_model_paths(flags))
    together = [f"{flags.reward_ensemble} of {', '.join(names[:count])}"] if count > 1 else names[:count]
    return " + ".join([*together, *names[count:]])


class Scorer:
    """Scores replies by the truth (`gold`) and by the rewards of the training (`proxy`). Models are loaded once.

    The scales of an ensemble are those of the first replies that it scores: of the model that the run started from.

    Args:
        columns: the prompts' other columns, see `reward_columns`.
    """

    def __init__(
        self,
        gold: RewardSource,
        proxies: list[RewardSource],
        flags: EnsembleFlags,
        model_args: ModelConfig,
        columns: Mapping[str, list[Any]] | None = None,
    ) -> None:
        self.columns = columns or {}
        self.functions = [load_reward(gold, model_args), *load_rewards(proxies, flags, model_args)]
        self.weights = flags.reward_weights or [1.0] * (len(self.functions) - 1)

    def __call__(self, prompts: list[Prompt], replies: Replies) -> tuple[list[float], list[float]]:
        """Gold and proxy score of each reply; NaN: none.

        Args:
            prompts: all of them, each as often as it has replies.

        Raises:
            RewardError: if no reply has the one or the other.
        """
        completions = [as_message(prompt, text) for prompt, text in zip(prompts, replies.texts, strict=True)]
        repeated = {
            name: [value for value in values for _ in range(len(prompts) // len(values))]
            for name, values in self.columns.items()
        }
        answers = call_rewards(self.functions, prompts, completions, replies.ids, **repeated)
        gold, proxy = (
            total_scores(self.functions[part], answers[part], weights, completions, need_all=False)
            for part, weights in ((slice(1), [1.0]), (slice(1, None), self.weights))
        )
        for functions, scores in ((self.functions[:1], gold), (self.functions[1:], proxy)):
            if all(map(math.isnan, scores)):
                need_scores(functions, 0, len(scores))
        return gold, proxy


def _sample_policy(
    name: str,
    prompts: list[Prompt],
    count: int,
    sampling: Sampling,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> ModelReplies:
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    replies = sample_replies(model, tokenizer, ids, count, sampling, name)
    chosen = replies.first_of(count)
    own = reply_logprobs(model, tokenizer, ids, chosen.ids, description=f"{name}: itself")
    return ModelReplies(replies, chosen, own)


def _logprobs_under_start(
    policies: dict[str, ModelReplies],
    prompts: list[Prompt],
    start: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, list[float]]:
    """Log-probabilities of every policy's chosen replies under the model that training started from."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    others = {name: policy.chosen.ids for name, policy in policies.items() if name != start}
    under = {
        name: reply_logprobs(model, tokenizer, ids, replies, description=f"{name} under {start}").sums
        for name, replies in others.items()
    }
    return {start: policies[start].own.sums, **under}


def measure_policies(
    sources: dict[str, Source],
    prompts: list[Prompt],
    scorer: Scorer,
    sampling: Sampling,
    candidates: int,
    model_args: ModelConfig,
) -> tuple[list[ScoredPoint], dict[str, ModelReplies]]:
    """Sample from every policy, with one in memory at a time, and score the replies.

    Args:
        sources: the model that training started from, then the checkpoints.
        candidates: how many replies the first gives to each prompt; the others give one.
    """
    start = next(iter(sources))
    policies = {}
    for name, source in sources.items():
        count = candidates if name == start else 1
        policies[name] = use_model(
            source, model_args, functools.partial(_sample_policy, name, prompts, count, sampling)
        )
    under = use_model(sources[start], model_args, functools.partial(_logprobs_under_start, policies, prompts, start))
    points = []
    for name, policy in policies.items():
        gold, proxy = scorer(prompts, policy.chosen)
        kl = [a - b for a, b in zip(policy.own.sums, under[name], strict=True)]
        points.append(ScoredPoint(name, interval(kl), over_known(gold), over_known(proxy)))
    return points, policies


def best_of_n_points(prompts: list[Prompt], candidates: Replies, scorer: Scorer, most: int) -> list[ScoredPoint]:
    """One point per n = 1, 2, 4, ... up to `most`, the number of candidates of each prompt, and of the scored ones."""
    repeated = [prompt for prompt in prompts for _ in range(most)]
    gold, proxy = (np.asarray(scores).reshape(len(prompts), -1) for scores in scorer(repeated, candidates))
    points, n = [], 1
    while n <= most:
        kl = best_of_n_kl(n)
        scores = [best_of_n(proxy, values, n) for values in (gold, proxy)]
        if any(np.isnan(values).all() for values in scores):
            break
        cells = [over_known(values.tolist()) for values in scores]
        points.append(ScoredPoint(f"best of {n}", Interval(kl, kl, kl, len(prompts)), *cells))
        n *= 2
    return points


def fits_of(points: list[ScoredPoint], kind: CurveKind) -> JsonObject:
    """The fitted curves of `gold` and `proxy` in points of one kind, the first of which is the start.

    A curve with fewer than three points away from the start is None.
    """
    later = [point for point in points[1:] if point.kl.mean > 0]
    if len(later) < 3:
        return {"gold": None, "proxy": None}
    distance = np.sqrt([point.kl.mean for point in later])
    gold = fit_curve(distance, _gains([point.gold for point in later], points[0].gold), kind)
    proxy = fit_curve(distance, _gains([point.proxy for point in later], points[0].proxy), kind)
    return {"gold": gold and gold.to_json(), "proxy": proxy and proxy.to_json()}


def _gains(cells: list[Interval], start: Interval) -> np.ndarray:
    """(P, N) gain of each of N prompts over the start at each of P points."""
    first, *later = [np.asarray(cell.sample.values) for cell in (start, *cells) if cell.sample]
    return np.stack([values - first for values in later])


def main() -> None:
    script_args, arguments, engine_args, model_args = parse(
        __file__, ScriptArguments, OverOptimizationArguments, SamplerArguments, ModelConfig
    )
    need_one_process(__file__)
    folder = model_args.model_name_or_path
    run = read_ppo_run(folder)
    fill_in(arguments, script_args, run)
    start = run.get("sft_model_path") or run.get("model_name_or_path")
    trust = arguments.trust_remote_code
    revision = run.get("model_revision")
    sources = {"start": resolve(start, "the run's --model_name_or_path", revision, trust_remote_code=trust)}
    sources |= {path.name: resolve(str(path), trust_remote_code=trust) for path in checkpoints(folder)}
    test = load_test_split(script_args)
    test = test.select(range(min(len(test), arguments.max_prompts)))
    proxies = resolve_rewards(arguments, columns=test.column_names)
    (truth,) = resolve_reward_functions(
        arguments.eval_reward_funcs[:1], "--eval_reward_funcs", columns=test.column_names, trust_remote_code=trust,
        judge=arguments,
    )  # fmt: skip
    tokenizer = load_tokenizer(sources["start"])
    room = context_length(sources["start"])
    refuse_columns(test, script_args.dataset_name, dict.fromkeys(OPTION_COLUMNS, "isn't used here. Remove it."))
    rows = prompt_rows(test, script_args.dataset_name, tokenizer, arguments.max_new_tokens, room)
    prompts = rows["prompt"][:]
    if not start_run(__file__, arguments.output_dir, script_args, arguments, engine_args, model_args):
        return

    scorer = Scorer(truth, proxies, arguments, model_args, reward_columns(rows))
    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.per_device_eval_batch_size, arguments.seed,
        make_sampler(engine_args, arguments.output_dir, list(sources.values())),
    )  # fmt: skip
    most = max(1, arguments.best_of_n)
    points, policies = measure_policies(sources, prompts, scorer, sampling, most, model_args)
    chosen = best_of_n_points(prompts, policies["start"].candidates, scorer, most) if most > 1 else []
    best, keep = to_keep(points)
    results = {
        "ppo": [point.to_json() for point in points],
        "best_of_n": [point.to_json() for point in chosen],
        "fits": {"ppo": fits_of(points, "ppo"), "best_of_n": fits_of(chosen, "best_of_n")},
        "gold": truth.name if truth.name != STARTER else "gold score",
        "proxy": proxy_name(proxies, arguments),
        "best": points[best].name,
        "keep": points[keep].name,
    }
    output = Path(arguments.output_dir)
    write_json(output / "overoptimization.json", results)
    write_jsonl(output / "samples.jsonl", [
        {"prompt": prompt, **{name: policy.chosen.texts[number] for name, policy in policies.items()}}
        for number, prompt in enumerate(prompts)
    ])  # fmt: skip
    save_figure(overoptimization_figure(results), output / "overoptimization.png")
    for point in (*points, *chosen):
        print(f"{point.name:>15}  sqrt(KL) {point.sqrt_kl:.2f}  gold {point.gold:.3f}  proxy {point.proxy:.3f}")
    print(f"Best by the truth: {results['best']}. Keep {results['keep']}: {KEEP_RULE}.")
    finish_run(arguments.output_dir, {})
    write_report(arguments.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
