"""Tiny models and datasets, and recipes as subprocesses."""

import dataclasses
import gc
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import pytest
import torch
from datasets import Dataset
from recipe_process import Elsewhere, run_on_processes, run_recipe, start
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig

from rlhf.data.encoding import encode_conversation
from rlhf.data.rows import prompt_rows
from rlhf.models.adapters import REFERENCE
from rlhf.models.loading import load_causal_lm, load_policy, load_reward_model
from rlhf.models.sources import resolve
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.rewards import completion_text
from rlhf.starter.model import starter_model

torch.set_num_threads(1)  # the test files run side by side, and two threads on one core wait for each other
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "HF_TOKEN_PATH": str(ROOT / "none"),  # not the token of whoever runs the tests
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
VOCABULARY = 6144
T = TypeVar("T")
_elsewhere: list[Elsewhere] = []  # it ends with this process, whose end closes its input
# a file is run by one process (--dist loadfile): the longest first, or one process works on them while another waits
LONGEST = (
    "test_docs.py", "test_instructgpt.py", "test_hub.py", "test_folders.py", "test_start.py", "test_gpu_check.py",
    "test_plan.py", "test_rounds.py", "test_scaling.py", "test_recipes.py", "test_distributed.py", "test_zero.py",
    "test_kills.py", "test_ppo_defects.py", "test_pages.py", "test_in_context.py", "test_families.py", "test_fsdp.py",
    "test_attacks.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, for --no-loadscope-reorder."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """Leave the libraries out of garbage collection, which each Trainer starts."""
    gc.collect()
    gc.freeze()


def present(value: T | None) -> T:
    """A value that the test relies on to be there."""
    assert value is not None
    return value


def load_script(path: str) -> ModuleType:
    """A recipe as a module, so that a test can call its `main` in this process."""
    spec = present(importlib.util.spec_from_file_location(Path(path).stem, ROOT / path))
    module = importlib.util.module_from_spec(spec)
    present(spec.loader).exec_module(module)
    return module


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The starter's tokenizer with the first eighth of its tokens, which have the same ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    AutoTokenizer.from_pretrained(starter_model()).save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    model = content["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    file.write_text(json.dumps(content))
    return AutoTokenizer.from_pretrained(folder)


def save_tiny(folder, tokenizer, seed=0, **changes):
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
        **changes,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer):
    """Folder of a tiny random Llama with the starter's tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny"), tokenizer)


def save_guesser(folder, tokenizer, **changes):
    """A tiny model that says of every box, at random, `The answer is 1.` or `The answer is 2.`"""
    model = LlamaForCausalLM.from_pretrained(save_tiny(folder, tokenizer, **changes))
    rows = [
        encode_conversation(tokenizer, [*user("What is in the red box?"), *assistant(f"The answer is {n}.")])
        for n in (1, 2)
    ]
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-2)
    for _ in range(100):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return str(folder)


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def learned(tokenizer, row):
    """The texts that a row's labels are on, each with the token that ends it."""
    spans: list[list[int]] = []
    before = -100
    for label in row["labels"]:
        if label != -100:
            spans = [*spans, []] if before == -100 else spans
            spans[-1].append(label)
        before = label
    return [tokenizer.decode(span) for span in spans]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with sft.jsonl, pairs.jsonl and prompts.jsonl."""
    return write_rows(tmp_path_factory.mktemp("data"))


def write_rows(folder):
    """Write sft.jsonl, pairs.jsonl and prompts.jsonl into a folder; returns it."""
    words = ["tea", "rain", "the cat", "music", "a long walk", "pizza", "snow", "chess"]
    rows = {
        "sft": [{"prompt": user(f"Do you like {w}?"), "completion": assistant(f"I love {w}!")} for w in words * 4],
        "pairs": [
            {
                "prompt": user(f"What about {w}?"),
                "chosen": assistant("Great, happy, love it"),
                "rejected": assistant("Awful, sad, hate it"),
            }
            for w in words * 4
        ],
        "prompts": [{"prompt": user(f"Tell me about {w}.")} for w in words],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def imported_with(environment):
    """What huggingface_hub reads while it is imported, if it isn't as in ENVIRONMENT."""
    names = {name for name in environment if name.startswith("HF_") and name != "HF_TOKEN"}
    return {name: environment[name] for name in names if environment[name] != ENVIRONMENT.get(name)}


def run(script, *arguments, processes=1, check=True, environment=None, cwd=ROOT):
    """Run a recipe as a user would, or -c and code; returns the completed process with its output as text."""
    command = [script if script == "-c" else str(ROOT / script), *map(str, arguments)]
    environment = {**ENVIRONMENT, **(environment or {})}
    if processes > 1:
        result = run_on_processes(start(ENVIRONMENT), processes, command, environment, cwd)
    elif read := imported_with(environment):
        if not _elsewhere or imported_with(_elsewhere[-1].environment) != read:
            _elsewhere.append(Elsewhere({**ENVIRONMENT, **read}))
        result = _elsewhere[-1].run(command, environment, cwd)
    else:
        result = run_recipe(start(ENVIRONMENT), command, environment, cwd)
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


TINY_TRAINING = [
    "--per_device_train_batch_size",
    "4",
    "--per_device_eval_batch_size",
    "8",
    "--logging_steps",
    "1",
    "--dtype",
    "float32",
    "--bf16",
    "false",
    "--lora_r",
    "4",
    "--eval_on_start",
    "false",
    "--save_steps",
    "4",
]
TINY_PPO = [
    "--total_episodes",
    "16",
    "--per_device_train_batch_size",
    "4",
    "--gradient_accumulation_steps",
    "1",
    "--num_mini_batches",
    "1",
    "--num_ppo_epochs",
    "1",
    "--response_length",
    "6",
    "--dtype",
    "float32",
    "--bf16",
    "false",
    "--lora_r",
    "4",
    "--save_steps",
    "1",
]


LORA = ModelConfig(dtype="float32", use_peft=True, lora_r=4, lora_target_modules=["all-linear"], lora_dropout=0.0)


def count_a(prompts, completions, **columns):
    return [float(completion_text(completion).count("a")) for completion in completions]


def make_adapter(base, tokenizer, folder):
    """Save a LoRA adapter of a tiny model with weights that do something."""
    model = load_causal_lm(resolve(str(base)), LORA, tokenizer)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def sft(tiny, tokenizer, tmp_path_factory):
    """Folder of a LoRA adapter of the tiny model."""
    return make_adapter(tiny, tokenizer, tmp_path_factory.mktemp("sft"))


def make_reward_adapter(sft, tokenizer, folder, rank=3, seed=3):
    """Save a reward adapter over the base of another adapter, with a random head; returns its folder."""
    lora = dataclasses.replace(LORA, lora_r=rank)
    model = load_reward_model(resolve(resolve(sft).base), lora, tokenizer, seed=seed)
    torch.manual_seed(seed + 5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def reward_adapter(sft, tokenizer, tmp_path_factory):
    """Folder of a reward adapter over the tiny model, of another rank than the policy's."""
    return make_reward_adapter(sft, tokenizer, tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="session")
def second_reward_adapter(sft, tokenizer, tmp_path_factory):
    """Folder of another reward adapter over the tiny model."""
    return make_reward_adapter(sft, tokenizer, tmp_path_factory.mktemp("second"), rank=2, seed=4)


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Ten conversational prompts, ready for PPOTrainer."""
    rows = [{"prompt": user("Hello " * (n % 3 + 1)), "number": n} for n in range(10)]
    return prompt_rows(Dataset.from_list(rows), "d", tokenizer, 8, 256)


def ppo_config(folder, **changes):
    """A PPOConfig for the tiny model: two updates of eight episodes, two epochs of two minibatches each."""
    settings = {
        "output_dir": str(folder),
        "total_episodes": 16,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "response_length": 6,
        "learning_rate": 1e-2,
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "ref_adapter_name": REFERENCE,
        **changes,
    }
    return PPOConfig(**settings)


def ppo_trainer(sft, tokenizer, prompts, folder, reward_funcs=(count_a,), extra=None, **changes):
    """A PPOTrainer that starts from an adapter; keyword arguments are PPOConfig's, `extra` PPOTrainer's."""
    policy = load_policy(resolve(sft), LORA, tokenizer)
    return PPOTrainer(
        ppo_config(folder, **changes),
        tokenizer,
        policy,
        train_dataset=prompts,
        reward_funcs=list(reward_funcs),
        **(extra or {}),
    )


def logged(ppo):
    """The log entries of updates."""
    return [entry for entry in ppo.state.log_history if "objective/kl" in entry]
