"""Tiny models and datasets, and recipes as subprocesses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf.starter import starter_model

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
}


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(starter_model())


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


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with sft.jsonl, pairs.jsonl and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("data")
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


def run(script, *arguments, processes=1, check=True, environment=None, cwd=ROOT):
    """Run a recipe as a user would; returns the completed process with its output as text."""
    words = [str(argument) for argument in arguments]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    else:
        command = [sys.executable]
    result = subprocess.run(
        [*command, str(ROOT / script), *words],
        cwd=cwd,
        env={**ENVIRONMENT, **(environment or {})},
        capture_output=True,
        text=True,
    )
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
    "2",
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
