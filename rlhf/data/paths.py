"""Files and folders that flags name. Missing ones are refused before the code that reads them is imported."""

import os
import re
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.starter.model import STARTER

DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # and what `datasets` calls them
TEMPLATE_FILES = (".jinja", ".j2")
HUB_ID = re.compile(r"(\w[\w.-]{0,95}/)?\w([\w.-]{0,94}\w)?", re.ASCII)
NAME_LENGTH = 60  # of a model's name in tables and pictures
# control characters, line ends, and embeddings that turn the text around them
NOT_IN_NAMES = re.compile(r"[/\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PATH_FLAGS = (
    "dataset_name", "ptx_dataset_name", "templates", "tokenizer_name", "chat_template_path", "models",
    "model_name_or_path", "sft_model_path", "reward_model_path", "rubric",
)  # fmt: skip
CONFIG_FLAGS = ("collect_config", "reward_config", "ppo_config", "compare_config", "sft_config", "base_config")
RUN_FILE = "run.json"  # of a run folder, see rlhf/run/folders.py
SEVERAL = ("models", "reward_model_path", "dataset_name", "comparisons")  # flags that take several names


def words_of(value: Any) -> list[Any]:
    """The values of a flag that takes one or several.

    >>> words_of("a"), words_of(["a", "b"])
    (['a'], ['a', 'b'])
    """
    return value if isinstance(value, list) else [value]


def looks_local(name: str) -> bool:
    """Whether a name is clearly a path. The Hub has no such ids, so it need not be asked.

    >>> [looks_local(name) for name in ("outputs/sft", "./model", "Qwen/Qwen2.5-0.5B")]
    [True, True, False]
    """
    return name.startswith((".", "/", "~", "outputs/")) or name.count("/") > 1


def need_file(path: str | Path, flag: str) -> None:
    """Raise InputError if there is no such file."""
    if not Path(path).is_file():
        raise InputError(f"{flag} {path}: no such file.")


def need_model(name: str, flag: str) -> None:
    """Raise InputError if a name is neither a folder nor a possible Hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return
    if "://" in name or name.startswith(("huggingface.co/", "hf.co/")):
        raise InputError(f"{flag} {name}: is an address. Give the Hub id alone, as in Qwen/Qwen2.5-0.5B.")
    if path.is_file():
        raise InputError(f"{flag} {name}: is a file. Give the folder with config.json and model.safetensors.")
    if path.exists() or looks_local(name):
        raise InputError(f"{flag} {name}: no such model folder. Train it first or check the path.")
    if not HUB_ID.fullmatch(name) or "--" in name or ".." in name:
        raise InputError(
            f"{flag} {name}: no such model folder, and it can't be a Hub id, which is name or owner/name of letters, "
            "digits, '-', '_' and '.'."
        )


def need_tokenizer(name: str) -> None:
    """Raise InputError if a name that can only be a tokenizer's folder holds none. A Hub id passes."""
    folder = Path(name).expanduser()
    if (folder.exists() or looks_local(name)) and not (folder / "tokenizer_config.json").exists():
        raise InputError(
            f"--tokenizer_name {name}: no tokenizer there. Train one first (accelerate launch recipes/tokenizer.py "
            f"--output_dir {name}), or give 'starter' or a Hub id."
        )


def need_dataset(name: str, flag: str = "--dataset_name") -> None:
    """Raise InputError if a name that can only be a dataset's file or folder isn't there. A Hub id passes."""
    path = Path(name).expanduser()
    if not path.exists() and (path.suffix in DATA_FILES or looks_local(name)):
        raise InputError(f"{flag} {name}: no such file or folder. Check the path.")


def behind_name(word: str) -> Path:
    """The folder of a word `name=folder`, or of a folder alone, whose name may have a `=`.

    >>> behind_name("sft=outputs/sft").as_posix(), behind_name("outputs/sft").as_posix()
    ('outputs/sft', 'outputs/sft')
    """
    whole = Path(word).expanduser()
    return whole if whole.exists() else Path(word.partition("=")[2] or word).expanduser()


def need_checkpoint(asked: Any, recipe: str | None = None) -> None:
    """Raise InputError if `--resume_from_checkpoint` names a folder that isn't there or is no checkpoint.

    Args:
        recipe: PPO's checkpoints are of another kind than the others'; None if it isn't known.
    """
    if not isinstance(asked, str) or asked.lower() in ("true", "false"):
        return
    if not Path(asked).expanduser().is_dir():
        raise InputError(f"--resume_from_checkpoint {asked}: no such folder.")
    kinds = {"ppo_state.json": recipe in ("ppo", None), "trainer_state.json": recipe != "ppo"}
    wanted = [name for name, fits in kinds.items() if fits]
    if not any((Path(asked).expanduser() / name).is_file() for name in wanted):
        raise InputError(
            f"--resume_from_checkpoint {asked}: no checkpoint of this recipe ({wanted[-1]} is missing). Give a folder "
            "checkpoint-<step> of the run, or leave the flag out."
        )


def need_output_dir(name: str) -> None:
    """Raise InputError if a folder of this name can't be made or written, as far as that can be told without trying."""
    if not name.isprintable():
        raise InputError(f"--output_dir {name!r}: has a character that no folder should have in its name.")
    folder = Path(name)
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        raise InputError(f"--output_dir {name}: {above.name} is not a folder. Give another path.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {name}: you may not write in {above}. Give another folder.")
    if os.path.lexists(folder / RUN_FILE) and not (folder / RUN_FILE).is_file():
        raise InputError(f"--output_dir {name}: {RUN_FILE} in it is not a file. Give another folder.")


def need_name(word: str, flag: str) -> None:
    """Refuse the name in `name=model` if it has a slash or can't stand in a table or picture.

    Raises:
        InputError: naming the flag.
    """
    name, equals, _ = word.partition("=")
    if Path(word).expanduser().is_dir():  # a folder alone, whose name has a `=`
        return
    if equals and (NOT_IN_NAMES.search(name) or name != name.strip() or len(name) > NAME_LENGTH):
        raise InputError(
            f"{flag} {word!r}: a name has up to {NAME_LENGTH} characters, no slash, no control character and no space "
            "at its ends. Give name=model pairs, as in: sft=outputs/sft."
        )


def check_paths(values: dict[str, Any], runs: dict[str, str]) -> None:
    """Refuse flags whose file or folder is missing, with the error line of the code that reads it.

    Args:
        values: of a command's flags.
        runs: flags that name folders of runs (`name=folder` where there are several), and the error for other folders.

    Raises:
        InputError: naming the flag and the path.
    """
    for flag in (*PATH_FLAGS, *runs):
        # a YAML file may hold anything
        for word in words_of(values.get(flag)) if flag in SEVERAL else [values.get(flag)]:
            if word is not None and not isinstance(word, str):
                raise InputError(f"--{flag} {word}: needs a name or a path; found {type(word).__name__}.")
    for flag, message in runs.items():
        for word in words_of(values[flag]):
            if word and not behind_name(word).is_dir():
                raise InputError(f"--{flag} {word}: {message}")
    given = {flag: value for flag, value in values.items() if value not in (None, STARTER) and flag not in runs}
    for flag in CONFIG_FLAGS:
        if flag in given:
            need_file(given[flag], f"--{flag}")
    for flag in ("templates", "rubric"):
        if flag in given:
            need_file(given[flag], f"--{flag}")
    # without templates the dataset is refused for another reason
    if "dataset_name" in given and ("templates" in given or "templates" not in values):
        for word in words_of(given["dataset_name"]):
            need_dataset(word)
    for word in given.get("models", []):
        name = word.partition("=")[2] or word
        need_name(word, "--models")
        if name != STARTER:
            need_model(name, "--models")
    # a command with --models refuses --model_name_or_path for another reason
    models = ("sft_model_path", "reward_model_path", *(() if "models" in values else ("model_name_or_path",)))
    for flag in models:
        for word in words_of(given.get(flag)):
            if word not in (None, STARTER):
                need_model(word, f"--{flag}")
    if "tokenizer_name" in given:
        need_tokenizer(given["tokenizer_name"])
    if template := given.get("chat_template_path"):
        check = need_file if template.endswith(TEMPLATE_FILES) else need_model
        check(template, "--chat_template_path")
    if "ptx_dataset_name" in given:
        need_dataset(given["ptx_dataset_name"], "--ptx_dataset_name")
    need_checkpoint(given.get("resume_from_checkpoint"))
    if isinstance(given.get("output_dir"), str):
        need_output_dir(given["output_dir"])
