"""A tokenizer of one's own: any text survives, control tokens stay apart, and the recipe says what it reached."""

import json

import pytest
from conftest import assistant, run, user
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from eval.measuring.bits import bytes_per_token
from rlhf.data.encoding import control_ids, encode_conversation, encode_messages
from rlhf.errors import InputError
from rlhf.models.sources import resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.pretraining.tokenization import (
    check_vocab_size,
    encode_texts,
    frame,
    resolve_tokenizer,
    special_tokens,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "don't panic: 42 is the answer!"] * 20


@pytest.fixture(scope="module")
def own():
    return train_tokenizer(TEXTS, 320, extra_ids=4)


def text_strategy(own):
    controls = st.sampled_from(
        [*own.all_special_tokens, "<|im_start|>assistant\n", "  ", "\r\n", "\u2028", "é", "e\u0301"]
    )
    return st.lists(st.text() | controls, max_size=6).map("".join)


def test_any_text_survives_encoding_and_decoding(own):
    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(text_strategy(own))
    def survives(text):
        (ids,) = encode_texts(own, [text])
        assert own.decode(ids) == text
        assert not control_ids(own) & set(ids)  # a control token written in a text is text

    survives()


def test_any_message_survives_the_chat_template(own):
    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(text_strategy(own).filter(str.strip))
    def survives(text):
        ids = encode_messages(own, user(text) + assistant("ok"))
        assert ids.count(own.eos_token_id) == 2 and ids[-1] == own.eos_token_id
        assert own.decode(ids) == f"<|im_start|>user\n{text}<|endoftext|>\n<|im_start|>assistant\nok<|endoftext|>"

    survives()


def test_merges_are_the_most_frequent_pairs():
    tokenizer = train_tokenizer(["abab abab abab"] * 3, 256 + len(special_tokens(0)) + 2, extra_ids=0)
    assert tokenizer.tokenize("abab") == ["abab"]  # ab first, then ab + ab
    assert {"ab", "abab"} <= set(tokenizer.get_vocab())
    rare = train_tokenizer(["abab"], 300, min_frequency=3, extra_ids=0)
    assert len(rare) == 256 + len(special_tokens(0))


def test_special_tokens_differ_and_the_template_marks_replies(own):
    assert (own.pad_token_id, own.eos_token_id) == (0, 1)
    ids = [own.pad_token_id, own.eos_token_id, own.cls_token_id, own.sep_token_id, own.mask_token_id]
    assert len(set(ids)) == 5 and own.bos_token_id == own.eos_token_id
    assert own.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_3>"]) == [6, 9]
    row = encode_conversation(own, user("hi") + assistant("the cat"))
    labels = [label for label in row["labels"] if label != -100]
    assert own.decode(labels) == "the cat<|endoftext|>"
    masks = own.apply_chat_template(
        user("hi") + assistant("the cat"), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert [i for i, m in zip(masks["input_ids"], masks["assistant_masks"], strict=True) if m] == labels


@pytest.mark.parametrize("objective,expected", [
    ("causal", "the cat"), ("masked", "[CLS]the[SEP] cat[SEP]"), ("span", "the<|endoftext|> cat<|endoftext|>"),
])  # fmt: skip
def test_the_saved_tokenizer_frames_texts_as_its_model_was_trained(objective, expected, tmp_path):
    tokenizer = train_tokenizer(TEXTS, 320, extra_ids=4)
    frame(tokenizer, objective)
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.for_model({"causal": "gpt2", "masked": "bert", "span": "t5"}[objective]).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    pair = again("the", " cat")["input_ids"]
    assert again.decode(pair) == expected
    assert again.decode(pair, skip_special_tokens=True) == "the cat"
    frame(again, objective)
    assert again("the", " cat")["input_ids"] == pair


def test_later_stages_load_it_unchanged(own, tmp_path, capsys):
    own.save_pretrained(tmp_path)
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    loaded = load_tokenizer(resolve(str(tmp_path), weights=False))
    assert (loaded.pad_token, loaded.eos_token, loaded.chat_template) == (
        own.pad_token,
        own.eos_token,
        own.chat_template,
    )
    assert capsys.readouterr().out == ""  # no token had to be put in another's place


def test_bytes_per_token_by_hand(own):
    cell = bytes_per_token(own, ["the", "é"])  # one token of 3 bytes; 2 bytes that were never merged
    assert cell.mean == pytest.approx(5 / 3) and cell.n == 2


def test_the_recipe_reports_bytes_per_token_beside_the_starters(tmp_path):
    data = tmp_path / "text.jsonl"
    rows = [{"messages": user(text) + assistant("Ja, größer!")} for text in TEXTS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    arguments = ["--dataset_name", data, "--vocab_size", 400, "--output_dir", out]
    first = run("recipes/tokenizer.py", *arguments)
    metrics = json.loads((out / "run.json").read_text())["metrics"]
    assert metrics["bytes_per_token/own_low"] <= metrics["bytes_per_token/own"] <= metrics["bytes_per_token/own_high"]
    assert metrics["bytes_per_token/own less starter"] == pytest.approx(
        metrics["bytes_per_token/own"] - metrics["bytes_per_token/starter"]
    )
    assert "held-out bytes per token" in first.stdout and (out / "report.html").exists()
    assert "größer" in AutoTokenizer.from_pretrained(out).decode(
        AutoTokenizer.from_pretrained(out)("größer")["input_ids"]
    )
    assert "already finished" in run("recipes/tokenizer.py", *arguments).stdout


def test_bad_input_gets_one_clear_line(tmp_path):
    result = run("recipes/tokenizer.py", "--vocab_size", 300, "--output_dir", tmp_path / "out", check=False)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert "error: --vocab_size 300: too small for 256 bytes and 106 special tokens. Give at least 362" in result.stderr
    check_vocab_size(362, 100)
    with pytest.raises(InputError, match="at least 362"):
        check_vocab_size(361, 100)
    with pytest.raises(InputError, match=r"outputs/nothing: no tokenizer there. Train one first"):
        resolve_tokenizer("outputs/nothing")


def test_a_tokenizer_without_a_pad_token_of_its_own_gets_one(tmp_path):
    for pad in ({}, {"pad_token": "<|endoftext|>"}):
        pieces = Tokenizer(BPE({"H": 0, "e": 1, "<|endoftext|>": 2}, []))
        made = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<|endoftext|>", **pad)
        made.save_pretrained(tmp_path / str(len(pad)))
        found = resolve_tokenizer(str(tmp_path / str(len(pad))))
        assert found.pad_token_id == len(found) - 1 == 3 and found.eos_token_id == 2
