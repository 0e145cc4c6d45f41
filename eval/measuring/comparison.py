"""What eval/compare.py computes: replies, log-probabilities and scores of every model, and the metrics of them."""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from eval.measuring.judges import ask, win_rates
from eval.measuring.replies import LogProbs, Replies, loaded_model, reply_logprobs
from eval.metrics import metric
from eval.stats.intervals import difference, interval
from rlhf.comparisons import Labeler, Prompt
from rlhf.data.encoding import encode_conversation, encode_prompt
from rlhf.models.generation import Sampling, sample_completions
from rlhf.models.sources import Source
from rlhf.rewards import RewardSource, load_reward
from rlhf.run.files import read_json, write_json
from rlhf.starter.labeler import gold_scores
from rlhf.starter.model import STARTER

# all sampled replies with their token ids, so that an interrupted evaluation goes on with the same ones
REPLIES_FILE = "replies.json"


class ComparedModels(NamedTuple):
    """Everything measured. Lists are in the order of the prompts."""

    prompts: list[Prompt]
    texts: dict[str, list[str]]  # by model
    metrics: dict[str, dict[str, dict[str, Any]]]  # by model and metric, results of the metric modules
    reward_accuracy: dict[str, Any]  # the reward model beside the gold score, on pairs of the reference's replies


def compare(
    sources: dict[str, Source],
    rows: Dataset,
    dataset: str,
    reward: RewardSource | None,
    judges: dict[str, Labeler],
    model_args: ModelConfig,
    arguments: Any,
) -> ComparedModels:
    """Measure every model on the prompts of `rows`.

    Args:
        sources: the models by name; `arguments.reference` is one of them.
        dataset: where the prompts come from; the gold score is the truth for the starter's only.
        reward: what `resolve_reward` says of `arguments.reward_model_path`, if that is given.
        judges: who compares each model's replies with the reference's, by name.
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
        by_prompt = split(
            score([prompt for prompt in prompts for _ in range(max(1, count))], candidates.texts), prompts
        )
        del score
        scores[reference] = [row[0] for row in by_prompt]
        accuracy = agreement_with_gold(candidates, by_prompt) if is_starter else {}
        if count > 1:
            replies[f"best_of_{count}"] = _best_of(candidates, by_prompt)
            scores[f"best_of_{count}"] = [max(row) for row in by_prompt]
    under_base, under_reference = _under(sources, rows, replies, own, model_args, arguments)
    texts = {name: reply.texts for name, reply in replies.items()}
    judged = {judge: ask(labeler, prompts, texts, reference) for judge, labeler in judges.items()}
    lengths = {name: [len(ids) for ids in reply.ids] for name, reply in replies.items()}
    metrics = {}
    for name, reply in replies.items():
        metrics[name] = {
            **({"gold_score": metric("gold_score", predictions=reply.texts)} if is_starter else {}),
            **({"reward_score": metric("reward_score", predictions=scores[name])} if scores else {}),
            **{
                f"{kind}/{judge}": result
                for judge, verdicts in judged.items()
                for kind, result in win_rates(verdicts[name], lengths[name], lengths[reference]).items()
            },
            "kl": _kl(name, own, under_reference, count),
            "reply_length": metric("reply_length", predictions=lengths[name]),
            "distinct_2": metric("distinct_2", predictions=reply.texts),
            "repetition": metric("repetition", predictions=reply.texts),
            "perplexity": metric("perplexity", predictions=under_base[name].sums, references=under_base[name].tokens),
            **(_of_human_replies(human[name], rows) if name in human else {}),
        }
    return ComparedModels(prompts, texts, metrics, accuracy)


def _best_of(candidates: Replies, by_prompt: list[list[float]]) -> Replies:
    """Of each prompt's candidates the one with the highest score; the first, if several have it."""
    best = [max(range(len(row)), key=row.__getitem__) for row in by_prompt]
    numbers = [first * len(row) + n for first, (row, n) in enumerate(zip(by_prompt, best, strict=True))]
    return Replies([candidates.ids[n] for n in numbers], [candidates.texts[n] for n in numbers])


def split(flat: list[Any], prompts: list[Prompt]) -> list[list[Any]]:
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
    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.per_device_eval_batch_size, arguments.seed
    )
    kept = Path(arguments.output_dir) / REPLIES_FILE
    sampled = read_json(kept) or {}
    for name, source in sources.items():
        with loaded_model(source, model_args) as (model, tokenizer):
            prompts = [encode_prompt(tokenizer, prompt) for prompt in rows["prompt"]]
            count = max(1, arguments.best_of_n) if name == arguments.reference else 1
            if name not in sampled:
                sampled[name] = sample_replies(model, tokenizer, prompts, count, sampling, name)
                write_json(kept, sampled)  # people may be judging these very replies when the run is interrupted
            everything = Replies(**sampled[name])
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


def sample_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    count: int,
    sampling: Sampling,
    name: str,
) -> dict[str, list[Any]]:
    """`count` replies to each prompt, prompt by prompt, as the fields of Replies.

    Args:
        name: what the progress bar calls the model.
    """
    sampled = sample_completions(
        model, tokenizer, prompts, sampling, num_return_sequences=count, description=f"{name}: sampling"
    )
    flat = [ids for several in sampled for ids in several]
    return {"ids": flat, "texts": [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in flat]}


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
        with loaded_model(source, model_args) as (model, tokenizer):
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


def _of_human_replies(logprobs: LogProbs, rows: Dataset) -> dict[str, Any]:
    """How well a model predicts what people really replied: loss per token, and bits per byte of their text."""
    sizes = [float(len(completion[0]["content"].encode())) for completion in rows["completion"]]
    return {
        "human_loss": interval([-value for value in logprobs.sums], [float(count) for count in logprobs.tokens]),
        "human_bits_per_byte": metric("bits_per_byte", predictions=logprobs.sums, references=sizes),
    }


def agreement_with_gold(replies: Replies, scores: list[list[float]]) -> dict[str, Any]:
    """Accuracy and calibration of the reward model on pairs of replies, taking the noise-free gold score as the truth.

    Pairs with equal gold scores are left out.

    Args:
        scores: the reward model's, by prompt; `replies` has the same replies in one list.
    """
    gold, lengths = iter(gold_scores(replies.texts)), iter(map(len, replies.ids))
    chosen, rejected, longer, groups = [], [], [], []
    for prompt, row in enumerate(scores):
        known = [(next(gold), score, next(lengths)) for score in row]
        for one, other in itertools.combinations(known, 2):
            if one[0] != other[0]:
                better, worse = (one, other) if one[0] > other[0] else (other, one)
                chosen.append(better[1])
                rejected.append(worse[1])
                longer.append(better[2] - worse[2])
                groups.append(prompt)
    if not chosen:
        return {}
    return metric("reward_accuracy", predictions=chosen, references=rejected, length_differences=longer, groups=groups)


def differences_of(metrics: dict[str, dict[str, dict[str, Any]]], seed: int) -> dict[str, Any]:
    """Paired differences of every two models, `<later>_minus_<earlier>`, in every metric both have."""
    return {
        f"{second}_minus_{first}": {
            name: difference(metrics[second][name], metrics[first][name], seed)
            for name in metrics[second]
            if "values" in metrics[second][name]  # a length-controlled win rate is one fit, not a mean
            and len(metrics[second][name]["values"]) == len(metrics[first].get(name, {}).get("values", []))
        }
        for first, second in itertools.combinations(metrics, 2)
    }
