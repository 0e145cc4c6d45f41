"""recipes/instructgpt.sh and eval/instructgpt.py: the whole road to the figure with tiny sizes, and its pure parts."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY_PPO, TINY_TRAINING, load_script, present, run, save_tiny
from PIL import Image
from transformers import AutoModelForCausalLM

from eval.drawing.tables import instructgpt_tables
from eval.measuring.alignment import PPO, SFT, TAXED, Kind, SeedTable, Size, _kinds, repair_of, tax_of, wins
from eval.stats.intervals import Interval
from rlhf.errors import InputError
from rlhf.run.folders import Run
from rlhf.starter.scorer import gold_scores

sys.path.append(str(ROOT / "docs"))
import tables

FLOAT32 = ["--dtype", "float32"]
FEW = [*FLOAT32, "--max_new_tokens", "4"]
# flags that make a command small; they come in place of its own, or behind them
SMALL = {
    "tokenizer.py": ["--dataset_name", "text.jsonl", "--vocab_size", "330", "--extra_ids", "0"],
    "pretrain.py": ["--dataset_name", "text.jsonl", "--max_steps", "1", "--hidden_size", "16", "--num_hidden_layers",
                    "1", "--num_attention_heads", "2", "--intermediate_size", "32", "--block_size", "32",
                    "--max_position_embeddings", "512", "--bf16", "false"],
    "sft.py": ["--dataset_name", "sft.jsonl", *TINY_TRAINING, "--max_steps", "1"],
    "reward.py": ["--dataset_name", "pairs.jsonl", *TINY_TRAINING, "--max_steps", "1"],
    "ppo.py": ["--dataset_name", "prompts.jsonl", *TINY_PPO, "--total_episodes", "4", "--learning_rate", "0.1"],
    "few_shot.py": ["--dataset_name", "sft.jsonl", "--reward_funcs", "starter", *FEW, "--max_prompts", "4",
                    "--num_prompts", "2", "--num_fewshot", "2"],
    "compare.py": [*FEW, "--max_prompts", "12"],
    "in_context.py": [*FLOAT32, "--limit", "4", "--num_fewshot", "1", "--tasks", "question", "sentiment"],
    "instructgpt.py": [],
}  # fmt: skip


def commands_of(folder, *words, **variables):
    """The commands that recipes/instructgpt.sh gives to `accelerate launch`, each as words."""
    for name in ("accelerate", "python"):
        stub = folder / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {folder}/log\n')
        stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **variables}
    subprocess.run(["bash", ROOT / "recipes/instructgpt.sh", *words], check=True, env=environment, capture_output=True)
    lines = [shlex.split(line) for line in (folder / "log").read_text().splitlines()]
    assert lines.pop()[0] == "eval/report.py"
    assert all(line[:3] == ["launch", "--config_file", "accelerate_config.yaml"] for line in lines)
    return [line[3:] for line in lines]


def test_all_sizes_run_the_same_stages(tmp_path):
    lines = [" ".join(words) for words in commands_of(tmp_path, "out", "demo", SEEDS="1", PTX_COEFS="0.5")]
    of_size = {size: [line for line in lines if f"/{size}/" in line and "figure" not in line] for size in SIZES}
    size = " --hidden_size 384 --num_hidden_layers 6 --num_attention_heads 6 --intermediate_size 1056"
    assert [line.replace("medium", "small").replace(size, "") for line in of_size["medium"]] == of_size["small"]
    aligned = [
        line.replace("out/small/base", "starter").replace("out/small/sft", "demo/sft") for line in of_size["small"]
    ]
    fewer = [line.replace("--total_episodes 640", "--total_episodes 384") for line in aligned]
    assert [line.replace("small", "starter") for line in fewer[2:]] == of_size["starter"]
    assert any("--ptx_coef 0.5 --ptx_dataset_name starter" in line for line in of_size["starter"])
    assert all(
        "--reward_model_path demo/reward" in line for line in lines if "ppo.py" in line or "compare" in line[:16]
    )


SIZES = ("small", "medium", "starter")


def smaller(script, flags):
    """A command's flags with small ones in place of the same flags."""
    own: dict[str, list[str]] = {}
    name = ""
    for word in [*flags, *SMALL[Path(script).name]]:
        if word.startswith("--"):
            name, own[word] = word, []
        else:
            own[name].append(word)
    if "--ptx_dataset_name" in own:
        own["--ptx_dataset_name"] = ["sft.jsonl"]
    return [part for name, values in own.items() for part in (name, *values)]


@pytest.fixture(scope="module")
def finished(files, tokenizer, tmp_path_factory):
    """The output folder of recipes/instructgpt.sh, all of its commands run with tiny sizes."""
    folder = tmp_path_factory.mktemp("instructgpt")
    for name in ("sft", "prompts", "pairs"):
        (folder / f"{name}.jsonl").write_text((files / f"{name}.jsonl").read_text())
    rows = [json.loads(line) for line in (files / "sft.jsonl").read_text().splitlines()]
    texts = [" ".join(turn["content"] for turn in row["prompt"] + row["completion"]) for row in rows]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    save_tiny(folder / "tiny", tokenizer, num_hidden_layers=3, max_position_embeddings=512)
    commands = commands_of(folder, "out", SEEDS="1 2", PTX_COEFS="1 10")
    in_context = load_script("eval/in_context.py")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    commands[-1].remove("medium=out/medium/comparison")
    for script, *flags in commands:
        # the simulated labeler sees ties in all that the model says; medium is made as small, in context as the starter
        if script == "recipes/collect.py" or any(part in " ".join(flags) for part in ("/medium/", "small/in-context")):
            continue
        words = [word.replace("starter", "tiny") if word in ("starter", "base=starter", "prompted=starter") else word
                 for word in smaller(script, flags)]  # fmt: skip
        if script in ("recipes/sft.py", "recipes/ppo.py") and "--model_name_or_path" not in words:
            words += ["--model_name_or_path", "tiny"]
        if script == "eval/few_shot.py":
            words[words.index("--reward_funcs") + 1] = "starter"
        if script == "eval/in_context.py":  # in this process lm-eval is loaded once
            patch.setattr("sys.argv", [str(ROOT / script), *words])
            in_context.main()
        else:
            run(script, *words, cwd=folder)
    patch.undo()
    return folder / "out"


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_whole_script_ends_in_a_figure_and_a_table(finished):
    found = json.loads((finished / "figure" / "instructgpt.json").read_text())
    assert (found["opponent"], found["ptx_coef"], list(found["sizes"])) == ("starter", 1.0, ["small", "starter"])
    counts = [size["parameters"] for size in found["sizes"].values()]
    bases = [AutoModelForCausalLM.from_pretrained(path) for path in (finished / "small/base", finished.parent / "tiny")]
    assert counts == [base.num_parameters() for base in bases] and counts[0] < counts[1]
    opponent = gold_scores([row["sft"] for row in lines_of(finished / "starter/comparison/samples.jsonl")])
    for name, size in found["sizes"].items():
        models = {(model["kind"], model["ptx_coef"]): model for model in size["models"]}
        coefs = [1.0, 10.0] if name == "starter" else [1.0]
        kinds = ["base", "prompted", "sft", "ppo", "best_of_4"]
        assert set(models) == {*((kind, 0.0) for kind in kinds), *(("ppo_ptx", coef) for coef in coefs)}
        samples = lines_of(finished / name / "comparison/samples.jsonl")
        scores = [gold_scores([row[f"ppo-{seed}"] for row in samples]) for seed in (1, 2)]
        outcomes = [0.5 + 0.5 * np.sign(np.subtract(of_seed, opponent)) for of_seed in scores]
        ppo = models["ppo", 0.0]
        assert ppo["seeds"] == 2 and ppo["win_rate"]["mean"] == pytest.approx(np.mean(outcomes))
        assert ppo["gold_score"]["mean"] == pytest.approx(np.mean(scores))
        results = json.loads((finished / name / "comparison/results.json").read_text())["models"]
        for metric in ("rating/simulated", "human_loss", "kl"):
            both = [results[f"ppo-{seed}"][metric]["mean"] for seed in (1, 2)]
            assert ppo[metric.partition("/")[0]]["mean"] == pytest.approx(np.mean(both))
        assert 1 <= ppo["rating"]["low"] <= ppo["rating"]["high"] <= 7
        assert [row["ptx_coef"] for row in size["tax"]] == [0.0, *coefs] and len(size["few_shot"]["scores"]) == 2
        if name == "small":
            assert size["chance"] is None and "in_context" not in ppo
            continue
        files = [finished / name / f"in-context/ppo-{seed}/results.json" for seed in (1, 2)]
        tasks = [cells["1"]["mean"] for file in files for cells in json.loads(file.read_text())["tasks"].values()]
        assert ppo["in_context"]["mean"] == pytest.approx(np.mean(tasks))
        assert size["chance"] == 0.5 and set(size["tax"][2]["repair"]["repaired"]) == {*TAXED}
    for name in ("instructgpt.png", "tax.png"):
        with Image.open(finished / "figure" / name) as image:
            assert image.width >= 1000
    page = (finished / "figure" / "report.html").read_text()
    assert all(title in page for title in ("Models of several sizes", "Alignment tax", "Few-shot prompts"))


def test_a_size_without_its_models_is_refused(finished, tmp_path):
    words = ["--output_dir", tmp_path / "out", "--comparisons"]
    for name, wrong, says in (
        ("x", finished / "small/ppo-1", "no finished run of eval/compare.py"),
        ("x", finished / "small/none", "no finished run of eval/compare.py"),
    ):
        refused = run("eval/instructgpt.py", *words, f"{name}={wrong}", check=False)
        assert refused.returncode == 2 and f"--comparisons {name}={wrong}: {says}" in refused.stderr
    sizes = [f"{name}={finished / name / 'comparison'}" for name in ("small", "starter")]
    for more, says in (
        (["--rater", "human"], "--rater human: small has no ratings"),
        (["--ptx_coef", 10], "--ptx_coef 10.0: not all sizes have it. Found small: 1.0, starter: 1.0 10.0."),
    ):
        refused = run("eval/instructgpt.py", *words, *sizes, *more, check=False, cwd=finished.parent)
        assert refused.returncode == 2 and says in refused.stderr, refused.stderr


@pytest.mark.parametrize("recipe", ["rloo", "star"])
def test_a_model_of_another_recipe_is_no_base(recipe, tmp_path):
    made = Run(recipe=recipe, command="", settings={}, finished=True)
    (tmp_path / "run.json").write_text(json.dumps(made))
    comparison = Run(recipe="compare", command="", settings={"models": [f"mine={tmp_path}"]}, finished=True)
    with pytest.raises(InputError, match=rf"^--comparisons x=y: mine is made by {recipe}\.py\. Compare models of pre"):
        _kinds(comparison, ["mine"], "--comparisons x=y")


def test_kept_results_fill_the_tables(finished):
    kept = tables.keep(finished)
    assert len(kept["runs"]) > 25 and all(run["command"] for run in kept["runs"].values())
    written = json.loads((finished / "figure" / "instructgpt.json").read_text())
    assert kept["runs"]["figure"]["instructgpt"]["sizes"].keys() == written["sizes"].keys()
    assert "results" not in kept["runs"]["small/comparison"]  # its numbers are in the figure's
    for name in tables.TABLES:
        if name.startswith("instructgpt"):
            lines = "\n".join(tables.TABLES[name][1](kept))
            assert "starter" in lines or "Source" in lines


# ------------------------------------------------------------------------------------------------ by hand


def scored(*rows, weights=(1.0, 1.0)):
    return SeedTable(np.array(rows, dtype=float), np.broadcast_to(np.array(weights), (len(rows), 2)))


@pytest.fixture
def size():
    """SFT, two seeds of PPO, and PPO-ptx with a coefficient with both seeds and one with one of them; two prompts."""
    mixed, other = Kind("ppo_ptx", 1.0), Kind("ppo_ptx", 10.0)
    models = {SFT: {42: "sft"}, PPO: {1: "a", 2: "b"}, mixed: {1: "c", 2: "d"}, other: {2: "e"}}
    loss = {"sft": (3, 4), "a": (5, 6), "b": (5, 8), "c": (4, 5), "d": (3, 6), "e": (3, 4)}
    gold = {"sft": (0, 0), "a": (1, 1), "b": (1, 1), "c": (0.5, 0.5), "d": (0.5, 0.5), "e": (0, 0)}
    right = {"sft": (1, 1), "a": (1, 0), "b": (1, 1), "c": (1, 1), "d": (1, 1), "e": (1, 1)}
    scores = {
        (name, metric): scored(values[name])
        for metric, values in (("human_loss", loss), ("gold_score", gold), ("in_context", right))
        for name in loss
    }
    return Size("tiny", models, scores, [], 0.5, None)


def test_tax_and_repair_are_paired_by_prompt_and_seed(size):
    taxes = tax_of(size, PPO, 0)
    assert taxes["human_loss"].mean == (2 + 2 + 2 + 4) / 4 and taxes["in_context"].mean == 1 / 4
    assert "human_bits_per_byte" not in taxes
    repair = present(repair_of(size, Kind("ppo_ptx", 1.0), 0))
    assert present(repair.repaired["human_loss"]).mean == (1 + 1 + 2 + 2) / (2 + 2 + 2 + 4)
    assert repair.repaired["in_context"] is None  # PPO lost one answer of four: no clear tax
    assert repair.given_up == Interval(0.5, 0.5, 0.5, 2)
    assert repair.given_up_share == Interval(0.5, 0.5, 0.5, 2)
    alone = present(repair_of(size, Kind("ppo_ptx", 10.0), 0))  # beside PPO of seed 2
    assert present(alone.repaired["human_loss"]).mean == 1.0 and alone.given_up.mean == 1.0
    assert repair_of(size._replace(models={**size.models, PPO: {3: "a"}}), Kind("ppo_ptx", 1.0), 0) is None


def test_wins_are_over_the_same_prompts(size):
    won = wins(size, scored((0.5, 2)))
    assert won[PPO].scores.tolist() == [[1, 0], [1, 0]] and won[Kind("ppo_ptx", 1.0)].scores.tolist()[0] == [0.5, 0]


def test_tables_say_where_guessing_is_no_worse(size):
    cell = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 2}
    model = {"kind": "sft", "ptx_coef": 0.0, "seeds": 1, "gold_score": cell, "in_context": cell, "human_loss": cell}
    row = {"kind": "ppo", "ptx_coef": 0.0, "repair": None, "tax": {}}
    found = {"parameters": 9, "models": [model], "tax": [row], "chance": 0.5, "at_chance": True, "few_shot": None}
    notes = [table.note for table in instructgpt_tables({"opponent": "s", "rater": "simulated", "sizes": {"s": found}})]
    assert "s: guessing has 50.0% in context, and SFT is not above it" in notes[1]
