"""Models, adapters and tokenizers that can't be loaded: one line each, which names the flag and what is wrong."""

import ast
import json
import shutil
import sys

import pytest
import torch
from conftest import LORA, ROOT
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from rlhf.errors import InputError
from rlhf.models.adapters import fits_beside
from rlhf.models.loading import load_causal_lm, load_policy, load_reward_model
from rlhf.models.sources import resolve
from rlhf.models.tokenizers import load_tokenizer

PLAIN = ModelConfig(dtype="float32")
MARK = "the_models_code_ran"


def settings(folder, file="config.json", **changes):
    """Change settings of a folder's JSON file; None removes one."""
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def weights(folder, change, file="model.safetensors"):
    """Change the weights of a folder by a function of their dictionary."""
    content = load_file(folder / file)
    change(content)
    save_file(content, folder / file, {"format": "pt"})


def poison(content, part="mlp"):
    content[next(key for key in content if part in key)].view(-1)[3] = float("nan")


def drop(content, part):
    for key in [key for key in content if part in key]:
        del content[key]


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def load(folder, flag="--model_name_or_path"):
    """Tokenizer and model, as the recipes load them."""
    source = resolve(str(folder), flag)
    return load_causal_lm(source, PLAIN, load_tokenizer(source), trainable=False)


BROKEN = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "model.safetensors is missing"),
    "weights of garbage": (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 99), "is damaged or incomplete"),
    "weights cut off": (lambda m: cut(m / "model.safetensors"), "is damaged or incomplete"),
    "a pickle only": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        r"model.safetensors is missing; found pytorch_model.bin. .*save_pretrained",
    ),
    "another framework": (
        lambda m: (m / "model.safetensors").rename(m / "tf_model.h5"),
        "missing; found tf_model.h5",
    ),
    "GGUF": (lambda m: (m / "model.safetensors").rename(m / "tiny.Q4.gguf"), "missing; found tiny.Q4.gguf"),
    "a shard is missing": (
        lambda m: (
            (m / "model.safetensors").rename(m / "one.safetensors"),
            (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors", "b": "two"}}'),
        ),
        "two is missing",
    ),
    "an index of garbage": (
        lambda m: (
            (m / "model.safetensors").unlink(),
            (m / "model.safetensors.index.json").write_text("[1]"),
        ),
        "holds a list",
    ),
    "a layer is missing": (
        lambda m: weights(m, lambda w: drop(w, "layers.1.mlp")),
        r"lack 3 weights .* model.layers.1.mlp.down_proj.weight for example; they would be random",
    ),
    "config with more layers": (lambda m: settings(m, num_hidden_layers=3), "lack 9 weights"),
    "config of other sizes": (lambda m: settings(m, intermediate_size=48), r"shape \(16, 32\), not \(16, 48\)"),
    "NaN": (lambda m: weights(m, poison), r"1 of its 20 weights are NaN or infinite, model.layers.0.mlp"),
    "config is empty": (lambda m: (m / "config.json").write_text(""), "config.json can't be read as JSON"),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), "config.json holds a list"),
    "config is binary": (lambda m: (m / "config.json").write_bytes(b"\xff\xfe"), "can't be read as JSON"),
    "no model_type": (lambda m: settings(m, model_type=None), "its config can't be loaded .*model_type"),
    "unknown model_type": (lambda m: settings(m, model_type="novel"), "`novel` .*pip install -U transformers"),
    "a word for a number": (lambda m: settings(m, hidden_size="x"), "its config can't be loaded .*hidden_size"),
    "no heads": (lambda m: settings(m, num_attention_heads=0), "ZeroDivisionError"),
    "unknown activation": (lambda m: settings(m, hidden_act="zzz"), "no 'zzz' is known or given"),
    "quantized by an absent package": (
        lambda m: settings(m, quantization_config={"quant_method": "gptq", "bits": 4}),
        "its quantization can't be loaded .*pip install optimum",
    ),
    "quantized by nobody knows what": (
        lambda m: settings(m, quantization_config={"quant_method": "magic"}),
        "no quantization method 'magic'",
    ),
    "quantized by a word": (
        lambda m: settings(m, quantization_config="x"),
        "config.json: quantization_config must be an object of settings; found 'x'",
    ),
    "packed, it says": (
        lambda m: settings(m, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"calls the weights packed by bitsandbytes, and they are plain \(F32\)",
    ),
    "whole numbers": (
        lambda m: weights(m, lambda w: w.update({key: w[key].to(torch.int8) for key in w if "q_proj" in key})),
        "its weights are of type I8, as quantized ones are, and config.json has no quantization_config",
    ),
    "architecture is a number": (lambda m: settings(m, architectures=[5]), "architectures must be a list, such as"),
    "an encoder, it says": (lambda m: settings(m, is_encoder_decoder=True), "and llama has no encoder"),
    "rope without its factor": (
        lambda m: settings(m, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        r"its config can't be loaded \(Missing required keys .*factor'\}\)",
    ),
    "vision": (
        lambda m: settings(m, model_type="llava", architectures=["LlavaForConditionalGeneration"]),
        "is a vision-language model",
    ),
    "no tokenizer": (
        lambda m: [(m / file).unlink() for file in ("tokenizer.json", "tokenizer_config.json")],
        "its tokenizer",
    ),
    "a tokenizer of garbage": (lambda m: (m / "tokenizer.json").write_text("{}"), "its tokenizer can't be loaded"),
    "a tokenizer of half a file": (lambda m: cut(m / "tokenizer.json"), "its tokenizer can't be loaded"),
    "more tokens than embeddings": (
        lambda m: (
            settings(m, vocab_size=200),
            weights(m, lambda w: w.update({"model.embed_tokens.weight": torch.ones(200, 16)})),
        ),
        r"has the token .* with id \d+, and the model has embeddings for 200 ids",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model_is_refused_in_one_line(tiny, tmp_path, spoil, message):
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    spoil(folder)
    with pytest.raises(InputError, match=f"^--sft_model_path {folder}: .*{message}"):
        load(folder, "--sft_model_path")


BROKEN_ADAPTERS = {
    "config of garbage": (lambda a: (a / "adapter_config.json").write_text("{,}"), "can't be read as JSON"),
    "config is a list": (lambda a: (a / "adapter_config.json").write_text("[]"), "holds a list"),
    "no kind": (lambda a: settings(a, "adapter_config.json", peft_type=None), "no peft_type"),
    "unknown kind": (lambda a: settings(a, "adapter_config.json", peft_type="NOVEL"), "adapter_config.json can't be"),
    "a setting of a newer PEFT": (
        lambda a: settings(a, "adapter_config.json", novel_scaling=2),
        "setting 'novel_scaling', which PEFT .* doesn't know",
    ),
    "its own base": (
        lambda a: settings(a, "adapter_config.json", base_model_name_or_path=str(a)),
        "is itself an adapter",
    ),
    "base is a number": (
        lambda a: settings(a, "adapter_config.json", base_model_name_or_path=3),
        "base_model_name_or_path must be",
    ),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "a pickle only": (
        lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"),
        "missing; found adapter_model.bin",
    ),
    "weights cut off": (lambda a: cut(a / "adapter_model.safetensors"), "is damaged or incomplete"),
    "another rank": (
        lambda a: settings(a, "adapter_config.json", r=3),
        r"the adapter can't be loaded .*size mismatch for .*lora_A",
    ),
    "layers that the base lacks": (
        lambda a: weights(
            a,
            lambda w: w.update(
                {key.replace("layers.0", "layers.7"): value.clone() for key, value in w.items() if "layers.0" in key}
            ),
            "adapter_model.safetensors",
        ),
        "the adapter doesn't fit its base: has no place for .*layers.7",
    ),
    "a layer is missing": (
        lambda a: weights(a, lambda w: drop(w, "layers.1"), "adapter_model.safetensors"),
        "the adapter doesn't fit its base: needs .*layers.1",
    ),
    "modules that the base lacks": (
        lambda a: settings(a, "adapter_config.json", target_modules=["nowhere"]),
        "the adapter can't be loaded",
    ),
    "NaN": (
        lambda a: weights(a, lambda w: poison(w, "lora_B"), "adapter_model.safetensors"),
        "are NaN or infinite",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN_ADAPTERS.values(), ids=BROKEN_ADAPTERS)
def test_a_broken_adapter_is_refused_in_one_line(sft, tmp_path, spoil, message):
    folder = tmp_path / "a"
    shutil.copytree(sft, folder)
    spoil(folder)
    with pytest.raises(InputError, match=f"^--model_name_or_path {folder}: .*{message}"):
        load(folder)


def test_adapters_of_adapters_end(sft, tmp_path):
    """Also where two name each other."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, base in ((one, other), (other, one)):
        shutil.copytree(sft, folder)
        settings(folder, "adapter_config.json", base_model_name_or_path=str(base))
    with pytest.raises(InputError, match=r"its base .* is itself an adapter"):
        resolve(str(one))


def test_an_adapter_of_a_newer_peft_loads_while_its_new_settings_are_empty(sft, tokenizer, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(sft, folder)
    settings(folder, "adapter_config.json", novel_config={}, novel_switch=False, peft_version="9.9")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(load(folder)(ids).logits, load(sft)(ids).logits)


@pytest.mark.parametrize("name", ["a/..", "one two", "https://huggingface.co/you/model", "you/model/", "you//m", "-a"])
def test_malformed_hub_ids_are_refused(name):
    with pytest.raises(InputError, match="--reward_model_path "):
        resolve(name, "--reward_model_path")


def test_a_folder_has_no_revisions(tiny, sft):
    for name in (tiny, sft, "starter"):
        with pytest.raises(InputError, match="--model_revision v9: only a Hub repo has revisions"):
            resolve(name, revision="v9")
    resolve(tiny, revision="main")


# ---------------------------------------------------------------------------------------------- code of the model's


@pytest.fixture
def with_code(tiny, tmp_path):
    """A model whose config, class and tokenizer are its own code, which leaves a file behind when it runs."""
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    (folder / "own.py").write_text(
        f"open({str(tmp_path / MARK)!r}, 'w')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    settings(folder, model_type="own", auto_map=own)
    return folder


def test_a_models_code_runs_only_when_it_is_asked_for(with_code, tmp_path, monkeypatch):
    class Yes:  # a user at the prompt that transformers shows without trust_remote_code=False
        def readline(self):
            return "y\n"

    monkeypatch.setattr(sys, "stdin", Yes())
    with pytest.raises(InputError, match=r"needs code that the model brings along.* --trust_remote_code true"):
        load(with_code)
    assert not (tmp_path / MARK).exists()
    source = resolve(str(with_code), trust_remote_code=True)
    model = load_causal_lm(source, PLAIN, load_tokenizer(source), trainable=False)
    assert type(model).__name__ == "OwnModel" and (tmp_path / MARK).exists()


def test_an_adapters_base_runs_no_code_unasked(with_code, sft, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(sft, folder)
    settings(
        folder,
        "adapter_config.json",
        base_model_name_or_path=str(with_code),
        auto_mapping={"base_model_class": "OwnModel", "parent_library": "own"},
    )
    with pytest.raises(InputError, match="--trust_remote_code true"):
        load(folder)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_that_a_config_names_is_not_fetched(tiny, tmp_path, key):
    """transformers would ask for the package that fetches and runs it."""
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    settings(folder, **{key: "kernels-community/flash-attn3"})
    assert load(folder).config._attn_implementation in ("sdpa", "grouped")


def test_every_loading_call_says_whether_code_may_run():
    """And that weights are safetensors. PEFT has neither; it loads no code, and its files are checked."""
    loaders = {"from_pretrained", "from_config"}
    unsaid = []
    for package in ("rlhf", "eval", "recipes"):
        for file in (ROOT / package).rglob("*.py"):
            for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                    continue
                owner = ast.unparse(call.func.value)
                words = {word.arg for word in call.keywords}
                if call.func.attr in loaders and not owner.startswith("Peft"):
                    common = None in words  # **common of rlhf/tasks/finetuning.py
                    if "trust_remote_code" not in words and not common:
                        unsaid.append(f"{file.name}:{call.lineno} {owner}")
                    model = "Model" in owner or "auto_class" in owner
                    whole = call.func.attr == "from_pretrained" and "gguf_file" not in words
                    if model and whole and "use_safetensors" not in words:
                        unsaid.append(f"{file.name}:{call.lineno} {owner}: use_safetensors")
                assert call.func.attr != "pipeline", file
    assert unsaid == []


# ---------------------------------------------------------------------------------------------- what loads


def test_an_adapter_brings_its_resized_embeddings_along(tiny, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    larger = AutoTokenizer.from_pretrained(tiny)
    larger.add_tokens(["<new>"])
    model.resize_token_embeddings(len(larger))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = 1.0
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its tokenizer has the token '<new>'"):
        larger.save_pretrained(tmp_path)
        shutil.copytree(tiny, tmp_path / "m")
        larger.save_pretrained(tmp_path / "m")
        load(tmp_path / "m")
    source = resolve(str(tmp_path))
    again = load_causal_lm(source, PLAIN, load_tokenizer(source), trainable=False)
    ids = torch.tensor([[5, len(larger) - 1, 7]])
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
    policy = load_causal_lm(resolve(tiny), LORA, tokenizer)
    assert not fits_beside(policy, source)


def test_outputs_that_a_config_names_change_nothing(tiny, tokenizer, tmp_path):
    """Tuples in place of named outputs, and attention weights, which attention kernels don't return."""
    shutil.copytree(tiny, tmp_path / "m")
    settings(tmp_path / "m", return_dict=False, output_attentions=True, output_hidden_states=True)
    source, ids = resolve(str(tmp_path / "m")), torch.tensor([[5, 6, 7]])
    output = load_causal_lm(source, LORA, tokenizer)(ids)
    torch.testing.assert_close(output.logits, load(tiny)(ids).logits)
    assert output.attentions is None and output.hidden_states is None
    assert load_reward_model(source, LORA, tokenizer)(ids).logits.shape == (1, 1)


def test_a_control_token_beyond_the_embeddings_that_nothing_uses_is_no_fault(tiny, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    larger = AutoTokenizer.from_pretrained(tiny)
    larger.add_special_tokens({"additional_special_tokens": ["<image>"]})
    larger.save_pretrained(folder)
    assert load(folder).get_input_embeddings().num_embeddings == len(larger) - 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptTuningConfig(num_virtual_tokens=2), "is a PROMPT_TUNING adapter"),
        (TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5]), "is a TRAINABLE_TOKENS adapter"),
        (LoraConfig(r=2, target_modules=["lm_head"]), "changes lm_head only, .* no such layer. Give its base"),
    ],
)
def test_no_start_for_a_reward_model(config, message, tiny, tokenizer, tmp_path):
    config.task_type = "CAUSAL_LM"
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"^--model_name_or_path {tmp_path}: .*{message}"):
        load_reward_model(resolve(str(tmp_path)), LORA, tokenizer)


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), True),
        (LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), True),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]), False),
        # these keep what their layers share outside of the model
        (VBLoRAConfig(r=2, vector_length=8, num_vectors=20, topk=2, target_modules=["q_proj"]), False),
        (UniLoraConfig(r=2, target_modules=["q_proj"]), False),
    ],
)
def test_a_reward_model_begins_with_the_trunk_of_its_sft_adapter(config, left_out, tiny, tokenizer, tmp_path, capsys):
    config.task_type = "CAUSAL_LM"
    sft = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).eval()
    for parameter in sft.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 10
    sft.save_pretrained(tmp_path / "sft")
    model = load_reward_model(resolve(str(tmp_path / "sft")), LORA, tokenizer).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = sft.get_base_model().model(ids).last_hidden_state
    torch.testing.assert_close(model.get_base_model().model(ids).last_hidden_state, expected)
    assert ("its lm_head is left out" in capsys.readouterr().out) == left_out
    model.save_pretrained(tmp_path / "reward")
    again = load_reward_model(resolve(str(tmp_path / "reward")), LORA, tokenizer, trainable=False)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_a_reward_model_keeps_its_adapters_and_heads(reward_adapter, sft, tiny, tokenizer):
    """The checks of adapters pass for what this library saves."""
    for name in (reward_adapter, sft, tiny):
        model = load_reward_model(resolve(name), LORA, tokenizer)
        assert isinstance(model, PeftModel)
    load_policy(resolve(sft), LORA, tokenizer)


@pytest.mark.parametrize("load", [load_causal_lm, load_reward_model])
def test_weights_of_more_layers_than_the_config_has_are_not_dropped(tiny, tokenizer, tmp_path, load):
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"config.json has fewer layers than the weights: 9 .*layers\.1\."):
        load(resolve(str(tmp_path / "model")), ModelConfig(dtype="float32"), tokenizer)


def test_the_padding_that_transformers_zeroes_at_loading_is_not_trained(tmp_path):
    """Youtu's head is its embeddings; a base without a pad token gets one here."""
    model = tiny_model("youtu")
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 1.0
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "base")
    loaded = load_causal_lm(resolve(str(tmp_path / "base")), ModelConfig(dtype="float32"), tiny_tokenizer())
    loaded(torch.tensor([[5, 6, 7]])).logits.logsumexp(-1).sum().backward()
    weight = loaded.get_input_embeddings().weight
    assert not weight.grad[0].any() and weight.grad[1].any()
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, loaded(ids).logits)
