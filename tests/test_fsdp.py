"""PPO under accelerate's own FSDP2 code, on two CPU processes (fsdp_on_cpu.py)."""

import json
import re

import torch
from conftest import ROOT, TINY_PPO, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SHARDED = re.compile(r"FSDP2 units: whole (\S*layers\.0 \S*layers\.1)?.*; (\d+) of (\d+)")


def ppo(files, folder, *more, processes=2, check=True, **environment):
    """Two updates with a global batch of 8; sharded, if there are two processes."""
    words = [*TINY_PPO, "--response_length", 24, "--save_steps", 1, "--temperature", 0.1, "--num_ppo_epochs", 2]
    words[words.index("--per_device_train_batch_size") + 1] = str(8 // processes)
    words = ["--dataset_name", files / "prompts.jsonl", "--output_dir", folder, *without_repeats([*words, *more])]
    if processes == 1:
        return run("recipes/ppo.py", *words)
    result = run("tests/fsdp_on_cpu.py", ROOT / "recipes" / "ppo.py", *words, processes=2, check=check,
                 environment=environment)  # fmt: skip
    for layers, own, whole in SHARDED.findall(result.stdout):
        assert layers and int(own) < 0.51 * int(whole)
    apart = "--ds3_gather_for_generation" in words
    assert set(re.findall(r"FSDP2 layers whole: (\d of \d)", result.stdout)) <= {"0 of 2" if apart else "2 of 2"}
    assert result.returncode or SHARDED.search(result.stdout)
    return result


def without_repeats(words):
    """Flags with the value that was given last; a tuple is several values."""
    flags = dict(zip(words[::2], words[1::2], strict=True))
    return [word for flag, value in flags.items() for word in (flag, *(value if isinstance(value, tuple) else [value]))]


def metrics(folder):
    log = json.loads((folder / "checkpoint-2" / "ppo_state.json").read_text())["log"]
    return [entry for entry in log if "objective/kl" in entry]


def trained(folder, step):
    return load_file(folder / f"checkpoint-{step}" / "trainable.safetensors")


def assert_same_run(one, two, tolerances=(1e-4, 2e-2)):
    # Adam makes steps of one size of gradients that are rounding alone
    for first, second, tolerance in zip(metrics(one), metrics(two), tolerances, strict=True):
        for key in first:
            if not key.startswith("time/") and key not in ("eps", "epoch"):
                assert abs(first[key] - second[key]) < tolerance * max(1.0, abs(first[key])), key
    for step, tolerance in ((1, 1e-5), (2, 1e-4)):
        first, second = trained(one, step), trained(two, step)
        assert set(first) == set(second)
        assert all(torch.allclose(first[name], second[name], atol=tolerance) for name in first)


def test_four_roles_and_an_ensemble_on_one_base_train_sharded_as_on_one_process_and_resume_exactly(
    sft, reward_adapter, second_reward_adapter, files, tmp_path
):
    words = ["--model_name_or_path", sft, "--reward_model_path", (reward_adapter, second_reward_adapter),
             "--reward_ensemble", "uwo", "--value_function", "adapter", "--learning_rate", 1e-3,
             "--stop_strings", "e"]  # fmt: skip
    ppo(files, tmp_path / "one", *words, processes=1)
    words += [
        "--ds3_gather_for_generation",
        "false",
    ]  # layer by layer, though one process samples longer than the other
    said = ppo(files, tmp_path / "two", *words, FSDP_CPU_RAM_EFFICIENT_LOADING="true").stdout
    assert re.search(r"each process gathers 0\.00\d+ GiB of weights .* true: 0\.0\d+ GiB, faster", said)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert set(adapters[0]) == set(adapters[1])
    assert all(torch.allclose(adapters[0][name], adapters[1][name], atol=1e-4) for name in adapters[0])
    assert metrics(tmp_path / "two")[0]["objective/kl"] == 0

    finished = (tmp_path / "two" / "adapter_model.safetensors").read_bytes()
    state = json.loads((tmp_path / "two" / "run.json").read_text())
    (tmp_path / "two" / "run.json").write_text(json.dumps({**state, "finished": False}))
    (tmp_path / "two" / "adapter_model.safetensors").unlink()
    (tmp_path / "two" / "checkpoint-2").rename(tmp_path / "gone")
    again = ppo(files, tmp_path / "two", *words, FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    assert "Resuming from" in again.stdout
    assert (tmp_path / "two" / "adapter_model.safetensors").read_bytes() == finished


def test_a_whole_model_trains_sharded_with_its_reference_in_bfloat16(tiny, files, tmp_path):
    words = ["--model_name_or_path", tiny, "--use_peft", "false", "--learning_rate", 1e-3]
    ppo(files, tmp_path / "two", *words, "--bf16", "true", "--ds3_gather_for_generation", "false")
    first = metrics(tmp_path / "two")[0]
    assert first["objective/kl"] == 0 and first["val/first_ratio"] == 1  # policy and reference compute alike
    start, end = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny, tmp_path / "two"))
    assert set(start) == set(end) and any(not torch.equal(start[name], end[name]) for name in start)


def test_a_whole_model_with_accumulation_and_checkpointed_activations(tiny, files, tmp_path):
    words = ["--model_name_or_path", tiny, "--use_peft", "false", "--learning_rate", 1e-3,
             "--activation_checkpointing", "true"]  # fmt: skip
    ppo(files, tmp_path / "one", *words, processes=1)
    halves = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    ppo(files, tmp_path / "two", *words, *halves)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    each = ["--accelerator_config", '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}']
    ppo(files, tmp_path / "each", *words, *halves, *each)
    assert_same_run(tmp_path / "two", tmp_path / "each")


def test_fsdp_1_is_refused(tiny, files, tmp_path):
    said = ppo(files, tmp_path / "out", "--model_name_or_path", tiny, check=False, FSDP_VERSION="1")
    assert said.returncode and "error: PPO runs on one process, under DDP, FSDP2" in said.stderr
