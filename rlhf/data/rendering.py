"""Messages → the text that a chat template makes of them, with nothing lost.

- A control token written inside a message, a tool or a template's variable stays text: private-use characters stand in
  for it while the template is rendered.
- A prompt ends where a reply begins, also under templates that ignore `add_generation_prompt`.
- A reply is what the template puts behind its prompt, up to the token that ends it. Where the template leaves out a
  part of the reply, TRL's training variant of the template is tried, and then the conversation is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import trl
from transformers import PreTrainedTokenizerBase

from rlhf.comparisons import Messages
from rlhf.data.templates import TemplateLimitError, render_template
from rlhf.errors import InputError

STAND_IN = re.compile("\U000f0000([0-9]+)\U000f0001")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
REASONING_TAGS = ("<think>", "</think>")  # left to the template in an assistant's message, even if they are special
SCAFFOLD = re.compile(r"(\s|<[^<>\s]{1,40}>)*")  # what a prompt may hold in front of a reply, such as "<think>\n"


# around a chat template: cuts off what follows the end of the last turn, or puts eos there if the template ends no turn
CLOSE = (
    "{% set conversation %}{{ '' }}",
    "{% endset %}{{ conversation if add_generation_prompt else conversation.rstrip() }}",
    "{% endset %}{{ conversation if add_generation_prompt else conversation.rstrip() + eos_token }}",
)


class TemplateOptions(NamedTuple):
    """What a template reads besides the messages."""

    tools: list[Any] | None = None
    variables: Mapping[str, Any] = MappingProxyType({})


class _Facts(NamedTuple):
    """What is known of a tokenizer and its chat template."""

    controls: frozenset[int]
    hide: re.Pattern[str]  # control tokens
    hide_in_reply: re.Pattern[str]  # the same without REASONING_TAGS
    end: re.Pattern[str]  # control tokens in a row, followed by nothing but control tokens and whitespace
    any_control: re.Pattern[str]  # added tokens in a row
    special: dict[str, str]  # variables such as bos_token
    adds_space: bool  # whether a text gets a space in front (SentencePiece)


class _Habits(NamedTuple):
    """How a chat template renders an ordinary conversation."""

    parts: bool  # whether it wants a message's content as a list of parts
    prompt: str  # generation prompt
    header: str  # what it puts in front of a reply without a generation prompt
    end: str  # control tokens that end a reply
    after: str  # what it puts behind the end, such as a newline


_known_facts: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, _Facts]] = WeakKeyDictionary()
_known_habits: WeakKeyDictionary[PreTrainedTokenizerBase, dict[object, _Habits]] = WeakKeyDictionary()


def facts(tokenizer: PreTrainedTokenizerBase) -> _Facts:
    """The tokenizer's control tokens and what follows from them, computed once."""
    state = (len(tokenizer), tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    known = _known_facts.get(tokenizer)
    if known is not None and known[0] == state:
        return known[1]
    ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids |= set(tokenizer.all_special_ids)
    controls = sorted(tokenizer.convert_ids_to_tokens(sorted(ids)), key=len, reverse=True)
    tokens = tokenizer.tokenize("a")
    new = _Facts(
        controls=frozenset(ids),
        hide=_pattern(controls),
        hide_in_reply=_pattern([control for control in controls if control not in REASONING_TAGS]),
        end=_end(controls),
        any_control=_row_of(sorted({*controls, *tokenizer.get_added_vocab()}, key=len, reverse=True)),
        special=dict(tokenizer.special_tokens_map),
        adds_space=bool(tokens) and tokens[0].startswith("▁"),
    )
    _known_facts[tokenizer] = (state, new)
    _known_habits.pop(tokenizer, None)
    return new


def _pattern(controls: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(control) for control in [*controls, "\U000f0000", "\U000f0001"]))


def _row_of(tokens: list[str]) -> re.Pattern[str]:
    return re.compile(f"(?:{'|'.join(map(re.escape, tokens)) or '(?!)'})+")


def _end(tokens: list[str]) -> re.Pattern[str]:
    one = "|".join(map(re.escape, tokens)) or "(?!)"
    return re.compile(rf"(?:{one})+(?=(?:\s|{one})*\Z)")


class RenderedChat:
    """A conversation, ready to be rendered.

    Args:
        messages: `content` may be text, a list of text parts, or missing beside tool calls.
        options: see `TemplateOptions`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, messages: Messages, options: TemplateOptions | None = None
    ) -> None:
        self.tokenizer, self.facts = tokenizer, facts(tokenizer)
        self.hidden: list[str] = []  # control tokens that the stand-ins stand for, by number
        tools, variables = options or TemplateOptions()
        self.tools = self._safe(tools, self.facts.hide)
        self.variables = self._safe(dict(variables), self.facts.hide)
        self.messages: Messages = [
            self._safe(
                {key: _joined(value) if key == "content" else value for key, value in message.items()},
                self.facts.hide_in_reply if message["role"] == "assistant" else self.facts.hide,
            )
            for message in messages
        ]
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several by name
            template = template["tool_use"] if tools and "tool_use" in template else template.get("default")
        if template is None:
            raise InputError("The tokenizer has no chat template. Give one with --chat_template_path.")
        self.template: str = template
        self.habits = self._habits() if messages else None

    def prompt(self, count: int) -> str:
        """The text of the first `count` messages with the generation prompt, behind which a reply is sampled.

        Raises:
            InputError: if the template refuses them, or leaves out a text of theirs.
        """
        text = self._text(count, True)
        for number in range(count):
            self._need_whole(number, text)
        for name in _names(self.tools or []):
            if name not in text:
                raise InputError(f"The chat template leaves out the tool {name!r}. Give one with a place for tools.")
        for name in self.variables:
            if not re.search(rf"\b{re.escape(name)}\b", self.template):
                raise InputError(f"chat_template_kwargs: the chat template reads no variable {name!r}. Remove it.")
        return text

    def reply(self, number: int) -> tuple[str, str, str, str]:
        """The prompt of message `number`, the message's text behind it, the control tokens that end it, and the rest.

        The end is empty if the template puts no control token behind the message. The rest is what follows, such as a
        newline.

        Raises:
            InputError: if the template refuses the messages, leaves out a part of this one, or renders it so that its
                beginning can't be found.
        """
        prompt, problem = self._prompt_of(number), ""
        for template, messages in self._variants(number + 1):
            try:
                whole = self._render(template, messages, False)
            except Exception as error:  # whatever a template raises
                problem = problem or self._refusal(number + 1, error)
                continue
            opening = self._generation_prompt()
            text = _behind(prompt, whole, opening)
            if text and number and opening.strip() and text.startswith(opening):
                text = text[len(opening) :]  # of a template that opens no turn behind a tool's result, but renders one
            if text is None:
                problem = problem or (
                    "The chat template renders the conversation differently once it is answered, so that the reply "
                    "can't be found. Give another one with --chat_template_path."
                )
            elif lost := _lost(messages[number], prompt, text):
                problem = problem or (
                    f"The chat template leaves out {lost[0]} ({self._shown(lost[1])}) of the assistant's message "
                    f"{number}. Give one that renders it (--chat_template_path), or remove it from the row."
                )
            else:
                return prompt, *self._split(text, messages[number].get("content"))
        raise InputError(problem)

    def whole(self) -> str:
        """The text of all messages without a generation prompt."""
        return self._text(len(self.messages), False)

    def _prompt_of(self, number: int) -> str:
        """The prompt of a message. A conversation's first message has the generation prompt alone in front."""
        if number:
            return self.prompt(number)
        whole, opening = self._text(1, False), self._generation_prompt()
        if not opening or opening not in whole:
            raise InputError(
                "The conversation begins with the assistant's message, and the chat template shows no prompt in front "
                "of it. Begin with the user's."
            )
        return whole[: whole.index(opening) + len(opening)]

    def _generation_prompt(self) -> str:
        assert self.habits is not None
        return self.habits.prompt or self.habits.header

    def _split(self, text: str, content: object) -> tuple[str, str, str]:
        """A reply's text without its end, the end, and what follows, such as a newline."""
        assert self.habits is not None
        usual = self.habits.end
        if usual and (place := text.rfind(usual)) >= 0:
            after = text[place + len(usual) :].strip()
            if after == self.habits.after or not self.facts.any_control.sub("", after).strip():
                return text[:place], usual, text[place + len(usual) :]
        if found := self.facts.end.search(text):
            return text[: found.start()], found.group(), text[found.end() :]
        if (
            isinstance(content, str)
            and content
            and (place := text.rfind(content)) >= 0
            and not text[place + len(content) :].strip()
        ):
            return text[: place + len(content)], "", text[place + len(content) :]
        return text.rstrip(), "", text[len(text.rstrip()) :]

    def _need_whole(self, number: int, text: str) -> None:
        """Refuse a template that leaves out a text that isn't the assistant's, or the name of a called tool."""
        message = self.messages[number]
        content = message.get("content")
        if message["role"] != "assistant" and isinstance(content, str) and not _within(content, text):
            raise InputError(
                f"The chat template leaves out the {message['role']} message {self._shown(content)}. Give another "
                "one with --chat_template_path."
            )
        for name in _names(message.get("tool_calls") or []):
            if name not in text:
                raise InputError(f"The chat template leaves out the tool call {name!r}. Give one that renders it.")

    def _text(self, count: int, prompt: bool) -> str:
        problem = ""
        for template, messages in self._variants(count):
            try:
                text = self._render(template, messages, prompt)
            except Exception as error:  # whatever a template raises
                problem = problem or self._refusal(count, error)
                continue
            header = self.habits.header if self.habits and prompt else ""
            return text + header
        raise InputError(problem)

    def _render(self, template: str, messages: Messages, prompt: bool) -> str:
        if self.habits and self.habits.parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message.get("content"), str)
                else message
                for message in messages
            ]
        return render_template(
            template, messages, tools=self.tools, add_generation_prompt=prompt,
            **{**self.facts.special, **self.variables},
        )  # fmt: skip

    def _variants(self, count: int) -> Iterator[tuple[str, Messages]]:
        """The template and the messages as they are; then, for templates that stumble over them, as they could be."""
        messages = self.messages[:count]
        yield self.template, messages
        empty = any(message.get("content") is None for message in messages)
        called = any(message.get("tool_calls") for message in messages)
        for content in ("", None) if empty else ():
            yield self.template, [{"content": content, **_without_none(message)} for message in messages]
        if called:
            yield self.template, [_with_text_arguments(message) for message in messages]
            if empty:
                yield self.template, [{"content": None, **_with_text_arguments(message)} for message in messages]
        if training := training_template(self.template):
            yield training, messages
            for content in ("", None) if empty else ():
                yield training, [{"content": content, **_without_none(message)} for message in messages]

    def _refusal(self, count: int, error: Exception) -> str:
        roles = " → ".join(message["role"] for message in self.messages[:count][-8:])
        why = str(error).strip().rstrip(".")[:200] or type(error).__name__
        stopped = isinstance(error, (TemplateLimitError, RecursionError, MemoryError))
        what = "was stopped at" if stopped else "refuses"
        return (
            f"The model's chat template {what} a conversation of {roles}: {why}. Correct the conversation, or give "
            "another template with --chat_template_path."
        )

    def _safe(self, value: Any, pattern: re.Pattern[str]) -> Any:
        """Plain data with stand-ins for control tokens."""
        if isinstance(value, str):
            return pattern.sub(self._hide, value)
        if isinstance(value, dict):
            return {self._safe(key, pattern): self._safe(part, pattern) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._safe(part, pattern) for part in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        return str(value)

    def _shown(self, text: str) -> str:
        """The beginning of a text, for an error."""
        return repr(STAND_IN.sub(lambda match: self.hidden[int(match[1])], text).strip()[:40])

    def _hide(self, match: re.Match[str]) -> str:
        self.hidden.append(match.group())
        return f"\U000f0000{len(self.hidden) - 1}\U000f0001"

    def _habits(self) -> _Habits:
        known = _known_habits.setdefault(self.tokenizer, {})
        if self.template not in known:
            known[self.template] = _habits_of(self.tokenizer)
        return known[self.template]


def _habits_of(tokenizer: PreTrainedTokenizerBase) -> _Habits:
    """Try a template on a short conversation."""
    asked, answered = [{"role": "user", "content": "Kq7"}], [{"role": "assistant", "content": "Zw3"}]
    probe = RenderedChat.__new__(RenderedChat)
    probe.tokenizer, probe.facts, probe.hidden, probe.tools, probe.variables = tokenizer, facts(tokenizer), [], None, {}
    template = tokenizer.chat_template
    probe.template = template["default"] if isinstance(template, dict) else template
    for parts in (False, True):
        probe.habits, probe.messages = _Habits(parts, "", "", "", ""), [*asked, *answered]
        try:
            plain, prompt, whole = (probe._text(*what) for what in ((1, False), (1, True), (2, False)))
        except InputError:
            continue
        if "Kq7" in plain:
            opening = prompt[_fork(plain, prompt) :]
            text = _behind(prompt, whole, opening) or ""
            header = text.partition("Zw3")[0] if "Zw3" in text and not opening else ""
            probe.habits = _Habits(parts, opening, header if header.strip() else "", "", "")
            found = probe.facts.any_control.search(text, text.find("Zw3") + 3)
            if found and "Zw3" in text:
                return probe.habits._replace(end=found.group(), after=text[found.end() :].strip())
            return probe.habits
    return _Habits(False, "", "", "", "")


def _behind(prompt: str, whole: str, opening: str) -> str | None:
    """What `whole` has behind `prompt`, whose last part is the generation prompt `opening`; None if it isn't found."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    fork = _fork(prompt, whole)
    # a template may open the reasoning in the prompt, and render a reply without any
    if len(prompt) - fork <= len(opening) and SCAFFOLD.fullmatch(prompt, fork):
        return whole[fork:]
    # or it may render what was before differently
    return whole[whole.rindex(opening) + len(opening) :] if opening and opening in whole else None


def _fork(one: str, other: str) -> int:
    """Where two texts begin to differ; never inside of a tag.

    >>> _fork("a<think>", "a</think>b"), _fork("ab", "abc")
    (1, 2)
    """
    place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if place == min(len(one), len(other)):
        return place
    tag = one.rfind("<", 0, place)
    return tag if tag > one.rfind(">", 0, place) and not re.search(r"\s", one[tag:place]) else place


def _lost(message: dict[str, Any], prompt: str, text: str) -> tuple[str, str] | None:
    """The field that a reply's text lacks of its message, and its value; it may begin in the prompt, as "<think>"."""
    fields = [("content", message.get("content"))]
    fields += [(name, message[name]) for name in REASONING_FIELDS if message.get(name) is not None][:1]
    for name, value in fields:
        if isinstance(value, str) and not _within(value, text, prompt):
            return repr(name), value
    for call in message.get("tool_calls") or []:
        for part in _strings(call.get("function", call) if isinstance(call, dict) else call):
            if not _within(part, text):
                return "a part of 'tool_calls'", part
    return None


def _within(needle: str, text: str, before: str = "") -> bool:
    """Whether a text holds another, whatever whitespace is around and between words, as it is or as JSON."""
    if needle.strip() in text:
        return True
    squeezed = "".join(text.split())
    for form in (needle, json.dumps(needle)[1:-1], json.dumps(needle, ensure_ascii=False)[1:-1]):
        wanted = "".join(form.split())
        overlap = "".join(before[-2 * len(form) - 100 :].split())[-(len(wanted) - 1) :] if len(wanted) > 1 else ""
        if wanted in overlap + squeezed:
            return True
    return False


def _strings(value: object) -> Iterator[str]:
    """The texts of a tool call: its name, and its arguments as texts."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value) if value.lstrip()[:1] in ("{", "[") else None
        except ValueError:
            parsed = None
        if parsed is None:
            yield value
        else:
            yield from _strings(parsed)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in ("id", "type", "index"):
                yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _names(tools: list[Any]) -> list[str]:
    """The names of tools or tool calls."""
    found = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return [tool["name"] for tool in found if isinstance(tool, dict) and isinstance(tool.get("name"), str)]


def _joined(content: object) -> object:
    """A content as text, if it is a list of text parts."""
    parts = content if isinstance(content, list) else []
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "".join(texts) if parts and len(texts) == len(parts) else content


def _without_none(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as JSON text instead of data, or the other way round."""
    calls = []
    for call in message.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and "arguments" in function:
            given = function["arguments"]
            try:
                other = json.loads(given) if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            except ValueError:
                other = given
            call = {**call, "function": {**function, "arguments": other}}
        calls.append(call)
    return {**_without_none(message), **({"tool_calls": calls} if calls else {})}


def training_template(template: str) -> str | None:
    """TRL's training variant of a chat template, closed where that is."""
    opened = template.removeprefix(CLOSE[0])
    for end in CLOSE[1:] if opened != template else ():
        if opened.endswith(end) and (training := _training_templates().get(opened.removesuffix(end))):
            return CLOSE[0] + training + end
    return _training_templates().get(template)


def close_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the chat template end a conversation with the token that ends its last reply, or else with eos.

    A reward model trained here reads its score there. With the template that is saved beside it, plain transformers
    read it there too, and a reward model from elsewhere is read where its own template ends.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        tokenizer.chat_template = {name: _closed(tokenizer, part) for name, part in template.items()}
    elif template is not None:
        tokenizer.chat_template = _closed(tokenizer, template)


def _closed(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    if template.startswith(CLOSE[0]):
        return template
    tokenizer.chat_template = template  # to try it alone
    chat = RenderedChat(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    try:
        _, _, end, rest = chat.reply(1)
    except InputError:  # a template for conversations of another kind
        end, rest = "unknown", "unknown"
    if end and not rest:
        return template
    return CLOSE[0] + template.removesuffix("\n") + CLOSE[1 if end else 2]


@cache
def _training_templates() -> dict[str, str]:
    """TRL's training variants by the chat templates that they stand for."""
    folder = Path(trl.__file__).parent / "chat_templates"
    files = {file.stem: file for file in folder.glob("*.jinja")}
    return {
        files[name].read_text(encoding="utf-8"): files[f"{name}_training"].read_text(encoding="utf-8")
        for name in files
        if f"{name}_training" in files
    }
