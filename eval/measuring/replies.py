"""Replies of a model to held-out prompts, and log-probabilities of replies under a model."""

import gc
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.models.generation import Sampling, sample_completions
from rlhf.models.loading import load_causal_lm
from rlhf.models.prefix import Rows, rows_of
from rlhf.models.sources import Source
from rlhf.models.tokenizers import end_ids, load_tokenizer, reply_text
from rlhf.ppo.model import completion_logprobs

T = TypeVar("T")


class Replies(NamedTuple):
    """Replies to N prompts, equally many to each, prompt by prompt."""

    ids: list[list[int]]  # token ids, ending with the stop token where one was drawn
    texts: list[str]

    def first_of(self, count: int) -> "Replies":
        """The first of every `count` replies.

        >>> Replies([[1], [2], [3], [4]], ["a", "b", "c", "d"]).first_of(2)
        Replies(ids=[[1], [3]], texts=['a', 'c'])
        """
        return Replies(self.ids[::count], self.texts[::count])


class LogProbs(NamedTuple):
    """Log-probabilities of N replies under a model."""

    sums: list[float]  # over the tokens of each reply, nats
    tokens: list[int]  # number of each reply's tokens


class ModelReplies(NamedTuple):
    """What one model replied, and log-probabilities under it."""

    candidates: Replies  # all replies
    chosen: Replies  # one to each prompt: its first candidate
    own: LogProbs  # of the chosen replies
    human: LogProbs | None = None  # of people's replies to the prompts, if they are known


def use_model(
    source: Source, model_args: ModelConfig, work: Callable[[PreTrainedModel, PreTrainedTokenizerBase], T]
) -> T:
    """Load a model and its tokenizer, return what `work` makes of them, and free the model.

    A function, not a context manager: the name after `as` would keep the model alive while the next is loaded.
    """
    tokenizer = load_tokenizer(source)
    model = load_causal_lm(source, model_args, tokenizer, trainable=False).eval()
    try:
        return work(model, tokenizer)
    finally:
        del model
        gc.collect()


def sample_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    count: int,
    sampling: Sampling,
    name: str,
) -> Replies:
    """`count` replies to each prompt.

    Args:
        name: of the model, for the progress bar.
    """
    sampled = sample_completions(
        model, tokenizer, prompts, sampling, num_return_sequences=count, description=f"{name}: sampling"
    )
    flat = [ids for several in sampled for ids in several]
    ends = end_ids(model, tokenizer)
    return Replies(flat, [reply_text(tokenizer, ids, ends).strip() for ids in flat])


@torch.no_grad()
def reply_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    replies: list[list[int]],
    batch_size: int = 32,
    description: str = "Log-probabilities",
) -> LogProbs:
    """Log-probability of each reply given its prompt, at temperature 1, summed over its tokens, in nats.

    Args:
        model: is read with the adapters that are active.
    """
    sums = [0.0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]) + len(replies[number]))
    for start in tqdm(range(0, len(order), batch_size), desc=description, unit="batch"):
        numbers = order[start : start + batch_size]
        ids, mask = rows_of([prompts[number] + replies[number] for number in numbers], model.device)
        lengths = torch.tensor([len(replies[number]) for number in numbers], device=model.device)
        logprobs = completion_logprobs(model, Rows(ids, mask, lengths), temperature=1.0)
        for number, total in zip(numbers, logprobs.sum(1).tolist(), strict=True):
            sums[number] = total
    return LogProbs(sums, [len(reply) for reply in replies])
