"""The value function of a run as a file, and as the start of another run."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlhf.errors import InputError
from rlhf.ppo.config import VALUE_FILE, value_file
from rlhf.ppo.model import PolicyAndValue
from rlhf.ppo.sharding import put
from rlhf.rewards import RewardScale

ABOUT = "value_function"  # the file's metadata


def save_value_function(
    folder: Path, weights: dict[str, torch.Tensor], scale: RewardScale, model: PolicyAndValue
) -> None:
    """Write the value function's tensors, what its head reads, and the scale of the scores that it predicts.

    Args:
        weights: by the names of PolicyAndValue, on the CPU.
    """
    # one entry: safetensors writes several in any order
    about = json.dumps({"reads": model.value_adapter, "scale": scale})
    save_file(weights, folder / VALUE_FILE, metadata={ABOUT: about})


def check_value_function(path: str, model: PolicyAndValue) -> None:
    """Raise InputError if the value function in a folder has another form or size than the model's."""
    with safe_open(value_file(path), "pt") as saved:
        reads = json.loads((saved.metadata() or {}).get(ABOUT, '{"reads": "unknown"}'))["reads"]
        found = {(name, *saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    own = model.value_parameters()
    wanted = {(name, *getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if name in own}
    differ = sorted(name for name, *_ in found ^ wanted)
    if reads != model.value_adapter:
        form = {None: "a head on the policy's trunk"}.get(reads, f"a head on the adapter {reads}")
        differ.insert(0, form)
    if differ:
        raise InputError(
            f"--value_model_path {path}: its value function has another form or size than this run's: see {differ[0]}. "
            "Give the base, the --value_function and the lora flags of that run."
        )


@torch.no_grad()
def load_value_function(path: str, model: PolicyAndValue, scale: RewardScale) -> None:
    """Copy the value function of a run into the model.

    Args:
        scale: of this run's scores. The head then predicts on it: a raw score s is (s - mean) / std on a scale, so V on
            the old one is (V std + mean - mean') / std' on the new one.
    """
    file = value_file(path)
    with safe_open(file, "pt") as saved:
        old = RewardScale(*json.loads(saved.metadata()[ABOUT])["scale"])
    weights = load_file(file)
    for name, parameter in model.named_parameters():
        if name in weights:
            value = weights[name]
            if name.endswith(("value_head.weight", "score.weight", "score.bias")):
                value = value * (old.std / scale.std)
            elif name.endswith("value_head.bias"):
                value = (value * old.std + old.mean - scale.mean) / scale.std
            put(parameter, value)
