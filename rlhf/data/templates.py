"""Chat templates, rendered within limits.

A chat template is a program that comes with a model, so it may loop or multiply without end. transformers' sandbox
keeps it away from files and from the interpreter, not from the processor and the memory. Here every loop, call and text
that a template makes is charged to a budget, before it is made where it could be large. The budget is counted rather
than timed: the same template and messages always give the same answer, on any thread.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, wraps
from types import BuiltinFunctionType
from typing import Any, cast

from jinja2 import Template, nodes, pass_context
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _alias_reasoning_fields, _compile_jinja_template

# One character costs 1, an item of a loop 20, a call or a filter 200: a second or two of looping, or 100 MB of text.
BUDGET = 100_000_000
ITEM = 20
CALL = 200
LARGEST = 1_000_000  # number that a call or filter takes, such as a width
LONGEST_INTEGER = 100_000  # in bits

_account = threading.local()


class TemplateLimitError(ValueError):
    """The template asks for more than the budget."""


def render_template(template: str, messages: list[dict[str, Any]], **variables: object) -> str:
    """The text that a chat template makes of messages.

    Args:
        messages: plain data; values of None are left out, as transformers does.
        variables: what else the template reads, such as `tools`, `add_generation_prompt` and `bos_token`.

    Raises:
        Exception: whatever the template raises; TemplateLimitError if it asks for too much.
    """
    _account.left = BUDGET
    known = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return _compiled(template).render(messages=_alias_reasoning_fields(known), documents=None, **variables)


def _charge(cost: int) -> None:
    _account.left -= cost
    if _account.left < 0:
        raise TemplateLimitError("it loops or writes without end")


def _size(value: object) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    return ITEM * len(value) if isinstance(value, (list, tuple, dict, range)) else 0


def _check_numbers(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise TemplateLimitError(f"it asks for {value:.3g} of something")
        if isinstance(value, str) and len(value) > 6 and re.search(r"\d{7}", value):
            raise TemplateLimitError("it asks for a width of over a million")


@pass_context
def _counted(context: Context | None, value: Any, each: int = 0) -> Any:
    """What a loop goes over, charged by its length."""
    if hasattr(value, "__len__"):
        _charge((ITEM + each) * len(value))
        return value

    def items() -> Iterator[Any]:
        for item in value:
            _charge(ITEM + each)
            yield item

    return items()


@pass_context
def _written(context: Context, value: Any) -> Any:
    """What an expression writes, charged by its length."""
    _charge(ITEM + _size(value))
    return value


class _Counting(NodeTransformer):
    """Puts the two filters above into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(cast(nodes.Expr, node.iter), "_counted", [nodes.Const(_literals(node))])
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            part if isinstance(part, (nodes.TemplateData, nodes.Const)) else _filter(cast(nodes.Expr, part), "_written")
            for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "_written")


def _filter(node: nodes.Expr, name: str, arguments: list[nodes.Expr] | None = None) -> nodes.Filter:
    return nodes.Filter(node, name, arguments or [], [], None, None, lineno=node.lineno)


def _literals(node: nodes.Node) -> int:
    return sum(len(part.data) for part in node.find_all(nodes.TemplateData))


def _limited_filter(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter that is charged for what it makes; `jinja_pass_arg` says whether the first argument is jinja's own."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def limited(*arguments: Any, **named: Any) -> Any:
        before, value, rest = arguments[:place], arguments[place], arguments[place + 1 :]
        _charge(CALL + _size(value))
        options = (*rest, *named.values())
        if name == "join" and not hasattr(value, "__len__"):
            value = list(_counted(None, value))
        if name == "format":
            _check_numbers((value, *options))
        elif name != "replace":
            _check_numbers(option for option in options if isinstance(option, int))
        _charge(_cost(name, value, options))
        result = function(*before, value, *rest, **named)
        _charge(_size(result))
        return result

    return limited


def _cost(name: str, value: Any, options: tuple[Any, ...]) -> int:
    """Characters that a filter or method makes whose result can be much longer than its arguments together."""
    if name == "replace" and len(options) > 1:
        return str(value).count(str(options[0])) * _size(options[1]) if isinstance(value, str) else 0
    if name == "join":
        separator: str | bytes = next((option for option in options if isinstance(option, str)), "")
        parts = value
        if isinstance(value, (str, bytes)) and options:  # the method: the text joins its argument
            separator, parts = value, options[0]
        if hasattr(parts, "__len__"):
            return sum(_size(part) or 20 for part in parts) + len(separator) * len(parts)
    if name in ("indent", "expandtabs", "wordwrap") and isinstance(value, str):
        widths = [option if isinstance(option, int) else _size(option) for option in options]
        return (value.count("\n") + value.count("\t") + 1) * max(widths, default=8)
    return 0


class _LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that charges for calls and operators too."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    macros: dict[str, int]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and left.bit_length() * abs(right) > LONGEST_INTEGER:
            raise TemplateLimitError("it makes a number without end")
        if operator == "*" and numbers and left.bit_length() + right.bit_length() > LONGEST_INTEGER:
            raise TemplateLimitError("it makes a number without end")
        if operator == "*" and not numbers:
            _charge(max(0, (_size(left) or 1) * right) if isinstance(right, int) else 0)
            _charge(max(0, (_size(right) or 1) * left) if isinstance(left, int) else 0)
        if operator == "%" and isinstance(left, (str, bytes)):
            _check_numbers((left if isinstance(left, str) else str(left), *(right if _size(right) else (right,))))
        if operator in "+%":
            _charge(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *arguments: Any, **named: Any) -> Any:  # type: ignore[override]
        _charge(CALL + sum(map(_size, arguments)))
        if isinstance(function, Macro):
            _charge(self.macros.get(function.name, 0))
        # the sandbox wraps str.format
        elif isinstance(method := getattr(function, "__wrapped__", function), BuiltinFunctionType):
            _check_method(method, arguments)
        result = super().call(context, function, *arguments, **named)
        _charge(_size(result))
        return result


def _check_method(method: BuiltinFunctionType, arguments: tuple[Any, ...]) -> None:
    owner, name = method.__self__, method.__name__
    _check_numbers(argument for argument in arguments if isinstance(argument, int))
    if name in ("format", "format_map"):
        _check_numbers((str(owner), *arguments))
    if name == "translate":
        raise TemplateLimitError("it calls translate, which can make a text without end")
    if name == "join" and arguments and not hasattr(arguments[0], "__len__"):
        raise TemplateLimitError("it joins something without a length")
    if isinstance(owner, (str, bytes)):
        _charge(_cost(name, owner, arguments))


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    """The template with limits. Not compiled by transformers, which would already compute constants such as 9**9**9."""
    theirs = _compile_jinja_template("").environment
    environment = _LimitedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[type(extension) for extension in theirs.extensions.values()],
    )
    environment.globals |= {name: value for name, value in theirs.globals.items() if name != "lipsum"}
    environment.globals.pop("lipsum", None)
    environment.filters |= {name: _limited_filter(value, name) for name, value in theirs.filters.items()}
    environment.filters |= {"_counted": _counted, "_written": _written}
    tree = environment.parse(template)
    environment.macros = {macro.name: _literals(macro) for macro in tree.find_all(nodes.Macro)}
    return environment.from_string(_Counting().visit(tree))
