"""Names, tokenizers, adapters and heads."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import VOCABULARY, save_tiny
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import ModelConfig

from rlhf.errors import InputError
from rlhf.models.adapters import REFERENCE
from rlhf.models.loading import draw_score_head, load_causal_lm, load_policy, load_reward_model
from rlhf.models.sources import Source, named_models, resolve
from rlhf.models.tokenizers import load_tokenizer, set_pad_token
from rlhf.rewards import resolve_reward

ARGS = ModelConfig(dtype="float32", use_peft=True, lora_r=4, lora_target_modules=["all-linear"], lora_dropout=0.0)
IDS = torch.tensor([[5, 6, 7, 8]])


def test_an_adapter_finds_its_base(sft, tiny):
    source = resolve(sft)
    assert (source.base, source.adapter) == (tiny, sft)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"base_model_name_or_path": "/no/such/base"}, "base model is missing"), ({}, "names no base model")],
)
def test_an_adapter_without_its_base_is_refused(tmp_path, config, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    with pytest.raises(InputError, match=message):
        resolve(str(tmp_path))


def test_models_are_given_as_pairs_of_name_and_model(tmp_path):
    assert named_models(["a=b=c", "a=d"], repeated=True) == [("a", "b=c"), ("a", "d")]
    for words in ([], ["a"], ["=a"], ["a="], ["a=b", "a=c"]):
        with pytest.raises(InputError, match=" ".join(["--models", *words]) + ": give name=model pairs with different"):
            named_models(words)
    for words in ([""], ["=a"], ["a="], ["a", "a"]):
        with pytest.raises(InputError, match="give name=model pairs"):
            named_models(words, bare=True)
    with pytest.raises(InputError, match="--models xz=a: the results call something else 'xz'"):
        named_models(["b=a", "xz=a"], taken=("xz",))
    (tmp_path / "lr=1").mkdir()
    assert named_models([f"{tmp_path}/lr=1"], bare=True) == [(f"{tmp_path}/lr=1",) * 2]


def test_folders_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(InputError, match="neither config"):
        resolve(str(tmp_path))
    with pytest.raises(InputError, match="no such model folder"):
        resolve(str(tmp_path / "missing"), "--reward_model_path")


def test_pad_gets_its_own_token_or_a_clear_refusal(tiny, tmp_path):
    broken = AutoTokenizer.from_pretrained(tiny)
    broken.pad_token = broken.eos_token
    save_tiny(tmp_path, broken)
    repaired = load_tokenizer(resolve(str(tmp_path)))
    assert repaired.pad_token_id != repaired.eos_token_id
    with pytest.raises(InputError, match="also the eos token"):
        load_tokenizer(resolve(tiny), pad_token="<|im_end|>")
    with pytest.raises(InputError, match="not in the vocabulary"):
        load_tokenizer(resolve(tiny), pad_token="<nothing>")
    assert load_tokenizer(resolve(tiny), eos_token="<|im_end|>").eos_token == "<|im_end|>"
    with pytest.raises(InputError, match="--eos_token '<nothing>': not in the vocabulary"):
        load_tokenizer(resolve(tiny), eos_token="<nothing>")
    with pytest.raises(InputError, match=r"ends a reply with '<\|im_end\|>'"):
        load_tokenizer(resolve(tiny), eos_token="<|endoftext|>")


def test_replies_end_where_the_chat_template_ends_them(tiny, tokenizer, tmp_path):
    base = AutoTokenizer.from_pretrained(tiny)
    base.eos_token = "<|endoftext|>"  # as base models with a chat template have it
    save_tiny(tmp_path, base)
    source = resolve(str(tmp_path))
    repaired = load_tokenizer(source)
    assert repaired.eos_token == "<|im_end|>"
    stops = load_causal_lm(
        source, ModelConfig(dtype="float32"), repaired, trainable=False
    ).generation_config.eos_token_id
    assert set(stops) == {base.eos_token_id, repaired.eos_token_id}


def test_wrong_kinds_of_adapters_are_refused(sft, tokenizer, tmp_path):
    with pytest.raises(InputError, match="--use_peft false"):
        load_causal_lm(resolve(sft), ModelConfig(dtype="float32"), tokenizer)
    load_reward_model(resolve(sft), ARGS, tokenizer).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a reward adapter"):
        load_causal_lm(resolve(str(tmp_path)), ARGS, tokenizer)
    with pytest.raises(InputError, match="is an adapter for CAUSAL_LM, and a reward model is a sequence classifier"):
        resolve_reward(sft)


@pytest.mark.parametrize(
    ("load", "given", "own"),
    [(load_causal_lm, "SEQ_CLS", "CAUSAL_LM"), (load_causal_lm, "x", "CAUSAL_LM"), (load_reward_model, "x", "SEQ_CLS")],
)
def test_a_task_type_that_would_be_ignored_is_refused(load, given, own, tiny, tokenizer):
    with pytest.raises(InputError, match=f"^--lora_task_type {given}: .* type {own}. Leave the flag out"):
        load(resolve(tiny), dataclasses.replace(ARGS, lora_task_type=given), tokenizer)
    assert load(resolve(tiny), dataclasses.replace(ARGS, lora_task_type=own), tokenizer).peft_type == "LORA"


def test_a_model_in_the_cache_works_offline(tiny, tmp_path):
    """A Hub model that was downloaded before resolves without a network, though it has no adapter_config.json."""
    snapshot = tmp_path / "hub" / "models--you--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(tiny, snapshot)
    (tmp_path / "hub" / "models--you--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--you--tiny" / "refs" / "main").write_text("a" * 40)
    code = """
from rlhf.models.sources import resolve
from rlhf.models.tokenizers import load_tokenizer
source = resolve('you/tiny')
print(source.base, len(load_tokenizer(source)))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == f"you/tiny {VOCABULARY}", result.stderr[-1500:]


def test_reward_model_starts_from_the_sft_adapter_and_survives_saving(sft, tokenizer, tmp_path):
    model = load_reward_model(resolve(sft), ARGS, tokenizer)
    mine = load_file(f"{sft}/adapter_model.safetensors")
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert mine and all(torch.equal(loaded[name], weight) for name, weight in mine.items())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trainable)
    assert all("lora_" in name or "score" in name for name in trainable)
    # a step on the head, then a round trip: nothing of it may be lost
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trainable and "score" in name:
                parameter += 1.0
    before = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    again = load_reward_model(resolve(str(tmp_path)), ARGS, tokenizer, trainable=False)
    assert torch.equal(again(IDS).logits, before)
    assert not any(p.requires_grad for name, p in again.named_parameters() if "lora_" in name)


def test_new_reward_heads_are_small_and_seeded(tiny, tokenizer):
    heads = [load_reward_model(resolve(tiny), ModelConfig(dtype="float32"), tokenizer, seed=s).score for s in (1, 1, 2)]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].weight.std() < 3 / 17**0.5
    wide = torch.nn.Linear(9999, 1, bias=False)
    draw_score_head(wide, seed=1)
    assert wide.weight.std().item() == pytest.approx(0.01, rel=0.05)  # 1/sqrt(d + 1)


def test_a_full_classifier_keeps_its_head_and_gets_an_adapter_to_train(tiny, tokenizer, tmp_path):
    whole = load_reward_model(resolve(tiny), ModelConfig(dtype="float32"), tokenizer, seed=5)
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    again = load_reward_model(source, ModelConfig(dtype="float32"), tokenizer, seed=6)
    assert not isinstance(again, PeftModel) and torch.equal(again.score.weight, whole.score.weight)
    adapted = load_reward_model(source, ARGS, tokenizer, seed=6)
    assert isinstance(adapted, PeftModel) and adapted.peft_config["default"].task_type == "SEQ_CLS"
    assert torch.equal(adapted(IDS).logits, whole(IDS).logits)
    frozen = load_reward_model(source, ARGS, tokenizer, trainable=False)
    assert not isinstance(frozen, PeftModel)


def test_policy_and_reference_start_equal_and_only_the_policy_is_trained(sft, tokenizer):
    policy = load_policy(resolve(sft), ARGS, tokenizer)
    before = policy(IDS).logits
    with torch.no_grad():
        policy.set_adapter(REFERENCE)
        assert torch.equal(policy(IDS).logits, before)
        policy.set_adapter("default")
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trainable and all(".default." in name for name in trainable)
    base = AutoModelForCausalLM.from_pretrained(resolve(sft).base)
    assert not torch.allclose(base(IDS).logits, before)


def test_sampling_copies_of_an_adapter_take_the_bases_dtype(sft, tokenizer):
    model = load_causal_lm(resolve(sft), ModelConfig(dtype="bfloat16"), tokenizer, trainable=False)
    assert isinstance(model, PeftModel)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_quantized_base_is_loaded_in_four_bits(tokenizer, tmp_path):
    wide = save_tiny(tmp_path, tokenizer, hidden_size=64, intermediate_size=128, num_key_value_heads=2)
    model = load_causal_lm(resolve(wide), ModelConfig(load_in_4bit=True, dtype="float32", use_peft=True), tokenizer)
    assert any(p.dtype == torch.uint8 for p in model.parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_a_vocabulary_of_bytes_has_a_pad_token(tmp_path):
    """GPT-2 has no unused token. The byte 0xFF is in its vocabulary and in no text."""
    bare = Tokenizer(BPE())
    bare.pre_tokenizer, bare.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(ByteLevel.alphabet())
    bare.train_from_iterator(["ÿ a"], BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet))
    bare = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    source = Source("bare", str(tmp_path), None, None, None)
    set_pad_token(bare, source, None)
    assert bare.pad_token == "ÿ" and bare.decode([bare.pad_token_id]) == "\ufffd"


def test_a_pad_token_that_ends_replies_is_no_longer_pad(tiny, tmp_path):
    """A base model that pads with <|im_end|>, with which its chat template ends replies."""
    base = AutoTokenizer.from_pretrained(tiny)
    base.eos_token, base.pad_token = "<|endoftext|>", "<|im_end|>"
    save_tiny(tmp_path, base)
    repaired = load_tokenizer(resolve(str(tmp_path)))
    assert repaired.eos_token == "<|im_end|>" != repaired.pad_token
