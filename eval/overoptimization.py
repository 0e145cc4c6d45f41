"""Over-optimization: where the reward model stops telling the truth, and which checkpoint of a PPO run to keep.

    accelerate launch eval/overoptimization.py --model_name_or_path outputs/ppo
    accelerate launch eval/overoptimization.py --model_name_or_path outputs/qwen-ppo \
        --eval_reward_funcs Skywork/Skywork-Reward-V2-Qwen3-0.6B --output_dir outputs/qwen-overoptimization

Every checkpoint of the run replies to held-out prompts, and its replies are scored by the reward it was trained on (the
proxy) and by the truth: the starter's gold score, or for other datasets the first of --eval_reward_funcs. The same is
done for best-of-n of the model that the run started from. Written are overoptimization.json, with both scores against
sqrt(KL), the curves of Gao et al. 2022 fitted to them, and the checkpoint to keep; samples.jsonl; and a picture. Keep
checkpoints with --save_total_limit when training. What is not given here is taken from the run.
"""

import math
import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from trl import ModelConfig, ScriptArguments

from eval.drawing.figures import overoptimization_figure, save_figure
from eval.measuring.comparison import sample_replies, split
from eval.measuring.replies import loaded_model, reply_logprobs
from eval.report import write_report
from eval.stats.fits import CurveKind, best_of_n, best_of_n_kl, fit, to_keep
from eval.stats.intervals import interval
from rlhf.comparisons import as_message
from rlhf.data.datasets import load_splits
from rlhf.data.encoding import encode_prompt
from rlhf.data.rows import prompt_rows
from rlhf.errors import InputError, report_errors
from rlhf.models.generation import Sampling
from rlhf.models.sources import Source, context_length, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.ppo import PPOConfig
from rlhf.rewards import RewardSource, call_rewards, load_reward, resolve_reward, resolve_rewards
from rlhf.run.arguments import parse
from rlhf.run.files import write_json, write_jsonl
from rlhf.run.folders import checkpoints, finish_run, read_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.starter.model import STARTER

PUBLIC = ("mean", "low", "high", "n")


@dataclass
class OverOptimizationArguments:
    """What is sampled and scored. Rewards, reply length and temperature are the run's unless they are given."""

    output_dir: str = field(default="outputs/overoptimization", metadata={"help": "Folder for the results."})
    reward_model_path: str | None = field(default=None, metadata={"help": "The proxy. Default: the run's reward."})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": "More of the proxy, as in ppo.py."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each reward."})
    eval_reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "The truth: a reward that was not trained on. Default: the starter's gold."}
    )
    best_of_n: int = field(default=16, metadata={"help": "Largest n of best-of-n; below 2: none."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest reply, in tokens."})
    temperature: float | None = field(default=None, metadata={"help": "Sampling temperature."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Replies to sample at once."})
    max_prompts: int = field(default=208, metadata={"help": "Use at most this many held-out prompts."})
    seed: int = field(default=42, metadata={"help": "Seed of sampling."})


def read_ppo_run(folder: str | None) -> dict[str, Any]:
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


def fill_in(arguments: OverOptimizationArguments, script_args: ScriptArguments, run: dict[str, Any]) -> None:
    """Take from the run what the command line leaves open."""
    if not arguments.reward_model_path and not arguments.reward_funcs:
        for name in ("reward_model_path", "reward_funcs", "reward_weights"):
            setattr(arguments, name, run.get(name))
    arguments.max_new_tokens = arguments.max_new_tokens or run.get("response_length", PPOConfig.response_length)
    arguments.temperature = arguments.temperature or run.get("temperature", PPOConfig.temperature)
    script_args.dataset_name = script_args.dataset_name or run.get("dataset_name", STARTER)
    if script_args.dataset_name == STARTER:
        arguments.eval_reward_funcs = arguments.eval_reward_funcs or [STARTER]
    if not arguments.eval_reward_funcs:
        raise InputError("--eval_reward_funcs: give a reward that the run was not trained on, to stand for the truth.")


class Scorer:
    """Scores replies by the truth (`gold`) and by what was trained on (`proxy`); models are loaded once."""

    def __init__(
        self, gold: RewardSource, proxies: list[RewardSource], weights: list[float] | None, model_args
    ) -> None:
        self.functions = [load_reward(source, model_args) for source in (gold, *proxies)]
        self.weights = weights or [1.0] * len(proxies)

    def __call__(self, prompts: list, replies: dict[str, list]) -> tuple[list[float], list[float]]:
        completions = [as_message(prompt, text) for prompt, text in zip(prompts, replies["texts"], strict=True)]
        columns = call_rewards(self.functions, prompts, completions, replies["ids"])
        sums = [[math.fsum(s) if isinstance(s, list) else s or 0.0 for s in column] for column in columns]
        proxy = [sum(map(operator.mul, self.weights, row)) for row in zip(*sums[1:], strict=True)]
        return sums[0], proxy


def measure_policies(
    sources: dict[str, Source], rows: Any, scorer: Scorer, model_args: ModelConfig, arguments: Any
) -> tuple[list[dict[str, Any]], dict[str, list[str]], dict[str, Any]]:
    """One point per model: gold, proxy and KL to the first model. And all replies, by model; and the candidates."""
    prompts, points = rows["prompt"][:], []
    texts: dict[str, list[str]] = {}
    sampled, own = {}, {}
    most = max(1, arguments.best_of_n)
    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.per_device_eval_batch_size, arguments.seed
    )
    for name, source in sources.items():
        with loaded_model(source, model_args) as (model, tokenizer):
            ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
            sampled[name] = sample_replies(model, tokenizer, ids, 1 if texts else most, sampling, name)
            if not texts:
                candidates, sampled[name] = sampled[name], {k: v[::most] for k, v in sampled[name].items()}
            own[name] = reply_logprobs(model, tokenizer, ids, sampled[name]["ids"], description=f"{name}: itself").sums
            texts[name] = sampled[name]["texts"]
    reference = next(iter(sources))
    with loaded_model(sources[reference], model_args) as (model, tokenizer):
        for name in sources:
            under = own[name] if name == reference else reply_logprobs(
                model, tokenizer, ids, sampled[name]["ids"], description=f"{name} under {reference}"
            ).sums  # fmt: skip
            gold, proxy = scorer(prompts, sampled[name])
            kl = [a - b for a, b in zip(own[name], under, strict=True)]
            points.append({"name": name, "kl": interval(kl), "gold": interval(gold), "proxy": interval(proxy)})
    return points, texts, candidates


def best_of_n_points(prompts: list, candidates: dict[str, Any], scorer: Scorer, most: int) -> list[dict[str, Any]]:
    """One point per n = 1, 2, 4, ... up to `most`."""
    repeated = [prompt for prompt in prompts for _ in range(most)]
    gold, proxy = (np.asarray(split(scores, prompts)) for scores in scorer(repeated, candidates))
    points, n = [], 1
    while n <= most:
        kl = best_of_n_kl(n)
        scores = {key: interval(best_of_n(proxy, values, n).tolist()) for key, values in
                  (("gold", gold), ("proxy", proxy))}  # fmt: skip
        points.append({"name": f"best of {n}", "kl": {"mean": kl, "low": kl, "high": kl, "n": len(prompts)}, **scores})
        n *= 2
    return points


def fits_of(points: list[dict[str, Any]], kind: CurveKind) -> dict[str, Any]:
    """The curve of each score in points of one kind; the first of them is the start."""
    start, later = points[0], [point for point in points[1:] if point["kl"]["mean"] > 0]
    distance = np.sqrt([point["kl"]["mean"] for point in later])
    fits = {}
    for score in ("gold", "proxy"):
        gains = [np.asarray(point[score]["values"]) - np.asarray(start[score]["values"]) for point in later]
        fits[score] = fit(distance, np.stack(gains), kind) if len(later) > 2 else None
    return fits


def public(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points without the single values, and with sqrt(KL)."""
    return [
        {
            "name": point["name"],
            "sqrt_kl": math.sqrt(max(0.0, point["kl"]["mean"])),
            **{key: {name: point[key][name] for name in PUBLIC} for key in ("kl", "gold", "proxy")},
        }
        for point in points
    ]


def main() -> None:
    script_args, arguments, model_args = parse(__file__, ScriptArguments, OverOptimizationArguments, ModelConfig)
    need_one_process(__file__)
    folder = model_args.model_name_or_path
    run = read_ppo_run(folder)
    fill_in(arguments, script_args, run)
    start = run.get("sft_model_path") or run.get("model_name_or_path")
    sources = {"start": resolve(start, "the run's --model_name_or_path", run.get("model_revision"))}
    sources |= {path.name: resolve(str(path)) for path in checkpoints(folder)}
    proxies = resolve_rewards(arguments)
    truth = resolve_reward(arguments.eval_reward_funcs[0], "--eval_reward_funcs", allow_functions=True)
    _, test = load_splits(script_args, "held_out")
    test = test.select(range(min(len(test), arguments.max_prompts)))
    tokenizer = load_tokenizer(sources["start"])
    room = context_length(sources["start"])
    rows = prompt_rows(test, script_args.dataset_name, tokenizer, arguments.max_new_tokens, room)
    if not start_run(__file__, arguments.output_dir, script_args, arguments, model_args):
        return

    scorer = Scorer(truth, proxies, arguments.reward_weights, model_args)
    policies, texts, candidates = measure_policies(sources, rows, scorer, model_args, arguments)
    chosen = best_of_n_points(rows["prompt"][:], candidates, scorer, arguments.best_of_n)
    best, keep = to_keep(policies)
    results = {
        "ppo": public(policies),
        "best_of_n": public(chosen),
        "fits": {"ppo": fits_of(policies, "ppo"), "best_of_n": fits_of(chosen, "best_of_n")},
        "gold": truth.name if truth.name != STARTER else "gold score",
        "proxy": " + ".join(Path(proxy.name).name for proxy in proxies),
        "best": policies[best]["name"],
        "keep": policies[keep]["name"],
    }
    output = Path(arguments.output_dir)
    write_json(output / "overoptimization.json", results)
    replies = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
    write_jsonl(output / "samples.jsonl", [{"prompt": p, **r} for p, r in zip(rows["prompt"][:], replies, strict=True)])
    save_figure(overoptimization_figure(results), output / "overoptimization.png")
    for point in (*results["ppo"], *results["best_of_n"]):
        print(f"{point['name']:>15}  sqrt(KL) {point['sqrt_kl']:.2f}  " + "  ".join(
            f"{score} {point[score]['mean']:.3f} [{point[score]['low']:.3f}, {point[score]['high']:.3f}]"
            for score in ("gold", "proxy")))  # fmt: skip
    print(
        f"Best by the truth: {results['best']}. Keep: {results['keep']} (no worse beyond doubt, and nearer the start)."
    )
    finish_run(arguments.output_dir, {})
    print(f"Report: {write_report(arguments.output_dir)}")


if __name__ == "__main__":
    with report_errors():
        main()
