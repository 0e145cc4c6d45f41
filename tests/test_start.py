"""Mistakes and --help are answered before torch is imported, with the line that the complete parser gives."""

import re
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT, run

COMMANDS = sorted(
    str(file.relative_to(ROOT)) for folder in ("recipes", "eval") for file in (ROOT / folder).glob("[a-z]*.py")
)
SLOW = {"torch", "transformers", "peft", "datasets", "accelerate", "scipy", "sklearn", "matplotlib", "evaluate"}

# what every command reads, in a process that has imported nothing else, beside what it reads once all is imported
SAME_PARSERS = """
import ast, runpy, sys
from rlhf.run.parser import Parser
from rlhf.run.declarations import argument_types

(odd, *commands), sys.argv = sys.argv[1:], ["command"]
early = {command: Parser(*argument_types(command)) for command in commands}
helps = {command: parser.format_help() for command, parser in early.items()}
assert not {"torch", "transformers"} & set(sys.modules), "slow imports"

# of a script whose declarations can't be read without running it, nothing is answered early
sys.argv = [odd, "--number", "3"]
runpy.run_path(odd, run_name="__main__")
sys.argv = ["command"]

def flags(parser):
    return [(action.option_strings, action.dest, action.nargs, action.const, action.default, action.required,
             action.choices and list(action.choices), getattr(action.type, "__name__", action.type))
            for action in parser._actions]

for command in commands:
    names = runpy.run_path(command)
    [call] = [node for node in ast.walk(ast.parse(open(command).read()))
              if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "parse"]
    complete = Parser(*[names[argument.id] for argument in call.args[1:]])
    assert flags(early[command]) == flags(complete), command
    assert helps[command] == complete.format_help(), command
    print(command, len(flags(complete)))
"""


def answer(command, *arguments, code=2):
    """What a command answers in a process of its own, in which nothing slow is imported: its output and its error."""
    words = [sys.executable, "-X", "importtime", str(ROOT / command), *map(str, arguments)]
    result = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", result.stderr, re.MULTILINE))
    assert "rlhf.run.arguments" in imported and not imported & SLOW
    assert result.returncode == code, result.stderr[-2000:]
    return result.stdout, [line for line in result.stderr.splitlines() if not line.startswith("import time:")]


def complete_answer(command, *arguments):
    """The same from the fork server, where everything is imported already and the complete parser answers."""
    result = run(command, *arguments, check=False)
    assert result.returncode == 2, result.stderr[-2000:]
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


ODD = """
from rlhf.run.arguments import answer_early, parse
answer_early(__file__)
from dataclasses import make_dataclass
globals()['Odd'] = make_dataclass('Odd', [('number', int)])
print(parse(__file__, Odd))
"""


def test_commands_declare_the_same_flags_before_and_after_slow_imports(tmp_path):
    assert len(COMMANDS) == 24
    (tmp_path / "recipes").mkdir()
    odd = tmp_path / "recipes" / "odd.py"
    odd.write_text(ODD)
    result = subprocess.run(
        [sys.executable, "-c", SAME_PARSERS, odd, *COMMANDS], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["(Odd(number=3),)", *COMMANDS]


@pytest.mark.parametrize("command", ("recipes/sft.py", "eval/compare.py"))
def test_help(command):
    said, errors = answer(command, "--help", code=0)
    assert said.startswith("usage: ") and "--dataset_name DATASET_NAME" in said and errors == []
    assert run(command, "--help").stdout == said


GONE = "outputs/gone"
MISTAKES = {
    "nearest flag": ("recipes/ppo.py", ["--learning_rat=1"]),
    "config": ("recipes/sft.py", ["--config", "gone.yaml"]),
    "key of the config": ("recipes/rloo.py", ["--config", "recipes/configs/sft.yaml"]),
    "wrong type": ("recipes/reward.py", ["--num_train_epochs", "many"]),
    "dataset": ("recipes/finetune.py", ["--dataset_name", "gone.jsonl"]),
    "model": ("recipes/collect.py", ["--model_name_or_path", GONE]),
    "model of rounds": ("recipes/rounds.py", ["--model_name_or_path", GONE]),
    "SFT model": ("recipes/ppo.py", ["--sft_model_path", GONE, "--reward_model_path", "starter"]),
    "reward model": ("recipes/rloo.py", ["--model_name_or_path", "starter", "--reward_model_path", GONE]),
    "chat template": (
        "recipes/sft.py", ["--dataset_name", "FILES/sft.jsonl", "--chat_template_path", "gone.jinja"]
    ),
    "checkpoint": (
        "recipes/sft.py",
        ["--model_name_or_path", "TINY", "--dataset_name", "FILES/sft.jsonl", "--resume_from_checkpoint", GONE],
    ),
    "tokenizer": ("recipes/pretrain.py", ["--tokenizer_name", GONE]),
    "config of a stage": ("recipes/star.py", ["--sft_config", "gone.yaml"]),
    "templates": ("recipes/instructions.py", ["--dataset_name", "gone.jsonl", "--templates", "gone.yaml"]),
    "chat": ("recipes/chat.py", ["--models", GONE]),
    "compare": ("eval/compare.py", ["--models", "base=starter", f"sft={GONE}"]),
    "compression": ("eval/compression.py", ["--models", f"mine={GONE}"]),
    "front": ("eval/front.py", ["--models", f"mine={GONE}"]),
    "curves": ("eval/curves.py", ["--models", f"ppo={GONE}"]),
    "transfer": ("eval/transfer.py", ["--models", f"scratch={GONE}"]),
    "instructgpt": ("eval/instructgpt.py", ["--comparisons", f"small={GONE}"]),
    "overoptimization": ("eval/overoptimization.py", ["--model_name_or_path", GONE]),
    "report": ("eval/report.py", ["--output_dir", GONE]),
}  # fmt: skip


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {command for command, _ in MISTAKES.values()}))
def test_unknown_flag(command):
    assert answer(command, "--no_such_flag")[1] == ["error: unknown flag --no_such_flag. See --help."]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_early_with_the_same_line(mistake, tiny, files):
    command, arguments = MISTAKES[mistake]
    arguments = [word.replace("FILES", str(files)).replace("TINY", tiny) for word in arguments]
    errors = answer(command, *arguments)[1]
    assert len(errors) == 1 and errors == complete_answer(command, *arguments)
