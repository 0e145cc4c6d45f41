"""The command line of a recipe: YAML and flags through TRL's `TrlParser` (rlhf/run/parser.py).

Without `--config`, a recipe reads `recipes/configs/<recipe>.yaml`. Functions import what training needs, so that this
module is imported in half a second.
"""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from rlhf.data.paths import check_paths
from rlhf.errors import InputError, end_at_signals, report_errors
from rlhf.run.declarations import argument_types
from rlhf.run.parser import LibraryError, Parser
from rlhf.run.processes import check_environment, cpu_has_bfloat16, end_with_parent, main_process, use_all_cores
from rlhf.starter.model import STARTER


def answer_early(command: str, **runs: str) -> None:
    """Answer `--help`, unknown flags and missing files before torch is imported: in 1 s of a core instead of 13 s.

    The process ends here if there is such an answer. `parse` repeats these checks and makes others. Ctrl-C and SIGTERM
    end it in one line from here on.

    Args:
        command: the command's `__file__`.
        runs: flags that name folders of runs, and the error for a missing folder.
    """
    end_at_signals()
    end_with_parent()
    # it would say at every start on a CPU that a package is missing, which only --load_in_4bit could use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if "torch" in sys.modules:  # forked from a server that has imported everything
        return
    with report_errors():
        check_environment()
        try:
            parsed = read_command_line(command, sys.argv[1:])
        except LibraryError:  # of a dataclass that was read without its checks
            return
        except InputError:
            raise
        except Exception:  # another version of TRL or transformers can't be read this way; `parse` checks then
            return
        check_paths({flag: value for part in parsed for flag, value in vars(part).items()}, runs)


def read_command_line(command: str, words: list[str]) -> tuple[Any, ...]:
    """A command's dataclasses, as far as they can be read without its imports: without checks that a library makes.

    Args:
        command: the command's file.
        words: its command line.

    Raises:
        InputError: see `parse`.
    """
    parser = Parser(*argument_types(command))
    words, file, _ = _words_and_file(command, words)
    return parser.read(words, file)


def parse(recipe: str, *types: type, args: list[str] | None = None) -> tuple[Any, ...]:
    """Parse the command line of a recipe into its dataclasses, and set the seed.

    Args:
        recipe: the recipe's `__file__`; its default configuration is recipes/configs/<its name>.yaml.
        args: another command line than this process's, which is only checked: the seed stays as it is.

    Raises:
        InputError: on an unknown flag or YAML key, a missing file or a value of the wrong type.
    """
    import torch
    from transformers import TrainingArguments, set_seed

    from rlhf.run.refused import check_refused
    from rlhf.run.trial import check_training

    # TRL and PEFT still use the old name of activation checkpointing; a user can't change that
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing`", category=FutureWarning)
    use_all_cores()
    check_environment()
    given = list(sys.argv[1:] if args is None else args)
    words, file, ours = _words_and_file(recipe, given)
    parser = Parser(*types)
    if not {"-h", "--help"} & {*words}:  # --help says the same on every machine
        if "--use_cpu" in parser.flags and not torch.accelerator.is_available():
            parser.set_defaults(use_cpu=True)  # else the trainers refuse bf16 on a machine without an accelerator
        if ours:  # a configuration of the user's own is taken as it is
            words = [*words, *_float32_without_bfloat16(words, parser.flags, say=args is None)]
    parsed = parser.read(words, file)
    check_refused(parsed)
    own_data = ours and "dataset_name" in parser.typed() and "dataset_config" not in parser.typed()
    for arguments in parsed:
        _check_packages(arguments)
        if isinstance(arguments, TrainingArguments):
            check_training(arguments)
        if own_data and getattr(arguments, "dataset_name", STARTER) != STARTER:
            arguments.dataset_config = None  # the one in our file is one of the starter's
        if args is None and hasattr(arguments, "seed"):
            set_seed(arguments.seed)  # before any model: trainers seed only after a new adapter is drawn
    return parsed


def _words_and_file(recipe: str, words: list[str]) -> tuple[list[str], Path | None, bool]:
    """The command line without --config, the YAML file, and whether it is one of recipes/configs.

    Without --config it is the recipe's own.

    Raises:
        InputError: if --config names no file, or stands twice.
    """
    folder = Path(recipe).resolve().parents[1] / "recipes" / "configs"
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in parts:
        default = folder / f"{Path(recipe).stem}.yaml"
        return parts, default if default.exists() else None, True
    position = parts.index("--config")
    file = parts.pop(position + 1) if position + 1 < len(parts) else ""
    parts.pop(position)
    if not file or file.startswith("--"):
        raise InputError("--config needs a YAML file behind it.")
    if "--config" in parts:
        raise InputError("--config: is given twice. Give one file.")
    return parts, Path(file), Path(file).resolve().parent == folder


def _check_packages(arguments: Any) -> None:
    """Refuse what needs a package that isn't installed, before any model is loaded.

    Raises:
        InputError: naming the flag and the package.
    """
    from transformers.integrations import get_available_reporting_integrations
    from transformers.utils import is_bitsandbytes_available, is_liger_kernel_available

    available = get_available_reporting_integrations()
    for name in getattr(arguments, "report_to", None) or []:
        if name not in (*available, "none"):
            raise InputError(
                f"--report_to {name}: that package isn't installed or isn't known; here are: "
                f"{', '.join(sorted(available)) or 'none'}. Install it with pip, or give --report_to none."
            )
        if name == "wandb":
            _need_wandb_account()
    needed = {
        "load_in_4bit": ("bitsandbytes", is_bitsandbytes_available),
        "load_in_8bit": ("bitsandbytes", is_bitsandbytes_available),
        "use_liger_kernel": ("liger-kernel", is_liger_kernel_available),
    }
    for flag, (package, is_available) in needed.items():
        if getattr(arguments, flag, False) and not is_available():
            raise InputError(f"--{flag}: needs the package {package}. Install it (pip install {package}).")


def _need_wandb_account() -> None:
    """Refuse Weights & Biases where nobody is logged in and nobody can be asked.

    Raises:
        InputError: saying how to log in, or to do without.
    """
    import wandb

    if not main_process() or wandb.setup().settings.mode in ("offline", "dryrun", "disabled") or sys.stdin.isatty():
        return  # at a terminal it asks
    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:  # a key that is none
        raise InputError(f"--report_to wandb: {error}") from error
    except TypeError:  # an earlier version can't be asked without a prompt
        return
    if not known:
        raise InputError(
            "--report_to wandb: nobody is logged in. Run 'wandb login' or set WANDB_API_KEY; WANDB_MODE=offline logs "
            "to the disk alone."
        )


def _float32_without_bfloat16(given: list[str], known: set[str], say: bool) -> list[str]:
    """Flags that switch a configuration of recipes/configs to float32 where bfloat16 would be a hundred times slower.

    That is the case on CPUs without instructions for it: a product of (512, 576) and (576, 1536) matrices ran at 1.2
    GFLOPS in bfloat16 and at 118 in float32 on an AVX2 machine with 2 cores.
    """
    import torch

    if torch.accelerator.is_available() or cpu_has_bfloat16():
        return []
    flags = [word.split("=")[0] for word in given]
    added = [f"--{flag}={value}" for flag, value in (("dtype", "float32"), ("bf16", "false")) if
             f"--{flag}" in known and f"--{flag}" not in flags]  # fmt: skip
    if added and say and main_process():
        print("This CPU has no bfloat16 arithmetic: computing in float32. Choose yourself with --dtype and --bf16.")
    return added
