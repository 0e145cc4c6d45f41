"""Rows that share what they begin with give the results of rows that don't."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from rlhf.models import prefix
from rlhf.models.adapters import trunk
from rlhf.models.prefix import Rows, can_continue, forward_sharing_prefix, positions_of, prefill, rows_of, shared_length
from rlhf.ppo.model import PolicyAndValue

SYSTEM = list(range(100, 130))
ROWS = [[*SYSTEM, 5, 6, 7, 8, 9], [*SYSTEM, 40], [*SYSTEM, 5, 6, 41, 42], [*SYSTEM[:29], 50, 51, 52]]
CPU = torch.device("cpu")


def prompts(rows=ROWS):
    ids, mask = rows_of(rows, CPU)
    return Rows(ids, mask, torch.zeros(len(rows), dtype=torch.long))


def left_padded(rows=ROWS):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def test_shared_length_is_that_of_the_common_beginning_within_the_limits():
    ids, mask, _ = prompts()
    lengths, starts = mask.sum(1), torch.zeros(4, dtype=torch.long)
    assert shared_length(ids, starts, lengths - 1) == 29
    assert shared_length(ids[:3], starts[:3], lengths[:3] - 1) == 30
    assert shared_length(ids, starts, torch.tensor([35, 7, 35, 35])) == 7
    assert shared_length(ids[:1], starts[:1], lengths[:1]) == 0  # one row shares with nobody
    ids, mask = left_padded()
    assert shared_length(ids, (mask == 0).sum(1), lengths - 1) == 29
    assert shared_length(torch.tensor([[1, 2, 3], [9, 2, 3]]), starts[:2], torch.tensor([2, 2])) == 0


@pytest.mark.parametrize("training", [False, True])
def test_logits_and_gradients_are_those_of_the_plain_forward(tiny, training):
    model = AutoModelForCausalLM.from_pretrained(tiny).train(training)
    rows = prompts()
    plain = model(rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
    shared = forward_sharing_prefix(model, model.config, rows)
    assert shared.start == 29 and shared.output.logits.shape[1] == 6  # 29 of 35 positions were computed once
    last = rows.attention_mask.sum(1)[:, None] - 1
    found = shared.at(shared.output.logits, last)
    expected = plain.gather(1, last[..., None].expand(-1, -1, plain.shape[-1]))
    assert torch.allclose(found, expected, atol=1e-5)
    gradients = []
    for logits in (found, expected):
        model.zero_grad()
        logits[..., :7].pow(2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-4, rtol=1e-3) for n in gradients[0])
    assert gradients[0]


@pytest.mark.parametrize("lora", [False, True])
def test_ppo_computes_a_shared_beginning_once(tiny, lora):
    policy = AutoModelForCausalLM.from_pretrained(tiny)
    policy = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")) if lora else policy
    model, seen = PolicyAndValue(policy).eval(), []
    ids, mask, _ = prompts()
    rows = Rows(ids, mask, torch.ones(len(ids), dtype=torch.long))
    model(rows, 1.0)  # tries it
    trunk(policy).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model(rows, 1.0)
    assert seen == [(1, 29), (4, 6)]


def test_completions_are_not_shared(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    ids, mask, _ = prompts([ROWS[0]] * 20)
    run = forward_sharing_prefix(model, model.config, Rows(ids, mask, torch.full((20,), 25)))
    assert run.output.logits.shape[1] == 35 - 9  # of 35 tokens, 25 are completion, and the last of a prompt is computed


@pytest.mark.parametrize("model_type", ["llama", "mpt", "gpt_neo"])  # rotary positions, ALiBi, a window of 12
def test_generation_can_go_on_from_the_cache(model_type):
    model = tiny_model(model_type).eval()
    ids, mask = left_padded()
    cache = DynamicCache(config=model.config)
    takes_positions = model_type != "mpt"
    positions = {"position_ids": positions_of(mask)} if takes_positions else {}
    output = prefill(model, ids, mask, cache, **positions)
    assert output.logits.shape[1] == 6
    following = torch.tensor([[3], [4], [5], [6]])
    grown = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
    positions = {"position_ids": positions_of(grown)[:, -1:]} if takes_positions else {}
    output = model(following, attention_mask=grown, past_key_values=cache, **positions)
    for row, token, logits in zip(ROWS, following, output.logits[:, 0], strict=True):
        assert torch.allclose(model(torch.tensor([[*row, int(token)]])).logits[0, -1], logits, atol=1e-4)


@pytest.mark.parametrize("model_type", ["moss_transcribe_diarize", "roformer"])
def test_rows_share_no_beginning_where_padding_counts_as_positions(model_type):
    model = tiny_model(model_type).eval()
    rows = [
        [*SYSTEM, *range(5, 30)],
        [*SYSTEM, *range(5, 15)],
        [*SYSTEM, 5, 6],
        [*SYSTEM, 5],
    ]  # begin within the prefix
    ids, mask = left_padded(rows)
    output = prefill(model, ids, mask, DynamicCache(config=model.config.get_text_config()))
    for row, logits in zip(rows, output.logits[:, -1], strict=True):
        assert torch.allclose(model(torch.tensor([row])).logits[0, -1], logits, atol=1e-4)


def test_nothing_is_shared_where_it_does_not_pay_or_may_not_be(tiny, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    whole = forward_sharing_prefix(model, model.config, prompts(), share=False)
    assert whole.start == 0 and whole.output.logits.shape[1] == 35
    monkeypatch.setattr(prefix, "WORTH_IT", 10_000)
    assert forward_sharing_prefix(model, model.config, prompts()).start == 0


def test_nothing_is_shared_by_a_model_that_goes_on_wrongly_from_a_cache(monkeypatch):
    model = tiny_model("llama").eval()
    forward = model.forward

    def forgets(*args, past_key_values=None, **settings):
        return forward(*args, past_key_values=None, **settings)

    monkeypatch.setattr(model, "forward", forgets)
    assert not can_continue(model, model.config, torch.tensor(SYSTEM))
    assert forward_sharing_prefix(model, model.config, prompts()).start == 0


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next", "mistral"])
def test_recurrent_states_and_windows_are_not_shared(model_type):
    model = tiny_model(model_type).eval()
    run = forward_sharing_prefix(model, model.config, prompts())
    assert run.start == 0
    logits = run.at(run.output.logits, run.output.logits.new_tensor([[len(row) - 1] for row in ROWS]).long())
    for row, found in zip(ROWS, logits[:, 0], strict=True):
        assert torch.allclose(model(torch.tensor([row])).logits[0, -1], found, atol=1e-4)
