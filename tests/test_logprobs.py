"""Log-probabilities behind a frozen head, whose logits are never all in memory."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig

from rlhf.models.logprobs import ends_with, frozen_head, logprobs_behind, token_logprobs
from rlhf.models.prefix import Rows
from rlhf.ppo.model import PolicyAndValue, completion_logprobs

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}  # fmt: skip


def _model(config, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZES, **more)).eval()


def test_by_hand():
    head = nn.Linear(2, 3, bias=False)
    head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    hidden = torch.tensor([[2.0, 0.0]], requires_grad=True)
    logprobs, entropy = logprobs_behind(head.requires_grad_(False), hidden, torch.tensor([1]), temperature=2.0)
    # logits 2, 0, 0 over 2: probabilities e/(e + 2), 1/(e + 2), 1/(e + 2) = 0.5761, 0.2119, 0.2119
    assert logprobs.item() == pytest.approx(-1.5514, abs=1e-4)
    assert entropy.item() == pytest.approx(0.5761 * 0.5514 + 2 * 0.2119 * 1.5514, abs=1e-3)
    logprobs.sum().backward()
    # (onehot - probabilities) W / 2: W keeps the first two entries, -0.5761 and 1 - 0.2119
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.28805, 0.39405]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_logits(temperature):
    torch.manual_seed(0)
    head = nn.Linear(16, 500, bias=False).requires_grad_(False)
    hidden = [torch.randn(150, 16, requires_grad=True)]  # three pieces
    hidden.append(hidden[0].detach().clone().requires_grad_())
    tokens, weights = torch.randint(500, (150,)), torch.randn(150)
    expected = token_logprobs(head(hidden[0]), tokens, temperature)
    found = logprobs_behind(head, hidden[1], tokens, temperature)
    for logprobs, entropy in (expected, found):
        ((logprobs * weights).sum() + 0 * entropy.sum()).backward()
    torch.testing.assert_close(found, expected)
    assert hidden[0].grad is not None and hidden[1].grad is not None
    torch.testing.assert_close(hidden[1].grad, hidden[0].grad)
    with torch.no_grad():
        same = logprobs_behind(head, hidden[1], tokens, temperature, "none")
    torch.testing.assert_close(same[0], expected[0])
    assert not same[1].any()


def test_scaled_and_capped_logits_are_noticed():
    ids = torch.arange(1, 9)
    for config, more, ends in (
        (LlamaConfig, {}, True),
        (Gemma2Config, {"final_logit_softcapping": 30.0}, False),
        (Gemma2Config, {"final_logit_softcapping": None}, True),
        (GraniteConfig, {"logits_scaling": 8.0}, False),
    ):
        model = _model(config, **more)
        assert ends_with(model, model.get_output_embeddings(), ids) is ends, (config, more)


@pytest.mark.parametrize(("config", "more"), [(LlamaConfig, {}), (Gemma2Config, {"final_logit_softcapping": 0.2})])
def test_a_policy_gives_the_logprobs_of_plain_transformers(config, more):
    model = _model(config, **more).requires_grad_(False)
    ids = torch.randint(1, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    rows = Rows(ids, torch.ones_like(ids), torch.tensor([4, 4, 4]))
    plain = model(input_ids=ids).logits.log_softmax(-1)[:, 7:11].gather(2, ids[:, 8:, None])[..., 0]
    sizes = []
    model.lm_head.register_forward_hook(lambda _head, inputs, _output: sizes.append(inputs[0].shape[-2]))
    torch.testing.assert_close(completion_logprobs(model, rows, 1.0), plain)  # a hook on the head: it has to run
    assert max(sizes) == 12
    model.lm_head._forward_hooks.clear()
    torch.testing.assert_close(completion_logprobs(model, rows, 1.0), plain)


def test_a_frozen_head_is_never_called_and_one_that_learns_is():
    model = _model(LlamaConfig)
    model.lm_head.requires_grad_(False)
    ids = torch.randint(1, 96, (2, 10), generator=torch.Generator().manual_seed(0))
    rows = Rows(ids, torch.ones_like(ids), torch.tensor([3, 3]))
    policy, sizes = PolicyAndValue(model).train(), []
    policy(rows, 1.0)  # tries the model once
    model.register_forward_hook(lambda _model, _inputs, output: sizes.append(output.logits.shape[1]))
    (frozen := policy(rows, 1.0).logprobs).sum().backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    assert sizes == [0]
    model.zero_grad()
    model.lm_head.requires_grad_(True)
    assert frozen_head(model) is None
    (learning := policy(rows, 1.0).logprobs).sum().backward()
    assert sizes == [0, 6]  # the states before completion tokens, as one row
    torch.testing.assert_close(learning, frozen)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, gradient)
