"""TRL's `TrlParser`, which answers mistakes in one line and takes no value that can't be right.

Every value is checked before a dataclass is made of it, whether it was typed or stands in the YAML file: its type, its
range (rlhf/run/ranges.py) and its choices. argparse checks the types and choices of typed words only.
"""

import difflib
import json
import reprlib
from argparse import Action, ArgumentTypeError, Namespace
from contextlib import suppress
from enum import Enum
from inspect import isclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from rlhf.data.paths import need_file
from rlhf.errors import InputError
from rlhf.run.ranges import check_range, ranges_of

# One setting under several names, and the words that switch it off. What is typed takes the place of what the YAML file
# says under another of these names, unless it only switches itself off.
SAME_SETTING = (
    (("gradient_checkpointing", "activation_checkpointing"), ()),
    (("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"), ()),
    (("num_train_epochs", "max_steps", "total_episodes"), ("-1",)),
    (("bf16", "fp16"), ("false", "no", "f", "n", "0")),
    (("bf16_full_eval", "fp16_full_eval"), ("false", "no", "f", "n", "0")),
    (("load_in_4bit", "load_in_8bit"), ("false", "no", "f", "n", "0")),
    (("stop_token", "stop_token_id"), ()),
    (("missing_eos_penalty", "missing_eos_score"), ()),
    (("generation_batch_size", "steps_per_generation"), ()),
)
# names that other libraries, other recipes or earlier versions have for a flag; difflib finds names that look alike
OTHER_NAMES = {
    "batch_size": ("per_device_train_batch_size", "per_device_eval_batch_size"),
    "dataset": ("dataset_name",),
    "epochs": ("num_train_epochs",),
    "eval_batch_size": ("per_device_eval_batch_size",),
    "evaluation_strategy": ("eval_strategy",),
    "init_kl_coef": ("kl_coef",),
    "lora_rank": ("lora_r",),
    "lr": ("learning_rate",),
    "max_completion_length": ("response_length", "max_new_tokens"),
    "max_new_tokens": ("response_length", "max_completion_length"),
    "max_seq_length": ("max_length",),
    "model": ("model_name_or_path", "models"),
    "per_gpu_train_batch_size": ("per_device_train_batch_size",),
    "response_length": ("max_completion_length", "max_new_tokens"),
    "reward_model": ("reward_model_path",),
    "torch_dtype": ("dtype",),
    "train_batch_size": ("per_device_train_batch_size",),
    "warmup_ratio": ("warmup_steps",),
}
BATCH = "per_device_train_batch_size, gradient_accumulation_steps and num_mini_batches"
# fields that a library computes and overwrites, so that a value given here would be ignored
COMPUTED = {
    "batch_size": BATCH, "local_batch_size": BATCH, "local_mini_batch_size": BATCH, "micro_batch_size": BATCH,
    "mini_batch_size": BATCH, "num_total_batches": "total_episodes", "world_size": "accelerate launch --num_processes",
}  # fmt: skip
# text fields of the libraries that take only these words
LIBRARY_CHOICES = {
    "bnb_4bit_quant_storage": ("uint8", "float16", "float32", "bfloat16"),
    "loss_type": ("nll", "dft", "chunked_nll"),
    "vllm_mode": ("server", "colocate"),
}
JSON_FILES = ("accelerator_config", "deepspeed", "fsdp_config")  # a JSON object, or the file that holds it
TYPABLE = (str, int, float, bool, list, Literal)
TYPES = {bool: "true or false", int: "a whole number", float: "a number", dict: "a mapping", str: "text"}


class LibraryError(InputError):
    """A library's dataclass refused the flags."""


class Parser(TrlParser):
    """TrlParser whose errors are one line with the flag, what was found and what to do.

    Args:
        arguments: dataclasses of flags.
    """

    def __init__(self, *arguments: type) -> None:
        self.words: list[str] = []
        self.file: Path | None = None
        self.in_file: dict[str, Any] = {}  # values of the YAML file that count
        self.hints = {name: hint for part in arguments for name, hint in get_type_hints(part).items()}
        self.ranges = {name: allowed for part in arguments for name, allowed in ranges_of(part).items()}
        super().__init__(arguments)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    @property
    def flags(self) -> set[str]:
        return {option for action in self._actions for option in action.option_strings}

    def read(self, words: list[str], file: Path | None) -> tuple[Any, ...]:
        """The dataclasses with what words and YAML file say; what is typed wins.

        Raises:
            InputError: naming the flag, or the file and its key.
            LibraryError: for combinations that TRL or transformers refuse.
        """
        self.words, self.file = words, file
        self._check_flags()
        if file is not None:
            self._check_keys(read_yaml(file))
        try:
            return self.parse_args_and_config(args=[*(["--config", str(file)] if file else []), *words])
        except InputError:
            raise
        except Exception as error:  # of a library's dataclass, which checks its values in its own way
            where = f"{file} and the flags" if file else "the flags"
            if "process group" in str(error):  # torch has none, and names no flag
                raise LibraryError(
                    "--ddp_backend: this is one process, which has nobody to talk to. Leave it out, or launch several."
                ) from error
            raise LibraryError(f"{where}: {error or type(error).__name__}") from error

    def typed(self) -> dict[str, list[str]]:
        """The words behind each flag that is typed, by field."""
        found: dict[str, list[str]] = {}
        behind: list[str] = []
        for word in self.words:
            flag, equals, value = word.partition("=")
            if flag in self.flags:
                behind = [value] if equals else ["false"] if flag.startswith("--no") and self._is_twin(flag) else []
                found[self._option_string_actions[flag].dest] = behind
            else:
                behind.append(word)
        return found

    def _is_twin(self, flag: str) -> bool:
        """Whether a flag is the one that switches off: --no_x of --x."""
        return self._option_string_actions[flag].nargs == 0

    def _check_flags(self) -> None:
        seen = set()
        for word in self.words:
            flag = word.split("=")[0]
            if not flag.startswith("--"):
                continue
            if flag not in self.flags:
                raise InputError(f"unknown flag {flag}." + (self._nearest(flag[2:], "--") or " See --help."))
            action = self._option_string_actions[flag]
            if action.nargs == "+" and action.dest in seen:  # argparse would forget the first values
                raise InputError(f"{flag}: is given twice. Give all values behind one {flag}.")
            if action.dest in COMPUTED:
                raise InputError(f"{flag}: is computed. Set it with {COMPUTED[action.dest]}.")
            if not any(
                _kind(option) in TYPABLE or _is_enum(option) for option in _options(self.hints.get(action.dest, str))
            ):
                raise InputError(f"{flag}: can't be typed. Write it into a YAML file and give that as --config.")
            seen.add(action.dest)

    def _check_keys(self, content: dict[Any, Any]) -> None:
        known = {action.dest for action in self._actions} - {"help"} | {"env"}
        if not isinstance(content.get("env", {}), dict):
            raise InputError(
                f"--config {self.file}: env: needs a mapping of names and values; found {content['env']!r}."
            )
        for key in content:
            if key not in known:
                raise InputError(f"--config {self.file}: unknown key '{key}'.{self._nearest(str(key), '')}")
            if key in COMPUTED:
                raise InputError(f"--config {self.file}: {key} is computed. Set it with {COMPUTED[key]}.")

    def _nearest(self, name: str, lead: str) -> str:
        """The sentence with the field that an unknown name probably means; empty if there is none."""
        name = name.replace("-", "_")
        fields = {action.dest for action in self._actions} - {"help"}
        near = [other for other in OTHER_NAMES.get(name, ()) if other in fields]
        near = near or difflib.get_close_matches(name, fields, n=1)
        return f" Did you mean {lead}{near[0]}?" if near else ""

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """As in TRL, once every value fits its field, and without settings that were typed under another name."""
        typed = self.typed()
        actions = {action.dest: action for action in reversed(self._actions)}  # --x comes before --no_x
        self.in_file = {name: self._fitting(actions[name], value) for name, value in values.items()}
        for names, off in SAME_SETTING:
            if any(name in typed and not {*map(str.lower, typed[name])} & {*off} for name in names):
                for name in names:
                    if name not in typed:
                        self.in_file.pop(name, None)
        return super().set_defaults_with_config(**self.in_file)

    def _fitting(self, action: Action, value: Any) -> Any:
        """A value of the YAML file as argparse would give it, had it been typed."""
        hint = self.hints[action.dest]
        if isinstance(value, str) and callable(action.type) and not _fits(value, hint):
            with suppress(ValueError, TypeError, ArgumentTypeError):
                value = action.type(value)  # 1e-4, which YAML takes for text
        each = value if isinstance(value, list) and action.nargs == "+" else [value]
        if not _fits(value, hint) or (action.choices and not {*map(str, each)} <= {"None", *map(str, action.choices)}):
            found = "nothing" if value is None else f"the {type(value).__name__} {reprlib.repr(value)}"
            quote = (
                " Write a word such as no in quotes."
                if isinstance(value, bool) and (action.choices or str in _options(hint))
                else ""
            )
            raise InputError(f"{self.file}: {action.dest}: needs {_described(action, hint)}; found {found}.{quote}")
        return [value] if action.nargs == "+" and value is not None and not isinstance(value, list) else value

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Namespace, list[str]]:
        """As in argparse; refuses values that can't be right, and words that belong to no flag."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            raise InputError(f"{rest[0]!r} on the command line belongs to no flag. See --help.")
        typed = self.typed()
        for name, value in vars(namespace).items():
            given = name in typed or name in self.in_file
            flag = f"{self.file}: {name}" if name in self.in_file and name not in typed else f"--{name}"
            if name in self.ranges:
                check_range(flag, value, self.ranges[name])
            if isinstance(value, str) and any(_kind(option) is dict for option in _options(self.hints[name])):
                _check_object(flag, name, value)
            if value is not None and name in LIBRARY_CHOICES and value not in LIBRARY_CHOICES[name]:
                raise InputError(f"{flag} {value}: give one of {', '.join(LIBRARY_CHOICES[name])}.")
            if given and "" in (value if isinstance(value, list) else [value]):
                raise InputError(f"{flag}: is empty. Give a value, or leave it out.")
        self._refuse_contradictions(vars(namespace), typed)
        return namespace, rest

    def _refuse_contradictions(self, values: dict[str, Any], typed: dict[str, list[str]]) -> None:
        for names, _ in SAME_SETTING[:2]:
            given = [name for name in names if name in typed or name in self.in_file]
            if len({str(values[name]) for name in given}) > 1:
                raise InputError(f"--{given[0]} and --{given[1]}: are two names for one setting. Give one of them.")
        for names, _ in SAME_SETTING[3:6]:
            if all(values.get(name) for name in names):
                raise InputError(f"--{names[0]} and --{names[1]}: exclude each other. Give one of them.")


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _kind(hint: Any) -> Any:
    """`list` of `list[int]`; a type without parameters itself."""
    return get_origin(hint) or hint


def _is_enum(hint: Any) -> bool:
    return isclass(hint) and issubclass(hint, Enum)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file has a field's type. A list may be written as its only element.

    >>> _fits(3, float), _fits(True, int), _fits("a", list[str]), _fits([1, "a"], list[int]), _fits(None, int | None)
    (True, False, True, False, True)
    """
    kind, parts = _kind(hint), get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is list:
        return all(_fits(part, parts[0]) for part in value) if isinstance(value, list) else _fits(value, parts[0])
    if kind is Literal:
        return value in parts
    if _is_enum(kind):
        return value in [member.value for member in kind]
    if kind is tuple:
        return isinstance(value, list)
    if not isclass(kind):
        return False
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _check_object(flag: str, name: str, text: str) -> None:
    """Refuse text that is no JSON object, and for some fields no file either."""
    if name in JSON_FILES and not text.startswith("{"):
        need_file(text, flag)
        return
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{flag} {text}: is no JSON ({error}). Write it as '{{\"key\": value}}'.") from error
    if not isinstance(found, dict):
        raise InputError(f"{flag} {text}: needs a JSON object, '{{\"key\": value}}'.")


def _described(action: Action, hint: Any) -> str:
    """What a field takes, in words."""
    if action.choices:
        return f"one of {', '.join(map(str, action.choices))}"
    text = str(hint)
    kind = next((word for type_, word in TYPES.items() if type_.__name__ in text), "another value")
    return f"a list, each {kind}" if action.nargs == "+" or "tuple" in text else kind


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, flag: str = "--config") -> dict[Any, Any]:
    """The keys and values of a YAML file of flags.

    Raises:
        InputError: if it can't be read or holds something else.
    """
    if not path.is_file():
        raise InputError(f"{flag} {path}: no such file.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError, ValueError) as error:
        raise InputError(f"{flag} {path}: not readable as YAML ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{flag} {path}: needs lines of the form 'flag: value'.")
    return content
