"""The road before RLHF and RLHF itself: everything made here, with tiny sizes."""

import json

import torch
from conftest import TINY_PPO, TINY_TRAINING, run, user
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


def test_tokenizer_base_sft_reward_model_and_policy_made_entirely_here(files, tmp_path):
    text = tmp_path / "text.jsonl"
    lines = [json.loads(line) for line in (files / "sft.jsonl").read_text().splitlines()]
    rows = [{"messages": line["prompt"] + line["completion"]} for line in lines]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("recipes/tokenizer.py", "--dataset_name", text, "--vocab_size", 330, "--extra_ids", 0, "--output_dir",
        tmp_path / "tokenizer")  # fmt: skip
    # on two processes, as on two accelerators
    run("recipes/pretrain.py", "--dataset_name", text, "--tokenizer_name", tmp_path / "tokenizer", "--output_dir",
        tmp_path / "base", "--hidden_size", 16, "--num_hidden_layers", 2, "--num_attention_heads", 2,
        "--block_size", 32, "--max_position_embeddings", 128, "--max_steps", 4,
        "--per_device_train_batch_size", 2, "--bf16", "false", processes=2)  # fmt: skip
    metrics = json.loads((tmp_path / "base" / "run.json").read_text())["metrics"]
    assert metrics["train_tokens"] == 4 * 2 * 2 * 32  # of both processes
    run("recipes/sft.py", "--model_name_or_path", tmp_path / "base", "--dataset_name", files / "sft.jsonl",
        "--output_dir", tmp_path / "sft", *TINY_TRAINING)  # fmt: skip
    run("recipes/reward.py", "--model_name_or_path", tmp_path / "sft", "--dataset_name", files / "pairs.jsonl",
        "--output_dir", tmp_path / "reward", *TINY_TRAINING)  # fmt: skip
    run("recipes/ppo.py", "--model_name_or_path", tmp_path / "sft", "--reward_model_path", tmp_path / "reward",
        "--dataset_name", files / "prompts.jsonl", "--output_dir", tmp_path / "ppo", *TINY_PPO)  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ppo")
    assert base.config.vocab_size == len(tokenizer) < 330
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tmp_path / "tokenizer").chat_template
    ids = torch.tensor([tokenizer("Do you like tea?")["input_ids"]])
    before = base(ids).logits
    policy = pipeline("text-generation", model=str(tmp_path / "ppo"))
    assert not torch.equal(policy.model(ids).logits, before)
    reply = policy(user("Do you like tea?"), max_new_tokens=3)[0]["generated_text"]
    assert reply[-1]["role"] == "assistant"
