"""Collators that transformers lacks: span corruption, and masks that don't depend on earlier random draws.

Source of span corruption: Raffel et al. (https://arxiv.org/abs/1910.10683), section 3.1.4, and the reference
implementation, `random_spans_noise_mask` and its neighbours in
https://github.com/google-research/text-to-text-transfer-transformer/blob/main/t5/data/preprocessors.py
"""

import zlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from rlhf.pretraining.tokenization import sentinel

PretrainingRow = dict[str, Any]  # of rlhf.pretraining.rows: `input_ids` and more


def count_spans(length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """(missing tokens, missing spans) of a text of `length` ≥ 2 tokens; both are at least 1.

    >>> count_spans(length=100, noise_density=0.15, mean_noise_span_length=3.0)
    (15, 5)
    """
    noise = min(max(round(length * noise_density), 1), length - 1)
    spans = min(max(round(noise / mean_noise_span_length), 1), noise, length - noise)
    return noise, spans


def random_lengths(total: int, parts: int, generator: torch.Generator | None) -> list[int]:
    """`parts` lengths of at least 1 that add up to `total`. Every such list is equally likely."""
    cuts = (torch.randperm(total - 1, generator=generator)[: parts - 1] + 1).sort().values.tolist()
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def corrupt_spans(
    ids: list[int], sentinels: list[int], noise: int, spans: int, generator: torch.Generator | None
) -> tuple[list[int], list[int]]:
    """Remove `spans` spans from a text, `noise` tokens in all.

    >>> corrupt_spans([5, 6], sentinels=[100], noise=1, spans=1, generator=None)
    ([5, 100], [100, 6])

    Returns:
        the text with a sentinel in place of each missing span; each sentinel followed by the tokens of its span.
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
    """Rows of equally many `input_ids` → T5's inputs and targets; both end with eos.

    Every row of n tokens loses round(n·mlm_probability) tokens, in spans of `mean_noise_span_length` on average, so the
    rows of a batch stay equally long. A text never begins with a missing span and always ends with one.

    Returns:
        `input_ids` (batch, kept + spans + 1) and `labels` (batch, noise + spans + 1), int64.
    """

    tokenizer: PreTrainedTokenizerBase
    mlm_probability: float = 0.15
    mean_noise_span_length: float = 3.0
    generator: torch.Generator | None = None  # None: torch's global one

    def __call__(self, rows: list[PretrainingRow]) -> dict[str, torch.Tensor]:
        noise, spans = count_spans(len(rows[0]["input_ids"]), self.mlm_probability, self.mean_noise_span_length)
        sentinels = self.tokenizer.convert_tokens_to_ids([sentinel(number) for number in range(spans)])
        pairs = [corrupt_spans(row["input_ids"], sentinels, noise, spans, self.generator) for row in rows]
        end = [self.tokenizer.eos_token_id]
        return {
            "input_ids": torch.tensor([inputs + end for inputs, _ in pairs]),
            "labels": torch.tensor([targets + end for _, targets in pairs]),
        }


class DataCollatorForMaskedTokens(DataCollatorForLanguageModeling):
    """transformers' masks, with at least one in every row: the loss of a batch without masks would be 0 / 0.

    Source: `create_masked_lm_predictions` in https://github.com/google-research/bert/blob/master/create_pretraining_data.py
    """

    def torch_call(self, examples: list[PretrainingRow]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        ids, labels = batch["input_ids"], batch["labels"]
        special = torch.tensor(self.tokenizer.all_special_ids)
        for row in (labels == -100).all(dim=1).nonzero().flatten().tolist():
            places = torch.isin(ids[row], special, invert=True).nonzero().flatten()
            if len(places):
                place = places[torch.randint(len(places), (1,), generator=self.generator)]
                labels[row, place] = ids[row, place]
                ids[row, place] = self.tokenizer.mask_token_id
        return batch


class MaskingCollator(Protocol):
    """A collator that draws its masks with `generator`."""

    generator: torch.Generator | None

    def __call__(self, rows: list[PretrainingRow]) -> dict[str, torch.Tensor]:
        """A batch of the rows."""
        ...


class SeededCollator:
    """A masking collator whose masks depend only on a seed and the batch.

    Masks change between epochs and repeat at every evaluation and after a resume. Masks from torch's global generator
    would not survive a resume: batches are made ahead of their use, so the generator would be a batch ahead.
    """

    def __init__(self, collator: MaskingCollator, seed: int):
        self.collator, self.seed = collator, seed

    def __call__(self, rows: list[PretrainingRow]) -> dict[str, torch.Tensor]:
        ids = np.concatenate([np.asarray(row["input_ids"], dtype=np.int64) for row in rows])
        self.collator.generator = torch.Generator().manual_seed(zlib.crc32(ids.tobytes(), self.seed))
        return self.collator(rows)
