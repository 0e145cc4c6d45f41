"""How a run is launched: the processes, what they share, and the precision, as far as memory depends on it."""

import os
from typing import NamedTuple

import torch
from transformers import TrainingArguments

from rlhf.errors import InputError
from rlhf.planning.arguments import PlanConfig

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Launch(NamedTuple):
    """What a plan is made for."""

    processes: int
    sharded: bool  # FSDP2; else each GPU has a copy of the model
    reshards: bool  # whether FSDP2 gives a layer up after its forward pass
    mixed: torch.dtype | None  # of --bf16 and --fp16
    accumulates: bool  # whether gradients stay whole until an update's last microbatch
    on_cpu: bool  # this machine's CPU, with its attention; else GPUs

    @property
    def words(self) -> str:
        """The launch in words."""
        what = "CPU process" if self.on_cpu else "GPU"
        together = "" if self.processes == 1 and not self.sharded else ", FSDP2" if self.sharded else ", DDP"
        mixed = "no mixed precision" if self.mixed is None else f"mixed precision {str(self.mixed).split('.')[1]}"
        return (
            f"{self.processes} {what}{'' if self.processes == 1 else 's' if what == 'GPU' else 'es'}{together}, {mixed}"
        )


def launch_of(args: TrainingArguments, plan: PlanConfig) -> Launch:
    """This process's launch; on `plan.plan_processes` GPUs, if that is given.

    accelerate's environment says whether FSDP2 is used, whatever the number of processes here.

    Raises:
        InputError: for DeepSpeed, FSDP1, offloading, and flags that shard in another way.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" or args.deepspeed:
        raise InputError("--plan: no plan is made for DeepSpeed. Launch with FSDP2 (recipes/accelerate/fsdp.yaml), DDP "
                         "or one process.")  # fmt: skip
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("--plan: no plan is made for FSDP1. Set fsdp_version: 2.")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise InputError("--plan: no plan is made for weights on the CPU. Set fsdp_offload_params: false.")
    if args.fsdp:
        raise InputError("--fsdp: a plan reads accelerate's configuration. Launch with recipes/accelerate/fsdp.yaml.")
    return Launch(
        processes=plan.plan_processes or int(os.environ.get("WORLD_SIZE", "1")),
        sharded=sharded,
        reshards=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true",
        mixed=DTYPES[args.mixed_precision],
        accumulates=not (args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch", False),
        on_cpu=plan.plan_processes is None and (args.use_cpu or not torch.accelerator.is_available()),
    )
