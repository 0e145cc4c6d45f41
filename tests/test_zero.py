"""PPO under DeepSpeed's ZeRO-2 and ZeRO-3 on two CPU processes (zero_on_cpu.py), started from recipes/accelerate/."""

import json
import os
import re
import shutil
import subprocess
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import ENVIRONMENT, ROOT, TINY_PPO, ppo_config, run
from safetensors.torch import load_file
from test_fsdp import SHARDED, assert_same_run, metrics, trained, without_repeats
from trl import ModelConfig

from rlhf.errors import InputError
from rlhf.ppo import zero
from rlhf.ppo.model import Shardable
from rlhf.ppo.sharding import shard
from rlhf.run.refused import check_refused

SHARES = re.compile(r"ZeRO-(\d): (\d+) of (\d+) weights, (\d+) of (\d+) trained")
SEAMS: dict[str | None, list[str]] = {"ddp": [], "fsdp": ["tests/fsdp_on_cpu.py"], "zero2": ["tests/zero_on_cpu.py"],
         "zero3": ["tests/zero_on_cpu.py"]}  # fmt: skip


def read(words):
    """How accelerate's launcher reads its arguments, and the environment that it gives to each process."""
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    arguments.deepspeed_fields_from_accelerate_config = ""
    with mock.patch.dict(os.environ, ENVIRONMENT, clear=True):
        if arguments.use_deepspeed:
            return arguments, prepare_deepspeed_cmd_env(arguments)[1]
        return arguments, prepare_multi_gpu_env(arguments)


def ppo(kind, files, folder, *more):
    """Two updates with a global batch of 4, on one process (`kind` is None) or on two with the launch file `kind`."""
    words = [*TINY_PPO, "--total_episodes", 8, "--response_length", 8, "--temperature", 0.1, "--learning_rate", 1e-3,
             "--per_device_train_batch_size", 2 if kind else 4]  # fmt: skip
    words = ["--dataset_name", files / "prompts.jsonl", "--output_dir", folder, *without_repeats([*words, *more])]
    if kind is None:
        return run("recipes/ppo.py", *words)
    _, environment = read(["--config_file", f"{ROOT}/recipes/accelerate/{kind}.yaml", "--num_processes", "2", "ppo.py"])
    script, *behind = [ROOT / path for path in [*SEAMS[kind], "recipes/ppo.py"]]
    result = run(script, *behind, *words, processes=2, environment=environment)
    spread = {"ddp": None, "fsdp": SHARDED}.get(kind, SHARES)
    assert spread is None or spread.search(result.stdout)  # a silent DDP would train as well
    for stage, own, weights, share, whole in SHARES.findall(result.stdout):
        assert kind == f"zero{stage}" and int(share) < 0.51 * int(whole)
        assert int(own) == int(weights) if stage == "2" else int(own) < 0.51 * int(weights)
    return result


def saved_optimizer(folder, step):
    return torch.load(folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["optimizer"]


def assert_same_optimizer(one, two, tolerance):
    """The same state of the same names, in the same groups."""
    assert set(one["state"]) == set(two["state"])
    for name, values in one["state"].items():
        for key, value in values.items():
            assert torch.allclose(torch.as_tensor(value), torch.as_tensor(two["state"][name][key]), atol=tolerance)
    groups = [{name: (group["lr"], group["weight_decay"]) for group in state["param_groups"]
               for name in group["params"]} for state in (one, two)]  # fmt: skip
    assert groups[0] == groups[1]


def again(kind, files, source, folder, *words):
    """Go on from the first of the two checkpoints of `source`, in a copy of it."""
    shutil.copytree(source / "checkpoint-1", folder / "checkpoint-1")
    state = json.loads((source / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**state, "finished": False}))
    result = ppo(kind, files, folder, *words)
    assert "Resuming from" in result.stdout


@pytest.fixture(scope="module")
def roles(sft, reward_adapter):
    return ["--model_name_or_path", sft, "--reward_model_path", reward_adapter, "--value_function", "adapter"]


@pytest.fixture(scope="module")
def folders(roles, files, tmp_path_factory):
    """Runs of four roles on one base, by kind; None is the run on one process."""
    runs = {kind: tmp_path_factory.mktemp("runs") / str(kind) for kind in (None, "fsdp", "zero2", "zero3")}
    for kind, folder in runs.items():
        ppo(kind, files, folder, *roles)
    return runs


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_four_roles_of_one_base_train_as_on_one_process(folders, kind):
    assert_same_run(folders[None], folders[kind], (1e-5, 1e-3))
    adapters = [load_file(folders[name] / "adapter_model.safetensors") for name in (None, kind)]
    assert set(adapters[0]) == set(adapters[1])
    assert all(torch.allclose(adapters[0][name], adapters[1][name], atol=1e-5) for name in adapters[0])


def test_an_ensemble_scores_as_on_one_process(sft, reward_adapter, second_reward_adapter, files, tmp_path):
    """With the bounds of test_fsdp.py: an ensemble divides scores by their spread, and with them rounding."""
    words = ["--model_name_or_path", sft, "--reward_model_path", (reward_adapter, second_reward_adapter),
             "--value_function", "reward"]  # fmt: skip
    for kind in (None, "zero3"):
        ppo(kind, files, tmp_path / str(kind), *words)
    assert metrics(tmp_path / "zero3")[0]["ensemble/spread"] > 0
    assert_same_run(tmp_path / "None", tmp_path / "zero3")


def test_every_strategy_saves_the_same_optimizer(folders):
    for folder in folders.values():
        assert_same_optimizer(saved_optimizer(folders[None], 1), saved_optimizer(folder, 1), 1e-5)


def test_zero_3_resumes_exactly(folders, roles, files, tmp_path):
    again("zero3", files, folders["zero3"], tmp_path / "again", *roles)
    for name in ("adapter_model.safetensors", "checkpoint-2/trainable.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folders["zero3"] / name).read_bytes()
    assert_same_optimizer(saved_optimizer(tmp_path / "again", 2), saved_optimizer(folders["zero3"], 2), 0)


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_continuous_batching_samples_with_weights_that_are_spread(roles, files, tmp_path, kind):
    words = ["--use_transformers_continuous_batching", "true", "--transformers_continuous_batching_config",
             '{"page_size": 16}']  # fmt: skip
    ppo(kind, files, tmp_path / "run", *roles, *words)
    for entry in metrics(tmp_path / "run"):
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
    assert abs(entry["objective/kl"]) > 1e-3  # the policy has moved since the start


def test_a_run_goes_on_under_another_strategy(folders, roles, files, tmp_path):
    again("fsdp", files, folders["zero3"], tmp_path / "again", *roles)
    assert_same_run(folders[None], tmp_path / "again")
    assert_same_optimizer(saved_optimizer(tmp_path / "again", 2), saved_optimizer(folders[None], 2), 1e-4)


def test_everything_that_an_update_can_do(tiny, files, tmp_path):
    """A whole model, value warm-up with weight decay, microbatches, PPO-ptx, recomputed activations."""
    words = ["--model_name_or_path", tiny, "--use_peft", "false", "--value_warmup_steps", 1, "--weight_decay", 0.1,
             "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, "--ptx_coef", 0.3,
             "--ptx_dataset_name", files / "sft.jsonl", "--activation_checkpointing", "true"]  # fmt: skip
    for kind in ("ddp", "zero3"):
        ppo(kind, files, tmp_path / kind, *words)
    assert_same_run(tmp_path / "ddp", tmp_path / "zero3")
    start, warm, end = (
        load_file(f"{tiny}/model.safetensors"),
        trained(tmp_path / "zero3", 1),
        trained(tmp_path / "zero3", 2),
    )
    assert all(torch.equal(start[name], warm[f"policy.{name}"]) for name in start)
    assert any(not torch.equal(start[name], end[f"policy.{name}"]) for name in start)
    again("zero2", files, tmp_path / "zero3", tmp_path / "again", *words)  # in the middle of the warm-up's groups
    assert_same_run(tmp_path / "ddp", tmp_path / "again")


def test_bfloat16_is_autocast(sft, reward_adapter, files, tmp_path):
    words = ["--model_name_or_path", sft, "--reward_model_path", reward_adapter, "--value_function", "adapter",
             "--dtype", "bfloat16", "--bf16", "true"]  # fmt: skip
    ppo("zero3", files, tmp_path, *words)
    first = metrics(tmp_path)[0]
    assert first["objective/kl"] == 0 and first["val/first_ratio"] == 1
    assert all(tensor.dtype == torch.float32 for tensor in trained(tmp_path, 1).values())


@pytest.mark.parametrize(
    ("settings", "precision", "said"),
    [
        ({"zero_stage": 1}, "no", "zero_stage 1: PPO runs under"),
        ({"zero_stage": 2, "offload_optimizer_device": "cpu"}, "no", "offload_optimizer_device cpu: "),
        ({"zero_stage": 3, "offload_param_device": "nvme"}, "no", "offload_param_device nvme: "),
        ({"zero_stage": 2}, "fp16", "--mixed_precision fp16: "),
        ({"hf_ds_config": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}}, "no", "'optimizer'"),
    ],
)
def test_what_was_not_run_is_refused(settings, precision, said):
    state = SimpleNamespace(deepspeed_plugin=DeepSpeedPlugin(**settings))
    with pytest.raises(InputError, match=re.escape(said)):
        zero.check(SimpleNamespace(state=state, mixed_precision=precision))


def test_a_layer_at_a_time_is_refused():
    state = SimpleNamespace(deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
    with pytest.raises(InputError, match="--ds3_gather_for_generation false"):
        shard(SimpleNamespace(state=state, mixed_precision="no"), Shardable([]), False)


def test_slurm_starts_a_launcher_on_each_machine(tmp_path):
    """What the script starts, with stand-ins for Slurm's commands and for accelerate."""
    stand_ins = {
        "scontrol": "echo node7; echo node8",
        "srun": 'shift; for id in 0 1; do SLURM_NODEID=$id "$@"; done',
        "accelerate": 'shift; printf "%s\\n" "$*"',
    }
    for name, lines in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    for file in ("multi_node", "zero3"):
        given = {
            "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "9",
            "LAUNCH_FILE": f"recipes/accelerate/{file}.yaml", "PATH": f"{tmp_path}:{os.environ['PATH']}",
        }  # fmt: skip
        said = subprocess.run(
            ["bash", "recipes/accelerate/slurm.sh", "recipes/ppo.py", "--output_dir", "out"],
            cwd=ROOT, env=given, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for machine, line in enumerate(said.splitlines()):
            arguments, _ = read(line.split())
            found = (arguments.nnodes, int(arguments.node_rank), arguments.nproc_per_node, arguments.rdzv_endpoint)
            assert found == ("2", machine, "8", "node7:20009")
            assert arguments.training_script_args == ["--output_dir", "out"]
        assert len(said.splitlines()) == 2


def test_whole_models_in_bfloat16_are_refused_before_they_are_loaded(tmp_path, monkeypatch):
    args = ppo_config(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_refused([args, ModelConfig(use_peft=False, dtype="float32")])
    check_refused([args, ModelConfig(use_peft=True, dtype="bfloat16")])
    with pytest.raises(InputError, match="--dtype bfloat16: under DeepSpeed PPO trains whole models in float32"):
        check_refused([args, ModelConfig(use_peft=False, dtype="bfloat16")])
