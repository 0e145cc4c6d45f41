"""The LSTM language model: an ordinary transformers model, and one that padding does not reach."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from rlhf.models.generation import Way, generate, left_pad, way_to_decode
from rlhf.models.lstm import LSTMForCausalLM, lstm_parameters, matching_hidden_size


def build(seed=0, **changes):
    set_seed(seed)
    config = AutoConfig.for_model("lstm", **{"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def test_it_computes_what_the_equations_say():
    model = build(num_hidden_layers=1)
    torch.nn.init.normal_(model.lstm.bias_hh_l0)
    ids = torch.tensor([[3, 1, 4, 1]])
    state, cell, weights = torch.zeros(12), torch.zeros(12), dict(model.lstm.named_parameters())
    for position, token in enumerate(ids[0]):
        gates = weights["weight_ih_l0"] @ model.embed_tokens.weight[token] + weights["bias_ih_l0"]
        gates = gates + weights["weight_hh_l0"] @ state + weights["bias_hh_l0"]
        enter, forget, new, leave = gates.chunk(4)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        state = leave.sigmoid() * cell.tanh()
        expected = model.embed_tokens.weight @ state
        assert torch.allclose(model(ids).logits[0, position], expected, atol=1e-5)


def test_its_start():
    model = build()
    assert torch.equal(model.lstm.bias_ih_l0[12:24], torch.ones(12))  # the forget gate is open
    assert model.lstm.bias_ih_l0.sum() == 12 and not model.lstm.bias_hh_l1.any()
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(build(0).lstm.weight_hh_l1, build(0).lstm.weight_hh_l1)
    assert not torch.equal(build(0).lstm.weight_hh_l1, build(1).lstm.weight_hh_l1)


def test_parameters_are_counted_and_matched():
    for width, depth in ((12, 2), (31, 1), (64, 3)):
        model = build(hidden_size=width, num_hidden_layers=depth)
        assert lstm_parameters(width, depth) == sum(p.numel() for p in model.lstm.parameters())
        assert matching_hidden_size(lstm_parameters(width, depth), depth) == width
    for width, depth in ((32, 2), (64, 2), (96, 3), (128, 4)):
        target = 12 * depth * width**2
        assert abs(lstm_parameters(matching_hidden_size(target, 2), 2) / target - 1) < 0.02


def test_it_is_saved_as_safetensors_and_loaded_again(tmp_path):
    model = build()
    torch.nn.init.normal_(model.lstm.bias_ih_l0)  # as training would have changed it
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, LSTMForCausalLM) and again.lm_head.weight is again.embed_tokens.weight
    ids = torch.randint(0, 50, (2, 7))
    assert torch.equal(model(ids).logits, again.eval()(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side):
    model, ids = build(), torch.randint(1, 50, (2, 6))
    padded, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    real = slice(3, 9) if side == "left" else slice(0, 6)
    padded[:, real], mask[:, real] = ids, 1
    mask[1, real.start if side == "left" else real.stop - 1] = 0  # rows of different length
    logits = model(padded, attention_mask=mask).logits[:, real]
    assert torch.allclose(logits[0], model(ids).logits[0], atol=1e-6)
    kept = slice(1, 6) if side == "left" else slice(0, 5)
    assert torch.allclose(logits[1, kept], model(ids[1:, kept]).logits[0], atol=1e-6)


def test_later_tokens_never_reach_earlier_ones_and_the_loss_is_shifted():
    model, ids = build(), torch.randint(0, 50, (2, 8))
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])
    expected = torch.nn.functional.cross_entropy(before[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(model(ids, labels=ids).loss, expected)


def test_the_trainer_trains_every_parameter(tmp_path):
    model = build()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": [1, 2, 3, 4] * 3, "labels": [1, 2, 3, 4] * 3}] * 16
    arguments = TrainingArguments(tmp_path, max_steps=100, learning_rate=0.05, use_cpu=True, report_to="none",
                                  save_strategy="no", disable_tqdm=True)  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert model.eval()(torch.tensor([[1, 2, 3]])).logits[0].argmax(-1).tolist() == [2, 3, 4]


def test_it_generates_alone_and_in_a_padded_batch(tokenizer):
    model = build(vocab_size=len(tokenizer), hidden_size=16, eos_token_id=tokenizer.eos_token_id)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["Hello there, how are you", "Hi"]
    alone = [generate(text, max_new_tokens=5, do_sample=False)[0]["generated_text"] for text in texts]
    together = generate(texts, max_new_tokens=5, do_sample=False, batch_size=2)
    assert [reply[0]["generated_text"] for reply in together] == alone


def test_it_is_sampled_by_reading_the_whole_rows(tokenizer):
    model = build(vocab_size=len(tokenizer), hidden_size=16, eos_token_id=tokenizer.eos_token_id).eval()
    rows = [[5, 6, 7, 8], [9], [40, 41]]
    config = GenerationConfig(max_new_tokens=6, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id)
    batch = left_pad(tokenizer, rows)
    assert way_to_decode(model, batch) is Way.UNCACHED
    samples = generate(model, batch, config)
    for row, sequence, logprobs in zip(rows, samples.sequences.tolist(), samples.logprobs, strict=True):
        new = sequence[4:]
        logits = model(torch.tensor([row + new])).logits[0, len(row) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected)
