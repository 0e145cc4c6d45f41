"""The same rows through the same weights on CPU and GPU: log-probabilities, values, and one update.

float32 has to agree to rounding. In bfloat16 the distance of the GPU's numbers from the CPU's in float32 has to be that
of the CPU's own bfloat16 numbers.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from piece import DEVICE, answer, save_random
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rlhf.ppo.model import PolicyAndValue
from rlhf.ppo.rollout import draw_uniforms, sample_rollout
from rlhf.ppo.scoring import logprobs_and_values
from rlhf.ppo.types import Advantages, Rewards, Rollout, Scored
from rlhf.ppo.update import UpdateSettings, update

SETTINGS = UpdateSettings(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1)
LENGTH = 24


def config(tiny: bool) -> LlamaConfig:
    width, layers = (32, 2) if tiny else (256, 4)
    return LlamaConfig(
        vocab_size=2000, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 16, num_key_value_heads=width // 32, max_position_embeddings=512,
        initializer_range=0.08, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip


def sampled(folder: str, device: str) -> Rollout:
    """Completions of 16 prompts of different lengths, drawn with the same random numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(3, 2000, (5 + 3 * number,), generator=generator).tolist()} for number in range(16)
    ]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return sample_rollout(
        model, AutoTokenizer.from_pretrained(folder), rows, response_length=LENGTH, temperature=0.7,
        stop_token_ids=[1], batch_size=16, uniforms=draw_uniforms(0, range(16), LENGTH, 0, torch.device(device)),
        device=torch.device(device),
    )  # fmt: skip


def computed(folder: str, rollout: Rollout, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Log-probabilities and values (B, T), the losses of one update, and its gradient norm."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    module = PolicyAndValue(policy).to(device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        module.value_head.weight.copy_(torch.randn(module.value_head.weight.shape, generator=generator) / 10)
    rollout = rollout._replace(
        **{name: part.to(device) for name, part in rollout._asdict().items() if isinstance(part, torch.Tensor)}
    )
    logprobs, values, reference, _ = logprobs_and_values(
        module, policy, None, rollout, batch_size=8, temperature=0.7
    )  # fmt: skip
    fixed = [torch.randn(logprobs.shape, generator=generator).to(device) * rollout.completion_mask for _ in range(2)]
    none = torch.zeros(len(logprobs), device=device)
    rewards = Rewards({}, none, None)
    scored = Scored(none, none, logprobs, reference, values, None, rewards)
    norms: list[float] = []

    def step() -> float:
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])))
        return norms[-1]

    module.train()
    stats = update(
        module,
        step,
        rollout,
        scored,
        Advantages(logprobs, logprobs, *fixed),
        [[torch.arange(16, device=device)]],
        SETTINGS,
    )
    losses = torch.tensor([stats.policy_loss, stats.value_loss, stats.entropy, stats.grad_norm])
    return {"logprobs": logprobs.cpu(), "values": values.cpu(), "update": losses}


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


def measure(tiny: bool, keep: Callable[[dict[str, Any]], None]) -> None:
    torch.set_num_threads(min(4, torch.get_num_threads()))  # on a shared machine, more threads wait for each other
    with tempfile.TemporaryDirectory() as parent:
        folder = save_random(config(tiny), Path(parent) / "model")
        rollout, again = sampled(folder, "cpu"), sampled(folder, DEVICE)
        same = (rollout.input_ids == again.input_ids.cpu()).all(1)
        keep({"completions_drawn_alike": int(same.sum()), "completions": len(same)})
        truth = computed(folder, rollout, "cpu", torch.float32)
        for name, device, dtype in (
            ("gpu_float32", DEVICE, torch.float32),
            ("cpu_bfloat16", "cpu", torch.bfloat16),
            ("gpu_bfloat16", DEVICE, torch.bfloat16),
        ):
            found = computed(folder, rollout, device, dtype)
            keep({name: {key: distance(found[key], truth[key]) for key in truth}})


if __name__ == "__main__":
    answer(measure)
