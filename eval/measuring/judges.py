"""Judges say which of two replies is better, and some of them how good each is from 1 to 7.

Judges are labelers (rlhf/feedback/labelers.py), asked about one reply per model.
"""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from eval.metrics import metric
from eval.stats.intervals import Interval, interval
from rlhf.comparisons import Comparison, Labeler, Prompt, Rater, Task, make_task
from rlhf.errors import InputError
from rlhf.feedback.labelers import LabelerSettings, check_labeler_flags, make_labeler
from rlhf.starter.labeler import SimulatedLabeler, SimulatedRaters

JUDGES = ("gold", "simulated", "reward", "judge", "human")


class Verdicts(NamedTuple):
    """How many judgements each of N prompts' two replies won; a tie is half a win for both."""

    prompts: list[int]  # numbers of the prompts that were judged
    model: list[float]
    reference: list[float]


class JudgedReplies(NamedTuple):
    """What one judge said of one model: each metric (`win_rate`, ...) over the prompts with these numbers."""

    metrics: dict[str, Interval]
    prompts: dict[str, list[int]]  # by metric; a metric that is no mean over prompts has none


def make_judges(
    names: list[str],
    settings: LabelerSettings,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str,
    seed: int,
) -> dict[str, Labeler]:
    """The judges that --judges names; their models are found now and loaded when they are first asked.

    Raises:
        InputError: for an unknown name, model or function, or flags of a judge that is not named.
    """
    unknown = [name for name in names if name not in JUDGES]
    if unknown:
        raise InputError(f"--judges {unknown[0]}: unknown. Judges are {', '.join(JUDGES)}.")
    check_labeler_flags(names, settings, "{} to --judges")
    simulated: dict[str, Labeler] = {
        "gold": SimulatedLabeler(temperature=0.0, name="gold"),
        "simulated": SimulatedRaters(seed),
    }
    return {
        name: simulated.get(name) or make_labeler(name, settings, model_args, tokenizer, output_dir, seed)
        for name in dict.fromkeys(names)
    }


def judge_replies(
    judge: Labeler, prompts: list[Prompt], texts: dict[str, list[str]], lengths: dict[str, list[int]], reference: str
) -> dict[str, JudgedReplies]:
    """What one judge says of every model; see `ask`, `win_rates` and `rate`.

    Args:
        texts: one reply per prompt, by model.
        lengths: tokens of each.
    """
    verdicts = ask(judge, prompts, texts, reference)
    ratings = rate(judge, prompts, texts, reference) if isinstance(judge, Rater) else {}
    judged = {}
    for name in texts:
        metrics = win_rates(verdicts[name], lengths[name], lengths[reference])
        numbers = {"win_rate": verdicts[name].prompts}
        if given := ratings.get(name):
            metrics["rating"], numbers["rating"] = interval(list(given.values())), list(given)
        judged[name] = JudgedReplies(metrics, numbers)
    return judged


def ask(judge: Labeler, prompts: list[Prompt], texts: dict[str, list[str]], reference: str) -> dict[str, Verdicts]:
    """Let one judge compare every model with the reference, on every prompt, without knowing which is which.

    Two equal replies are a tie; the judge isn't asked about them.

    Args:
        texts: one reply per prompt, by model.
    """
    tasks = _tasks(prompts, texts, reference)
    if not tasks and len(texts) > 1:
        print(f"{judge.name}: every reply equals that of {reference!r}, so there was nothing to compare.")
    answers = dict(zip(tasks, judge.compare(list(tasks.values())), strict=True))
    verdicts = {}
    for name in texts:
        judged: dict[int, tuple[float, float]] = {}
        for number in range(len(prompts)):
            if (name, number) not in tasks:
                judged[number] = (0.5, 0.5)
            elif answers[name, number]:
                wins = [_wins(answer) for answer in answers[name, number]]
                judged[number] = (sum(wins), len(wins) - sum(wins))
        verdicts[name] = Verdicts(list(judged), [pair[0] for pair in judged.values()], [p[1] for p in judged.values()])
    return verdicts


def _tasks(prompts: list[Prompt], texts: dict[str, list[str]], reference: str) -> dict[tuple[str, int], Task]:
    """Each model's reply and the reference's, by model and number of the prompt, where they differ."""
    tasks = {}
    for name in texts:
        for number, prompt in enumerate(prompts):
            pair = [texts[name][number], texts[reference][number]]
            if pair[0] != pair[1]:
                tasks[name, number] = make_task("test", prompt, pair, [name, reference])
    return tasks


def rate(
    judge: Rater, prompts: list[Prompt], texts: dict[str, list[str]], reference: str
) -> dict[str, dict[int, float]]:
    """Mean rating of each model's reply by number of the prompt, over all who rated it, once `ask` has asked.

    A reply that several models gave to a prompt has the ratings of all of them. A person who rated a reply beside
    several others counts each time.

    Args:
        texts: one reply per prompt, by model.
    """
    tasks = _tasks(prompts, texts, reference)
    given: dict[tuple[int, str], list[int]] = {}
    for ((_, number), task), ratings in zip(tasks.items(), judge.ratings(list(tasks.values())), strict=True):
        for rating in ratings:
            given.setdefault((number, task.completions[rating.completion]), []).append(rating.rating)
    return {
        name: {
            number: sum(found) / len(found)
            for number, text in enumerate(texts[name])
            if (found := given.get((number, text)))
        }
        for name in texts
    }


def _wins(answer: Comparison) -> float:
    """The model's share of one answer in which its reply is the first: 1, 0, or half for a tie."""
    return 0.5 if answer.preferred == "tie" else float(answer.preferred == "first")


def win_rates(verdicts: Verdicts, lengths: list[int], reference_lengths: list[int]) -> dict[str, Interval]:
    """`win_rate` and `length_controlled_win_rate` of one model; empty if nothing was judged.

    Args:
        lengths, reference_lengths: tokens of every reply, in the order of the prompts.
    """
    if not verdicts.prompts:
        return {}
    sides = {"predictions": verdicts.model, "references": verdicts.reference}
    return {
        "win_rate": metric("win_rate", **sides),
        "length_controlled_win_rate": metric(
            "length_controlled_win_rate",
            **sides,
            prediction_lengths=[lengths[number] for number in verdicts.prompts],
            reference_lengths=[reference_lengths[number] for number in verdicts.prompts],
        ),
    }
