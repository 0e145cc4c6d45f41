"""What eval/compare.py computes: every model's replies, log-probabilities, scores and metrics."""

import functools
import itertools
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from eval.measuring.few_shot import with_turns
from eval.measuring.judges import judge_replies
from eval.measuring.replies import LogProbs, ModelReplies, Replies, reply_logprobs, sample_replies, use_model
from eval.metrics import metric, metric_results
from eval.stats.fits import best_of_n_kl
from eval.stats.intervals import Interval, JsonObject, interval
from rlhf.comparisons import Labeler, Messages, Prompt
from rlhf.data.datasets import Row
from rlhf.data.encoding import (
    OPTION_COLUMNS,
    encode_conversation,
    encode_prompt,
    encode_reply,
    is_seq2seq,
    options_of_rows,
    template_options,
)
from rlhf.models.generation import Sampling
from rlhf.models.sources import Source
from rlhf.rewards import RewardSource, load_reward
from rlhf.run.files import read_json, write_json
from rlhf.starter.scorer import gold_scores

# all sampled replies with their token ids, so that an interrupted evaluation continues with the same ones
REPLIES_FILE = "replies.json"
VALUES_FILE = "values.jsonl"  # of a finished comparison, see ComparedModels.values


class ComparisonPlan(NamedTuple):
    """Which models are compared, on which prompts, and how they reply."""

    sources: dict[str, Source]  # by name
    reference: str  # one of them, which the others are compared with
    rows: Dataset  # `prompt`, and `completion` where people's replies are known
    has_gold: bool  # the gold score is the truth; for the starter's prompts only
    sampling: Sampling
    best_of_n: int  # replies of the reference that best-of-n chooses from; below 2: no best-of-n
    model_args: ModelConfig
    folder: Path  # of the run
    turns: dict[str, Messages]  # by model: turns of a chat that it reads in front of each prompt, if any

    @property
    def prompts(self) -> list[Prompt]:
        return self.rows["prompt"][:]

    def encode(self, tokenizer: PreTrainedTokenizerBase, name: str | None) -> list[list[int]]:
        """Token ids of the prompts as a model reads them.

        Args:
            name: of the model; None: one that is not compared, and has no turns.
        """
        prompts = [with_turns(prompt, self.turns.get(name or "", [])) for prompt in self.prompts]
        columns = {column: self.rows[column] for column in OPTION_COLUMNS if column in self.rows.column_names}
        options = options_of_rows(columns, len(self.rows))
        return [encode_prompt(tokenizer, prompt, option) for prompt, option in zip(prompts, options, strict=True)]

    def replies_of(self, name: str) -> int:
        """How many replies a model gives to each prompt."""
        return max(1, self.best_of_n) if name == self.reference else 1


class ComparedModels(NamedTuple):
    """Everything measured. Lists are in the order of the prompts."""

    prompts: list[Prompt]
    texts: dict[str, list[str]]  # by model
    metrics: dict[str, dict[str, Interval]]  # by model and metric
    reward_accuracy: JsonObject  # all results of reward_accuracy, with the gold score as the truth
    judged: dict[str, dict[str, list[int]]]  # numbers of the prompts of a judge's metric, by model and metric

    def values(self) -> list[JsonObject]:
        """The values behind every mean over prompts, one row per model and metric.

        Rows have `model`, `metric`, `prompts` (their numbers), and for each of these `values` and `weights`: the mean
        is sum(values) / sum(weights), and for the perplexity its exponential.
        """
        return [
            {
                "model": name, "metric": key, "prompts": self.judged[name].get(key, list(range(len(self.prompts)))),
                "values": cell.sample.values, "weights": cell.sample.weights,
            }
            for name, cells in self.metrics.items()
            for key, cell in cells.items()
            if cell.sample and key != "distinct_2"  # whose values are those of groups
        ]  # fmt: skip


def compare(plan: ComparisonPlan, reward: RewardSource | None, judges: dict[str, Labeler]) -> ComparedModels:
    """Measure every model on the prompts.

    Args:
        reward: what `resolve_reward` found for --reward_model_path, if that is given.
        judges: who compares each model's replies with the reference's, by name.
    """
    prompts, reference, count = plan.prompts, plan.reference, plan.best_of_n
    measured = _sample_all(plan)
    replies = {name: one.chosen for name, one in measured.items()}
    candidates = measured[reference].candidates
    scores: dict[str, list[float]] = {}
    accuracy: JsonObject = {}
    if reward is not None:
        scores, by_prompt = _score_all(plan, reward, replies, candidates)
        accuracy = agreement_with_gold(candidates, by_prompt) if plan.has_gold else {}
        if count > 1:
            replies[f"best_of_{count}"] = _best_of(candidates, by_prompt)
            scores[f"best_of_{count}"] = [max(row) for row in by_prompt]
    own = {name: one.own for name, one in measured.items()}
    under_base, under_reference = _logprobs_under_base_and_reference(plan, replies, own)
    texts = {name: reply.texts for name, reply in replies.items()}
    lengths = {name: [len(ids) for ids in reply.ids] for name, reply in replies.items()}
    judged = {judge: judge_replies(labeler, prompts, texts, lengths, reference) for judge, labeler in judges.items()}
    metrics = {}
    for name, reply in replies.items():
        metrics[name] = {
            **({"gold_score": metric("gold_score", predictions=reply.texts)} if plan.has_gold else {}),
            **({"reward_score": metric("reward_score", predictions=scores[name])} if scores else {}),
            **{
                f"{kind}/{judge}": result
                for judge, said in judged.items()
                for kind, result in said[name].metrics.items()
            },
            "kl": metric("kl", predictions=own[name].sums, references=under_reference[name].sums)
            if name in own
            else interval([best_of_n_kl(count)] * len(prompts)),
            "reply_length": metric("reply_length", predictions=lengths[name]),
            "distinct_2": metric("distinct_2", predictions=reply.texts),
            "repetition": metric("repetition", predictions=reply.texts),
            "perplexity": metric("perplexity", predictions=under_base[name].sums, references=under_base[name].tokens),
            **(_metrics_of_human_replies(measured[name].human, plan.rows) if name in measured else {}),
        }
    numbers = {
        name: {f"{kind}/{judge}": of for judge, said in judged.items() for kind, of in said[name].prompts.items()}
        for name in replies
    }
    return ComparedModels(prompts, texts, metrics, accuracy, numbers)


def _sample_all(plan: ComparisonPlan) -> dict[str, ModelReplies]:
    """Replies of every model by its name. One model is in memory at a time."""
    sampled = read_json(plan.folder / REPLIES_FILE) or {}
    return {
        name: use_model(source, plan.model_args, functools.partial(_sample_one, plan, name, sampled))
        for name, source in plan.sources.items()
    }


def _sample_one(
    plan: ComparisonPlan,
    name: str,
    sampled: dict[str, JsonObject],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> ModelReplies:
    """Sample one model's replies, add them to `sampled` and write them; or read them from there.

    Args:
        sampled: fields of Replies by model, the content of the replies' file.
    """
    prompts = plan.encode(tokenizer, name)
    if name not in sampled:
        replies = sample_replies(model, tokenizer, prompts, plan.replies_of(name), plan.sampling, name)
        sampled[name] = replies._asdict()
        write_json(plan.folder / REPLIES_FILE, sampled)  # people may be judging these replies when a run is interrupted
    candidates = Replies(**sampled[name])
    chosen = candidates.first_of(plan.replies_of(name))
    own = reply_logprobs(model, tokenizer, prompts, chosen.ids, description=f"{name}: own log-probabilities")
    human, rows = None, plan.rows
    if "completion" in rows.column_names and not isinstance(rows[0]["completion"], str):
        targets = [_human_reply(tokenizer, row) for row in rows]
        human = reply_logprobs(model, tokenizer, prompts, targets, description=f"{name}: human replies")
    return ModelReplies(candidates, chosen, own, human)


def _human_reply(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Token ids of the reply that a row brings along, as SFT would learn them."""
    if is_seq2seq(tokenizer):
        return encode_reply(tokenizer, row["completion"][-1]["content"])
    prompt, options = row["prompt"], template_options(row)
    labels = encode_conversation(tokenizer, prompt + row["completion"], len(prompt), options)["labels"]
    return [label for label in labels if label != -100]


def _score_all(
    plan: ComparisonPlan, source: RewardSource, replies: dict[str, Replies], candidates: Replies
) -> tuple[dict[str, list[float]], list[list[float]]]:
    """Scores of every model's replies by its name, and those of all the reference's candidates, prompt by prompt."""
    prompts, count = plan.prompts, plan.replies_of(plan.reference)
    score = load_reward(source, plan.model_args, batch_size=plan.sampling.batch_size)
    scores = {name: score(prompts, reply.texts) for name, reply in replies.items() if name != plan.reference}
    flat = score([prompt for prompt in prompts for _ in range(count)], candidates.texts)
    by_prompt = [flat[start : start + count] for start in range(0, len(flat), count)]
    return {**scores, plan.reference: [row[0] for row in by_prompt]}, by_prompt


def _best_of(candidates: Replies, by_prompt: list[list[float]]) -> Replies:
    """Each prompt's candidate with the highest score; the first if several have it."""
    best = [max(range(len(row)), key=row.__getitem__) for row in by_prompt]
    numbers = [first * len(row) + n for first, (row, n) in enumerate(zip(by_prompt, best, strict=True))]
    return Replies([candidates.ids[n] for n in numbers], [candidates.texts[n] for n in numbers])


def _logprobs_under_base_and_reference(
    plan: ComparisonPlan, replies: dict[str, Replies], own: dict[str, LogProbs]
) -> tuple[dict[str, LogProbs], dict[str, LogProbs]]:
    """Log-probabilities of all replies under the base, and of the models' own replies under the reference.

    The base is the model named `base`, or else the one that the reference is an adapter of.
    """
    base = "base" if "base" in plan.sources else None
    return (
        _logprobs_under(base, plan, replies, own),
        _logprobs_under(plan.reference, plan, {name: replies[name] for name in plan.sources}, own),
    )


def _logprobs_under(
    judge: str | None, plan: ComparisonPlan, replies: dict[str, Replies], own: dict[str, LogProbs]
) -> dict[str, LogProbs]:
    """Log-probabilities of replies under one model, by the name of the model that gave them.

    Those of the model's own replies are in `own` and are not computed again.

    Args:
        judge: name of the model; None: what the reference is an adapter of.
    """
    reference = plan.sources[plan.reference]
    source = plan.sources[judge] if judge else Source(reference.base, reference.base, None, None, None)
    same = (source.base, source.adapter, plan.turns.get(judge or ""))
    known = {
        name: own[name]
        for name in own
        if (plan.sources[name].base, plan.sources[name].adapter, plan.turns.get(name)) == same
    }

    def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, LogProbs]:
        prompts = plan.encode(tokenizer, judge)
        return {
            name: reply_logprobs(model, tokenizer, prompts, reply.ids, description=f"{name} under {judge or 'base'}")
            for name, reply in replies.items()
            if name not in known
        }

    return {**known, **use_model(source, plan.model_args, measure)}


def _metrics_of_human_replies(logprobs: LogProbs | None, rows: Dataset) -> dict[str, Interval]:
    """How well a model predicts people's replies: loss per token, and bits per byte of their text."""
    if logprobs is None:
        return {}
    sizes = [float(len(completion[0]["content"].encode())) for completion in rows["completion"]]
    return {
        "human_loss": interval([-value for value in logprobs.sums], [float(count) for count in logprobs.tokens]),
        "human_bits_per_byte": metric("bits_per_byte", predictions=logprobs.sums, references=sizes),
    }


def agreement_with_gold(replies: Replies, scores: list[list[float]]) -> JsonObject:
    """Accuracy and calibration of the reward model on pairs of replies, with the noise-free gold score as the truth.

    Pairs with equal gold scores are left out.

    Args:
        scores: the reward model's, by prompt; `replies` has the same replies in one list.

    Returns:
        all results of the metric reward_accuracy; empty if there is no pair.
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
    return metric_results(
        "reward_accuracy", predictions=chosen, references=rejected, length_differences=longer, groups=groups
    )


def differences_of(metrics: dict[str, dict[str, Interval]], seed: int) -> dict[str, dict[str, Interval]]:
    """Paired differences of every two models, `<later>_minus_<earlier>`, in every metric both have.

    A length-controlled win rate has none: it is one fit, not a mean.
    """
    return {
        f"{second}_minus_{first}": {
            name: cell.minus(metrics[first][name], seed)
            for name, cell in metrics[second].items()
            if name in metrics[first] and cell.is_paired_with(metrics[first][name])
        }
        for first, second in itertools.combinations(metrics, 2)
    }
