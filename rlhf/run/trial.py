"""The optimizer and the schedule of a training, tried on one weight before any model is loaded.

transformers makes both when training begins: after the model is loaded and the data is tokenized.
"""

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from rlhf.errors import InputError

# what the trainers measure in an evaluation, by their config; not RLOO's, whose reward functions name metrics
MEASURED = {
    "SFTConfig": ("loss", "mean_token_accuracy", "entropy", "num_tokens", "aux_loss"),
    "TrainingArguments": ("loss", "accuracy"),  # of fine-tuning
    "PretrainingConfig": (
        "loss", "masked_accuracy", "next_sentence_accuracy", "token_accuracy", "replaced_share", "detection_auc",
        "detection_accuracy", "detection_precision", "detection_recall", "generator_loss", "discriminator_loss",
    ),
    "RewardConfig": ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens"),
}  # fmt: skip
# these take their own flags and ignore --optim_args
WITHOUT_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adafactor")


def try_optimizer(args: TrainingArguments) -> None:
    """Refuse an optimizer or a schedule that can't be made with these flags.

    Raises:
        InputError: naming the flag, with the library's reason.
    """
    weight = torch.nn.Linear(1, 1)
    name = args.optim.value
    given = f"--optim {name}" + (f" with --optim_args {args.optim_args}" if args.optim_args else "")
    if args.optim_args and name in WITHOUT_ARGUMENTS:
        raise InputError(f"{given}: {name} takes none. Leave them out, or give another optimizer.")
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, weight)
        optimizer = kind(weight.parameters(), **options)
    except ImportError as error:
        raise InputError(f"{given}: {error}") from error
    except Exception as error:
        if name.startswith(("galore", "apollo", "lomo", "adalomo")):  # these need the model itself
            return
        raise InputError(f"{given}: {error}. Correct them, or leave them out.") from error
    schedule = args.lr_scheduler_type.value
    try:
        get_scheduler(
            schedule, optimizer, num_warmup_steps=1, num_training_steps=10,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )  # fmt: skip
    except Exception as error:
        raise InputError(
            f"--lr_scheduler_type {schedule} with --lr_scheduler_kwargs {args.lr_scheduler_kwargs or {}}: {error}."
        ) from error


def check_training(args: TrainingArguments) -> None:
    """Refuse what a trainer would refuse once the model is loaded.

    Raises:
        InputError: naming the flag.
    """
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise InputError("--dataloader_persistent_workers true: needs --dataloader_num_workers 1 or more.")
    best, measured = args.metric_for_best_model, MEASURED.get(type(args).__name__, ())
    if best is not None and measured and best.removeprefix("eval_") not in measured:
        raise InputError(f"--metric_for_best_model {best}: isn't measured. Give one of {', '.join(measured)}.")
    if args.torch_compile:
        _try_compiler(args)
    try_optimizer(args)


def _try_compiler(args: TrainingArguments) -> None:
    """Refuse a backend or mode that torch.compile doesn't know.

    Raises:
        InputError: naming the flags, with torch's reason.
    """
    try:
        torch.compile(torch.nn.Identity(), backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    except Exception as error:  # each backend has its own
        given = f"--torch_compile_backend {args.torch_compile_backend}"
        given += f" with --torch_compile_mode {args.torch_compile_mode}" if args.torch_compile_mode else ""
        raise InputError(f"{given}: {' '.join(str(error).split())}") from error
