"""What a judge judges by: a principle, or a rubric of several criteria; and the questions that it is asked."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlhf.comparisons import Prompt
from rlhf.errors import InputError
from rlhf.run.ranges import PositiveInt

JUDGE = "judge"  # its name among rewards and labelers
PRINCIPLE = "A good reply is helpful, honest and harmless."
RATINGS = tuple("1234567")  # one token each, in any tokenizer
LETTERS = ("A", "B")
LEAST_ANSWERED = 0.1  # with less probability than this on all answers together, the judge has not answered


@dataclass
class JudgeArguments:
    """Which model judges, and by what.

    Args:
        judge_model_name_or_path: folder or Hub id, or the server's name for a model. Default: the starter, or the one
            model that the server has.
        judge_base_url: of a server with OpenAI's API, such as `vllm serve`. The key is read from the environment
            variable OPENAI_API_KEY, if there is one.
        judge_max_new_tokens: what the server may write. Up to 16 the judge answers at once, if the server can begin its
            answer; with more it may think first.
        principle: one criterion, in words.
        rubric: a YAML file of several, see `criteria_of`.
    """

    judge_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The judge: folder, Hub id or the server's name. Default: starter."}
    )
    judge_base_url: str | None = field(
        default=None,
        metadata={"help": "Judge on a server with OpenAI's API, such as http://127.0.0.1:8000/v1 (vllm serve)."},
    )
    judge_max_new_tokens: PositiveInt = field(
        default=16,
        metadata={"help": "Tokens that a judge on a server may write. Above 16 it may think first."},
    )
    principle: str | None = field(
        default=None, metadata={"help": f"What the judge judges by, in words. Default: '{PRINCIPLE}'"}
    )
    rubric: str | None = field(
        default=None, metadata={"help": "YAML file of several principles with weights, in place of --principle."}
    )


class Criterion(NamedTuple):
    """One thing that replies are judged by."""

    name: str
    text: str
    weight: float


def criteria_of(args: JudgeArguments) -> list[Criterion]:
    """The criteria that the flags give: the principle, or what is in the rubric's file.

    The file maps a name to a text, or to a `text` and a `weight`, which is 1 by default:

        upbeat: The reply is cheerful.
        short: {text: The reply is one sentence., weight: 0.5}

    Raises:
        InputError: for an empty principle, both flags, or a file with anything else in it.
    """
    if args.rubric is None:
        text = PRINCIPLE if args.principle is None else args.principle
        if not text.strip():
            raise InputError("--principle: is empty. Describe what makes one reply better than another.")
        return [Criterion(JUDGE, text.strip(), 1.0)]
    if args.principle is not None:
        raise InputError("--principle and --rubric: give one of them.")
    try:
        content = yaml.safe_load(Path(args.rubric).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--rubric {args.rubric}: can't be read ({' '.join(str(error).split())[:200]}).") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"--rubric {args.rubric}: is no mapping. Give a line for each criterion, as in 'upbeat: The "
                         "reply is cheerful.'")  # fmt: skip
    return [_criterion(args.rubric, name, entry) for name, entry in content.items()]


def _criterion(file: str, name: object, entry: Any) -> Criterion:
    given = entry if isinstance(entry, dict) else {"text": entry}
    text, weight = given.get("text"), given.get("weight", 1.0)
    if not isinstance(text, str) or not text.strip() or set(given) - {"text", "weight"}:
        raise InputError(f"--rubric {file}: {name}: needs a text, or a text and a weight; found {str(entry)[:80]}.")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e6:
        raise InputError(f"--rubric {file}: {name}: a weight is a number above 0; found {weight!r}. Say in the text "
                         "what to avoid.")  # fmt: skip
    return Criterion(str(name), text.strip(), float(weight))


def rating_question(criterion: str, prompt: Prompt, reply: str) -> str:
    """Asks for a rating of one reply, one of `RATINGS`."""
    return (
        f"{criterion}\n\nConversation:\n{_conversation(prompt)}\n\nReply:\n{fenced(reply)}\n\n"
        f"Rate the reply by this from {RATINGS[0]} (worst) to {RATINGS[-1]} (best). Answer with the number only."
    )


def choice_question(criterion: str, prompt: Prompt, first: str, second: str) -> str:
    """Asks for the better of two replies, one of `LETTERS`."""
    return (
        f"{criterion}\n\nConversation:\n{_conversation(prompt)}\n\nReply A:\n{fenced(first)}\n\nReply B:\n"
        f"{fenced(second)}\n\nWhich reply is better? Answer with the letter A or B only."
    )


def _conversation(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return fenced(prompt)
    return fenced("\n".join(f"{message['role']}: {message['content']}" for message in prompt))


def fenced(text: str) -> str:
    """A text between two fences that are longer than any in it, so that it can't seem to end before its end.

    >>> fenced("a").split(), fenced("```")[:4]
    (['```', 'a', '```'], '````')

    Source: https://spec.commonmark.org/0.31.2/#fenced-code-blocks
    """
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", text))])
    return f"{fence}\n{text}\n{fence}"


def expected_rating(probabilities: list[float]) -> float | None:
    """The mean of the ratings under the probabilities of `RATINGS`; None if the judge has not answered.

    >>> expected_rating([0, 0, 0, 0.2, 0.2, 0, 0]), expected_rating([0.05, 0, 0, 0, 0, 0, 0])
    (4.5, None)

    Source: Liu et al., G-Eval, arXiv 2303.16634, section 2, equation 1, here with the probabilities scaled to 1.
    """
    total = sum(probabilities)
    if total < LEAST_ANSWERED:
        return None
    return sum(int(rating) * share for rating, share in zip(RATINGS, probabilities, strict=True)) / total
