"""Small models, adapters, data and runs for the commands of tests/mistake_table.py, and ways to damage them."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

WORDS = ("tea", "rain", "music", "pizza", "snow", "chess", "apples", "trains")
SHORT = "--dtype float32 --bf16 false --lora_r 4 --max_steps 1 --per_device_train_batch_size 4 --save_steps 1"
PPO = (
    "--model_name_or_path made/sft --dataset_name made/data/prompts.jsonl --dtype float32 --bf16 false --lora_r 4 "
    "--total_episodes 4 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --num_mini_batches 1 "
    "--response_length 4 --reward_funcs made_rewards.length --save_steps 1"
)
FINISHED = {  # runs that later commands read
    "ppo": f"recipes/ppo.py {PPO}",
    "finetune": f"recipes/finetune.py --model_name_or_path made/lm --dataset_name made/data/labelled.jsonl {SHORT}",
    "tok": "recipes/tokenizer.py --dataset_name made/data/text.jsonl --vocab_size 300 --extra_ids 0",
}


def lines(rows: list[dict]) -> str:
    """The content of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


ROWS: dict[str, list[dict]] = {
    "sft": [{"prompt": user(f"Do you like {w}?"), "completion": assistant(f"I love {w}!")} for w in WORDS * 2],
    "pref": [
        {"prompt": user(f"What about {w}?"), "chosen": assistant(f"Good {w}"), "rejected": assistant(f"Bad {w}")}
        for w in WORDS * 2
    ],
    "bench": [{"prompt": f"About {w}?", "chosen": f"Good {w}", "rejected": "Bad", "subset": "mine"} for w in WORDS],
    "prompts": [{"prompt": user(f"Tell me about {w}.")} for w in WORDS],
    "text": [{"text": f"Once there was {w}, and then more {w} than before, day after day. " * 8} for w in WORDS * 3],
    "problems": [
        {"prompt": f"{n} and {n + 1} make?", "answer": str(2 * n + 1), "solution": f"It is {2 * n + 1}."}
        for n in range(20)
    ],
    "labelled": [{"text": f"{start} {w}", "label": start} for w in WORDS for start in ("Good", "Bad")],
}  # fmt: skip
FUNCTION = "def length(prompts, completions, **columns):\n    return [float(len(str(c))) for c in completions]\n"


def make_inputs(folder: Path, runs: dict[str, str] = FINISHED) -> Path:
    """Make everything that the commands read, in `folder`: models, data and these finished runs."""
    # here, because a process that is forked for a command reads this file too
    import torch
    from conftest import ENVIRONMENT, ROOT, make_adapter, save_tiny
    from recipe_process import run_recipe, start
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForSequenceClassification

    from rlhf.starter.model import starter_model

    (folder / "data").mkdir(parents=True)
    for name, rows in ROWS.items():
        (folder / "data" / f"{name}.jsonl").write_text(lines(rows))
    tokenizer = AutoTokenizer.from_pretrained(starter_model())
    lm = save_tiny(folder / "lm", tokenizer)
    make_adapter(lm, tokenizer, folder / "sft")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    common = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **sizes}
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(num_labels=1, num_key_value_heads=1, **common)).save_pretrained(
        folder / "rm"
    )
    LlamaForSequenceClassification(LlamaConfig(num_labels=3, num_key_value_heads=1, **common)).save_pretrained(
        folder / "three"
    )
    BertForMaskedLM(BertConfig(max_position_embeddings=128, **common)).save_pretrained(folder / "bert")
    for name in ("rm", "three", "bert", "sft"):
        tokenizer.save_pretrained(folder / name)
    beside = folder.parent / "inputs"
    beside.mkdir()
    (beside / "made").symlink_to(folder)
    (beside / "made_rewards.py").write_text(FUNCTION)
    for name, words in runs.items():
        command, *flags = words.split()
        said = run_recipe(
            start(ENVIRONMENT), [str(ROOT / command), *flags, "--output_dir", f"made/{name}"], ENVIRONMENT, beside
        )
        if said.returncode:
            raise RuntimeError(f"{words}\n{said.stderr[-3000:]}")
    return folder


def copy(source: str, **changes: object) -> Callable[[Path], None]:
    """Make a copy of made/<source> in which files are replaced, changed by a function, or removed (None)."""

    def make(path: Path) -> None:
        shutil.copytree(path.parent / "made" / source, path)
        for name, change in changes.items():
            file = path / FILE_NAMES.get(name, name)
            if change is None:
                file.unlink()
            elif callable(change):
                change(file)
            elif isinstance(change, bytes):
                file.write_bytes(change)
            else:
                file.write_text(str(change))

    return make


FILE_NAMES = {  # as keyword arguments
    "config": "config.json", "weights": "model.safetensors", "tokenizer": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json", "template": "chat_template.jinja", "adapter": "adapter_config.json",
    "adapter_weights": "adapter_model.safetensors", "run": "run.json", "state": "trainer_state.json",
    "evaluation": "evaluation.json", "generation": "generation_config.json",
}  # fmt: skip


def halved(file: Path) -> None:
    """Cut a file in half."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def of_nan(file: Path) -> None:
    """Set the last weight of a safetensors file to NaN."""
    content = bytearray(file.read_bytes())
    content[-4:] = struct.pack("<f", float("nan"))  # the models are in float32
    file.write_bytes(content)


def with_keys(**keys: object) -> Callable[[Path], None]:
    """Set keys of a JSON file; None removes one."""

    def change(file: Path) -> None:
        content = json.loads(file.read_text()) | keys
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def folder_instead(path: Path) -> None:
    """A folder where a file is expected."""
    path.unlink(missing_ok=True)
    path.mkdir()
