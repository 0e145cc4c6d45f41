"""Tokens per second of three ways to sample: the project's own loop, transformers' generate, continuous batching.

A Llama of about a billion parameters with random weights. Replies end where their length says, so that all ways sample
as many tokens: no end token. Each way meets lengths that it hasn't seen, as in training.
"""

from collections.abc import Callable
from typing import Any

import torch
from bench_ppo import clock
from piece import DEVICE, answer, peak_gib
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

from rlhf.models.generation import generate


def config(tiny: bool) -> LlamaConfig:
    """The shape of https://huggingface.co/meta-llama/Llama-3.2-1B"""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
    large = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1} if tiny else {
        "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
    return LlamaConfig(
        **(small if tiny else large), **heads, max_position_embeddings=4096, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip


def sampling(new: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)


def own_loop(model: Any, prompts: torch.Tensor, new: int) -> int:
    samples = generate(model, {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}, sampling(new))
    return int(samples.lengths.sum())


def stock(model: Any, prompts: torch.Tensor, new: int) -> int:
    mask = torch.ones_like(prompts)
    replies = model.generate(input_ids=prompts, attention_mask=mask, generation_config=sampling(new))
    return len(prompts) * (replies.shape[1] - prompts.shape[1])


def continuous_batching(model: Any, prompts: torch.Tensor, new: int) -> int:
    pages = len(prompts) * (-(-(prompts.shape[1] + new) // 256) + 1)
    settings = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=max(4096, len(prompts)))
    found = model.generate_batch(prompts.tolist(), sampling(new), continuous_batching_config=settings)
    return sum(len(output.generated_tokens) for output in found.values())


def draw(rows: int, width: int, tiny: bool) -> torch.Tensor:
    return torch.randint(3, config(tiny).vocab_size, (rows, width), device=DEVICE)


@torch.no_grad()
def measure(tiny: bool, keep: Callable[[dict[str, Any]], None]) -> None:
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config(tiny), dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    for rows, width, new in [(2, 12, 5)] if tiny else [(64, 512, 53), (256, 128, 128)]:
        for way in (own_loop, stock, continuous_batching):
            name = f"{way.__name__}, {rows} prompts of {width}, {new} new"
            try:
                way(model, draw(rows, width + 8, tiny), 4)  # to warm up; of a length that doesn't come again
                prompts = draw(rows, width, tiny)
                start = clock()
                tokens = way(model, prompts, new)
                taken = clock() - start
                keep({name: {"tokens": tokens, "seconds": round(taken, 3), "tokens_per_second": round(tokens / taken)}})
            except Exception as error:  # the other ways are measured all the same
                keep({name: {"error": f"{type(error).__name__}: {error}"[:500]}})
    keep({"peak_memory_gib": peak_gib()})


if __name__ == "__main__":
    answer(measure)
