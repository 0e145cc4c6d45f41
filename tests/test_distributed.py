"""Two real processes (gloo): the same training as one process with the same global batch."""

import json
import subprocess
import sys

import torch
from conftest import ENVIRONMENT, ROOT, TINY_PPO, TINY_TRAINING, VOCABULARY, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def _weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def _close(first, second, tolerance):
    assert set(first) == set(second)
    return all(torch.allclose(first[name], second[name], atol=tolerance) for name in first)


def _train(recipe, dataset, tiny, folder, processes, run=run):
    batch = str(8 // processes)
    arguments = [*TINY_TRAINING, "--max_steps", 3, "--optim", "sgd", "--learning_rate", 0.5]
    arguments[arguments.index("--per_device_train_batch_size") + 1] = batch
    run(f"recipes/{recipe}.py", "--model_name_or_path", tiny, "--dataset_name", dataset, "--output_dir", folder,
        *arguments, processes=processes)  # fmt: skip
    assert json.loads((folder / "run.json").read_text())["finished"]
    return _weights(folder)


def test_sft_on_two_processes_of_accelerate_launch_equals_one(tiny, files, tmp_path):
    one = _train("sft", files / "sft.jsonl", tiny, tmp_path / "one", 1)
    two = _train("sft", files / "sft.jsonl", tiny, tmp_path / "two", 2, launched)
    assert _close(one, two, 1e-4)


def launched(script, *arguments, processes):
    """As the README starts several processes; the other tests fork them from one that has imported the libraries."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml", "--multi_gpu"]
    flags = ["--num_processes", processes, "--main_process_port", 0, script, *arguments]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}  # for machines with a GPU
    subprocess.run([sys.executable, *launch, *map(str, flags)], cwd=ROOT, check=True, env=environment)


def test_reward_on_two_processes_equals_one(tiny, files, tmp_path):
    one = _train("reward", files / "pairs.jsonl", tiny, tmp_path / "one", 1)
    two = _train("reward", files / "pairs.jsonl", tiny, tmp_path / "two", 2)
    assert any("score" in name for name in one)
    assert _close(one, two, 1e-4)


def _ppo(sft, files, folder, processes, *more):
    """Two updates of LoRA PPO with a global batch of 8."""
    arguments: list[object] = list(TINY_PPO)
    arguments[arguments.index("--per_device_train_batch_size") + 1] = str(8 // processes)
    arguments[arguments.index("--response_length") + 1] = "24"
    # a sharp distribution, in which rounding doesn't decide between thousands of likely tokens
    arguments += [
        "--learning_rate",
        1e-2,
        "--temperature",
        0.1,
        "--stop_token_id",
        *range(0, VOCABULARY, 40),
        *more,
    ]  # of uneven length
    run("recipes/ppo.py", "--model_name_or_path", sft, "--dataset_name", files / "prompts.jsonl", "--output_dir",
        folder, *arguments, processes=processes)  # fmt: skip
    log = json.loads((folder / "checkpoint-2" / "ppo_state.json").read_text())["log"]
    return [entry for entry in log if "objective/kl" in entry]


def test_defect_30_lora_ppo_on_two_processes_equals_one(sft, files, tmp_path):
    """Same rollouts, same gathered metrics, same weights after each update."""
    one = _ppo(sft, files, tmp_path / "one", 1)
    two = _ppo(sft, files, tmp_path / "two", 2)
    for first, second in zip(one, two, strict=True):
        for key in first:
            if not key.startswith("time/") and key not in ("eps", "epoch"):
                assert abs(first[key] - second[key]) < 1e-3 * max(1.0, abs(first[key])), key
    assert one[0]["completions/mean_length"] < 24
    for step in (1, 2):
        folders = [tmp_path / name / f"checkpoint-{step}" for name in ("one", "two")]
        first, second = (load_file(folder / "trainable.safetensors") for folder in folders)
        assert _close(first, second, 1e-4)
    assert _close(_weights(tmp_path / "one"), _weights(tmp_path / "two"), 1e-4)


def test_two_processes_resume_exactly(sft, files, tmp_path):
    settings = ("--save_steps", 1)
    _ppo(sft, files, tmp_path / "run", 2, *settings)
    finished = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**state, "finished": False}))
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "gone")
    assert {path.name for path in (tmp_path / "gone").glob("random_state_*")} == {
        "random_state_0.pt",
        "random_state_1.pt",
    }
    _ppo(sft, files, tmp_path / "run", 2, *settings)
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == finished


def test_defect_31_full_ppo_on_two_processes_saves_a_whole_model(tiny, files, tmp_path):
    weights: list[dict[str, torch.Tensor]] = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = list(TINY_PPO)
        arguments[arguments.index("--per_device_train_batch_size") + 1] = str(4 // processes)
        run("recipes/ppo.py", "--model_name_or_path", tiny, "--use_peft", "false", "--dataset_name",
            files / "prompts.jsonl", "--output_dir", folder, *arguments, "--learning_rate", 1e-3,
            processes=processes)  # fmt: skip
        weights.append(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    start = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    assert any(not torch.equal(start[name], weights[1][name]) for name in start)
    one, two = weights
    assert _close(one, two, 1e-4)
