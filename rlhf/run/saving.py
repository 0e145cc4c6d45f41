"""What can fail when a run saves is asked before it trains: the room on the disk, and configurations."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, TrainingArguments

from rlhf.errors import InputError, full_disk
from rlhf.run.checkpoints import checkpoints
from rlhf.run.processes import main_process

KEPT = 2  # checkpoints that lie on the disk at once, at least: the last one stays until the next one is whole


def need_room(args: TrainingArguments, model: nn.Module, copies: int = 1) -> None:
    """Refuse a run whose checkpoints and final model don't fit on the disk.

    Args:
        model: the one that is trained, with its adapters.
        copies: of the weights in a checkpoint.

    Raises:
        InputError: naming what is needed and what is free.
    """
    if not args.should_save or args.save_strategy == "no":
        return
    missing = max(1, KEPT - len(checkpoints(args.output_dir)))
    weights = saved_bytes(model)
    needed = missing * (copies * weights + optimizer_bytes(args, model)) + weights
    folder = Path(args.output_dir).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if needed > free:
        raise InputError(
            f"--output_dir {args.output_dir}: {missing} checkpoint{'s' * (missing > 1)} and the model need about "
            f"{_size(needed)}, and {_size(free)} are free on that disk. Free some space, or give a folder on another "
            "disk."
        )


def make_savable(model: nn.Module, processing_class: Any) -> None:
    """Repair a generation_config that transformers refuses to save; refuse what else can't be saved, by saving it once.

    Raises:
        InputError: naming what can't be saved.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(model, "generation_config", None) is not None:
        _repair_generation_config(model)
    parts = {name: getattr(model, name, None) for name in ("config", "generation_config")}
    for name, part in (parts | {"tokenizer": processing_class}).items():
        if part is None or not hasattr(part, "save_pretrained"):
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                part.save_pretrained(folder)
        except Exception as error:  # each class of configurations has its own
            if full_disk(error) is not None:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"--model_name_or_path: the model's {name} can't be saved ({reason}), so training would be lost. "
                "Correct it in the model's folder."
            ) from error


def _repair_generation_config(model: Any) -> None:
    """Change what transformers would refuse to save, and say so. Many public models have a temperature for no sampling.

    transformers saves such a configuration only as it was loaded, and its eos and pad tokens may have changed.
    """
    config = model.generation_config
    try:
        config.validate(strict=True)
        return
    except ValueError:
        config.do_sample = True  # the other settings are then of use
    try:
        config.validate(strict=True)
        change = "do_sample is now true"
    except ValueError as error:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        model.generation_config = GenerationConfig(**{key: getattr(config, key) for key in ids})
        change = f"only its token ids are kept ({' '.join(str(error).split()).removesuffix('.')})"
    if main_process():
        print(f"transformers would not save the model's generation_config.json; {change}.")


def saved_bytes(model: nn.Module) -> int:
    """Size of the weights that are saved: of a PeftModel the trained ones, else all."""
    only_trained = any(isinstance(module, PeftModel) for module in model.modules())
    return sum(whole_bytes(p) for p in model.parameters() if p.requires_grad or not only_trained)


def whole_bytes(parameter: nn.Parameter) -> int:
    """Size of a parameter, of which a process under DeepSpeed's ZeRO-3 may hold nothing."""
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def optimizer_bytes(args: TrainingArguments, model: nn.Module) -> int:
    """Size of the optimizer's state: two numbers for each trained weight with Adam and its relatives.

    It is 0 for optimizers of which less is known, so that nothing is refused that fits.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if not name.startswith("adamw"):
        return 0
    trained = [p for p in model.parameters() if p.requires_grad]
    if "8bit" in name or "4bit" in name:
        return 2 * sum(p.numel() for p in trained) // (2 if "4bit" in name else 1)
    return 2 * sum(whole_bytes(p) for p in trained)


def _size(count: int) -> str:
    """As in 1.5 GB.

    >>> _size(1_500_000_000), _size(20_000)
    ('1.5 GB', '0.02 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.2g} MB"
