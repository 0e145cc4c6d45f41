"""Every chat template that TRL ships, and others as people write them, by their labels: `make templates`.

    python tests/templates.py --only qwen3 gptoss

Each template renders conversations of one turn and of several, with reasoning, tools, a system message, and replies
that begin with a newline or a space, under a byte-level tokenizer and one that puts a space in front of words. Both
have the template's control tokens. For each learned message, what the labels decode to must be the message's text and
the token that ends it, in the template's own form (such as "<think>" around its reasoning) and without a word of
another message; and the tokens in front must be those that PPO, collect and chat sample behind, and the text that
transformers renders. The table goes to docs/templates.md.
"""

import argparse
import copy
import datetime
import io
import json
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import jinja2
import transformers
import trl
from conftest import assistant, user
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.comparisons import Messages
from rlhf.data.encoding import conversation_rows, encode_prompt, template_options
from rlhf.errors import InputError
from rlhf.starter.model import starter_model

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(trl.__file__).parent / "chat_templates"
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CUT = "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant'%s else m['content'] }}"
HEADED = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
WRITTEN = {
    "ChatML": CHATML + ASK,
    "no generation prompt": CHATML,
    "no end token": HEADED + "{% if add_generation_prompt %}### assistant:\n{% endif %}",
    "header ends in newlines": HEADED.replace(":\n", ":\n\n")
    + "{% if add_generation_prompt %}### assistant:\n\n{% endif %}",
    "eos behind the last message only": HEADED
    + "{% if add_generation_prompt %}### assistant:\n{% else %}{{ eos_token }}{% endif %}",
    "text behind the end": CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n---\n") + ASK,
    "history rendered anew": "{{ messages | length }} messages\n" + CHATML + ASK,
    "earlier reasoning is cut": CHATML.replace("{{ m['content'] }}", CUT % " and not loop.last") + ASK,
    "reasoning is always cut": CHATML.replace("{{ m['content'] }}", CUT % "") + ASK,
    "reasoning begins in the prompt": CHATML.replace("{{ m['content'] }}", CUT % " and not loop.last")
    + ASK.replace("assistant\n", "assistant\n<think>\n"),
    "system is refused": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + CHATML + ASK,
    "system is left out": CHATML.replace("in messages", "in messages if m['role'] != 'system'") + ASK,
    "replies are left out": CHATML.replace("in messages", "in messages if m['role'] != 'assistant'") + ASK,
    "date": "Today is {{ strftime_now('%Y-%m-%d %H:%M:%S') }}.\n" + CHATML + ASK,
    "tools": "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    + CHATML.replace("{{ m['content'] }}", "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}"
                     "<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}") + ASK,
    "trimmed": CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}") + ASK,
    "parts": CHATML.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}") + ASK,
    "[INST]": INST,
    "loops without end": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + CHATML,
    "multiplies without end": "{{ 'x' * 99999999999 }}" + CHATML,
    "wrong type": "{{ messages + 1 }}",
}  # fmt: skip

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"town": "Oslo"}}}
THOUGHT = "<think>\nLet me count.\n</think>\n\nSeven."
# no word of one message is in another
CASES: dict[str, dict[str, Any]] = {
    "single": {"messages": user("How many?") + assistant("Seven.")},
    "multi": {"messages": user("How many?") + assistant("Seven.") + user("Then what?") + assistant("A pause.")},
    "newline": {"messages": user("How many?") + assistant("\n\nSeven.")},
    "space": {"messages": user("How many?") + assistant(" Seven.") + user("Then what?") + assistant("  A pause.")},
    "system": {"messages": [{"role": "system", "content": "Be brief"}, *user("How many?"), *assistant("Seven.")]},
    "think": {"messages": user("How many?") + assistant(THOUGHT)},
    "think, multi": {
        "messages": user("How many?") + assistant(THOUGHT) + user("Then what?")
        + assistant("<think>\nHm, rest.\n</think>\n\nA pause.")
    },
    "reasoning": {
        "messages": [*user("How many?"), {**assistant("Seven.")[0], "reasoning_content": "Let me count."}]
    },
    "tools": {
        "messages": [
            *user("How many?"),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "name": "get_weather", "content": "sunny"},
            *assistant("Seven."),
        ],
        "tools": [WEATHER],
    },
    "begins with a reply": {"messages": assistant("Welcome!") + user("How many?") + assistant("Seven.")},
}  # fmt: skip
# what a template writes around a reply's text: tags, channels and recipients
AROUND = re.compile(r"</?think>|final|analysis|thought|to=(user|self)|assistant")
CONTROL = re.compile(
    r"<[|｜][^<>\s'\"{}]*?[|｜]>|<[|]?[a-z_]+[|]>|<[|][a-z_]+>|</?s>|<eos>|<bos>|\[gMASK\]|<sop>|"
    r"<(?:start|end)_of_[a-z]+>"
)


def all_templates() -> dict[str, str]:
    """Templates by name."""
    return {**{file.stem: file.read_text() for file in sorted(FOLDER.glob("*.jinja"))}, **WRITTEN}


def byte_level_tokenizer() -> PreTrainedTokenizerBase:
    """The starter's."""
    return AutoTokenizer.from_pretrained(starter_model())


def spaced_tokenizer() -> PreTrainedTokenizerBase:
    """One that puts a space in front of words, as SentencePiece does, and begins texts with bos."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    texts = [json.dumps(CASES), json.dumps(WRITTEN), *(file.read_text() for file in FOLDER.glob("qwen*"))]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=[chr(number) for number in range(32, 127)],
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([f"<0x{byte:02X}>" for byte in range(256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


TOKENIZERS = {"byte-level": byte_level_tokenizer, "spaced": spaced_tokenizer}


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that has the template and its control tokens."""
    own = copy.deepcopy(tokenizer)
    controls = sorted({match.group() for match in CONTROL.finditer(template)} | {"<|im_start|>", "<|im_end|>"})
    own.add_special_tokens({"additional_special_tokens": controls})
    own.add_tokens([tag for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>") if tag in template])
    own.chat_template = template
    return own


def check(tokenizer: PreTrainedTokenizerBase, case: dict[str, Any]) -> str:
    """`exact`, `refused: ...` or `WRONG: ...` for a conversation under the tokenizer's template."""
    messages: Messages = case["messages"]
    try:
        rows = conversation_rows(tokenizer, messages, options=template_options(case))
    except InputError as error:
        return f"refused: {error}"
    except Exception:
        return "TRACEBACK: " + traceback.format_exc().strip().rsplit("\n", 1)[-1][:200]
    spans = [(row["input_ids"], span) for row in rows for span in _spans(row["labels"])]
    replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(replies):
        return f"WRONG: {len(spans)} replies have labels, not {len(replies)}"
    for number, (ids, (start, end)) in zip(replies, spans, strict=True):
        learned = tokenizer.decode(ids[start:end])
        for control in tokenizer.all_special_tokens:
            learned = learned.replace(control.replace("▁", " "), control)  # the spaced decoder's
        if problem := _wrong_text(tokenizer, messages, number, learned):
            return f"WRONG: {problem}"
        if number and (problem := _wrong_prompt(tokenizer, case, number, ids[:start])):
            return f"WRONG: {problem}"
    return "exact"


def _spans(labels: list[int]) -> list[tuple[int, int]]:
    edges = [n for n in range(len(labels) + 1)
             if (n < len(labels) and labels[n] != -100) != (n > 0 and labels[n - 1] != -100)]  # fmt: skip
    return list(zip(edges[::2], edges[1::2], strict=True))


def _wrong_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, number: int, learned: str) -> str | None:
    message, controls = messages[number], "|".join(map(re.escape, sorted(tokenizer.all_special_tokens, key=len)[::-1]))
    if not re.search(rf"({controls})\Z", learned):
        return f"{learned!r} ends with no control token"
    if re.search(rf"({controls})\s+({controls})\Z", learned):
        return f"{learned!r} has a token behind the end"
    rest = " ".join(re.sub(controls, " ", learned).split())
    if message.get("tool_calls"):
        return None if all(part in rest for part in ("get_weather", "Oslo")) and "sunny" not in rest else rest
    content = message["content"]
    thoughts = [content.partition("</think>")[0]] if "</think>" in content else []
    texts = [content.rpartition("</think>")[2], *thoughts, message.get("reasoning_content", "")]
    for text in texts:
        text = " ".join(text.removeprefix("<think>").split())
        if text not in rest:
            return f"{text!r} is not in {learned!r}"
        rest = rest.replace(text, " ", 1)
    rest = AROUND.sub(" ", rest)
    return f"{learned!r} has {rest.strip()!r}" if rest.strip() else None


def _wrong_prompt(
    tokenizer: PreTrainedTokenizerBase, case: dict[str, Any], number: int, before: list[int]
) -> str | None:
    messages, dated = case["messages"][:number], "strftime_now('%Y-%m-%d %H" in str(tokenizer.chat_template)
    options = template_options(case)
    if not dated and before != encode_prompt(tokenizer, messages, options):
        return "the prompt isn't that of PPO and collect"
    try:
        theirs = tokenizer.apply_chat_template(
            messages, tools=case.get("tools"), tokenize=False, add_generation_prompt=True
        )
    except (jinja2.TemplateError, TypeError):  # rendered by TRL's training variant
        return None
    ids = tokenizer(theirs, add_special_tokens=False)["input_ids"]
    if dated:
        same = tokenizer.decode(before)[40:] == tokenizer.decode(ids)[40:]
        return None if same else "the prompt isn't transformers'"
    said = all(message["content"] in theirs for message in messages if message["role"] == "user")
    without = tokenizer.apply_chat_template(messages, tools=case.get("tools"), tokenize=False)
    same = before == ids or (without == theirs and before[: len(ids)] == ids)  # the template has no generation prompt
    return None if same or not said else f"the prompt {tokenizer.decode(before)!r} isn't transformers' {theirs!r}"


def table(found: dict[str, dict[str, str]]) -> str:
    """The page docs/templates.md."""
    words = [text.split(":")[0] for cells in found.values() for text in cells.values()]
    counts = ", ".join(f"{words.count(kind)} {kind}" for kind in dict.fromkeys(words))
    page = io.StringIO()
    print("# Chat templates\n", file=page)
    print(
        f"Written by `make templates` with transformers {transformers.__version__}, TRL {trl.__version__} and jinja2 "
        f"{jinja2.__version__} on {datetime.date.today()}. tests/templates.py says what *exact* means. The first "
        f"{len(list(FOLDER.glob('*.jinja')))} templates are those that TRL ships; the others are written as people "
        f"write them. {len(found)} templates with {len(CASES)} conversations each, under {len(TOKENIZERS)} "
        f"tokenizers: {counts}. *Refused* comes with the line that the user gets.\n", file=page,
    )  # fmt: skip
    print("| template | " + " | ".join(CASES) + " |\n|-" + "|-" * len(CASES) + "|", file=page)
    lines: dict[str, int] = {}
    for name, cells in found.items():
        shown = []
        for case in CASES:
            outcomes = list(dict.fromkeys(cells[f"{case} {kind}"] for kind in TOKENIZERS))
            shown.append(", ".join(
                text if text == "exact" else f"{text.split(':')[0]} [{lines.setdefault(text, len(lines) + 1)}]"
                for text in outcomes
            ))  # fmt: skip
        print(f"| {name} | " + " | ".join(shown) + " |", file=page)
    print(file=page)
    for text, number in lines.items():
        print(f"{number}. {text}", file=page)
    return page.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TEMPLATE", help="these alone; docs/ is left as it is")
    arguments = parser.parse_args()
    tokenizers = {name: make() for name, make in TOKENIZERS.items()}
    found: dict[str, dict[str, str]] = {}
    for name, template in all_templates().items():
        if arguments.only and name not in arguments.only:
            continue
        own = {kind: with_template(tokenizer, template) for kind, tokenizer in tokenizers.items()}
        found[name] = {f"{case} {kind}": check(own[kind], row) for case, row in CASES.items() for kind in own}
        words = [text.split(":")[0] for text in found[name].values()]
        print(f"{name}: " + ", ".join(f"{words.count(kind)} {kind}" for kind in dict.fromkeys(words)), flush=True)
        for case, text in found[name].items():
            if text != "exact" and (arguments.only or not text.startswith("refused")):
                print(f"    {case}: {text}", flush=True)
    if not arguments.only:
        (ROOT / "docs" / "templates.md").write_text(table(found), encoding="utf-8")
    bad = sum(text.startswith(("WRONG", "TRACEBACK")) for cells in found.values() for text in cells.values())
    sys.exit(f"{bad} are wrong" if bad else 0)


if __name__ == "__main__":
    main()
