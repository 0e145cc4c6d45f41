"""Rules that notice problems of a run and describe each in a sentence or two.

A rule looks at the metrics logged so far and returns a text or None. Thresholds are rules of thumb; the text always has
the number that crossed one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

Entry = dict[str, float]
History = list[Entry]


class Remark(NamedTuple):
    """A problem that a rule noticed at an update."""

    step: int
    name: str
    text: str


class RunLog(NamedTuple):
    """The input of a rule."""

    updates: History  # metrics of every update so far, oldest first
    evaluations: History  # metrics of every evaluation so far, with keys `eval_…`
    response_length: int  # the largest number of tokens a completion can have
    can_end: bool  # whether there is a stop token or stop string at all


def remarks(history: History, response_length: int, can_end: bool = True) -> list[Remark]:
    """The remarks of all rules on the newest logged update.

    Args:
        history: the trainer's log, oldest first.
        response_length: the largest number of tokens a completion can have.
        can_end: whether there is a stop token or stop string at all.
    """
    updates = [entry for entry in history if "objective/kl" in entry]
    if not updates:
        return []
    run = RunLog(updates, [entry for entry in history if "eval_score" in entry], response_length, can_end)
    step = int(updates[-1].get("step", len(updates)))
    said = ((rule.__name__.lstrip("_"), rule(run)) for rule in RULES)
    return [Remark(step, name, text) for name, text in said if text is not None]


def without_repeats(found: list[Remark], last: dict[str, int]) -> list[Remark]:
    """The remarks of rules that said nothing in the last ten updates.

    Args:
        last: the update of the last printed remark, by rule.
    """
    return [remark for remark in found if remark.step - last.get(remark.name, -10) >= 10]


def _kl_negative(run: RunLog) -> str | None:
    kl = run.updates[-1]["objective/kl"]
    if kl < -1.0:
        return (
            f"The KL to the reference is {kl:.1f} nats, and a true KL is never negative: completions are not sampled "
            "from the distribution that their log-probabilities are computed with. Check for a generation setting "
            "(top_k, top_p, a logits processor) that applies to one of them only."
        )
    return None


def _kl_exploding(run: RunLog) -> str | None:
    kl = run.updates[-1]["objective/kl"]
    before = run.updates[-2]["objective/kl"] if len(run.updates) > 1 else 0.0
    if kl > 30 or (len(run.updates) > 2 and kl > 10 and kl > 3 * max(before, 0.1)):
        return (
            f"The KL to the reference is {kl:.1f} nats per completion (before: {before:.1f}): the policy is leaving "
            "the SFT model, and what it writes may be nonsense that scores well. Read its samples; raise kl_coef, set "
            "adaptive_kl_target, or lower learning_rate."
        )
    return None


def _first_ratio(run: RunLog) -> str | None:
    ratio = run.updates[-1]["val/first_ratio"]
    if abs(ratio - 1) > 0.02:
        return (
            f"On the first minibatch, before any step, the ratio of new to old probabilities is {ratio:.3f} and not 1: "
            "the two are computed differently. Usual causes are dropout, other precision, or batch statistics."
        )
    return None


def _engine_drifts(run: RunLog) -> str | None:
    kl = run.updates[-1].get("sampling/kl", 0.0)
    first = run.updates[0].get("sampling/kl", 0.0)
    if kl > 0.02 or (kl > 0.002 and kl > 10 * first):
        return (
            f"The engine samples from other probabilities than the policy's: a KL of {kl:.4f} nats per token (at first "
            f"{first:.4f}). Rounding grows as the policy gets sharp; serve the model in the precision that trains, "
            "lower vllm_importance_sampling_clip_max, or sample with the own loop for comparison."
        )
    return None


def _no_reply_ends(run: RunLog) -> str | None:
    if run.can_end and run.updates[-1]["completions/ended"] == 0:
        return (
            f"No completion ended by itself within response_length={run.response_length} tokens, so scores judge "
            "unfinished texts. Check that the SFT model learned to end its replies (stop_token, stop_strings), raise "
            "response_length, or set missing_eos_score."
        )
    return None


def _entropy_collapsing(run: RunLog) -> str | None:
    first, now = run.updates[0]["policy/entropy_avg"], run.updates[-1]["policy/entropy_avg"]
    if len(run.updates) > 2 and now < 0.25 * first:
        return (
            f"The policy's entropy fell from {first:.2f} to {now:.2f} nats per token: it is becoming deterministic and "
            "stops exploring. Lower learning_rate, raise kl_coef, or set entropy_coef."
        )
    return None


def _length_running_away(run: RunLog) -> str | None:
    first, now = run.updates[0]["completions/mean_length"], run.updates[-1]["completions/mean_length"]
    if len(run.updates) > 2 and (now > 0.95 * run.response_length and now > 1.5 * first):
        return (
            f"Completions grew from {first:.0f} to {now:.0f} tokens and fill response_length={run.response_length}: "
            "the reward may like length itself. Look at the reward by length; set length_penalty or missing_eos_score."
        )
    if len(run.updates) > 2 and now < 0.4 * first:
        return (
            f"Completions shrank from {first:.0f} to {now:.0f} tokens: ending early may pay more than a good reply. "
            "Keep normalize_reward on, raise kl_coef, or read the samples."
        )
    return None


def _reward_saturated(run: RunLog) -> str | None:
    if len(run.updates) < 3:
        return None
    now = {key: value for key, value in run.updates[-1].items() if key.startswith("rewards/") and key.endswith("/std")}
    first = {key: run.updates[0].get(key, value) for key, value in now.items()}
    if not now or any(value >= max(1e-6, 0.1 * first[key]) for key, value in now.items()):
        return None  # one that has few opinions may give equal scores for a while; the others go on
    key = next(iter(now))
    return (
        f"Reward {key.split('/')[1]!r} gives nearly the same score to every completion (standard deviation "
        f"{now[key]:.2g}, at first {first[key]:.2g}): there is nothing left to learn from it. Stop here, or retrain "
        "the reward model on newer samples."
    )


def _value_explains_nothing(run: RunLog) -> str | None:
    recent = [entry["val/explained_variance"] for entry in run.updates[-5:]]
    mean = sum(recent) / len(recent)
    if len(run.updates) >= 8 and mean < 0.05 and any(recent):  # all 0: no value function, or one that isn't trained
        return (
            f"The value function explains nothing of the returns (explained variance {mean:.2f}, the mean of "
            f"{len(recent)} updates), so advantages are as noisy as without one. Raise value_learning_rate, or give it "
            "an adapter of its own (value_function)."
        )
    return None


def _reward_hacking(run: RunLog) -> str | None:
    evaluations = run.evaluations
    if len(evaluations) < 2:
        return None
    for key in evaluations[-1]:
        if not key.startswith("eval_held_out/"):
            continue
        best = max(evaluations[:-1], key=lambda entry: entry.get(key, -math.inf))
        fell = best.get(key, -math.inf) - evaluations[-1][key]
        rose = evaluations[-1]["eval_score"] - best["eval_score"]
        if fell > 0.05 * max(1e-6, abs(best[key])) and rose > 0:
            return (
                f"The reward on held-out prompts rose by {rose:.3f} while {key.split('/')[1]!r}, which is not trained "
                f"on, fell by {fell:.3f} from its best (step {best.get('step', '?')}): reward hacking. Keep that "
                "checkpoint, raise kl_coef, or collect new preferences on these samples."
            )
    return None


RULES: tuple[Callable[[RunLog], str | None], ...] = (
    _kl_negative,
    _kl_exploding,
    _first_ratio,
    _engine_drifts,
    _no_reply_ends,
    _entropy_collapsing,
    _length_running_away,
    _reward_saturated,
    _value_explains_nothing,
    _reward_hacking,
)
