"""Run a command under DeepSpeed's ZeRO on CPU processes, which accelerate and transformers don't offer.

    torchrun --nproc_per_node 2 tests/zero_on_cpu.py recipes/ppo.py --output_dir ...

accelerate is told that it isn't on a CPU, and to take gloo. DeepSpeed's engine and accelerate's use of it are
unchanged. DeepSpeed's shared memory between processes is left out: it would be compiled now. Under ZeRO-3 small weights
are spread like large ones. The main process prints what is spread, for tests to look at.
"""

import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu",
}  # fmt: skip


def use_deepspeed() -> None:
    """Have this process's accelerate use DeepSpeed with gloo."""
    from accelerate import state

    backend = importlib.import_module("deepspeed.comm.torch")  # the attribute of that name is torch itself
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    initialize = state.PartialState.__init__

    def told(self: Any, cpu: bool = False, **settings: Any) -> None:
        initialize(self, cpu=False, **{**settings, "backend": "gloo"})

    state.PartialState.__init__ = told  # type: ignore[method-assign]


def say_shares() -> None:
    """Have the main process print the stage, and how much of weights and optimizer it has."""
    import deepspeed

    initialize = deepspeed.initialize

    def initialized(*args: Any, **settings: Any) -> Any:
        config = settings.get("config_params") or settings["config"]
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        engine, optimizer, *rest = initialize(*args, **settings)
        stage = engine.zero_optimization_stage()
        if engine.global_rank == 0 and "optimizer" in settings:  # not for a frozen reference
            parameters = list(engine.module.parameters())
            trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
            weights = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
            own = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in parameters)
            shares = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
            share = sum(tensor.numel() for tensor in shares)
            print(f"ZeRO-{stage}: {own} of {weights} weights, {share} of {trained} trained", flush=True)
        return (engine, optimizer, *rest)

    deepspeed.initialize = initialized


if __name__ == "__main__":
    os.environ |= {name: value for name, value in SETTINGS.items() if name not in os.environ}
    os.environ["ACCELERATE_USE_CPU"] = "false"
    use_deepspeed()
    say_shares()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
