"""A sample of `make kills` (tests/kill_runs.py): a PPO run that is killed, SFT and reward runs that resume."""

import json
import shutil
import signal

import pytest
from conftest import TINY_PPO, TINY_TRAINING
from kill_runs import (
    Case,
    Result,
    compare,
    complete,
    disturb,
    keep_results,
    outcome,
    page,
    read_results,
    signalled,
    still_good,
    words_of,
)  # fmt: skip


def test_a_ppo_run_killed_at_any_moment_ends_with_the_same_weights(sft, files, tmp_path):
    words = words_of(model_name_or_path=sft, dataset_name=files / "prompts.jsonl")
    case = Case("recipes/ppo.py", [*words, *TINY_PPO, "--logging_steps", "1"], seed=1)
    duration = complete(case, tmp_path / "whole", tmp_path / "log")
    whole = outcome(tmp_path / "whole")
    assert {"adapter_model.safetensors", "trainer_state.json"} <= whole.keys()
    # it compares weights and logged numbers, byte for byte
    assert len(list(disturb(case, tmp_path / "killed", whole, duration, 1, signalled(signal.SIGKILL)))) == 1


@pytest.mark.parametrize("ended", ["before its last checkpoint", "behind its last checkpoint", "between two entries"])
@pytest.mark.parametrize("recipe, data", [("sft", "sft"), ("reward", "pairs")])
def test_a_resumed_run_logs_what_the_undisturbed_one_does(recipe, data, ended, tiny, files, tmp_path):
    """The tokens that TRL counts, means over all steps, one evaluation at the start, no step more than --max_steps."""
    logging = 3 if ended == "between two entries" else 1
    words = words_of(model_name_or_path=tiny, dataset_name=files / f"{data}.jsonl", max_steps=3)
    words += [*TINY_TRAINING, "--eval_on_start", "true", "--save_steps", "2", "--logging_steps", str(logging)]
    case = Case(f"recipes/{recipe}.py", words)
    run = tmp_path / "run"
    complete(case, run, tmp_path / "log")
    whole = outcome(run)
    assert {"eval_loss", "num_tokens"} <= {key for entry in whole["trainer_state.json"] for key in entry}
    if ended != "behind its last checkpoint":
        shutil.rmtree(run / "checkpoint-3")
    finish_again(case, run, whole)


def test_a_run_that_ended_behind_its_last_checkpoint_is_evaluated_on_the_same_samples(sft, files, tmp_path):
    words = words_of(model_name_or_path=sft, dataset_name=files / "prompts.jsonl", max_steps=2, num_generations=4)
    case = Case("recipes/rloo.py", [*words, *TINY_TRAINING, "--max_completion_length", "6"])
    complete(case, tmp_path / "run", tmp_path / "log")
    whole = outcome(tmp_path / "run")
    assert any("eval_reward" in entry for entry in whole["trainer_state.json"])
    finish_again(case, tmp_path / "run", whole)


@pytest.mark.parametrize("recipe", ["rloo", "finetune", "sft"])
def test_later_epochs_and_own_numbers_are_those_of_the_undisturbed_run(recipe, sft, tiny, files, tmp_path):
    """RLOO resumes at the beginning of its third epoch, the others within their second one."""
    (tmp_path / "noting.py").write_text(
        "def reward(completions, completion_ids, log_metric):\n"
        "    log_metric('first', completion_ids[0][0])\n"
        "    return [float(ids[0] % 7) for ids in completion_ids]\n"
    )
    (tmp_path / "labels.jsonl").write_text(
        "".join(json.dumps({"text": f"I like number {n}", "label": ["odd", "even"][n % 2]}) + "\n" for n in range(24))
    )
    model, data, steps, name, words = {
        "rloo": (sft, files / "prompts.jsonl", 3, "first", ["--reward_funcs", "noting.reward", "--num_generations", "4",
                                                            "--max_completion_length", "6"]),
        "finetune": (tiny, tmp_path / "labels.jsonl", 6, "lm_loss", ["--lm_coef", "0.5"]),
        "sft": (tiny, files / "sft.jsonl", 6, "loss", ["--train_sampling_strategy", "group_by_length"]),
    }[recipe]  # fmt: skip
    if recipe != "rloo":
        words += ["--per_device_train_batch_size", "10"]
    flags = words_of(model_name_or_path=model, dataset_name=data)
    often = words_of(max_steps=steps, save_steps=steps - 1, logging_steps=3)
    case = Case(f"recipes/{recipe}.py", [*flags, *TINY_TRAINING, *often, *words], cwd=str(tmp_path))
    complete(case, tmp_path / "run", tmp_path / "log")
    whole = outcome(tmp_path / "run")
    entry = next(entry for entry in whole["trainer_state.json"] if entry["step"] == steps)
    assert name in entry and entry["epoch"] > 1
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{steps}")
    finish_again(case, tmp_path / "run", whole)


def finish_again(case, run, whole):
    """Run a finished run once more, as if it had ended before it was finished."""
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**state, "finished": False}))
    complete(case, run, run.with_name("log"))
    compare(case, run, whole)


def test_results_of_several_sessions_make_the_page(tmp_path):
    day = "2026-11-2{}T10:00:00".format
    early = Result({"identical": 2}, 0, day(6), code="old", versions="torch 2")
    late = Result({"identical": 3, "one line": 2}, 0, day(7), code="new", versions="torch 2")
    wrong = Result({"identical": 1, "wrong": 1}, 0, day(7), code="new", versions="torch 2")
    for recipe, kind, results in (
        ("sft", "kill", [early]), ("sft", "damage", [late]), ("sft", "kill", [early, late]), ("ppo", "disk", [wrong]),
    ):  # fmt: skip
        keep_results(tmp_path, recipe, kind, results)
    kept = read_results(tmp_path)
    assert kept == {"sft": {"kill": [early, late], "damage": [late]}, "ppo": {"disk": [wrong]}}
    text = page(kept, ["sft", "ppo", "star"])
    said = " ".join(text.split())
    assert "2 of 3 recipes were disturbed 14 times" in said and "9 identical, 4 one line, 1 wrong" in said
    assert "| sft | 5 identical, 2 one line \\* | not tried | not tried | 3 identical, 2 one line |" in text
    assert "| ppo | not tried | not tried | 1 identical, 1 wrong | not tried |" in text
    assert (
        still_good([early, late], 0) == [early, late] and still_good([early], 1) == still_good([early, wrong], 0) == []
    )
