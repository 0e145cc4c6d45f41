"""Flags against a model's architecture, refused before its weights are read."""

import shutil

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from rlhf.errors import InputError
from rlhf.models.architecture import check_architecture
from rlhf.models.sources import resolve


@pytest.fixture
def weightless(tiny, tmp_path):
    """A model whose weights are gone since it was looked for."""
    shutil.copytree(tiny, tmp_path / "model")
    source = resolve(str(tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").unlink()
    return source


@pytest.mark.parametrize(
    ("attention", "lora", "said"),
    [
        ("warp", {}, "--attn_implementation warp: "),
        ("flash_attention_2", {}, "--attn_implementation flash_attention_2: "),
        (
            None,
            {"target_modules": "no_such_layer"},
            "--lora_target_modules: PEFT can't give llama such an adapter .*no_such_layer",
        ),
        (None, {"target_modules": ["q_proj", "no_such"]}, "--lora_target_modules no_such: .* It has .*q_proj"),
        (None, {"target_modules": ["q_proj"], "modules_to_save": ["gone"]}, "--lora_modules_to_save gone: "),
        (
            None,
            {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight", "nothing.here"]},
            "--lora_target_parameters nothing.here: .* no such parameter. .* q_proj.weight",
        ),
        (None, {"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, "--lora_target_modules: .* adapter"),
    ],
)
@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_what_the_architecture_lacks_is_refused_without_weights(attention, lora, said, auto_class, weightless):
    with pytest.raises(InputError, match=f"^{said}"):
        check_architecture(weightless, auto_class, attention, LoraConfig(**lora) if lora else None)


def test_what_fits_passes(weightless):
    fitting = LoraConfig(target_modules=["q_proj", "mlp.up_proj"], modules_to_save=["lm_head"])
    every = LoraConfig(target_modules="all-linear")
    for attention, lora in (("eager", None), ("sdpa", fitting), (None, every)):
        check_architecture(weightless, AutoModelForCausalLM, attention, lora)
    # they are as they were given, for the model that gets them later
    assert fitting.target_modules == {"q_proj", "mlp.up_proj"} and every.target_modules == "all-linear"


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_an_adapter_of_trls_task_type_fits_a_classifier(auto_class, weightless):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    check_architecture(weightless, auto_class, None, lora)
    assert (lora.task_type, lora.target_modules) == ("CAUSAL_LM", "all-linear")  # the model gets it later
