"""Problems: the prompt that asks for a solution, and the answer that a solution ends with.

A dataset of problems has `prompt` (text or messages), and may have `answer` and `solution`, a worked one. A missing or
empty `answer` is unknown.
"""

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from rlhf.comparisons import Messages

Row = dict[str, Any]  # of a dataset, by column
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
SENTENCE_END = re.compile(r"[.!?]\s+(?=[A-Z])")
# GSM8K ends its solutions with `#### 18`; models and the starter's solutions say `The answer is 18.`
MARK = re.compile(r"####|answer is:?", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------- answers


def plain_answer(text: str) -> str:
    """An answer in the form that is compared: a number without commas or trailing zeros, or lower-case words.

    A text with exactly one number gives that number. An equation gives its right side.

    >>> plain_answer("$1,234.50"), plain_answer("3 + 4 = 7 apples"), plain_answer("3/4"), plain_answer("Yes.")
    ('1234.5', '7', '3/4', 'yes')
    """
    text = text.rpartition("=")[2].strip() or text
    first = SENTENCE_END.split(text)[0]  # models add sentences: `The answer is 7. Tom has 3 more.`
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
    """The answer that a solution ends with: the text after the last `####` or `answer is`, else the last number.

    >>> final_answer("3 + 4 = 7. The answer is 7."), final_answer("so it is 7"), final_answer("I don't know.")
    ('7', '7', None)
    """
    marks = list(MARK.finditer(text))
    if marks:
        lines = text[marks[-1].end() :].strip().splitlines()
        return plain_answer(lines[0]) or None if lines else None
    numbers = NUMBER.findall(text)
    return plain_answer(numbers[-1]) if numbers else None


def known_answer(row: Row) -> str | None:
    """The `answer` of a row in the form that is compared, or None.

    >>> known_answer({"answer": "18.0"}), known_answer({"answer": " "})
    ('18', None)
    """
    answer = row.get("answer")
    return None if answer is None or not str(answer).strip() else final_answer(f"#### {answer}")


def majority(answers: Sequence[str | None]) -> str | None:
    """The most common answer, and the first of equally common ones; None without any answer.

    >>> majority(["2", None, "3", "3"]), majority(["2", "3"]), majority([None])
    ('3', '2', None)

    Self-consistency: Wang et al. 2022, https://arxiv.org/abs/2203.11171; as a label: Huang et al. 2022,
    https://arxiv.org/abs/2210.11610, section 3.1.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


# ---------------------------------------------------------------------------------------------- prompts


def question(prompt: str | Messages, answer: str | None = None) -> Messages:
    """A problem as messages, with `answer` as STaR's hint for rationalization.

    >>> question("1 + 1?", answer="2")
    [{'role': 'user', 'content': '1 + 1? (The answer is 2.)'}]
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if answer is None:
        return messages
    return [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']} (The answer is {answer}.)"}]


def worked_example(row: Row, hint: bool = False) -> Messages:
    """An example for the prompt: the problem and its worked solution, which ends with the answer."""
    # remove the calculator annotations of GSM8K's solutions, such as <<16-3-4=9>>
    solution = re.sub(r"<<.*?>>", "", row["solution"]).split("####")[0].strip()
    text = f"{solution} The answer is {row['answer']}."
    return [*question(row["prompt"], row["answer"] if hint else None), {"role": "assistant", "content": text}]


def few_shot(examples: list[Row], row: Row, hint: bool = False) -> Messages:
    """The conversation that asks for a solution: worked examples as earlier turns, then the problem.

    Args:
        hint: give the answer, in the examples too.
    """
    turns = [message for example in examples for message in worked_example(example, hint)]
    return [*turns, *question(row["prompt"], row["answer"] if hint else None)]
