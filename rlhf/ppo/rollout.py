"""Prompts → Rollout: completions sampled by the policy."""

from collections.abc import Iterator

import torch
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.datasets import Row
from rlhf.engines.own_loop import OwnLoop
from rlhf.engines.seam import Decoding, Engine
from rlhf.models.generation import left_pad
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
    """Sample one completion per row with the project's own loop, by pure sampling at `temperature`.

    Args:
        rows: rows of the dataset with `input_ids`, and perhaps `prompt` and other columns for the reward functions.
        batch_size: number of rows to sample at once.
        uniforms: (rows, response_length), see `draw_uniforms`.
    """
    decoding = Decoding(response_length, temperature, stop_token_ids, stop_strings or [])
    engine = OwnLoop(policy, tokenizer, batch_size)
    return rollout_of(engine, policy, tokenizer, rows, decoding, uniforms.to(device))


def rollout_of(
    engine: Engine,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    decoding: Decoding,
    uniforms: torch.Tensor,
) -> Rollout:
    """The rows with the completions that an engine samples for them, on the device of `uniforms`."""
    ids = [row["input_ids"] for row in rows]
    tokens, logprobs, lengths, ended = engine.sample(ids, decoding, uniforms)
    prompts = left_pad(tokenizer, ids).to(uniforms.device)
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
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
        sampling_logprobs=logprobs,
    )
