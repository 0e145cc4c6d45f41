"""Texts → rows of token ids: packed blocks, or pairs of texts."""

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.errors import InputError
from rlhf.pretraining.config import PretrainingConfig
from rlhf.pretraining.tokenization import AT_ONCE, boundary, encode_texts

PAIR_SEED = 20  # of the sentence pairs, which are the same in every run


def packed_rows(texts: list[str], tokenizer: PreTrainedTokenizerBase, args: PretrainingConfig, split: str) -> Dataset:
    """Rows of exactly `block_size` token ids: all texts in one stream, cut into blocks.

    Each text ends with the tokenizer's token between texts (`boundary`). For `masked` and `replaced` it ends with sep,
    and each block begins with cls and ends with sep. Tokens that do not fill a last block are dropped.

    Returns:
        rows of `input_ids`, and for masking `special_tokens_mask`.

    Raises:
        InputError: if there are too few tokens for one block.
    """
    framed = args.objective in ("masked", "replaced")
    end = tokenizer.sep_token_id if framed else boundary(tokenizer)
    parts = (texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE))
    lists = (ids for part in parts for ids in encode_texts(tokenizer, part))
    stream = np.fromiter((id_ for ids in lists for id_ in (*ids, end)), dtype=np.int64)
    size = args.block_size - 2 * framed
    blocks = stream[: len(stream) // size * size].reshape(-1, size)
    if not len(blocks):
        raise InputError(
            f"--block_size {args.block_size}: the {split} split has only {len(stream)} tokens. Give more text or a "
            "smaller block."
        )
    if not framed:
        return Dataset.from_dict({"input_ids": list(blocks)})
    edge = np.ones((len(blocks), 1), dtype=np.int64)
    blocks = np.hstack([edge * tokenizer.cls_token_id, blocks, edge * tokenizer.sep_token_id])
    special = np.isin(blocks, tokenizer.all_special_ids).astype(np.int64)
    return Dataset.from_dict({"input_ids": list(blocks), "special_tokens_mask": list(special)})


def sentence_pair_rows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, args: PretrainingConfig, split: str
) -> Dataset:
    """Rows [CLS] first [SEP] second [SEP]. In half of them the second part comes from another text (BERT, section 3.1).

    Lines of a text that fill half a row are the first part. The second part is the following lines, or lines of another
    text.

    Returns:
        rows of `input_ids`, `token_type_ids`, `special_tokens_mask`, `next_sentence_label` (0: follows, 1: does not).

    Raises:
        InputError: if fewer than two texts have two lines.
    """
    draw, cls, sep = np.random.default_rng(PAIR_SEED), tokenizer.cls_token_id, tokenizer.sep_token_id
    in_lines = [[line for line in text.split("\n") if line.strip()] for text in texts]
    documents = [encode_texts(tokenizer, lines) for lines in in_lines if len(lines) > 1]
    if len(documents) < 2:
        raise InputError(
            f"--next_sentence_prediction: needs texts of two lines or more; the {split} split has {len(documents)}."
        )
    room = args.block_size - 3
    rows: dict[str, list] = {
        name: [] for name in ("input_ids", "token_type_ids", "special_tokens_mask", "next_sentence_label")
    }
    for number, lines in enumerate(documents):
        start = 0
        while start < len(lines) - 1:
            first, middle = _fill(lines, start, room // 2, len(lines) - 1)
            second, end = _fill(lines, middle, room - len(first), len(lines))
            label = int(draw.random() < 0.5)
            if label:
                other = documents[(number + int(draw.integers(1, len(documents)))) % len(documents)]
                second, _ = _fill(other, int(draw.integers(len(other))), room - len(first), len(other))
                end = middle  # as in BERT, the unused lines begin the next first part
            rows["input_ids"].append([cls, *first, sep, *second, sep])
            rows["token_type_ids"].append([0] * (len(first) + 2) + [1] * (len(second) + 1))
            rows["special_tokens_mask"].append([1, *[0] * len(first), 1, *[0] * len(second), 1])
            rows["next_sentence_label"].append(label)
            start = end
    return Dataset.from_dict(rows)


def _fill(lines: list[list[int]], start: int, room: int, stop: int) -> tuple[list[int], int]:
    """Tokens of the lines from `start` on that fit into `room` (at least one, cut), and the number of the next line.

    >>> _fill([[1, 2], [3], [4, 5]], start=0, room=4, stop=3)
    ([1, 2, 3], 2)
    """
    ids, end = list(lines[start]), start + 1
    while end < stop and len(ids) + len(lines[end]) <= room:
        ids += lines[end]
        end += 1
    return ids[:room], end


def pretraining_rows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, args: PretrainingConfig, split: str
) -> Dataset:
    """Rows for the objective: sentence pairs for next-sentence prediction, else packed blocks."""
    make = sentence_pair_rows if args.next_sentence_prediction else packed_rows
    return make(texts, tokenizer, args, split)
