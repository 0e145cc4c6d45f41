"""Models that see what they should predict are refused; those that don't are not."""

import pytest
import torch
from tiny_models import TYPES, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from rlhf.errors import InputError
from rlhf.models.causality import looks_ahead, need_causal
from rlhf.starter.model import starter_model


@pytest.mark.parametrize("model_type", ["llama", "bert", "mamba", "llama4_text"])
def test_causal_models_pass(model_type):
    model = tiny_model(model_type)
    model.train()
    assert not looks_ahead(model) and model.training


def test_a_bert_without_is_decoder_is_refused():
    config = tiny_config("bert")
    config.is_decoder = False
    torch.manual_seed(0)
    with pytest.raises(InputError, match="this bert model sees the tokens that it should predict"):
        need_causal(AutoModelForCausalLM.from_config(config), "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["xlnet", "cpmant", "prophetnet"])
def test_models_that_read_in_both_directions_are_refused(model_type, dtype):
    if (model_type, dtype) == ("prophetnet", torch.bfloat16):
        assert not looks_ahead(tiny_model(model_type).to(dtype))  # no more of it than rounding in half precision
        return
    with pytest.raises(InputError, match=f"this {model_type} model sees"):
        need_causal(tiny_model(model_type).to(dtype), "m")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_half_precision_rounds_away_is_no_look_ahead(attention):
    """torch's attention takes another kernel for another number of tokens; between special tokens that shows."""
    settings = {"dtype": torch.bfloat16, "attn_implementation": attention}
    assert not looks_ahead(AutoModelForCausalLM.from_pretrained(starter_model(), **settings))


def test_attention_by_random_hashes_is_refused(monkeypatch):
    model = tiny_model("reformer")
    with pytest.raises(InputError, match="random hashes"):
        need_causal(model, "m")
    monkeypatch.setitem(TYPES, "reformer", {**TYPES["reformer"], "attn_layers": ["local", "local"]})
    need_causal(tiny_model("reformer"), "m")
