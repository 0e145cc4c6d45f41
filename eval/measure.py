"""What eval/compare.py computes: replies, log-probabilities and scores of every model, and the metrics of them."""

import functools
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import evaluate
from datasets import Dataset
from trl import ModelConfig

from eval.intervals import difference, interval
from eval.replies import LogProbs, Replies, loaded, reply_logprobs
from rlhf.data import encode_conversation, encode_prompt
from rlhf.feedback import Prompt
from rlhf.generation import sample_completions
from rlhf.models import Source
from rlhf.rewards import RewardSource, load_reward
from rlhf.starter import STARTER, gold_scores

HERE = Path(__file__).parent
# The order of the table, and how a value is shown.
FORMATS = {
    "gold_score": ".3f",
    "reward_score": ".3f",
    "win_rate": ".1%",
    "kl": ".2f",
    "reply_length": ".1f",
    "distinct_2": ".3f",
    "perplexity": ".1f",
    "human_loss": ".3f",
}


class Comparison(NamedTuple):
    """Everything measured. Lists are in the order of the prompts."""

    prompts: list[Prompt]
    texts: dict[str, list[str]]  # by model
    metrics: dict[str, dict[str, dict[str, Any]]]  # by model and metric, results of eval.intervals.interval
    reward_accuracy: dict[str, Any]  # agreement of the reward model with the gold score on the reference's replies


def metric(name: str, **inputs: Any) -> dict[str, Any]:
    """Compute the `evaluate` module eval/<name>."""
    return _module(name).compute(**inputs)


@functools.cache
def _module(name: str) -> evaluate.EvaluationModule:
    return evaluate.load(str(HERE / name))


def compare(
    sources: dict[str, Source],
    rows: Dataset,
    dataset: str,
    reward: RewardSource | None,
    model_args: ModelConfig,
    arguments: Any,
) -> Comparison:
    """Measure every model on the prompts of `rows`.

    Args:
        sources: the models by name; `arguments.reference` is one of them.
        dataset: where the prompts come from; the gold score is the truth for the starter's only.
        reward: what `resolve_reward` says of `arguments.reward_model_path`, if that is given.
        arguments: CompareArguments of eval/compare.py.
    """
    prompts = rows["prompt"][:]
    replies, candidates, own, human = _replies(sources, rows, model_args, arguments)
    is_starter, reference, count = dataset == STARTER, arguments.reference, arguments.best_of_n
    scores: dict[str, list[float]] = {}
    accuracy: dict[str, Any] = {}
    if reward is not None:
        score = load_reward(reward, model_args, batch_size=arguments.per_device_eval_batch_size)
        scores = {name: score(prompts, reply.texts) for name, reply in replies.items() if name != reference}
        by_prompt = _split(
            score([prompt for prompt in prompts for _ in range(max(1, count))], candidates.texts), prompts
        )
        scores[reference] = [row[0] for row in by_prompt]
        accuracy = _reward_accuracy(candidates.texts, by_prompt) if is_starter else {}
        if count > 1:
            name, best = f"best_of_{count}", [max(range(count), key=row.__getitem__) for row in by_prompt]
            replies[name] = Replies(
                [row[n] for row, n in zip(_split(candidates.ids, prompts), best, strict=True)],
                [row[n] for row, n in zip(_split(candidates.texts, prompts), best, strict=True)],
            )
            scores[name] = [max(row) for row in by_prompt]
    under_base, under_reference = _under(sources, rows, replies, own, model_args, arguments)
    metrics = {}
    for name, reply in replies.items():
        judged = gold_scores(reply.texts) if is_starter else scores.get(name)
        opponent = gold_scores(replies[reference].texts) if is_starter else scores.get(reference)
        metrics[name] = {
            **({"gold_score": metric("gold_score", predictions=reply.texts)} if is_starter else {}),
            **({"reward_score": metric("reward_score", predictions=scores[name])} if scores else {}),
            **({"win_rate": metric("win_rate", predictions=judged, references=opponent)} if judged else {}),
            "kl": _kl(name, own, under_reference, count),
            "reply_length": metric("reply_length", predictions=[len(ids) for ids in reply.ids]),
            "distinct_2": metric("distinct_2", predictions=reply.texts),
            "perplexity": metric("perplexity", predictions=under_base[name].sums, references=under_base[name].tokens),
            **({"human_loss": _loss(human[name])} if name in human else {}),
        }
    return Comparison(prompts, {name: reply.texts for name, reply in replies.items()}, metrics, accuracy)


def _split(flat: list[Any], prompts: list[Prompt]) -> list[list[Any]]:
    """A list in pieces of equal length, one per prompt."""
    size = len(flat) // len(prompts)
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def _replies(
    sources: dict[str, Source], rows: Dataset, model_args: ModelConfig, arguments: Any
) -> tuple[dict[str, Replies], Replies, dict[str, LogProbs], dict[str, LogProbs]]:
    """Sample from every model, and measure the samples and the human replies under it.

    Returns:
        one reply per prompt by model; all best_of_n replies of the reference, prompt by prompt, of which its own entry
        has the first ones; log-probabilities of each model's replies under itself; those of the human replies.
    """
    replies, own, human = {}, {}, {}
    for name, source in sources.items():
        with loaded(source, model_args) as (model, tokenizer):
            prompts = [encode_prompt(tokenizer, prompt) for prompt in rows["prompt"]]
            count = max(1, arguments.best_of_n) if name == arguments.reference else 1
            sampled = sample_completions(
                model,
                tokenizer,
                prompts,
                max_new_tokens=arguments.max_new_tokens,
                temperature=arguments.temperature,
                num_return_sequences=count,
                batch_size=arguments.per_device_eval_batch_size,
                seed=arguments.seed,
                description=f"{name}: sampling",
            )
            flat = [ids for several in sampled for ids in several]
            everything = Replies(flat, [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in flat])
            replies[name] = Replies(everything.ids[::count], everything.texts[::count])
            if name == arguments.reference:
                candidates = everything
            own[name] = reply_logprobs(
                model, tokenizer, prompts, replies[name].ids, description=f"{name}: own log-probabilities"
            )
            if "completion" in rows.column_names and not isinstance(rows[0]["completion"], str):
                pairs = [encode_conversation(tokenizer, row["prompt"] + row["completion"]) for row in rows]
                targets = [[label for label in pair["labels"] if label != -100] for pair in pairs]
                human[name] = reply_logprobs(model, tokenizer, prompts, targets, description=f"{name}: human replies")
    return replies, candidates, own, human


def _under(
    sources: dict[str, Source],
    rows: Dataset,
    replies: dict[str, Replies],
    own: dict[str, LogProbs],
    model_args: ModelConfig,
    arguments: Any,
) -> tuple[dict[str, LogProbs], dict[str, LogProbs]]:
    """Log-probabilities of every model's replies under the base, and of `sources`' under the reference.

    The base is the model named `base`, or else the one that the reference is an adapter of.


    What `own` already has is not computed again: the base's replies under the base, the reference's under itself.
    """
    reference = sources[arguments.reference]
    base = sources.get("base") or Source(reference.base, reference.base, None, None, None)
    results = []
    for title, source, names in (("base", base, list(replies)), (arguments.reference, reference, list(sources))):
        known = {
            name: own[name]
            for name in names
            if name in sources and (sources[name].base, sources[name].adapter) == (source.base, source.adapter)
        }
        missing = [name for name in names if name not in known]
        with loaded(source, model_args) as (model, tokenizer):
            prompts = [encode_prompt(tokenizer, prompt) for prompt in rows["prompt"]]
            for name in missing:
                known[name] = reply_logprobs(
                    model, tokenizer, prompts, replies[name].ids, description=f"{name} under {title}"
                )
        results.append(known)
    return results[0], results[1]


def _kl(name: str, own: dict[str, LogProbs], under_reference: dict[str, LogProbs], count: int) -> dict[str, Any]:
    """KL to the reference. For best-of-n the bound log n - (n - 1)/n (Beirami et al., https://arxiv.org/abs/2401.01879)."""
    if name in own:
        return metric("kl", predictions=own[name].sums, references=under_reference[name].sums)
    return interval([math.log(count) - (count - 1) / count] * len(own[next(iter(own))].sums))


def _loss(logprobs: LogProbs) -> dict[str, Any]:
    return interval([-value for value in logprobs.sums], [float(count) for count in logprobs.tokens])


def _reward_accuracy(texts: list[str], scores: list[list[float]]) -> dict[str, Any]:
    """Share of reply pairs that the reward model orders as the noise-free gold score does; one value per prompt.

    Pairs with equal gold scores are left out. Prompts weigh by their number of pairs.
    """
    gold = iter(gold_scores(texts))
    agree, pairs = [], []
    for row in scores:
        truth = [next(gold) for _ in row]
        compared = [(i, j) for i, j in itertools.combinations(range(len(row)), 2) if truth[i] != truth[j]]
        if compared:
            agree.append(float(sum((row[i] > row[j]) == (truth[i] > truth[j]) for i, j in compared)))
            pairs.append(float(len(compared)))
    if not agree:
        return {}
    result = interval(agree, pairs)
    return {"accuracy": {key: result[key] for key in ("mean", "low", "high", "n")}, "pairs": int(sum(pairs))}


def differences_of(metrics: dict[str, dict[str, dict[str, Any]]], seed: int) -> dict[str, Any]:
    """Paired differences of every two models, `<later>_minus_<earlier>`, in every metric both have."""
    return {
        f"{second}_minus_{first}": {
            name: difference(metrics[second][name], metrics[first][name], seed)
            for name in metrics[second]
            if name in metrics[first]
        }
        for first, second in itertools.combinations(metrics, 2)
    }


def table_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Model names, and rows of the table: metric, then `mean [low, high]` of each model."""
    names = list(results["models"])
    rows = []
    for name, style in FORMATS.items():
        cells = [results["models"][model].get(name) for model in names]
        if any(cells):
            rows.append(
                [name]
                + [
                    f"{cell['mean']:{style}} [{cell['low']:{style}}, {cell['high']:{style}}]" if cell else ""
                    for cell in cells
                ]
            )
    return names, rows
