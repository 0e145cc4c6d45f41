"""Fills the table of docs/many-gpus.md: what PPO of models from 1B to 70B parameters is planned to need on GPUs.

    python tests/plan_table.py

The models are Llamas of these sizes without weights, with the starter's tokenizer. Prompts have 512 tokens and replies
512, the reward is a function, and each GPU has 2 rows at once. No plan has been compared with a GPU.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from plan_published import LLAMA_8B, LLAMA_70B
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from rlhf.starter.model import starter_model

ROOT = Path(__file__).resolve().parents[1]
PAGE, BEGIN, END = ROOT / "docs" / "many-gpus.md", "<!-- plans -->", "<!-- end of plans -->"
LLAMA_1B = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}  # fmt: skip
MODELS = {"1B": LLAMA_1B, "8B": LLAMA_8B, "70B": LLAMA_70B}
ROWS = ["--per_device_train_batch_size", "2", "--local_rollout_forward_batch_size", "2",
        "--activation_checkpointing", "true", "--response_length", "512"]  # fmt: skip
METHODS = {
    "LoRA": ["--dtype", "bfloat16", "--bf16", "true"],
    "full": ["--use_peft", "false", "--dtype", "float32", "--bf16", "true", "--accelerator_config",
             '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}'],
}  # fmt: skip
SERVER = ["--ds3_gather_for_generation", "false", "--use_vllm", "true"]


class Row(NamedTuple):
    """A row of the table."""

    model: str
    gpus: int
    method: str
    file: str  # of recipes/accelerate
    more: list[str]  # flags beside those of the method


TABLE = [
    Row("1B", 1, "LoRA", "ddp", []),
    Row("1B", 8, "full", "fsdp", []),
    Row("8B", 1, "LoRA", "ddp", []),
    Row("8B", 8, "LoRA", "ddp", []),
    Row("8B", 8, "full", "fsdp", []),
    Row("8B", 8, "full", "fsdp", SERVER),
    Row("8B", 64, "full", "fsdp", []),
    Row("70B", 8, "LoRA", "fsdp", SERVER),
    Row("70B", 64, "LoRA", "fsdp", SERVER),
    Row("70B", 64, "full", "fsdp", SERVER),
]


def prepare(folder: Path) -> None:
    """Models without weights, prompts of 512 tokens, and a reward."""
    tokenizer = AutoTokenizer.from_pretrained(starter_model())
    for name, sizes in MODELS.items():
        config = LlamaConfig(**sizes, max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
                             pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        save_file({}, folder / name / "model.safetensors")  # has to be there, and is not read
    rows = [json.dumps({"prompt": [{"role": "user", "content": f"{' tea' * 490} {number}"}]}) for number in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "any_reward.py").write_text(
        "def zero(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n"
    )


def planned(row: Row, folder: Path) -> tuple[str, str]:
    """GiB on each GPU at the peak, and the phase of it."""
    command = [
        "accelerate", "launch", "--config_file", f"recipes/accelerate/{row.file}.yaml", "--num_processes", "1",
        "recipes/ppo.py", "--model_name_or_path", str(folder / row.model), "--dataset_name",
        str(folder / "prompts.jsonl"), "--reward_funcs", "any_reward.zero", *ROWS, *METHODS[row.method], *row.more,
        "--plan", "true", "--plan_processes", str(row.gpus), "--output_dir", str(folder / "out"),
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    found = re.search(r"The peak is ([\d.]+) GiB, in: (.*)\.", done.stdout)
    assert found, done.stdout + done.stderr
    return found[1], found[2]


def main() -> None:
    """Make the plans and write the table."""
    lines = ["| model | GPUs that train | method | launch file | more flags | GiB on each GPU | at the peak |",
             "| - | - | - | - | - | - | - |"]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for row in TABLE:
            gib, phase = planned(row, Path(name))
            flags = f"`{' '.join(row.more)}`" if row.more else ""
            lines.append(f"| {row.model} | {row.gpus} | {row.method} | `{row.file}.yaml` | {flags} | {gib} | {phase} |")
            print(lines[-1], flush=True)
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
