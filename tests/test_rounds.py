"""The closed loop: collect, reward model, PPO, evaluation, again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ENVIRONMENT, ROOT, TINY_PPO, TINY_TRAINING, run, save_tiny, user
from trl import ModelConfig

from rlhf.errors import InputError
from rlhf.feedback.rounds import check_start, gather_comparisons, round_verdicts
from rlhf.models.adapters import REFERENCE
from rlhf.models.loading import load_policy
from rlhf.models.sources import resolve, resolve_start
from rlhf.models.tokenizers import load_tokenizer
from rlhf.run.files import write_jsonl

LORA = ModelConfig(dtype="float32", use_peft=True)


def config(path, words, **more):
    """A YAML file of flags given as words."""
    names = [str(word).removeprefix("--") for word in words[::2]]
    path.write_text(yaml.safe_dump({**dict(zip(names, map(_plain, words[1::2]), strict=True)), **more}))
    return path


def _plain(word):
    return yaml.safe_load(str(word))


@pytest.fixture(scope="module")
def settings(tiny, files, tmp_path_factory):
    """An SFT adapter, and the flags of a tiny loop from it."""
    folder = tmp_path_factory.mktemp("rounds")
    run("recipes/sft.py", "--model_name_or_path", tiny, "--dataset_name", files / "sft.jsonl", "--output_dir",
        folder / "sft", *TINY_TRAINING)  # fmt: skip
    sample = {"max_new_tokens": 6, "dtype": "float32", "labeler": "reward", "num_generations": 3}
    evaluated = {"max_new_tokens": 6, "dtype": "float32", "best_of_n": 1}
    configs = {
        "collect_config": config(folder / "collect.yaml", [], **sample),
        "reward_config": config(folder / "reward.yaml", TINY_TRAINING, use_peft=True),
        "ppo_config": config(folder / "ppo.yaml", TINY_PPO, use_peft=True, learning_rate=0.05, logging_steps=1),
        "compare_config": config(folder / "compare.yaml", [], **evaluated),
    }
    words = ["--model_name_or_path", folder / "sft", "--dataset_name", files / "sft.jsonl"]
    for name, path in configs.items():
        words += [f"--{name}", path]
    return folder, words


def test_two_rounds_and_an_interruption(settings):
    folder, words = settings
    out = folder / "loop"
    first = run("recipes/rounds.py", *words, "--rounds", 1, "--output_dir", out)
    assert first.stdout.count("===") == 4
    (out / "round-1" / "comparison" / "run.json").unlink()  # as if it had been stopped before its evaluation
    for file in (out / "round-1" / "comparison").iterdir():
        file.unlink()
    adapter = (out / "round-1" / "ppo" / "adapter_model.safetensors").read_bytes()
    second = run("recipes/rounds.py", *words, "--rounds", 2, "--output_dir", out)
    assert second.stdout.count("already finished") == 3  # preferences, reward, ppo of round 1
    assert (out / "round-1" / "ppo" / "adapter_model.safetensors").read_bytes() == adapter
    summary = json.loads((out / "rounds.json").read_text())
    assert [entry["round"] for entry in summary["rounds"]] == [0, 1, 2]
    assert summary["rounds"][0]["kl"]["mean"] == pytest.approx(0, abs=1e-4)
    assert summary["rounds"][2]["comparisons"] > summary["rounds"][1]["comparisons"] > 0
    assert "Round 2" in second.stdout and "on held-out prompts" in second.stdout
    settings_of_ppo = json.loads((out / "round-2" / "ppo" / "run.json").read_text())["settings"]
    assert settings_of_ppo["sft_model_path"] == str(folder / "sft")
    state = json.loads((out / "round-2" / "ppo" / "trainer_state.json").read_text())
    assert state["log_history"][0]["objective/kl"] != pytest.approx(0, abs=1e-6)  # the policy has left SFT in round 1
    assert (out / "rounds.png").stat().st_size > 3000 and (out / "report.html").exists()
    last = run("recipes/rounds.py", *words, "--rounds", 2, "--output_dir", out)
    assert "already finished" in last.stdout and "===" not in last.stdout


def test_the_policy_goes_on_while_the_reference_stays(settings, tmp_path, tokenizer):
    folder, _ = settings
    source = resolve(str(folder / "sft"))
    policy = load_policy(source, LORA, tokenizer)
    for name, parameter in policy.named_parameters():
        if ".default." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    policy.save_pretrained(tmp_path / "newest", selected_adapters=["default"])
    start = resolve_start(str(tmp_path / "newest"), source)
    again = dict(load_policy(source, LORA, load_tokenizer(source), start=start).named_parameters())
    trained = dict(policy.named_parameters())
    for name, parameter in again.items():
        if ".default." in name or f".{REFERENCE}." in name:
            assert torch.equal(parameter, trained[name]), name
            assert parameter.requires_grad == (".default." in name)
    assert resolve_start(str(folder / "sft"), source) == source
    with pytest.raises(InputError, match="--sft_model_path"):
        resolve_start(str(tmp_path / "newest"), resolve(save_tiny(tmp_path / "other", tokenizer, seed=1)))
    # from a full model as the SFT model, the reference is the model without the adapter
    full = resolve(source.base)
    start = resolve_start(str(tmp_path / "newest"), full)
    names = dict(load_policy(full, LORA, load_tokenizer(full), start=start).named_parameters())
    assert start.adapter == str(tmp_path / "newest") and not any(f".{REFERENCE}." in name for name in names)
    assert all(torch.equal(names[name], trained[name]) for name in names if ".default." in name)


def test_rounds_from_a_full_model_need_an_adapter_to_go_on_from(settings, tmp_path):
    folder, _ = settings
    whole = config(tmp_path / "whole.yaml", [], use_peft=False)
    sft = resolve(str(folder / "sft"))
    check_start(sft, str(whole), 3)
    check_start(resolve(sft.base), str(whole), 1)
    check_start(resolve(sft.base), str(config(tmp_path / "lora.yaml", [], use_peft=True)), 3)
    with pytest.raises(InputError, match=r"--ppo_config .*whole\.yaml: trains .* whole"):
        check_start(resolve(sft.base), str(whole), 2)


def test_held_out_prompts_stay_held_out(tmp_path):
    for number, (train, test) in enumerate([("a", "b"), ("b", "c")], 1):
        for split, prompt in (("train", train), ("test", test)):
            write_jsonl(tmp_path / f"round-{number}" / "preferences" / f"{split}.jsonl", [{"prompt": user(prompt)}])
    rounds = [tmp_path / "round-1", tmp_path / "round-2"]
    assert gather_comparisons(rounds, tmp_path / "all") == {"train": 1, "test": 2}
    assert json.loads((tmp_path / "all" / "train.jsonl").read_text())["prompt"] == user("a")
    write_jsonl(rounds[0] / "preferences" / "test.jsonl", [{"prompt": user("a")}])
    with pytest.raises(InputError, match="no pair is left"):
        gather_comparisons(rounds[:1], tmp_path / "none")


def test_the_verdict_says_what_the_interval_says():
    def entry(number, low, high):
        return {"round": number, "difference": {"mean": (low + high) / 2, "low": low, "high": high}}

    said = round_verdicts({
        "truth_name": "gold_score", "proxy_name": "score", "kl_name": "KL",
        "rounds": [{"round": 0}, entry(1, 0.1, 0.3), entry(2, -0.1, 0.2), entry(3, -0.3, -0.1)],
    })  # fmt: skip
    assert [sentence.split(" in gold")[0] for sentence in said] == [
        "Round 1 beats SFT", "Round 2 does not differ significantly from round 1", "Round 3 is worse than round 2",
    ]  # fmt: skip
    assert [sentence.endswith("the 95% interval excludes 0.") for sentence in said] == [True, False, True]


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--rounds", 0], "--rounds 0"), (["--ppo_config", "no.yaml"], "--ppo_config no.yaml"),
     (["--model_name_or_path", "./nowhere"], "--model_name_or_path ./nowhere")],
)  # fmt: skip
def test_bad_input(flags, said, tmp_path):
    result = run("recipes/rounds.py", *flags, "--output_dir", tmp_path / "out", check=False)
    assert result.returncode == 2 and f"error: {said}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_stage_that_fails_is_named_and_one_that_refuses_its_input_says_so_itself(tmp_path):
    (tmp_path / "c.yaml").write_text("model_name_or_path: ./nowhere\n")
    (tmp_path / "stage.py").write_text("raise SystemExit(3)")
    (tmp_path / "loop.py").write_text(LOOP)
    said = run(tmp_path / "loop.py", ROOT / "recipes" / "sft.py", tmp_path / "c.yaml", tmp_path / "out", check=False)
    assert said.returncode == 2 and said.stderr.splitlines()[-1].startswith("error: --model_name_or_path ./nowhere")
    said = run(tmp_path / "loop.py", tmp_path / "stage.py", "c.yaml", tmp_path / "out", check=False)
    assert said.returncode == 2 and "stage.py ended with exit code 3" in said.stderr


LOOP = """
import sys
from pathlib import Path
from rlhf.errors import report_errors
from rlhf.run import stages
from rlhf.run.stages import run_stage
stages.LIBRARIES = ()  # these stages need few
if __name__ == "__main__":
    with report_errors():
        print("finished:", run_stage(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), {}))
"""
STAGE = """
import json, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
signal.signal(signal.SIGINT, lambda *_: None)
(out / "ready").touch()
signal.pause()
time.sleep(1)  # longer than subprocess.run leaves a child after Ctrl-C
(out / "run.json").write_text(json.dumps({"recipe": "x", "settings": {}, "finished": False}))
"""


def test_ctrl_c_lets_a_stage_write_what_there_is(tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "loop.py").write_text(LOOP)
    loop = subprocess.Popen(
        [sys.executable, tmp_path / "loop.py", tmp_path / "stage.py", "c.yaml", tmp_path], cwd=ROOT,
        stdout=subprocess.PIPE, text=True, start_new_session=True, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while not (tmp_path / "ready").exists():
        assert loop.poll() is None
        time.sleep(0.1)
    os.killpg(loop.pid, signal.SIGINT)  # as a terminal does
    assert loop.communicate()[0].endswith("finished: False\n") and loop.returncode == 0
