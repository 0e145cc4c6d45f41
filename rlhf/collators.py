"""Span corruption: the collator that transformers lacks.

Source: Raffel et al. (https://arxiv.org/abs/1910.10683), section 3.1.4, and the reference implementation,
`random_spans_noise_mask` and its neighbours in
https://github.com/google-research/text-to-text-transfer-transformer/blob/main/t5/data/preprocessors.py
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.tokenization import sentinel


def count_spans(length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """(missing tokens, missing spans) of a text of `length` ≥ 2 tokens; both numbers are at least 1."""
    noise = min(max(round(length * noise_density), 1), length - 1)
    spans = min(max(round(noise / mean_noise_span_length), 1), noise, length - noise)
    return noise, spans


def random_lengths(total: int, parts: int, generator: torch.Generator | None) -> list[int]:
    """`parts` lengths of at least 1 that add up to `total`, every such list equally likely."""
    cuts = (torch.randperm(total - 1, generator=generator)[: parts - 1] + 1).sort().values.tolist()
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def corrupt_spans(
    ids: list[int], sentinels: list[int], noise: int, spans: int, generator: torch.Generator | None
) -> tuple[list[int], list[int]]:
    """Cut `spans` spans of `noise` tokens in all out of a text.

    Returns:
        the text with a sentinel in place of each missing span; and every sentinel followed by what it stands for.
    """
    kept = random_lengths(len(ids) - noise, spans, generator)
    missing = random_lengths(noise, spans, generator)
    inputs, targets, position = [], [], 0
    for mark, keep, miss in zip(sentinels, kept, missing, strict=False):
        inputs += [*ids[position : position + keep], mark]
        targets += [mark, *ids[position + keep : position + keep + miss]]
        position += keep + miss
    return inputs, targets


@dataclass
class DataCollatorForSpanCorruption:
    """Rows of equally many `input_ids` → what T5 reads and writes; both end with eos.

    Every row of n tokens loses round(n·mlm_probability) of them, in spans of `mean_noise_span_length` on average, so
    the rows of a batch stay equally long. A text never begins with a missing span and always ends with one.

    Args:
        seed: of a generator of this collator's own; without it torch's global one is used.

    Returns:
        `input_ids` (batch, kept + spans + 1) and `labels` (batch, noise + spans + 1), int64.
    """

    tokenizer: PreTrainedTokenizerBase
    mlm_probability: float = 0.15
    mean_noise_span_length: float = 3.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self.generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        noise, spans = count_spans(len(rows[0]["input_ids"]), self.mlm_probability, self.mean_noise_span_length)
        sentinels = self.tokenizer.convert_tokens_to_ids([sentinel(number) for number in range(spans)])
        pairs = [corrupt_spans(row["input_ids"], sentinels, noise, spans, self.generator) for row in rows]
        end = [self.tokenizer.eos_token_id]
        return {
            "input_ids": torch.tensor([inputs + end for inputs, _ in pairs]),
            "labels": torch.tensor([targets + end for _, targets in pairs]),
        }
