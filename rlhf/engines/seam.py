"""What every engine does: `sync` takes over the policy's weights, `sample` draws completions with them.

An engine is only a faster way to the same samples. Where a completion ends means the same in all of them: at the first
stop token or stop string, which belongs to the completion, or at the length limit, where it has not ended.
"""

from typing import NamedTuple, Protocol

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StopStringCriteria

from rlhf.errors import InputError

# Nats per token, mean of absolute differences: more than another rounding explains. A bfloat16 server beside a float32
# policy had 0.04 to 0.13 (docs/engines.md).
TOLERANCE = 0.25


class Decoding(NamedTuple):
    """How completions are drawn: from the whole distribution at a temperature, without top-k and top-p.

    At temperature 0 each token is the most likely one.
    """

    response_length: int  # at most so many tokens
    temperature: float
    stop_token_ids: list[int]
    stop_strings: list[str]


class Completions(NamedTuple):
    """Completions of B prompts. T tokens of the longest, padded on the right."""

    tokens: torch.Tensor  # (B, T) int64
    logprobs: torch.Tensor  # (B, T) float32: by the engine, at the temperature; NaN if unknown, 0 on padding
    lengths: torch.Tensor  # (B,) int64: the stop token included
    ended: torch.Tensor  # (B,) bool: a stop token or stop string was drawn; False at the length limit


class Engine(Protocol):
    """Samples completions of the policy."""

    exact: bool  # True: it samples with the model that trains, so there is nothing to correct or to refuse
    own_weights: bool  # True: it has a copy of the weights, so the policy's need not be gathered for it
    advice: str  # what to look at if its log-probabilities are not the policy's

    def sync(self) -> None:
        """Take over the policy's weights as they are now. All processes call it together."""
        ...

    def sample(self, prompts: list[list[int]], decoding: Decoding, uniforms: torch.Tensor) -> Completions:
        """One completion for each prompt of this process.

        Args:
            prompts: B lists of token ids.
            uniforms: (B, response_length) random numbers in [0, 1), from which all randomness comes.
        """
        ...


class Stops:
    """Finds where completions end, for engines that may sample further.

    Stop strings are found by transformers' own rule, as in the project's loop: also those that begin in the prompt.
    """

    def __init__(self, decoding: Decoding, tokenizer: PreTrainedTokenizerBase) -> None:
        strings = decoding.stop_strings
        self.ids = set(decoding.stop_token_ids)
        self.texts = StopStringCriteria(tokenizer, strings) if strings else None  # reads the whole vocabulary, once
        self.longest = max((len(text.encode()) for text in strings), default=0) + 1

    def first(self, prompt: list[int], tokens: list[int]) -> int | None:
        """How many tokens a completion has up to its first stop, which it includes; None if it has none."""
        stops = [number for number, token in enumerate(tokens, 1) if token in self.ids]
        if self.texts is not None and tokens:
            padded = torch.tensor([0] * self.longest + prompt + tokens)  # padding, as the loop's, is 0
            tails = padded.unfold(0, self.longest, 1)[-len(tokens) :]  # the last tokens up to each of the completion
            stops += [int(number) + 1 for number in self.texts(tails, None).nonzero()[:1]]
        return min(stops, default=None)


def need_decoder(config: PretrainedConfig, flag: str) -> None:
    """Refuse an encoder-decoder, which only the project's own loop samples.

    Raises:
        InputError: that names the flag of the other engine.
    """
    if config.is_encoder_decoder:
        raise InputError(f"{flag}: samples decoders only, and {config.model_type} is an encoder-decoder.")


def completions_of(
    tokens: list[list[int]], logprobs: list[list[float]], ended: list[bool], pad: int, device: torch.device
) -> Completions:
    """Lists of each row's tokens and their log-probabilities as tensors.

    >>> completions_of([[5, 6], [7]], [[-1.0, -2.0], [-0.5]], [False, True], 0, torch.device("cpu")).tokens.tolist()
    [[5, 6], [7, 0]]
    """
    lengths = [len(row) for row in tokens]
    width = max(lengths)
    return Completions(
        torch.tensor([row + [pad] * (width - len(row)) for row in tokens], device=device),
        torch.tensor([row + [0.0] * (width - len(row)) for row in logprobs], device=device),
        torch.tensor(lengths, device=device),
        torch.tensor(ended, device=device),
    )
