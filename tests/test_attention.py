"""rlhf/models/attention.py against torch's own attention."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.errors import InputError
from rlhf.models.attention import LARGEST, NAME, group_attention, grouped_attention


@pytest.mark.parametrize("queries", [1, 5, 9])
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_same_as_torchs_attention(queries, kind):
    torch.manual_seed(0)
    query = torch.randn(3, 6, queries, 8, requires_grad=True)
    key = torch.randn(3, 2, 9, 8, requires_grad=True)
    value = torch.randn(3, 2, 9, 5, requires_grad=True)  # of another width, as in DeepSeek-V3
    causal = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries)
    mask = causal.expand(3, 1, -1, -1).clone()
    mask[1, :, :, :3] = False  # padding on the left
    mask[:, :, :, 8] |= ~mask.any(-1)
    given = {"none": None, "bool": mask, "added": torch.zeros(mask.shape).masked_fill(~mask, -1e9)}[kind]
    ours, weights = grouped_attention(torch.nn.Module(), query, key, value, given, scaling=0.3)
    repeated = [tensor.repeat_interleave(3, 1) for tensor in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=causal if given is None else given, scale=0.3
    ).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(ours, expected)
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * probe).sum(), (query, key, value))
    found = torch.autograd.grad((ours * probe).sum(), (query, key, value))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_with_padding_computes_the_same_and_saves_nothing_of_it(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = model(ids, attention_mask=mask).logits
    group_attention(model)
    if not torch.accelerator.is_available():
        assert model.config._attn_implementation == NAME
    found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert found.isfinite().all()
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_long_sequences_and_dropout_are_left_to_torch():
    size = int(LARGEST**0.5) + 1
    query = torch.randn(1, 2, size, 4)
    key, value = torch.randn(1, 1, size, 4), torch.randn(1, 1, size, 4)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    ours, _ = grouped_attention(module, query, key, value, None, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.expand(-1, 2, -1, -1), value.expand(-1, 2, -1, -1), is_causal=True
    )
    torch.testing.assert_close(ours, expected.transpose(1, 2))


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa", "dots3_note"])
def test_sparse_attention_stays_sparse(model_type):
    """With more tokens than its attention keeps, a grouped model would attend to all."""
    model = tiny_model(model_type).eval()
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        group_attention(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        if model_type == "deepseek_v32":
            model.set_attn_implementation(NAME)
            with pytest.raises(InputError, match="--attn_implementation grouped"):
                model(ids, use_cache=False)
