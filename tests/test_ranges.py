"""The ranges of numbers among the flags, and what a YAML file of flags may hold."""

import dataclasses
import math

import pytest
from conftest import ROOT

from rlhf.errors import InputError
from rlhf.ppo import PPOConfig
from rlhf.rloo import RLOOConfig
from rlhf.run.declarations import argument_types
from rlhf.run.parser import COMPUTED, Parser
from rlhf.run.processes import check_environment
from rlhf.run.ranges import LIBRARY_RANGES, check_ranges, ranges_of

COMMANDS = sorted(
    str(file.relative_to(ROOT)) for folder in ("recipes", "eval") for file in (ROOT / folder).glob("[a-z]*.py")
)


def parser_of(command):
    return Parser(*argument_types(str(ROOT / command)))


def numbers(parser):
    return {
        action.dest
        for action in parser._actions
        if getattr(action.type, "__name__", "") in ("int", "float") and action.dest not in COMPUTED
    }


def refusal(command, words, file=None):
    """The line that refuses a command line."""
    with pytest.raises(InputError) as error:
        parser_of(command).read(words, file)
    return str(error.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range_which_its_default_is_in_and_nan_is_not(command):
    parser = parser_of(command)
    assert numbers(parser) <= set(parser.ranges)
    defaults = {action.dest: action.default for action in parser._actions}
    for name in numbers(parser):
        values = defaults[name] if isinstance(defaults[name], list) else [defaults[name]]
        assert all(value is None or value in parser.ranges[name] for value in values), name
        for bad in (math.nan, math.inf, -math.inf, 10**30):
            assert bad not in parser.ranges[name], name
        assert refusal(command, [f"--{name}", "1" + "0" * 30]).startswith(f"--{name} ")


def test_the_table_names_fields_of_the_libraries_only():
    fields = {name for command in COMMANDS for name in parser_of(command).hints}
    assert set(LIBRARY_RANGES) <= fields
    own = [kind for kind in (PPOConfig, RLOOConfig) for _ in [ranges_of(kind)]]
    assert all(ranges_of(kind)["temperature"] == LIBRARY_RANGES["temperature"] for kind in own)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (PPOConfig, {"gamma": 7}), (PPOConfig, {"kl_coef": math.nan}), (PPOConfig, {"num_mini_batches": 0}),
        (PPOConfig, {"save_total_limit": -1}), (PPOConfig, {"stop_token_id": [3, -4]}),
        (RLOOConfig, {"num_generations": 1}), (RLOOConfig, {"beta": math.inf}),
    ],
)  # fmt: skip
def test_constructors_check_from_the_same_place(config, changes):
    [name] = changes
    with pytest.raises(InputError, match=f"^--{name} .*: must be"):
        config(output_dir="never", use_cpu=True, bf16=False, **changes)


def test_a_number_in_a_list_counts():
    @dataclasses.dataclass
    class Weights:
        reward_weights: list[float] | None = None

    check_ranges(Weights(), Weights([1.0, -2.0]))
    with pytest.raises(InputError, match="--reward_weights nan: must be a finite number"):
        check_ranges(Weights([1.0, math.nan]))


@pytest.mark.parametrize(
    ("command", "content", "said"),
    [
        ("sft", "learning_rate: [1]", "learning_rate: needs a number; found the list [1]"),
        ("sft", "learning_rate: .nan", "learning_rate nan: must be from 0 to 100"),
        ("sft", "lora_r: null", "lora_r: needs a whole number; found nothing"),
        ("ppo", "lora_r: true", "lora_r: needs a whole number; found the bool True"),
        ("ppo", "lora_r: 4.5", "lora_r: needs a whole number; found the float 4.5"),
        ("ppo", "learning_rate: quick", "learning_rate: needs a number; found the str 'quick'"),
        ("sft", "save_strategy: no", "save_strategy: needs one of no, steps, epoch, best; found the bool False. Write"),
        ("sft", "lora_target_modules: &a [*a]", "lora_target_modules: needs a list, each text"),
        ("sft", "lora_r: 3\nlora_r: 4", "the key 'lora_r' stands twice"),
        ("sft", "run_name: 2026-11-27", "run_name: needs text; found the date"),
        ("sft", "learning-rate: 3", "unknown key 'learning-rate'. Did you mean learning_rate?"),
        ("sft", "evaluation_strategy: steps", "unknown key 'evaluation_strategy'. Did you mean eval_strategy?"),
        ("ppo", "batch_size: 3", "batch_size is computed. Set it with per_device_train_batch_size"),
        ("sft", "dataset_name: ''", "dataset_name: is empty"),
        ("sft", "- a", "needs lines of the form"),
        ("sft", "", "needs lines of the form"),
        ("sft", b"\xff\xfe\x00", "not readable as YAML ('utf-8' codec"),
        ("sft", "a: b: c", "not readable as YAML (mapping values"),
        ("rloo", "num_generations: 1", "num_generations 1: must be at least 2"),
        ("sft", "bf16: true\nfp16: true", "--bf16 and --fp16: exclude each other"),
    ],
)  # fmt: skip
def test_a_yaml_file_that_cannot_be_right_is_one_line_with_its_name(command, content, said, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(f"recipes/{command}.py", [], file)
    assert said in line
    assert str(file) in line or "exclude each other" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("LOCAL_RANK", "1.5"), ("WORLD_SIZE", ""), ("ACCELERATE_MIXED_PRECISION", "fp17")],
)
def test_a_variable_of_a_launcher_that_cannot_be_right_is_named(name, value, monkeypatch):
    check_environment()
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^{name}={value}: "):
        check_environment()


def test_text_that_is_a_number_and_a_list_of_one_are_taken_from_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-4\nlora_r: '4'\nlora_target_modules: all-linear\nbf16: 'no'\n")
    parser = parser_of("recipes/sft.py")
    parser.read([], tmp_path / "c.yaml")
    assert parser.in_file == {
        "learning_rate": 1e-4, "lora_r": 4, "lora_target_modules": ["all-linear"], "bf16": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "content", "words", "left"),
    [
        ("ppo", "activation_checkpointing: false", ["--gradient_checkpointing", "true"], {}),
        ("ppo", "activation_checkpointing: false", ["--activation-checkpointing"], {"activation_checkpointing": False}),
        ("ppo", "total_episodes: 640", ["--num_train_epochs=1"], {}),
        ("ppo", "total_episodes: 640", ["--max_steps", "-1"], {"total_episodes": 640}),
        ("rloo", "max_steps: 10", ["--num-train-epochs", "2"], {}),
        ("sft", "bf16: true", ["--fp16", "true"], {}),
        ("sft", "bf16: true", ["--fp16", "false"], {"bf16": True}),
        ("sft", "load_in_8bit: true", ["--load_in_4bit"], {}),
        ("ppo", "stop_token: eos", ["--stop_token_id", "5"], {}),
    ],
)  # fmt: skip
def test_what_is_typed_wins_over_yaml_under_the_other_name_too(command, content, words, left, tmp_path):
    (tmp_path / "c.yaml").write_text(content)
    parser = parser_of(f"recipes/{command}.py")
    parser.read([*words, "--use_cpu", "true"], tmp_path / "c.yaml")
    assert parser.in_file == left


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gradient_checkpointing", "true", "--activation-checkpointing=false"], "two names for one setting"),
        (["--lora_target_modules", "a", "--lora-target-modules=b"], "is given twice"),
        (["-learning_rate", "1"], "'-learning_rate' on the command line belongs to no flag"),
        (["word"], "'word' on the command line belongs to no flag"),
        (["--learning", "1"], "unknown flag --learning. Did you mean --learning_rate?"),
        (["--parallelism_config", "1"], "--parallelism_config: can't be typed"),
        (["--output_dir="], "--output_dir: is empty"),
        (["--use_peft", "perhaps"], "argument --use_peft/--use-peft: Truthy value expected"),
        (["--optim", "best"], "argument --optim: invalid choice: 'best' (choose from"),
        (["--seed=-1"], "--seed -1: must be from 0 to 4294967295"),
        (["--max_steps", "0"], "--max_steps 0: must be at least 1, or -1"),
        (["--lora_dropout", "1"], "--lora_dropout 1.0: must be at least 0 and below 1"),
    ],
)
def test_words_that_cannot_be_right_are_one_line_with_the_flag(words, said):
    assert said in refusal("recipes/sft.py", words)
