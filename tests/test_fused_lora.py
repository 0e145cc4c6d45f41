"""rlhf/models/fused_lora.py against hand-computed numbers and PEFT's own layers."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.models.adapters import active_adapter
from rlhf.models.fused_lora import FusedLora, _LowRankProduct, fuse, weights_stay

IDS = torch.arange(2, 44).view(3, 14)


def adapted(dtype: torch.dtype = torch.float32, **settings) -> PeftModel:
    """A Llama with biases and a LoRA adapter that changes something, computed by PEFT."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    lora = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **settings})
    model = get_peft_model(LlamaForCausalLM(config).to(dtype), lora).eval()
    change(model)
    return model


def change(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def gradients(model: PeftModel, mixed: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of a loss, in float64."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        logits = model(IDS).logits
    logits.float().logsumexp(-1).pow(2).sum().backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().double(), found


def refuse_products(*_args):
    raise AssertionError("computed in three products")


def test_hand_computed():
    """W = [[1, 2]], A = 1, B = [[3, 4]], s = 2: y = x1 + 2 x2 + 2 (3 x1 + 4 x2), at (1, 1), gradient 10."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(2, 1, bias=False)), LoraConfig(target_modules=["0"], r=2, lora_alpha=4)
    )
    layer = fuse(model).base_model.model[0]
    layer.base_layer.weight.data[:] = torch.tensor([[1.0, 2.0]])
    layer.lora_A["default"].weight.data[:] = torch.eye(2)
    layer.lora_B["default"].weight.data[:] = torch.tensor([[3.0, 4.0]])
    x = torch.ones(1, 1, 2, requires_grad=True)
    parts = (layer.base_layer.weight, None, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    y = _LowRankProduct.apply(x[0], *parts, layer.scaling["default"])[None]
    assert y.tolist() == [[[17.0]]]
    (10 * y).sum().backward()
    assert x.grad.tolist() == [[[70.0, 100.0]]]
    assert layer.lora_A["default"].weight.grad.tolist() == [[60.0, 60.0], [80.0, 80.0]]
    assert layer.lora_B["default"].weight.grad.tolist() == [[20.0, 20.0]]
    assert layer.base_layer.weight.grad is None


def test_a_model_and_its_gradients_are_those_of_peft():
    plain = adapted()
    fused = fuse(copy.deepcopy(plain))
    assert sum(type(module) is FusedLora for module in fused.modules()) == 14
    (logits, wanted), (ours, found) = gradients(plain), gradients(fused)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert found.keys() == wanted.keys()
    assert len(found) == 28
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


def test_no_less_precise_than_peft_in_mixed_precision():
    plain = adapted()
    fused = fuse(copy.deepcopy(plain))
    exact, wanted = gradients(plain)
    errors = {}
    for name, model in (("peft", plain), ("fused", fused)):
        logits, found = gradients(model, mixed=True)
        parts = [(logits - exact).norm() / exact.norm()]
        parts += [(found[key] - wanted[key]).norm() / wanted[key].norm() for key in wanted]
        errors[name] = torch.stack(parts).mean()
        assert not torch.equal(logits, exact)
    assert errors["fused"] < 1.1 * errors["peft"]


@pytest.mark.parametrize(
    "settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=["dropout", "dora", "lora_bias"]
)
def test_what_does_more_is_left_to_peft(settings, monkeypatch):
    plain = adapted(**settings)
    fused = fuse(copy.deepcopy(plain))
    monkeypatch.setattr("rlhf.models.fused_lora._LowRankProduct.apply", refuse_products)
    with torch.no_grad():
        torch.testing.assert_close(fused(IDS).logits, plain(IDS).logits)


def test_every_way_to_choose_adapters_is_that_of_peft():
    plain = adapted()
    plain.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"]))
    change(plain)
    fused = fuse(copy.deepcopy(plain))
    seen = []
    with torch.no_grad():
        for name in ("default", "other", None):
            with active_adapter(plain, name), active_adapter(fused, name):
                seen.append(fused(IDS).logits)
                torch.testing.assert_close(seen[-1], plain(IDS).logits)
        for model in (plain, fused):
            model.base_model.set_adapter(["default", "other"])  # both at once
        torch.testing.assert_close(fused(IDS).logits, plain(IDS).logits)
        names = ["default", "other", "__base__"]
        torch.testing.assert_close(fused(IDS, adapter_names=names).logits, plain(IDS, adapter_names=names).logits)
        for model in (plain, fused):
            model.base_model.set_adapter("default")
        merged = fused.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, seen[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2])


def test_hooks_on_the_parts_of_a_layer_still_run():
    """ZeRO-3 gathers weights in them."""
    fused = fuse(adapted())
    layer = next(module for module in fused.modules() if isinstance(module, FusedLora))
    called = []
    layer.lora_A["default"].register_forward_pre_hook(lambda *_: called.append(True))
    fused(IDS)
    assert called == [True]


def test_half_precision_trains_as_in_peft_and_a_frozen_adapter_is_near_it():
    """PEFT keeps the adapter in float32. Without autocast its low-rank part is computed in float32 too. What is trained
    samples as it trains, so that PPO's first ratio is 1.
    """
    plain = adapted(torch.bfloat16)
    fused = fuse(copy.deepcopy(plain))
    assert next(p for name, p in fused.named_parameters() if "lora_A" in name).dtype == torch.float32
    (logits, wanted), (ours, found) = gradients(plain), gradients(fused)
    assert torch.equal(ours, logits)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        assert torch.equal(fused(IDS).logits.double(), logits)
        frozen = fused.requires_grad_(False)(IDS).logits.double()
    assert 0 < (frozen - logits).abs().max() < 0.05


def test_a_layer_without_adapter_is_no_lora_layer():
    fused = fuse(adapted(target_modules=["q_proj"]))
    kinds = [type(module) for module in fused.modules() if isinstance(module, Linear)]
    assert kinds == [FusedLora] * 2
    assert type(fused.base_model.model.lm_head) is nn.Linear


def test_weights_are_kept_within_the_block_alone():
    peft, fused = adapted(torch.bfloat16), fuse(adapted(torch.bfloat16))

    def logits(model):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return model(IDS).logits

    before = logits(fused)
    with weights_stay():
        assert torch.equal(logits(fused), before)
        assert torch.equal(logits(fused), before)  # with what the layers kept
        torch.manual_seed(1)
        change(fused)
        assert torch.equal(logits(fused), before)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            learning = fused(IDS).logits  # kept for passes without gradients alone
        assert not torch.equal(learning, before)
    torch.manual_seed(1)
    change(peft)
    torch.testing.assert_close(logits(fused), logits(peft), atol=0.05, rtol=0.05)
    assert not torch.equal(logits(fused), before)
