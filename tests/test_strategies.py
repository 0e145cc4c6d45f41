"""SFT and reward training under FSDP2 and DeepSpeed, on two CPU processes, beside one process."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, TINY_TRAINING, run, save_tiny
from safetensors.torch import load_file
from test_fsdp import SHARDED, without_repeats
from test_zero import SEAMS, SHARES, read
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf.models.losses import FUSED

KINDS: list[str | None] = ["fsdp", "zero2", "zero3"]
DATA = {"sft": "sft", "reward": "pairs"}


def train(recipe, kind, files, out, *more, check=True):
    """Three steps of 8 of the 28 rows, on one process (`kind` is None) or on two with the launch file `kind`."""
    words = [*TINY_TRAINING, "--dataset_name", files / f"{DATA[recipe]}.jsonl", "--output_dir", out, "--max_steps", 3,
             "--save_steps", 2, "--learning_rate", 1e-3, "--per_device_train_batch_size", 4 if kind else 8,
             *more]  # fmt: skip
    words = without_repeats(words)
    if kind is None:
        return run(f"recipes/{recipe}.py", *words)
    _, environment = read(["--config_file", f"{ROOT}/recipes/accelerate/{kind}.yaml", "--num_processes", "2", "x.py"])
    script, *behind = [ROOT / path for path in [*SEAMS[kind], f"recipes/{recipe}.py"]]
    result = run(script, *behind, *words, processes=2, environment=environment, check=check)
    assert not check or (SHARDED if kind == "fsdp" else SHARES).search(
        result.stdout
    )  # a silent DDP would train as well
    return result


def log(out):
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in entries for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy")
            if name in entry]  # fmt: skip


def weights(out):
    (file,) = out.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    ("recipe", "flags", "kinds"),
    [
        ("sft", ["--use_peft", "false", "--activation_checkpointing", "true"], KINDS),
        ("reward", [], KINDS),
        ("sft", [], ["zero3"]),
        ("reward", ["--use_peft", "false"], ["zero3"]),
    ],
)
def test_training_is_that_of_one_process(recipe, flags, kinds, tiny, files, tmp_path):
    flags = ["--model_name_or_path", tiny, *flags]
    train(recipe, None, files, tmp_path / "one", *flags)
    expected = weights(tmp_path / "one")
    for kind in kinds:
        train(recipe, kind, files, tmp_path / kind, *flags)
        assert log(tmp_path / kind) == pytest.approx(log(tmp_path / "one"), rel=1e-3, abs=1e-4), kind
        found = weights(tmp_path / kind)
        assert set(found) == set(expected), kind
        assert all(torch.allclose(found[name], tensor, atol=2e-5) for name, tensor in expected.items()), kind


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_trained_beside_an_adapter(tied, tokenizer, files, tmp_path):
    """TRL's own loss would drop the gradients of the other process. From 1.15 on it has no other, and is refused."""
    model = save_tiny(tmp_path / "model", tokenizer, tie_word_embeddings=tied)
    flags = ["--model_name_or_path", model, "--lora_modules_to_save", "embed_tokens" if tied else "lm_head"]
    refused = tied or FUSED
    two = train("sft", "fsdp", files, tmp_path / "two", *flags, check=not refused)
    if refused:
        assert two.returncode == 2 and "error: --lora_modules_to_save: under FSDP2" in two.stderr
    else:
        train("sft", None, files, tmp_path / "one", *flags)
        assert log(tmp_path / "two") == pytest.approx(log(tmp_path / "one"), rel=1e-3, abs=1e-4)


def test_an_encoder_is_spread_and_what_fsdp_cannot_spread_is_refused(tokenizer, files, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=len(tokenizer), num_labels=1))
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    flags = ["--model_name_or_path", tmp_path / "bert", "--use_peft", "false"]
    train("reward", None, files, tmp_path / "one", *flags)
    train("reward", "fsdp", files, tmp_path / "two", *flags)
    assert log(tmp_path / "two") == pytest.approx(log(tmp_path / "one"), rel=1e-3, abs=1e-4)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(**sizes, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    said = train("sft", "fsdp", files, tmp_path / "t5-run", "--model_name_or_path", tmp_path / "t5", check=False)
    assert said.returncode == 2 and "error: FSDP2 can't spread a model of type t5 (" in said.stderr


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_a_classifier_that_reads_rows_by_length(kind, tokenizer, files, tmp_path):
    """FNet takes a pass for each length of a batch, which differ between the processes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": len(tokenizer)}
    FNetForSequenceClassification(FNetConfig(**sizes, num_labels=1)).save_pretrained(tmp_path / "fnet")
    tokenizer.save_pretrained(tmp_path / "fnet")
    flags = ["--model_name_or_path", tmp_path / "fnet", "--use_peft", "false"]
    train("reward", None, files, tmp_path / "one", *flags)
    train("reward", kind, files, tmp_path / kind, *flags)
    assert log(tmp_path / kind) == pytest.approx(log(tmp_path / "one"), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_a_sharded_run_goes_on_where_it_was(kind, tiny, files, tmp_path):
    flags = ["--model_name_or_path", tiny, "--use_peft", "false"]
    train("sft", kind, files, tmp_path / "run", *flags)
    finished = weights(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**state, "finished": False}))
    (tmp_path / "run" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    assert "Resuming from" in train("sft", kind, files, tmp_path / "run", *flags).stdout
    again = weights(tmp_path / "run")
    assert all(torch.equal(again[name], tensor) for name, tensor in finished.items())
