"""Two real processes (gloo): the same training as one process with the same global batch."""

import json

import torch
from conftest import TINY_PPO, TINY_TRAINING, run
from safetensors.torch import load_file


def _weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def _close(first, second, tolerance):
    assert set(first) == set(second)
    return all(torch.allclose(first[name], second[name], atol=tolerance) for name in first)


def _train(recipe, dataset, tiny, folder, processes):
    batch = str(8 // processes)
    arguments = [*TINY_TRAINING, "--max_steps", 3, "--optim", "sgd", "--learning_rate", 0.5]
    arguments[arguments.index("--per_device_train_batch_size") + 1] = batch
    run(f"recipes/{recipe}.py", "--model_name_or_path", tiny, "--dataset_name", dataset, "--output_dir", folder,
        *arguments, processes=processes)  # fmt: skip
    assert json.loads((folder / "run.json").read_text())["finished"]
    return _weights(folder)


def test_sft_on_two_processes_equals_one(tiny, files, tmp_path):
    one = _train("sft", files / "sft.jsonl", tiny, tmp_path / "one", 1)
    two = _train("sft", files / "sft.jsonl", tiny, tmp_path / "two", 2)
    assert _close(one, two, 1e-4)


def test_reward_on_two_processes_equals_one(tiny, files, tmp_path):
    one = _train("reward", files / "pairs.jsonl", tiny, tmp_path / "one", 1)
    two = _train("reward", files / "pairs.jsonl", tiny, tmp_path / "two", 2)
    assert any("score" in name for name in one)
    assert _close(one, two, 1e-4)


def test_lora_ppo_on_two_processes(tiny, files, tmp_path):
    result = run("recipes/ppo.py", "--model_name_or_path", tiny, "--dataset_name", files / "prompts.jsonl",
                 "--output_dir", tmp_path / "ppo", *TINY_PPO, processes=2)  # fmt: skip
    assert "'episode': 16" in result.stdout
    weights = _weights(tmp_path / "ppo")
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)
