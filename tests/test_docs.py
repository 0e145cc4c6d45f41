"""README.md and docs/: every command block runs, every number is one of docs/results, every link leads somewhere.

Blocks run in a folder that looks like a checkout after `make demo` and `make road`, with a tiny model in place of the
starter and few rows and steps. A comment above a block says what is different about it:

- `<!-- not run: reason -->`: it is only parsed;
- `<!-- run: until "text", then Ctrl-C -->`: it waits for people, so it is interrupted once it has said this;
- `<!-- excerpt: file -->`: its lines are in that file.
"""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ENVIRONMENT, ROOT, TINY_PPO, TINY_TRAINING, make_adapter, save_tiny
from PIL import Image
from recipe_process import run_recipe, start
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.append(str(ROOT / "docs"))
import tables

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
# where a command says nothing about its model or data, they are the starter's: these take their place
MODEL = {"sft.py", "collect.py", "reward.py", "ppo.py", "rloo.py", "finetune.py", "in_context.py", "few_shot.py"}
DATA = {"sft.py": "sft", "collect.py": "prompts", "ppo.py": "prompts", "rloo.py": "prompts", "finetune.py": "labelled",
        "tokenizer.py": "text", "pretrain.py": "text", "compression.py": "text"}  # fmt: skip
FLOAT32 = ["--dtype", "float32"]
REPLIES = [*FLOAT32, "--max_new_tokens", "4", "--max_prompts", "5"]
# flags that make a command small; they come behind its own
SMALLER = {
    "sft.py": [*TINY_TRAINING, "--max_steps", "1"],
    "collect.py": REPLIES,
    "reward.py": [*TINY_TRAINING, "--max_steps", "1"],
    "ppo.py": [*TINY_PPO, "--total_episodes", "8", "--save_steps", "2", "--learning_rate", "0.1"],
    "rloo.py": [*FLOAT32, "--bf16", "false", "--max_steps", "1", "--num_generations", "2", "--max_completion_length",
                "4", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"],
    "chat.py": FLOAT32,
    "tokenizer.py": ["--vocab_size", "330", "--extra_ids", "0"],
    "pretrain.py": ["--max_steps", "1", "--hidden_size", "16", "--num_hidden_layers", "1", "--block_size", "32",
                    "--intermediate_size", "32", "--bf16", "false"],
    "finetune.py": [*FLOAT32, "--max_train_samples", "8", "--max_steps", "1", "--bf16", "false"],
    "instructions.py": ["--max_examples_per_task", "4", "--max_test_examples_per_task", "4"],
    "compare.py": REPLIES,
    "few_shot.py": [*REPLIES, "--num_prompts", "2"],
    "overoptimization.py": [*REPLIES, "--best_of_n", "2"],
    "compression.py": [*FLOAT32, "--max_texts", "4"],
    "in_context.py": [*FLOAT32, "--limit", "4"],
    "transfer.py": [],
    "reward_bench.py": FLOAT32,
    "curves.py": [],
    "report.py": [],
}  # fmt: skip


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    mark: str
    language: str
    code: str


def blocks_of(page):
    """The fenced blocks of a page that are commands or code."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page.name, text[: match.start()].count("\n") + 1, match["mark"] or "", match["language"], match["code"])
        for match in BLOCK.finditer(text)
    ]
    assert len(found) == text.count("\n```") / 2, f"{page}: a block that this test does not see"
    return [block for block in found if block.language]


def lines_of(code):
    """The commands of a bash block, each as words; comments are left out."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def recipe_of(words):
    """Launcher flags, script and flags of an `accelerate launch` command."""
    assert words[:2] == ["accelerate", "launch"], words
    script = next(number for number, word in enumerate(words) if word.endswith(".py"))
    return words[2:script], words[script], words[script + 1 :]


# ------------------------------------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def checkout(files, tmp_path_factory):
    """A folder that looks like a checkout after `make demo` and `make road`, made of tiny models."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "eval", "docs", "accelerate_config.yaml"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("sft", "prompts", "pairs"):
        shutil.copy(files / f"{name}.jsonl", folder)
    (folder / "outputs/demo/preferences").mkdir(parents=True)
    shutil.copy(files / "pairs.jsonl", folder / "outputs/demo/preferences/train.jsonl")
    rows = [json.loads(line) for line in (files / "sft.jsonl").read_text().splitlines()]
    texts = [" ".join(turn["content"] for turn in row["prompt"] + row["completion"]) for row in rows]
    for name, entries in (
        ("text", [{"text": text} for text in texts]),
        ("labelled", [{"text": text, "label": ("odd", "even")[number % 2]} for number, text in enumerate(texts)]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "stand_in.py").write_text(
        "def sum_of_ids(prompts, completions, completion_ids, **columns): return [sum(ids) for ids in completion_ids]"
    )
    small_run("recipes/tokenizer.py", ["--output_dir", "outputs/road/tokenizer"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "outputs/road/tokenizer")
    save_tiny(folder / "tiny", tokenizer, max_position_embeddings=2048)
    for name in ("demo/sft", "road/star/round-3/model"):
        make_adapter(folder / "tiny", tokenizer, folder / "outputs" / name)
        tokenizer.save_pretrained(folder / "outputs" / name)
    shutil.copytree(folder / "tiny", folder / "outputs/road/pretrain")
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "tiny", num_labels=2)
    classifier.save_pretrained(folder / "outputs/road/finetune/full-1")
    tokenizer.save_pretrained(folder / "outputs/road/finetune/full-1")
    sft = ["--model_name_or_path", "outputs/demo/sft"]
    reward = [*sft, "--dataset_name", "pairs.jsonl", "--output_dir", "outputs/demo/reward"]
    small_run("recipes/reward.py", reward, folder)
    ppo = [*sft, "--reward_model_path", "outputs/demo/reward", "--dataset_name", "starter"]
    small_run("recipes/ppo.py", [*ppo, "--output_dir", "outputs/demo/ppo"], folder)
    return folder


def small_run(script, flags, folder, interrupt_at=None):
    """Run a recipe with a tiny model in place of the starter, and few rows and steps."""
    assert Path(script).name in SMALLER, f"{script}: say in SMALLER what makes it small, or mark the block"
    words = [re.sub("^([a-z]+)=starter$", r"\1=tiny", word) for word in flags]
    name = Path(script).name
    if name in MODEL and "--model_name_or_path" not in words:
        words += ["--model_name_or_path", "tiny"]
    if name in DATA and "--dataset_name" not in words:
        words += ["--dataset_name", f"{DATA[name]}.jsonl"]
    if name == "collect.py" and "--labeler" not in words:  # the simulated labeler sees ties in all that the model says
        words += ["--labeler", "reward", "--reward_funcs", "stand_in.sum_of_ids"]
    words += SMALLER[name]
    if interrupt_at is not None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            words += ["--server_port", str(probe.getsockname()[1])]
    command = [str(ROOT / script), *words]
    result = run_recipe(start(ENVIRONMENT), command, ENVIRONMENT, folder, interrupt_at)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-1500:]}{result.stderr[-3000:]}"
    assert interrupt_at is None or interrupt_at in result.stdout, result.stdout[-1500:]
    return result


def run_block(block, folder):
    """Run all commands of a block, or its Python code."""
    until = re.fullmatch(r'run: until "(.+)", then Ctrl-C', block.mark)
    assert until or not block.mark, f"{block.page}:{block.line}: unknown mark {block.mark!r}"
    if block.language == "python":
        file = folder / "block.py"
        file.write_text(block.code)
        result = run_recipe(start(ENVIRONMENT), [str(file)], ENVIRONMENT, folder)
        assert result.returncode == 0, f"{block.page}:{block.line}\n{result.stdout[-500:]}{result.stderr[-3000:]}"
        return
    assert block.language == "bash", f"{block.page}:{block.line}: {block.language} is neither bash nor python"
    for words in lines_of(block.code):
        if words[0] == "echo":
            line = next(line for line in block.code.splitlines() if line.startswith("echo"))
            subprocess.run(["bash", "-c", line], cwd=folder, check=True)
            continue
        _, script, flags = recipe_of(words)
        small_run(script, flags, folder, until and until[1])
        if "human" in flags and "collect.py" in script:  # as if people had voted
            output = folder / flags[flags.index("--output_dir") + 1]
            for split in ("train", "test"):
                shutil.copy(folder / "pairs.jsonl", output / f"{split}.jsonl")


def parse_block(block, folder):
    """Check what can be checked of a block that is not run: syntax, flags, targets of make."""
    assert re.fullmatch("not run: .{10,}", block.mark), f"{block.page}:{block.line}: say why it is not run"
    if block.language == "python":
        compile(block.code, block.page, "exec")
        return
    assert subprocess.run(["bash", "-n"], input=block.code, text=True).returncode == 0
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for words in lines_of(block.code):
        if words[0] == "make":
            assert set(words[1:]) <= targets, f"{block.page}:{block.line}: make {words[1:]}"
        elif words[0] == "accelerate":
            launcher, script, flags = recipe_of(words)
            launch_command_parser().parse_args([*launcher, script])
            # --help ends parsing, behind all flags of the command: unknown ones and wrong values are refused before
            result = run_recipe(start(ENVIRONMENT), [str(ROOT / script), *flags, "--help"], ENVIRONMENT, folder)
            assert result.returncode == 0, f"{block.page}:{block.line}\n{result.stderr[-2000:]}"


def find_excerpt(block):
    """Check that the lines of an excerpt stand in its file, one behind the other."""
    file = ROOT / block.mark.removeprefix("excerpt: ")
    source, excerpt = ([line.strip() for line in text.splitlines()] for text in (file.read_text(), block.code))
    assert any(source[start:][: len(excerpt)] == excerpt for start in range(len(source))), f"{block.page}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_blocks(page, checkout):
    for block in blocks_of(page):
        if block.mark.startswith("excerpt: "):
            find_excerpt(block)
        elif block.mark.startswith("not run"):
            parse_block(block, checkout)
        else:
            run_block(block, checkout)


@pytest.mark.parametrize("code", ["frobnicate", "make demo", "accelerate launch recipes/scaling.py",
                                  "accelerate launch recipes/sft.py --no_such_flag 1"])  # fmt: skip
def test_a_block_that_is_neither_run_nor_marked_fails(code, checkout):
    with pytest.raises(AssertionError):
        run_block(Block("page", 1, "", "bash", code), checkout)


@pytest.mark.parametrize("code", ["make nothing", "accelerate launch recipes/sft.py --no_such_flag 1",
                                  "accelerate launch recipes/sft.py --max_steps many"])  # fmt: skip
def test_a_marked_block_is_parsed(code, checkout):
    with pytest.raises(AssertionError):
        parse_block(Block("page", 1, "not run: needs the Hub", "bash", code), checkout)


# ------------------------------------------------------------------------------------------------ numbers


def test_tables_and_picture_are_those_of_the_results():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.fill(text) == text, f"{page.name}: run make docs"
    used = {name for page in PAGES for name in re.findall("<!-- table: ([a-z-]+) -->", page.read_text())}
    assert used == set(tables.TABLES)
    with Image.open(ROOT / "docs/demo.png") as image:
        assert image.info["Description"] == json.dumps(tables.drawn(tables.load("demo"))), "run make docs"
        assert image.width >= 800


def test_readme_quotes_the_demo():
    models = tables.load("demo")["runs"]["comparison"]["results"]["models"]
    sft, ppo = models["sft"], models["ppo"]
    expected = [f"{sft['gold_score']['mean']:.2f}", f"{ppo['gold_score']['mean']:.2f}",
                f"{ppo['win_rate/gold']['mean']:.1%}", f"{ppo['kl']['mean']:.2f}"]  # fmt: skip
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("\n## What the demo shows\n")[2].partition("\n## ")[0]
    assert re.findall(r"\*\*([\d.%−]+)\*\*", section) == expected
    rest = re.sub(r"<!-- table.*?<!-- end -->|\*\*[\d.%−]+\*\*", "", section, flags=re.S)
    assert re.findall(r"\d[\d.]*", rest) == ["208"] and ppo["kl"]["n"] == 208


def test_results_name_their_commands_and_no_paths():
    for file in sorted((ROOT / "docs/results").glob("*.json")):
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
        assert content["source"] and content["machine"]["cores"] > 0
        assert content.get("commands") or all(run["command"] for run in content["runs"].values()), file.name
        assert not re.search(r"/(home|tmp|root|Users|work|mnt)/", text), file.name


def test_finished_runs_are_kept(checkout, tmp_path):
    if not (checkout / "outputs/comparison").exists():  # the commands of README.md make it
        for block in blocks_of(ROOT / "README.md"):
            if block.language == "bash" and not block.mark:
                run_block(block, checkout)
    for name in ("sft", "preferences", "reward", "ppo", "comparison"):
        shutil.copytree(checkout / "outputs" / name, tmp_path / name)
    results = tables.keep(tmp_path)
    written = json.loads((checkout / "outputs/comparison/results.json").read_text())
    kept = results["runs"]["comparison"]
    assert kept["results"]["models"]["ppo"]["kl"] == pytest.approx(written["models"]["ppo"]["kl"], rel=1e-5)
    assert kept["command"].startswith("accelerate launch eval/compare.py --models") and len(kept["samples"]) == 5
    assert json.loads(tables.dumps(results)) == results
    rows = tables.comparison(results)
    assert rows[0] == "| | base | sft | ppo | best_of_4 |" and any(row.startswith("| `win_rate/gold`") for row in rows)
    assert tables.picture(tables.drawn(results)).axes
    for table in (tables.setup, tables.demo_findings, tables.demo_samples):
        assert table(results)


def test_unfinished_runs_are_not_kept(tmp_path):
    with pytest.raises(SystemExit, match="no run here"):
        tables.keep(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"finished": False, "command": "make demo", "metrics": {}}))
    with pytest.raises(SystemExit, match="not finished"):
        tables.read_run(tmp_path)


# ------------------------------------------------------------------------------------------------ pages


def anchors_of(page):
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(
        "^#+ (.+)$", re.sub("^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    linked = set()
    for page in PAGES:
        text = re.sub("^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("http://", "https://")):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors_of(file), f"{page.name}: {target}"
            linked.add(file)
    assert set(PAGES) - linked <= {ROOT / "README.md"}, "a page that no page links to"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
