"""What transformers lacks: span corruption, and masks that don't depend on what was drawn before.

Source of span corruption: Raffel et al. (https://arxiv.org/abs/1910.10683), section 3.1.4, and the reference
implementation, `random_spans_noise_mask` and its neighbours in
https://github.com/google-research/text-to-text-transfer-transformer/blob/main/t5/data/preprocessors.py
"""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from rlhf.pretraining.tokenization import sentinel


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

    Returns:
        `input_ids` (batch, kept + spans + 1) and `labels` (batch, noise + spans + 1), int64.
    """

    tokenizer: PreTrainedTokenizerBase
    mlm_probability: float = 0.15
    mean_noise_span_length: float = 3.0
    generator: torch.Generator | None = None  # None: torch's global one

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        noise, spans = count_spans(len(rows[0]["input_ids"]), self.mlm_probability, self.mean_noise_span_length)
        sentinels = self.tokenizer.convert_tokens_to_ids([sentinel(number) for number in range(spans)])
        pairs = [corrupt_spans(row["input_ids"], sentinels, noise, spans, self.generator) for row in rows]
        end = [self.tokenizer.eos_token_id]
        return {
            "input_ids": torch.tensor([inputs + end for inputs, _ in pairs]),
            "labels": torch.tensor([targets + end for _, targets in pairs]),
        }


class DataCollatorForMaskedTokens(DataCollatorForLanguageModeling):
    """transformers' masks, and at least one in every row: the loss of a batch without any would be 0 / 0.

    Source: `create_masked_lm_predictions` in https://github.com/google-research/bert/blob/master/create_pretraining_data.py
    """

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
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


class SeededCollator:
    """A masking collator whose masks depend on a seed and the batch alone.

    So they are other ones in each epoch, whose batches of several rows are other ones; the same at every evaluation;
    and the same after a resume, where torch's global generator would be a batch ahead, since batches are made before
    they are needed.
    """

    def __init__(self, collator: Any, seed: int):
        self.collator, self.seed = collator, seed

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        ids = np.concatenate([np.asarray(row["input_ids"], dtype=np.int64) for row in rows])
        self.collator.generator = torch.Generator().manual_seed(zlib.crc32(ids.tobytes(), self.seed))
        return self.collator(rows)
