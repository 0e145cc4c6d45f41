"""The pieces of the GPU check, with tiny sizes, on whatever device there is."""

import importlib
import json
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "gpu"))  # its scripts import each other

import beside_trl
import check
import recipe
from agreement import config
from piece import save_random

from rlhf.ppo.upstream import HAS_TRL_PPO


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", check.python_path())
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measured(piece):
    found: dict[str, Any] = {}
    importlib.import_module(piece).measure(True, found.update)
    return found


def test_a_piece_is_recorded_and_a_failure_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    file, kept = tmp_path / "gpu.json", check.KEPT.read_bytes()
    monkeypatch.setitem(check.PIECES, "gone", ("a script that is not there", 60))
    words = ["check.py", "--tiny", "--only", "gone", "card", "--results_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        check.main()
    record = json.loads(file.read_text())
    assert check.KEPT.read_bytes() == kept
    assert stopped.value.code == 1 and "Failed: gone." in capsys.readouterr().out
    assert record["pieces"]["gone"]["error"][0] == "exit code 2"
    assert record["pieces"]["card"]["bf16_matmul_tflops"] > 0 and "error" not in record["pieces"]["card"]
    assert set(record) == {"command", "commit", "machine", "versions", "pieces"}


def test_only_a_whole_run_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check.py", "--keep", "--tiny"])
    with pytest.raises(SystemExit):
        check.main()
    assert "--keep: keeps a whole run" in capsys.readouterr().err


def test_agreement():
    found = measured("agreement")
    assert found["completions_drawn_alike"] == found["completions"]
    assert all(value < 1e-5 for value in found["gpu_float32"].values())
    for name, value in found["gpu_bfloat16"].items():
        assert 0 < value < 2 * found["cpu_bfloat16"][name] + 1e-4


def test_three_ways_sample_as_many_tokens():
    found = measured("sampling")
    ways = {name.split(",")[0]: numbers for name, numbers in found.items() if name != "peak_memory_gib"}
    assert {name: numbers["tokens"] for name, numbers in ways.items()} == {
        "own_loop": 10, "stock": 10, "continuous_batching": 10
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("which", ["ours", *(["trl"] if HAS_TRL_PPO else [])])
def test_ppo_beside_trl(tmp_path, capsys, which, mode):
    folder = save_random(beside_trl.config(True), tmp_path / "model", torch.bfloat16)
    beside_trl.run(which, mode, folder, tiny=True)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("REPORT ")]
    report = json.loads(line.removeprefix("REPORT "))
    assert report["seconds_per_update"] > 0 and report["teraflop_per_update"] > 0
    assert {"rollout", "update"} <= set(report["phases"])


def test_resume_and_one_sharded_run():
    assert measured("resume") == {"deterministic": {"two runs": True, "resumed": True}}
    [numbers] = measured("sharded").values()
    assert numbers["KL before the first step"] == 0 and numbers["ratio before the first step"] == 1
    assert numbers["largest difference of update 1"][1] == numbers["of update 2"][1] == 0


def test_the_road():
    found = measured("road")
    assert {"tokenizer", "pretrain", "sft", "preferences", "reward", "ppo", "comparison", "models"} == set(found)
    assert found["models"].keys() == {"base", "sft", "ppo", "best_of_4"}


def test_a_failed_recipe_ends_the_piece(tmp_path):
    with pytest.raises(SystemExit, match="ended with exit code 2"):
        recipe.run_recipe("recipes/sft.py", "--model_name_or_path", tmp_path / "none")


def test_the_record_of_a_gpu_is_kept():
    """benchmarks/gpu.json says which card and what was left out."""
    kept = json.loads((ROOT / "benchmarks" / "gpu.json").read_text())
    assert kept["machine"]["gpu"] and kept["commit"] != "unknown"
    assert set(kept["pieces"]) <= {*check.PIECES, "attention"}
    assert config(True).vocab_size == config(False).vocab_size
