"""The recipes as a user runs them: the whole road on a tiny model, resume, skip, bad input."""

import json
import re
import types

import pytest
import torch
from conftest import ROOT, TINY_PPO, TINY_TRAINING, present, run, save_tiny, user
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from trl import ModelConfig, ScriptArguments

from rlhf.data.datasets import DatasetArguments
from rlhf.errors import InputError
from rlhf.pretraining.config import NewModelConfig, PretrainingConfig
from rlhf.run.arguments import parse
from rlhf.run.checkpoints import last_checkpoint, write_digests
from rlhf.run.files import digest
from rlhf.run.folders import command, settings_of

RECIPES = sorted((ROOT / "recipes").glob("*.py"))


@pytest.fixture(scope="module")
def road(tiny, files, tmp_path_factory):
    """Outputs of all stages, each made from the one before."""
    out = tmp_path_factory.mktemp("road")
    logs = {}
    sft = ["--model_name_or_path", tiny, "--dataset_name", files / "sft.jsonl", "--output_dir", out / "sft"]
    logs["sft"] = run("recipes/sft.py", *sft, *TINY_TRAINING)
    logs["collect"] = run(
        "recipes/collect.py", "--model_name_or_path", out / "sft", "--dataset_name", files / "prompts.jsonl",
        "--output_dir", out / "preferences", "--dtype", "float32", "--max_new_tokens", 24, "--num_generations", 3,
    )  # fmt: skip
    logs["reward"] = run(
        "recipes/reward.py", "--model_name_or_path", out / "sft", "--dataset_name", files / "pairs.jsonl",
        "--output_dir", out / "reward", *TINY_TRAINING, "--num_train_epochs", 3, "--learning_rate", 2e-2,
    )  # fmt: skip
    ppo = ["--model_name_or_path", out / "sft", "--dataset_name", files / "prompts.jsonl"]
    logs["ppo"] = run(
        "recipes/ppo.py", *ppo, "--reward_model_path", out / "reward", "--output_dir", out / "ppo", *TINY_PPO
    )
    logs["compare"] = run(
        "eval/compare.py", "--models", f"base={tiny}", f"sft={out / 'sft'}", f"ppo={out / 'ppo'}", "--dataset_name",
        files / "sft.jsonl", "--reward_model_path", out / "reward", "--output_dir", out / "comparison", "--dtype",
        "float32", "--max_new_tokens", 6, "--best_of_n", 2,
    )  # fmt: skip
    return out, logs


def test_every_stage_finishes_and_says_what_it_reached(road):
    out, logs = road
    for stage in ("sft", "preferences", "reward", "ppo", "comparison"):
        assert json.loads((out / stage / "run.json").read_text())["finished"], stage
    reward = json.loads((out / "reward" / "run.json").read_text())["metrics"]
    assert reward["eval_accuracy"] > 0.9 and reward["eval_margin"] > 0
    over_pairs = json.loads((out / "reward" / "evaluation.json").read_text())
    logged = json.loads((out / "reward" / "trainer_state.json").read_text())["log_history"][-1]
    for name, key in (("eval_accuracy", "mean"), ("eval_margin", "margin")):
        assert reward[name] == logged[name] == over_pairs[key]
    assert "pairs to train on" in logs["collect"].stdout


def test_preferences_are_complete(road):
    out, _ = road
    lines = [json.loads(line) for line in (out / "preferences" / "train.jsonl").read_text().splitlines()]
    assert all({"prompt", "chosen", "rejected", "labeler", "certainty", "model"} <= set(line) for line in lines)
    assert all(line["labeler"] == "simulated" and line["model"] == "sft" for line in lines)


def test_ppo_starts_at_the_sft_model_and_leaves_an_ordinary_adapter(road, tiny):
    out, logs = road
    first = present(re.search(r"'objective/kl': '?(-?[\d.e-]+)", logs["ppo"].stdout))
    assert abs(float(first.group(1))) < 1e-4
    adapters = {}
    for stage in ("sft", "ppo"):
        base = AutoModelForCausalLM.from_pretrained(tiny)
        adapters[stage] = PeftModel.from_pretrained(base, str(out / stage))(torch.tensor([[5, 6, 7]])).logits
    assert not torch.equal(adapters["sft"], adapters["ppo"])
    reply = pipeline("text-generation", model=str(out / "ppo"))(user("Hi"), max_new_tokens=3)
    assert reply[0]["generated_text"][-1]["role"] == "assistant"


def test_the_reward_adapter_loads_with_plain_peft(road, tiny):
    out, _ = road
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    model = PeftModel.from_pretrained(base, str(out / "reward"))
    tokenizer = AutoTokenizer.from_pretrained(str(out / "reward"))
    scores = []
    for reply in ("Great, happy, love it", "Awful, sad, hate it"):
        chat = [*user("What about tea?"), {"role": "assistant", "content": reply}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        scores.append(float(model(**ids).logits))
    assert scores[0] > scores[1]


def test_comparison_writes_means_with_intervals(road):
    out, logs = road
    results = json.loads((out / "comparison" / "results.json").read_text())
    assert set(results["models"]) == {"base", "sft", "ppo", "best_of_2"}
    for metric in (
        "reward_score",
        "win_rate/reward",
        "length_controlled_win_rate/reward",
        "kl",
        "reply_length",
        "distinct_2",
        "perplexity",
    ):
        cell = results["models"]["ppo"][metric]
        assert cell["low"] <= cell["mean"] <= cell["high"] and cell["n"] >= 1
    assert results["models"]["sft"]["win_rate/reward"]["mean"] == 0.5
    assert abs(results["models"]["sft"]["kl"]["mean"]) < 1e-4
    best, plain = results["models"]["best_of_2"]["reward_score"], results["models"]["sft"]["reward_score"]
    assert best["mean"] >= plain["mean"]
    assert "ppo_minus_sft" in results["differences"]
    stages = [command.split()[2] for command in results["commands"]]
    assert stages == ["recipes/sft.py", "recipes/reward.py", "recipes/ppo.py", "eval/compare.py"]
    assert "Some held-out prompts" in logs["compare"].stdout
    sample = json.loads((out / "comparison" / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample) == {"prompt", "base", "sft", "ppo", "best_of_2"}


def test_a_finished_run_is_skipped_and_another_run_refused(road, tiny, files):
    out, _ = road
    arguments = ["--model_name_or_path", tiny, "--dataset_name", files / "sft.jsonl", "--output_dir", out / "sft"]
    before = (out / "sft" / "adapter_model.safetensors").read_bytes()
    again = run("recipes/sft.py", *arguments, *TINY_TRAINING)
    assert "already finished" in again.stdout
    other = run("recipes/sft.py", *arguments, *TINY_TRAINING, "--learning_rate", 0.5, check=False)
    assert other.returncode == 2
    assert "holds another run" in other.stderr and "learning_rate" in other.stderr
    assert (out / "sft" / "adapter_model.safetensors").read_bytes() == before


def test_a_run_that_fails_before_it_made_anything_gives_its_folder_back(tiny, files, tmp_path):
    arguments = ["--model_name_or_path", tiny, "--dataset_name", files / "sft.jsonl", "--output_dir", tmp_path / "out"]
    failed = run("recipes/sft.py", *arguments, *TINY_TRAINING, "--attn_implementation", "bogus", check=False)
    assert failed.returncode != 0 and "bogus" in failed.stderr
    assert list((tmp_path / "out").iterdir()) == []
    flags = ["--assistant_only_loss", "true", "--eos_token", "<|im_end|>", "--dataset_num_proc", 2]  # TRL's, and work
    run("recipes/sft.py", *arguments, *TINY_TRAINING, *flags, "--max_steps", 1)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_quantized_weights_need_their_package(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(InputError, match="--load_in_4bit: needs the package bitsandbytes"):
        parse("nowhere/recipe.py", ModelConfig, args=["--load_in_4bit"])


def test_the_same_paths_with_other_content_are_another_run(tiny, files, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text((files / "sft.jsonl").read_text())
    arguments = ["--model_name_or_path", tiny, "--dataset_name", data, "--output_dir", tmp_path / "out", *TINY_TRAINING]
    run("recipes/sft.py", *arguments, "--max_steps", 1)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:9]))
    again = run("recipes/sft.py", *arguments, "--max_steps", 1, check=False)
    assert again.returncode == 2
    assert "these differ: content of" in again.stderr


def test_an_interrupted_run_goes_on_from_its_checkpoint(road, tiny, files, tmp_path):
    _out, _ = road
    arguments = ["--model_name_or_path", tiny, "--dataset_name", files / "sft.jsonl", *TINY_TRAINING]
    run("recipes/sft.py", *arguments, "--output_dir", tmp_path / "run")
    finished = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**state, "finished": False}))
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    last.rename(tmp_path / "gone")  # as if it had been killed between the last two checkpoints
    again = run("recipes/sft.py", *arguments, "--output_dir", tmp_path / "run")
    assert "Resuming from" in again.stdout
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == finished


def make_checkpoint(folder, state="trainer_state.json", random_state="rng_state.pth"):
    """A checkpoint as far as its files tell."""
    folder.mkdir()
    (folder / state).write_text("{}")
    for name in ("optimizer.pt", random_state):
        (folder / name).write_bytes(b"12345678")
    write_digests(folder)
    return folder


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path, capsys):
    make_checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-best").mkdir()  # the user's own
    arguments = types.SimpleNamespace(resume_from_checkpoint=None, output_dir=str(tmp_path))
    assert last_checkpoint(arguments) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-10 is passed over: digests.json is missing" in capsys.readouterr().out
    whole = make_checkpoint(tmp_path / "checkpoint-3", "ppo_state.json", "random_state_0.pt")
    assert last_checkpoint(arguments) == str(whole)
    (whole / "optimizer.pt").write_bytes(b"12345679")
    assert last_checkpoint(arguments) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-3 is passed over: optimizer.pt is damaged" in capsys.readouterr().out
    arguments.resume_from_checkpoint = str(tmp_path / "checkpoint-99")
    with pytest.raises(InputError, match="no such folder"):
        last_checkpoint(arguments)


def test_recorded_commands_hold_no_token_and_no_outside_path(monkeypatch):
    tokens = "--hub_token hf_1 --hub_token=hf_2 --hub-token hf_3 --hub-token=hf_4"
    monkeypatch.setattr(
        "sys.argv", f"x.py {tokens} --output_dir /home/me/out --models a=/home/me/b outputs/sft".split()
    )
    recorded = command("recipes/x.py")
    assert "hf_" not in recorded and "/home" not in recorded
    assert recorded.startswith("accelerate launch recipes/x.py --hub_token ...")
    assert recorded.endswith("--output_dir out --models a=b outputs/sft")


def test_only_the_projects_own_configurations_go_to_float32_without_bfloat16(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    mine = tmp_path / "mine.yaml"
    mine.write_text("bf16: true\n")
    for capable, words, expected in (
        (False, [], False),
        (False, ["--config", "recipes/configs/pretrain_masked.yaml"], False),
        (False, ["--bf16", "true"], True),
        (False, ["--config", str(mine)], True),
        (True, [], True),
    ):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda capable=capable: {"avx2": True, "amx_bf16": capable})
        _, training_args, _ = parse(
            "recipes/pretrain.py", ScriptArguments, PretrainingConfig, NewModelConfig, args=words
        )
        assert training_args.bf16 is (expected or torch.accelerator.is_available())


def test_a_dataset_of_ones_own_gets_no_part_of_the_starters():
    recipe = str(ROOT / "recipes" / "pretrain.py")
    for words, expected in (
        ([], ("starter", "full")),
        (["--dataset_name", "some/stories"], ("some/stories", None)),
        (["--dataset-name=some/stories", "--dataset_config", "en"], ("some/stories", "en")),
        (["--dataset_name", "starter"], ("starter", "full")),
    ):
        script_args, *_ = parse(recipe, ScriptArguments, PretrainingConfig, NewModelConfig, args=words)
        assert (script_args.dataset_name, script_args.dataset_config) == expected


def test_a_configuration_without_a_dataset_means_the_starter():
    (script_args,) = parse("nowhere/recipe.py", DatasetArguments, args=["--dataset_config", "small"])
    assert script_args.dataset_name == "starter"  # which run.json and the model card name
    assert settings_of(script_args) == {"dataset_name": "starter", "dataset_config": "small"}


@pytest.mark.parametrize("asked", [False, "false"])
def test_resuming_can_be_declined_in_yaml_and_on_the_command_line(asked, tmp_path):
    make_checkpoint(tmp_path / "checkpoint-2")
    settings = types.SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=asked)
    assert last_checkpoint(settings) is None
    settings.resume_from_checkpoint = None
    assert last_checkpoint(settings) == str(tmp_path / "checkpoint-2")


def test_readme_and_docs_name_only_files_that_exist():
    text = "\n".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    named = set(re.findall(r"(?:recipes|eval|rlhf|tests)/[\w/]+\.(?:py|yaml|sh)", text))
    assert len(named) > 3
    assert not [name for name in named if not (ROOT / name).exists()]


def test_full_fine_tuning_of_all_three_trainers(tiny, files, tmp_path):
    full = ["--use_peft", "false", "--model_name_or_path", tiny]
    run("recipes/sft.py", *full, "--dataset_name", files / "sft.jsonl", "--output_dir", tmp_path / "sft",
        *TINY_TRAINING, "--packing", "--max_length", 64)  # fmt: skip
    run("recipes/reward.py", *full, "--dataset_name", files / "pairs.jsonl", "--output_dir", tmp_path / "reward",
        *TINY_TRAINING)  # fmt: skip
    run("recipes/ppo.py", "--use_peft", "false", "--model_name_or_path", tmp_path / "sft", "--reward_model_path",
        tmp_path / "reward", "--dataset_name", files / "prompts.jsonl", "--output_dir", tmp_path / "ppo",
        *TINY_PPO)  # fmt: skip
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo").state_dict()
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").state_dict()
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert not (tmp_path / "ppo" / "adapter_config.json").exists()


def test_plain_text_prompts_and_the_starters_scorer(tiny, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"prompt": "Once upon a time"}\n{"prompt": "Hello"}\n')
    result = run(
        "recipes/ppo.py", "--model_name_or_path", tiny, "--dataset_name", tmp_path / "text.jsonl", "--output_dir",
        tmp_path / "ppo", *TINY_PPO,
    )  # fmt: skip
    assert "objective/raw_scores" in result.stdout
    assert (tmp_path / "ppo" / "adapter_model.safetensors").exists()


def bad(tmp_path, tiny, files):
    (tmp_path / "bad.yaml").write_text("learning_rat: 1\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "columns.jsonl").write_text('{"question": "x", "answer": "y"}\n' * 3)
    (tmp_path / "roles.jsonl").write_text('{"messages": [{"role": "bot", "content": "x"}]}\n' * 3)
    long = json.dumps({"prompt": user("word " * 400)})
    (tmp_path / "long.jsonl").write_text(f"{long}\n{long}\n")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("mine")
    (tmp_path / "orphan").mkdir()
    (tmp_path / "orphan" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/gone/base"})
    )
    model, sft, out = ["--model_name_or_path", tiny], files / "sft.jsonl", ["--output_dir", tmp_path / "out"]
    return {
        "unknown flag": ("sft", ["--learning_rat", "1"], "unknown flag --learning_rat. Did you mean --learning_rate"),
        "unknown key": ("sft", ["--config", tmp_path / "bad.yaml"], "unknown key 'learning_rat'. Did you mean"),
        "missing config": ("sft", ["--config", tmp_path / "none.yaml"], "no such file"),
        "wrong type": ("sft", ["--num_train_epochs", "many"], "many"),
        "missing file": ("sft", [*model, "--dataset_name", tmp_path / "none.jsonl"], "none.jsonl: no such file"),
        "empty dataset": ("sft", [*model, "--dataset_name", tmp_path / "empty.jsonl"], "the file is empty"),
        "missing columns": ("sft", [*model, "--dataset_name", tmp_path / "columns.jsonl"], "['answer', 'question']"),
        "no such split": (
            "sft", [*model, "--dataset_name", sft, "--dataset_train_split", "trian"], "no such split; found ['train']"
        ),
        "wrong roles": ("sft", [*model, "--dataset_name", tmp_path / "roles.jsonl"], "role 'bot' is unknown"),
        "long prompts": ("ppo", [*model, *out, "--dataset_name", tmp_path / "long.jsonl"], "context of 256"),
        "beyond the context": ("sft", [*model, "--dataset_name", sft, "--max_length", 257], "context of 256 tokens"),
        "pad is eos": ("sft", [*model, *out, "--dataset_name", sft, "--pad_token", "<|im_end|>"], "also the eos token"),
        "adapter without base": ("sft", ["--model_name_or_path", tmp_path / "orphan"], "base model is missing"),
        "occupied folder": (
            "sft", [*model, "--dataset_name", sft, "--output_dir", tmp_path / "occupied"], "not empty"
        ),
        "offline Hub model": ("sft", ["--model_name_or_path", "some/model"], "the Hub can't be reached"),
        "missing output": ("sft", ["--model_name_or_path", "outputs/gone"], "outputs/gone: no such model folder"),
        "missing output data": ("sft", [*model, "--dataset_name", "outputs/gone"], "no such file or folder"),
        "missing tracker": ("sft", [*model, *out, "--dataset_name", sft, "--report_to", "swanlab"], "swanlab: that"),
        "offline Hub data": ("sft", [*model, "--dataset_name", "some/data"], "--dataset_name some/data"),
        "no token": ("sft", ["--push_to_hub", "--hub_model_id", "you/x"], "no Hub token"),
        "no repo name": ("reward", ["--push_to_hub"], "--hub_model_id"),
        "bad repo name": ("sft", ["--push_to_hub", "--hub_model_id", "no spaces please"], "no name for a Hub repo"),
        "no such checkpoint": (
            "sft", [*model, *out, "--dataset_name", sft, "--resume_from_checkpoint", "gone"], "gone: no such folder"
        ),
        "no prompts": ("collect", [*model, *out, "--max_prompts", "0"], "--max_prompts 0: must be at least 1"),
        "no replies": ("collect", [*model, *out, "--num_generations", "0"], "--num_generations 0: must be at least 2"),
        "unknown labeler": ("collect", ["--labeler", "oracle"], "--labeler: invalid choice: 'oracle'"),
        "not a reward model": ("ppo", [*model, *out, "--reward_model_path", tiny], "sequence classifier"),
    }  # fmt: skip


CASES = (
    "unknown flag,unknown key,missing config,wrong type,missing file,empty dataset,missing columns,"
    "no such split,wrong roles,long prompts,beyond the context,pad is eos,adapter without base,occupied folder,"
    "offline Hub model,missing output,missing output data,missing tracker,offline Hub data,"
    "no token,no repo name,bad repo name,no such checkpoint,"
    "no prompts,no replies,unknown labeler,not a reward model"
)


@pytest.mark.parametrize("case", CASES.split(","))
def test_bad_input_gets_one_clear_line(case, tmp_path, tiny, files):
    recipe, arguments, message = bad(tmp_path, tiny, files)[case]
    before = set(tmp_path.rglob("*"))
    result = run(f"recipes/{recipe}.py", *arguments, check=False)
    assert result.returncode == 2, result.stderr[-2000:]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in result.stderr
    assert {path for path in tmp_path.rglob("*") if "thesis" not in path.name} >= {p for p in before if p.suffix == ""}
    assert (tmp_path / "occupied" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_a_reward_adapter_of_another_base_scores_over_its_own(road, tiny, tokenizer, files, tmp_path):
    out, _ = road
    other = save_tiny(tmp_path / "other", tokenizer, seed=9, hidden_size=24)
    result = run("recipes/ppo.py", "--model_name_or_path", other, "--reward_model_path", out / "reward",
                 "--dataset_name", files / "prompts.jsonl", "--output_dir", tmp_path / "ppo", *TINY_PPO,
                 "--eval_strategy", "steps", "--eval_steps", 4)  # fmt: skip
    assert "which is loaded beside the policy's own base other" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "ppo/eval_samples/4.jsonl").read_text().splitlines()]
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    model, own = PeftModel.from_pretrained(base, str(out / "reward")), AutoTokenizer.from_pretrained(out / "reward")
    for row in rows:
        chat = [*row["prompt"], {"role": "assistant", "content": row["completion"]}]
        score = model(**own.apply_chat_template(chat, return_tensors="pt", return_dict=True)).logits
        assert row["score"] == pytest.approx(float(score), abs=1e-3)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_read_alike(recipe):
    text = recipe.read_text()
    assert 60 <= len(text.splitlines()) <= 120
    assert "accelerate launch recipes/" in text.split('"""')[1]
    order = ["Arguments", "Data", "Tokenizer", "Model", "Trainer", "Train", "Save"]
    headings = re.findall(r"^    # (\w+)", text, flags=re.M)
    known = [heading for heading in headings if heading in order]
    assert headings[0] == "Arguments" and known == sorted(known, key=order.index)
    if "trainer.train(" in text:
        assert headings == order


def test_whatever_layout_a_dataset_has_its_content_tells_it_from_others(tmp_path):
    for number, name in enumerate(("data/train.parquet", "train.json", "rows.jsonl", "en/dev.csv.gz")):
        folder = tmp_path / str(number)
        file = folder / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"one")
        before = digest(str(folder))
        (folder / "README.md").write_text("a card")
        (folder / ".cache").touch()
        assert digest(str(folder)) == before
        file.write_bytes(b"two")
        assert digest(str(folder)) != before
