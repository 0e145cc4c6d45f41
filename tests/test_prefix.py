"""Rows that share what they begin with give the results of rows that don't."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from rlhf.models import prefix
from rlhf.models.prefix import Rows, forward_sharing_prefix, positions_of, rows_of_prompts, shared_length

SYSTEM = list(range(100, 130))
ROWS = [[*SYSTEM, 5, 6, 7, 8, 9], [*SYSTEM, 40], [*SYSTEM, 5, 6, 41, 42], [*SYSTEM[:29], 50, 51, 52]]


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def test_shared_length_is_that_of_the_common_beginning_within_the_limits():
    ids, mask = left_padded(ROWS)
    lengths = mask.sum(1)
    assert shared_length(ids, mask, lengths - 1) == 29
    assert shared_length(ids[:3], mask[:3], lengths[:3] - 1) == 30
    assert shared_length(ids, mask, torch.tensor([35, 7, 35, 35])) == 7
    assert shared_length(ids[:1], mask[:1], lengths[:1]) == 0  # one row shares with nobody
    other, mask = left_padded([[1, 2, 3], [9, 2, 3]])
    assert shared_length(other, mask, torch.tensor([2, 2])) == 0


@pytest.mark.parametrize("training", [False, True])
def test_logits_and_gradients_are_those_of_the_plain_forward(tiny, training):
    model = AutoModelForCausalLM.from_pretrained(tiny).train(training)
    ids, mask = left_padded(ROWS)
    plain = model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits[:, -2:]
    shared = forward_sharing_prefix(model, model.config, rows_of_prompts(ids, mask))
    assert shared.output.logits.shape[1] == 6  # 29 of 35 positions were computed once
    assert torch.allclose(plain, shared.output.logits[:, -2:], atol=1e-5)
    gradients = []
    for logits in (plain, shared.output.logits[:, -2:]):
        model.zero_grad()
        logits[..., :7].pow(2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-4, rtol=1e-3) for n in gradients[0])
    assert gradients[0]


def test_completions_are_not_shared(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    ids, mask = left_padded([ROWS[0]] * 20)
    run = forward_sharing_prefix(model, model.config, Rows(ids, mask, torch.full((20,), 25)))
    assert run.output.logits.shape[1] == 35 - 9  # of 35 tokens, 25 are completion, and the last of a prompt is computed


def test_generation_can_go_on_from_the_cache(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    ids, mask = left_padded(ROWS)
    run = forward_sharing_prefix(
        model, model.config, rows_of_prompts(ids, mask), cache=DynamicCache(config=model.config)
    )
    following = torch.tensor([[3], [4], [5], [6]])
    grown = torch.cat([run.attention_mask, torch.ones(4, 1, dtype=torch.long)], 1)
    output = model(following, attention_mask=grown, position_ids=run.position_ids[:, -1:] + 1,
                   past_key_values=run.cache)  # fmt: skip
    for row, token, logits in zip(ROWS, following, output.logits[:, 0], strict=True):
        assert torch.allclose(model(torch.tensor([[*row, int(token)]])).logits[0, -1], logits, atol=1e-5)


def test_nothing_is_shared_where_it_does_not_pay_or_may_not_be(tiny, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    ids, mask = left_padded(ROWS)
    whole = forward_sharing_prefix(model, model.config, rows_of_prompts(ids, mask), share=False)
    assert whole.output.logits.shape[1] == ids.shape[1] and whole.cache is None
    monkeypatch.setattr(prefix, "WORTH_IT", 10_000)
    assert (
        forward_sharing_prefix(model, model.config, rows_of_prompts(ids, mask)).output.logits.shape[1] == ids.shape[1]
    )
