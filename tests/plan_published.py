"""Plans of 8B and 70B models beside memory that others have published: python tests/plan_published.py

Their code is not this project's, so only the size of a number can agree. docs/plan.md names the sources.
"""

import os
import tempfile

from datasets import Dataset
from transformers import LlamaConfig
from trl import ModelConfig, SFTConfig

from rlhf.models.sources import Source
from rlhf.planning.arguments import PlanConfig
from rlhf.planning.plan import GIB, Plan
from rlhf.planning.supervised import plan_sft

LLAMA_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
LLAMA_70B = {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
             "num_attention_heads": 64, "num_key_value_heads": 8}  # fmt: skip
LLAMA2_70B = {**LLAMA_70B, "vocab_size": 32000}


def planned(sizes: dict[str, int], gpus: int, rows: int, tokens: int, model: ModelConfig, **changes: object) -> Plan:
    """The plan of SFT under FSDP2 with rows of equal length."""
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=False,
                             architectures=["LlamaForCausalLM"])  # fmt: skip
        config.save_pretrained(folder)
        settings = {"activation_checkpointing": True, "bf16": True, "use_cpu": True, **changes}
        args = SFTConfig(folder, per_device_train_batch_size=rows, max_length=tokens, report_to="none", **settings)
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        try:
            data = Dataset.from_list([{"input_ids": [1] * tokens, "labels": [1] * tokens}] * 2)
            plan = PlanConfig(plan=True, plan_processes=gpus)
            return plan_sft(plan, args, model, Source("llama", folder, None, None, None), data)
        finally:
            del os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"]


def gib(plan: Plan) -> float:
    """The peak."""
    return plan.peak.at_rows.total / GIB


def main() -> None:
    full = ModelConfig(dtype="float32", use_peft=False)
    few, many = (planned(LLAMA_8B, gpus, 1, 512, full) for gpus in (8, 128))
    print(f"8B, full: 8 GPUs instead of 128 need {gib(few) - gib(many):.1f} GiB more each; published 15.0 to 15.4")
    states = sum(few.peak.at_rows.memory[role] for role in ("weights", "gradients", "optimizer"))
    print(f"8B, full: {states * 8 / few.parameters['model'][0]:.1f} bytes a parameter on all GPUs; published 16")
    tune = ModelConfig(dtype="bfloat16", use_peft=True, lora_r=16, lora_dropout=0.0, lora_target_modules=[
        "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])  # fmt: skip
    print(f"70B, LoRA, 8 GPUs, 2 x 2048: {gib(planned(LLAMA_70B, 8, 2, 2048, tune)):.1f} GiB; published 27.6")
    peft = ModelConfig(
        dtype="float32", use_peft=True, lora_r=8, lora_dropout=0.1, lora_target_modules=["all-linear"]
    )  # its base was loaded in float32
    plan = planned(LLAMA2_70B, 8, 8, 2048, peft, loss_type="nll", gradient_accumulation_steps=4)
    print(f"70B, LoRA, 8 GPUs, 8 x 2048: {gib(plan):.1f} GiB; published 72 to 80 GB, of which nvidia-smi counts all")
    large = planned(LLAMA_70B, 64, 1, 4096, full)
    print(f"70B, full, 64 GPUs, 1 x 4096: {gib(large):.1f} GiB; nothing found that was published")


if __name__ == "__main__":
    main()
