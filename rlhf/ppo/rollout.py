"""Prompts → Rollout: completions sampled by the policy."""

from collections.abc import Iterator

import torch
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from rlhf.data.datasets import Row
from rlhf.models.generation import generate, left_pad
from rlhf.models.tokenizers import end_ids, reply_text
from rlhf.ppo.types import Rollout


def prompt_order(rows: int, episode: int, count: int, seed: int) -> list[int]:
    """The row numbers of `count` episodes from number `episode` on.

    Every pass over the dataset is a fresh permutation, seeded by `seed` and the number of the pass. Passes follow each
    other without a gap, so a dataset may be smaller than a batch, and a resume needs no more than the position.
    """
    numbers: list[int] = []
    while len(numbers) < count:
        round_number, offset = divmod(episode + len(numbers), rows)
        generator = torch.Generator().manual_seed(seed + round_number)
        numbers += torch.randperm(rows, generator=generator).tolist()[offset : offset + count - len(numbers)]
    return numbers


class PromptSampler(Sampler[list[int]]):
    """The row numbers of one process's batches, in `prompt_order`.

    Args:
        rows: number of rows of the dataset.
        own_rows: which rows of a batch belong to the process.
        batch_size: episodes of an update, on all processes.
        first_episode: the episode at which the run stands.
        total_episodes: where it ends.
    """

    def __init__(
        self, rows: int, own_rows: range, batch_size: int, first_episode: int, total_episodes: int, seed: int
    ) -> None:
        self.rows, self.own_rows, self.batch_size, self.seed = rows, own_rows, batch_size, seed
        self.episodes = range(first_episode, total_episodes, batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for episode in self.episodes:
            order = prompt_order(self.rows, episode, self.batch_size, self.seed)
            yield [order[number] for number in self.own_rows]

    def __len__(self) -> int:
        return len(self.episodes)


def draw_uniforms(first_episode: int, rows: range, length: int, seed: int, device: torch.device) -> torch.Tensor:
    """Random numbers (rows, length) in [0, 1) to sample these rows of a batch with.

    They depend on the seed and the episode alone, so a run samples the same tokens on one process or several, and after
    a resume.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + first_episode)
    return torch.rand(rows.stop, length, generator=generator)[rows.start :].to(device)


@torch.no_grad()
def sample_rollout(
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    *,
    response_length: int,
    temperature: float,
    stop_token_ids: list[int],
    stop_strings: list[str] | None = None,
    batch_size: int,
    uniforms: torch.Tensor,
    device: torch.device,
) -> Rollout:
    """Sample one completion per row, by pure sampling at `temperature`.

    Args:
        rows: rows of the dataset with `input_ids`, and perhaps `prompt` and other columns for the reward functions.
        batch_size: number of rows to sample at once.
        uniforms: (rows, response_length), see `draw_uniforms`.
    """
    config = GenerationConfig(
        max_new_tokens=response_length, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=stop_token_ids or None,
    )  # fmt: skip
    stops = StoppingCriteriaList([StopStringCriteria(tokenizer, stop_strings)] if stop_strings else [])
    prompts = left_pad(tokenizer, [row["input_ids"] for row in rows]).to(device)
    width = prompts["input_ids"].shape[1]
    tokens = torch.full((len(rows), response_length), tokenizer.pad_token_id, device=device)
    lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        mask = prompts["attention_mask"][part]
        batch = {"input_ids": prompts["input_ids"][part].masked_fill(mask == 0, 0), "attention_mask": mask}
        samples = generate(policy, batch, config, stopping_criteria=stops, uniforms=uniforms[part])
        tokens[part, : samples.sequences.shape[1] - width] = samples.sequences[:, width:]
        lengths[part], ended[part] = samples.lengths, samples.ended
    tokens = tokens[:, : int(lengths.max())]
    mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    ends = end_ids(policy, tokenizer)
    columns = {
        name: [row[name] for row in rows] for name in rows[0] if name not in ("input_ids", "attention_mask", "prompt")
    }
    return Rollout(
        prompts=[row["prompt"] if "prompt" in row else tokenizer.decode(row["input_ids"]) for row in rows],
        completions=[
            reply_text(tokenizer, row[:length], ends)
            for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)
        ],
        columns=columns,
        input_ids=torch.cat([prompts["input_ids"], tokens], 1),
        attention_mask=torch.cat([prompts["attention_mask"], mask.long()], 1),
        completion_mask=mask,
        ended=ended,
    )
