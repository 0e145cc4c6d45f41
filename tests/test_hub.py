"""Pushing with the real huggingface_hub client to a Hub on 127.0.0.1, and loading from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_PPO, TINY_TRAINING, run
from hub_server import local_hub
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf.hub import public_value

LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
torch.save(model(torch.tensor([[5, 6, 7]])).logits, sys.argv[3])
"""


RESOLVE = """
import sys, time
time.sleep = lambda _: None  # the client waits between its attempts
from trl import ModelConfig
from rlhf.errors import InputError
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import resolve
from rlhf.models.tokenizers import load_tokenizer
for word in sys.argv[1:]:
    name, _, revision = word.partition("@")
    try:
        source = resolve(name, "--sft_model_path", revision or None)
        load_causal_lm(source, ModelConfig(dtype="float32"), load_tokenizer(source), trainable=False)
        print("loaded")
    except InputError as error:
        print(" ".join(str(error).split()))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Hub and the environment of its users, which name it while they are imported."""
    with local_hub() as hub:
        yield hub, {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path_factory.mktemp("home"))}  # fmt: skip


@pytest.fixture
def hub(place):
    hub = place[0]
    hub.repos, hub.commits, hub.uploads, hub.denied, hub.tokens = {}, {}, {}, {}, set()
    hub.requests, hub.failing = 0, None
    return hub


@pytest.fixture
def environment(place):
    return place[1]


def test_what_the_hub_refuses_is_one_line_each(tiny, sft, hub, environment):
    """Gated, forbidden, missing and broken repos; a revision that isn't there; an adapter of a gated base."""
    model = {path.name: path.read_bytes() for path in Path(tiny).iterdir()}
    adapter = {path.name: path.read_bytes() for path in Path(sft).iterdir()}
    config = json.loads(adapter["adapter_config.json"])
    pickled = {"pytorch_model.bin" if name == "model.safetensors" else name: data for name, data in model.items()}
    words = {
        "you/fine": "loaded",
        "you/fine@v9": "--sft_model_path you/fine: the Hub repo has no revision 'v9'",
        "you/gated": "--sft_model_path you/gated: no such local folder, and the Hub says no: it doesn't",
        "you/forbidden": "the Hub says no: it doesn't exist, is gated or needs a token",
        "you/login": "the Hub says no: it doesn't exist, is gated or needs a token",
        "you/missing": "the Hub says no: it doesn't exist, is gated or needs a token",
        "you/down": "--sft_model_path you/down: no such local folder, and the Hub ",
        "you/empty": "this Hub repo has neither config.json nor adapter_config.json",
        "you/pickled": "you/pickled: model.safetensors is missing; found pytorch_model.bin.",
        "you/adapter": "--sft_model_path you/adapter: the adapter's base model is missing.",
    }  # fmt: skip
    hub.repos = {
        "models/you/fine": model,
        "models/you/empty": {"README.md": b"none"},
        "models/you/pickled": pickled,
        "models/you/adapter": {
            **adapter,
            "adapter_config.json": json.dumps(config | {"base_model_name_or_path": "you/gated"}).encode(),
        },
    }
    hub.commits = dict.fromkeys(hub.repos, "1" * 40)
    hub.denied = {
        "models/you/gated": (403, "GatedRepo"),
        "models/you/forbidden": (403, ""),
        "models/you/login": (401, ""),
        "models/you/down": (500, ""),
    }
    result = run("-c", RESOLVE, *words, environment={**environment, "HF_TOKEN": "hf_secret"})
    lines = result.stdout.strip().splitlines()
    assert len(lines) == len(words), result.stdout + result.stderr[-3000:]
    for line, (word, expected) in zip(lines, words.items(), strict=True):
        assert expected in line, (word, line)
        assert "hf_secret" not in line


def test_every_recipe_pushes_what_others_can_load(tiny, files, hub, environment, tmp_path):
    environment = {**environment, "HF_TOKEN": "hf_secret"}
    push = lambda name: ["--push_to_hub", "--hub_model_id", f"you/{name}"]  # noqa: E731
    sft, reward, ppo = tmp_path / "sft", tmp_path / "reward", tmp_path / "ppo"
    run("recipes/sft.py", "--model_name_or_path", tiny, "--dataset_name", files / "sft.jsonl", "--output_dir", sft,
        *TINY_TRAINING, *push("sft"), environment=environment)  # fmt: skip
    run("recipes/collect.py", "--model_name_or_path", sft, "--dataset_name", files / "prompts.jsonl",
        "--output_dir", tmp_path / "pairs", "--dtype", "float32", "--max_new_tokens", 24, *push("pairs"),
        environment=environment)  # fmt: skip
    run("recipes/reward.py", "--model_name_or_path", sft, "--dataset_name", files / "pairs.jsonl", "--output_dir",
        reward, *TINY_TRAINING, *push("reward"), "--hub_revision", "trial", environment=environment)  # fmt: skip
    # PPO takes both adapters from the Hub
    run("recipes/ppo.py", "--model_name_or_path", sft, "--reward_model_path", reward, "--dataset_name",
        files / "prompts.jsonl", "--output_dir", ppo, *TINY_PPO, *push("ppo"), environment=environment)  # fmt: skip

    pushed = hub.repos
    assert pushed.pop("models/you/reward") == {}  # --hub_revision leaves main alone
    assert set(pushed) == {"models/you/sft", "datasets/you/pairs", "models/you/reward@trial", "models/you/ppo"}
    assert hub.tokens - {None} == {"Bearer hf_secret"}  # validating a card needs none
    for repo, content in pushed.items():
        assert "README.md" in content
        for name, data in content.items():
            assert not name.endswith((".bin", ".pt", ".pth", ".pkl")), name
            for secret in (
                b"hf_secret",
                str(tmp_path).encode(),
                str(files).encode(),
                os.path.dirname(tiny).encode(),
            ):
                assert secret not in data, (repo, name, secret)

    card = pushed["models/you/ppo"]["README.md"].decode()
    assert f"| started from | you/sft | {hub.commits['models/you/sft']} |" in card
    assert f"| trained against the reward model | you/reward | {hub.commits['models/you/reward@trial']} |" in card
    assert "learning_rate" in card and "objective/raw_scores" in card and "base_model: tiny0" in card
    assert json.loads(pushed["models/you/reward@trial"]["adapter_config.json"])["task_type"] == "SEQ_CLS"

    logits = tmp_path / "logits.pt"
    run("-c", LOAD, tiny, "you/ppo", logits, environment=environment)
    local = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(ppo))
    assert torch.equal(torch.load(logits, weights_only=True), local(torch.tensor([[5, 6, 7]])).logits)


def test_no_path_of_this_machine_is_public_wherever_a_setting_has_it(tmp_path):
    secret = str(tmp_path / "secret" / "reward")
    assert public_value([secret, "starter", 0.5]) == "reward, starter, 0.5"
    assert public_value(f"sft={secret}") == "sft=reward" and public_value("you/model") == "you/model"
    assert public_value([secret], {(tmp_path / "secret" / "reward").resolve(): "round-1/reward"}) == "round-1/reward"


PUSH = """
import sys
from datasets import Dataset
from rlhf.ppo import PPOConfig, PPOTrainer
args = PPOConfig(
    sys.argv[2], push_to_hub=True, hub_model_id="you/policy", hub_token="hf_secret", max_steps=2, save_strategy="steps",
    save_steps=1, response_length=4, per_device_train_batch_size=2, num_ppo_epochs=1, report_to="none", bf16=False,
    num_sample_generations=0,
)
rows = Dataset.from_list([{"prompt": "Tea is"}, {"prompt": "Rain is"}])
ones = lambda completions: [1.0] * len(completions)
trainer = PPOTrainer(args, model=sys.argv[1], reward_funcs=ones, train_dataset=rows)
trainer.train()
trainer.save_model()
"""


def test_the_trainer_in_python_pushes_the_policy_and_no_token(tiny, hub, environment, tmp_path):
    run("-c", PUSH, tiny, tmp_path / "out", environment=environment)
    content = hub.repos["models/you/policy"]
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= set(content)
    assert b"ppo" in content["README.md"]
    files = [*content.values(), *(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())]
    assert not any(b"hf_secret" in data for data in files)


def test_a_hub_that_fails_at_any_request_loses_nothing(tiny, files, tmp_path):
    """One line each time, nothing noted as pushed, and the same push completes once the Hub is well again."""
    run("recipes/sft.py", "--model_name_or_path", tiny, "--dataset_name", files / "sft.jsonl", "--output_dir",
        tmp_path / "sft", *TINY_TRAINING, "--max_steps", 1)  # fmt: skip
    ways = ("500", "403", "401", "404", "close", "silence")
    words = [sys.executable, ROOT / "tests" / "push_failures.py", tmp_path / "sft", *ways]
    script = subprocess.run(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert script.returncode == 0
    lines = [line for line in script.stdout.splitlines() if line.startswith("PUSH ")]
    pushes = [json.loads(line.removeprefix("PUSH ")) for line in lines]
    for how in (500, 403, 401, 404, "close", "silence"):
        *failed, last = [push for push in pushes if push["how"] == how]
        assert len(failed) > (6 if how in (500, 403) else 2) and last["said"] is None
        for push in failed:
            assert push["said"].startswith("--push_to_hub you/x: the Hub refused or failed (")
            assert "without training" in push["said"] and "hf_secret" not in push["said"] and not push["noted"]
        for push in (*failed, last) if how == 500 else ():
            assert push["hub"]["name"] == "you/x" and "adapter_model.safetensors" in push["files"]


def test_a_hub_that_refuses_is_asked_before_training(tiny, files, hub, environment, tmp_path):
    words = ["--model_name_or_path", tiny, "--dataset_name", files / "sft.jsonl", "--output_dir", tmp_path / "out",
             *TINY_TRAINING, "--push_to_hub", "--hub_model_id", "you/x", "--hub_token", "hf_secret"]  # fmt: skip
    for number in (1, 2):  # creating the repo; may the token write?
        hub.requests, hub.failing = 0, (number, 403)
        said = run("recipes/sft.py", *words, check=False, environment=environment)
        line = said.stderr.splitlines()[-1]
        assert said.returncode == 2 and line.startswith("error: --push_to_hub you/x: the Hub refused or failed (")
        assert "Nothing was trained yet" in line and not list((tmp_path / "out").iterdir())
    hub.failing = None
    run("recipes/sft.py", *words, environment=environment)  # the same folder
    assert "adapter_model.safetensors" in hub.repos["models/you/x"]
    for file in (*tmp_path.rglob("*"), *Path(environment["HF_HOME"]).rglob("*")):
        assert not file.is_file() or b"hf_secret" not in file.read_bytes(), file
