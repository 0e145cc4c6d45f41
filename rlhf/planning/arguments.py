"""The flags of a plan."""

from dataclasses import dataclass, field

from rlhf.errors import InputError
from rlhf.run.ranges import PositiveFloat, PositiveInt


@dataclass
class PlanConfig:
    """What a recipe prints in place of a run.

    Args:
        plan: print the plan and end. No weights are loaded, nothing is trained or written.
        plan_memory: memory of a GPU; the plan then says the largest batch that fits.
        plan_processes: plan for this many GPUs. By default the plan is for the launch itself, on this machine.

    Raises:
        InputError: for the other two without `plan`.
    """

    plan: bool = field(
        default=False, metadata={"help": "Print memory, FLOPs and tokens of this run, and end without training."}
    )
    plan_memory: PositiveFloat | None = field(
        default=None, metadata={"help": "With plan: GiB of a GPU; says the largest batch that fits."}
    )
    plan_processes: PositiveInt | None = field(
        default=None, metadata={"help": "With plan: number of GPUs to plan for. Default: this launch, on this machine."}
    )

    def __post_init__(self) -> None:
        for name in ("plan_memory", "plan_processes"):
            if getattr(self, name) is not None and not self.plan:
                raise InputError(f"--{name}: belongs to a plan, and this would train. Give --plan true too.")
