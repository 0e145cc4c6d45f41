"""Problems with a known answer: generated ones for the starter, what a prompt to solve them looks like, and the answer
that a solution ends with.

A dataset of problems has `prompt` (text or messages), mostly `answer`, and perhaps `solution`, a worked one. Where
`answer` is missing or empty it is unknown.
"""

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from rlhf.comparisons import Messages

NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
SENTENCE_END = re.compile(r"[.!?]\s+(?=[A-Z])")
# GSM8K ends its solutions with `#### 18`; models and the starter's solutions say `The answer is 18.`
MARK = re.compile(r"####|answer is:?", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------- answers


def plain_answer(text: str) -> str:
    """An answer in the form that is compared: a number without commas or trailing zeros, or lower-case words.

    It is a number if there is one only: 3/4 and 10:30 stay as they are. Of an equation it is the right side.
    """
    text = text.rpartition("=")[2].strip() or text
    first = SENTENCE_END.split(text)[0]  # models go on talking: `The answer is 7. Tom has 3 more.`
    text = first if NUMBER.search(first) else text
    found = NUMBER.search(text)
    if found is None or re.search(r"\d", text[: found.start()] + text[found.end() :]):
        return " ".join(text.split()).strip(" .,:;!?()*\"'$").casefold()
    try:
        number = Decimal(found.group().replace(",", ""))
    except InvalidOperation:  # digits of another script
        return found.group()
    return "0" if number == 0 else f"{number.normalize():f}"


def final_answer(text: str) -> str | None:
    """The answer that a solution ends with: what follows the last `####` or `answer is`, else the last number."""
    marks = list(MARK.finditer(text))
    if marks:
        lines = text[marks[-1].end() :].strip().splitlines()
        return plain_answer(lines[0]) or None if lines else None
    numbers = NUMBER.findall(text)
    return plain_answer(numbers[-1]) if numbers else None


def known_answer(row: dict[str, Any]) -> str | None:
    """The answer that a row of a dataset gives, in the form that is compared, or None."""
    answer = row.get("answer")
    return None if answer is None or not str(answer).strip() else final_answer(f"#### {answer}")


def majority(answers: Sequence[str | None]) -> str | None:
    """The most common answer, the one seen first among equals; None if there is no answer at all.

    Self-consistency: Wang et al. 2022, https://arxiv.org/abs/2203.11171; as a label: Huang et al. 2022,
    https://arxiv.org/abs/2210.11610, section 3.1.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


# ---------------------------------------------------------------------------------------------- prompts


def question(prompt: str | Messages, answer: str | None = None) -> Messages:
    """A problem as messages; with `answer` as the hint of STaR's rationalization."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if answer is None:
        return messages
    return [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']} (The answer is {answer}.)"}]


def solved(row: dict[str, Any], hint: bool = False) -> Messages:
    """An example for the prompt: the problem and its worked solution, which ends with the answer."""
    # GSM8K's solutions have calculator annotations, <<16-3-4=9>>, which nobody says
    solution = re.sub(r"<<.*?>>", "", row["solution"]).split("####")[0].strip()
    text = f"{solution} The answer is {row['answer']}."
    return [*question(row["prompt"], row["answer"] if hint else None), {"role": "assistant", "content": text}]


def few_shot(examples: list[dict[str, Any]], row: dict[str, Any], hint: bool = False) -> Messages:
    """The conversation that asks for a solution: worked examples as earlier turns, then the problem.

    Args:
        hint: tell the answer, in the examples too.
    """
    shown = [message for example in examples for message in solved(example, hint)]
    return [*shown, *question(row["prompt"], row["answer"] if hint else None)]
