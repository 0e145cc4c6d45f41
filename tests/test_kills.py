"""A sample of `make kills` (tests/kill_runs.py): a PPO run that is killed, SFT and reward runs that resume."""

import json
import shutil
import signal

import pytest
from conftest import TINY_PPO, TINY_TRAINING
from kill_runs import Case, compare, complete, disturb, outcome, signalled, words_of


def test_a_ppo_run_killed_at_any_moment_ends_with_the_same_weights(sft, files, tmp_path):
    words = words_of(model_name_or_path=sft, dataset_name=files / "prompts.jsonl")
    case = Case("recipes/ppo.py", [*words, *TINY_PPO, "--logging_steps", "1"], seed=1)
    duration = complete(case, tmp_path / "whole", tmp_path / "log")
    whole = outcome(tmp_path / "whole")
    assert {"adapter_model.safetensors", "trainer_state.json"} <= whole.keys()
    # it compares weights and logged numbers, byte for byte
    assert len(list(disturb(case, tmp_path / "killed", whole, duration, 1, signalled(signal.SIGKILL)))) == 1


@pytest.mark.parametrize("recipe, data", [("sft", "sft"), ("reward", "pairs")])
def test_a_resumed_run_logs_what_the_undisturbed_one_does(recipe, data, tiny, files, tmp_path):
    """The tokens that TRL counts, and one evaluation at the start."""
    words = words_of(model_name_or_path=tiny, dataset_name=files / f"{data}.jsonl", max_steps=3)
    case = Case(f"recipes/{recipe}.py", [*words, *TINY_TRAINING, "--eval_on_start", "true"])
    run = tmp_path / "run"
    complete(case, run, tmp_path / "log")
    whole = outcome(run)
    assert {"eval_loss", "num_tokens"} <= {key for entry in whole["trainer_state.json"] for key in entry}
    shutil.rmtree(run / "checkpoint-3")  # it ended before that one
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**state, "finished": False}))
    complete(case, run, tmp_path / "log")
    compare(case, run, whole)
