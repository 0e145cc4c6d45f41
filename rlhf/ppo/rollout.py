"""Prompts → completions sampled by the policy."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf.generation import generate, left_pad
from rlhf.ppo.types import Rollout


def prompt_order(rows: int, episode: int, count: int, seed: int) -> list[int]:
    """The row numbers of `count` episodes from number `episode` on.

    Every pass over the dataset is a fresh permutation seeded by `seed` and the number of the pass, and passes follow
    each other without a gap, so that a dataset may be smaller than a batch and a position is all a resume needs.
    """
    numbers: list[int] = []
    while len(numbers) < count:
        round_number, offset = divmod(episode + len(numbers), rows)
        generator = torch.Generator().manual_seed(seed + round_number)
        numbers += torch.randperm(rows, generator=generator).tolist()[offset : offset + count - len(numbers)]
    return numbers


@torch.no_grad()
def sample_rollout(
    policy: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    *,
    response_length: int,
    temperature: float,
    stop_token_ids: list[int],
    batch_size: int,
    device: torch.device,
) -> Rollout:
    """Sample one completion per row, by pure sampling at `temperature`.

    Args:
        rows: of the dataset, with `input_ids` and, for reward functions, `prompt` and any other columns.
        batch_size: how many rows to sample at once.
    """
    config = GenerationConfig(
        max_new_tokens=response_length, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=stop_token_ids or None,
    )  # fmt: skip
    prompts = left_pad(tokenizer, [row["input_ids"] for row in rows]).to(device)
    completions = []
    for start in range(0, len(rows), batch_size):
        part = {name: tensor[start : start + batch_size] for name, tensor in prompts.items()}
        new = generate(policy, part, config).sequences[:, prompts["input_ids"].shape[1] :]
        completions.append(
            torch.nn.functional.pad(new, (0, response_length - new.shape[1]), value=tokenizer.pad_token_id)
        )
    tokens = torch.cat(completions)
    is_stop = torch.isin(tokens, torch.tensor(stop_token_ids, device=device, dtype=tokens.dtype))
    behind = (is_stop.cumsum(1) - is_stop.long()) > 0  # strictly behind the first stop token
    longest = int((~behind).sum(1).max())
    tokens, behind, is_stop = tokens[:, :longest], behind[:, :longest], is_stop[:, :longest]
    tokens = tokens.masked_fill(behind, tokenizer.pad_token_id)
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("input_ids", "prompt")}
    return Rollout(
        prompts=[row["prompt"] if "prompt" in row else tokenizer.decode(row["input_ids"]) for row in rows],
        completions=tokenizer.batch_decode(tokens, skip_special_tokens=True),
        columns=columns,
        input_ids=torch.cat([prompts["input_ids"], tokens], 1),
        attention_mask=torch.cat([prompts["attention_mask"], (~behind).long()], 1),
        completion_mask=~behind,
        ended=is_stop.any(1),
    )
