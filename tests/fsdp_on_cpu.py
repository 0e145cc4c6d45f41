"""Run a command under accelerate's own FSDP2 code on CPU processes, which AcceleratorState doesn't offer.

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py recipes/ppo.py --output_dir ...

The state says FSDP where it would say MULTI_CPU; nothing else is changed. The main process prints the units that are
sharded, for tests to look at: a silent DDP would train just as well.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip


def use_fsdp() -> None:
    """Have this process's accelerate shard over CPU processes."""
    from accelerate import state
    from accelerate.utils import DistributedType

    initialize = state.AcceleratorState.__init__

    def told(self: Any, *args: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
        first = not state.AcceleratorState._shared_state
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **settings)
        if first and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    state.AcceleratorState.__init__ = told  # type: ignore[method-assign]


def say_units() -> None:
    """Have the main process print what accelerate shards."""
    from accelerate import accelerator as of_trainers
    from torch.distributed.fsdp import FSDPModule

    from rlhf.ppo import sharding

    prepare = sharding.fsdp2_prepare_model

    def prepared(accelerator: Any, model: Any) -> Any:
        model = prepare(accelerator, model)
        if accelerator.is_main_process:
            units = [name or "whole" for name, part in model.named_modules() if isinstance(part, FSDPModule)]
            own = sum(parameter.to_local().numel() for parameter in model.parameters())
            print(f"FSDP2 units: {' '.join(units)}; {own} of {sum(p.numel() for p in model.parameters())}", flush=True)
        return model

    sharding.fsdp2_prepare_model = of_trainers.fsdp2_prepare_model = prepared


def say_gathered() -> None:
    """Have the main process print how many layers of the policy were whole when tokens were drawn, at most."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from rlhf.models import generation
    from rlhf.ppo.trainer import PPOTrainer

    draw, sample = generation.draw_tokens, PPOTrainer._sample

    def sampled(trainer: Any, *args: Any) -> Any:
        layers = [part for part in trainer.model.policy.modules() if isinstance(part, FSDPModule)]
        counts = []

        def drawn(*args: Any) -> Any:
            counts.append(sum(not isinstance(next(layer.parameters()), DTensor) for layer in layers))
            return draw(*args)

        generation.draw_tokens = drawn  # type: ignore[assignment]
        rollout = sample(trainer, *args)
        if counts:  # else another engine drew them
            trainer.accelerator.print(f"FSDP2 layers whole: {max(counts)} of {len(layers)}")
        return rollout

    PPOTrainer._sample = sampled  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    os.environ |= {name: value for name, value in SETTINGS.items() if name not in os.environ}
    use_fsdp()
    say_units()
    say_gathered()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
