"""Encoders and encoder-decoders as reward models: pairs of texts, heads, two labels, and what is refused.

Training, saving and loading of every type: test_families.py.
"""

import pytest
import torch
from conftest import LORA, assistant, user
from datasets import Dataset
from tiny_models import EOS, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import ModelConfig, RewardConfig, RewardTrainer

from eval.measuring.held_out import evaluate_reward_model
from rlhf.data.pairs import PreferenceCollator, encode_pair
from rlhf.data.rows import preference_rows
from rlhf.errors import InputError
from rlhf.models.loading import load_reward_model
from rlhf.models.padding import SHORTEST, Layout, pad_neutrally
from rlhf.models.sources import base_config, context_length, reads_pairs, resolve, usable_context
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards import RewardModel, load_reward, resolve_reward

FULL = ModelConfig(dtype="float32")
TEXTS = ["Yes", "No, it is not. " * 3, "Perhaps", "."]
CHATS = [user(text) for text in ("Hi", "What is it like there?", "So?", "Why")]


def bert_tokenizer():
    """Bytes, with [CLS] and [SEP] and numbered texts, and without eos."""
    tokenizer = tiny_tokenizer()
    inner = tokenizer.backend_tokenizer
    inner.post_processor = TemplateProcessing(
        single="<bos>:0 $A:0 <eos>:0", pair="<bos>:0 $A:0 <eos>:0 $B:1 <eos>:1",
        special_tokens=[("<bos>", 1), ("<eos>", EOS)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", cls_token="<bos>", sep_token="<eos>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Folder of a tiny random BERT, pretrained as a masked language model: without a pooler."""
    folder = tmp_path_factory.mktemp("bert")
    tiny_model("bert", "encoder").save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return str(folder)


def classifier(folder, labels, **names):
    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=299, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=80, num_labels=labels, **names,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.normal_()
    model.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return model.eval()


def alone(model, tokenizer, chat, reply):
    """Logits of one pair, by transformers alone."""
    with torch.no_grad():
        return model(**tokenizer(chat[0]["content"], reply, return_tensors="pt")).logits[0]


def test_a_pair_keeps_its_form_when_it_is_cut():
    tokenizer = bert_tokenizer()
    whole = encode_pair(tokenizer, user("abcd"), "ef<eos>")
    assert tokenizer.decode(whole["input_ids"]) == "<bos>abcd<eos>ef<eos><eos>"
    assert whole["input_ids"].count(EOS) == 2  # a control token inside a text stays text
    assert whole["token_type_ids"] == [0] * 6 + [1] * 8
    cut = encode_pair(tokenizer, user("abcd"), "efg", 8)
    assert (tokenizer.decode(cut["input_ids"]), cut["token_type_ids"]) == ("<bos>cd<eos>efg<eos>", [0] * 4 + [1] * 4)
    assert tokenizer.decode(encode_pair(tokenizer, "", "ef")["input_ids"]) == "<bos>ef<eos>"
    turns = encode_pair(tokenizer, user("Hi") + assistant("Yo") + user("So?"), "No")
    assert tokenizer.decode(turns["input_ids"]) == "<bos>User: Hi\nAssistant: Yo\nUser: So?<eos>No<eos>"
    ended = tiny_tokenizer()  # without separators: T5 reads the score at eos
    assert [ended.decode(encode_pair(ended, "ab", "cd", n)["input_ids"]) for n in (None, 4)] == [
        "abcd<eos>",
        "bcd<eos>",
    ]


@pytest.mark.parametrize("model_args", [FULL, LORA], ids=["full", "lora"])
def test_a_trained_encoder_scores_replies_as_it_did_in_training(bert, tmp_path, model_args):
    source = resolve(bert)
    tokenizer = load_tokenizer(source, classifier=True)
    assert reads_pairs(tokenizer, base_config(source)) and tokenizer.chat_template is None
    pairs = [{"prompt": chat, "chosen": assistant("Good"), "rejected": assistant(text)}
             for chat, text in zip(CHATS, TEXTS, strict=True)]  # fmt: skip
    rows = preference_rows(Dataset.from_list(pairs), "d", tokenizer, None, None, context_length(source), True)
    args = RewardConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, per_device_eval_batch_size=3, learning_rate=1e-2,
        bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = RewardTrainer(
        model=load_reward_model(source, model_args, tokenizer), args=args, train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer, data_collator=PreferenceCollator(tokenizer.pad_token_id),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("classifier" in name for name in changed) and any("pooler" in name for name in changed)
    trainer.evaluate()
    held_out = evaluate_reward_model(trainer, rows)
    trainer.save_model()

    reward = load_reward(resolve_reward(str(tmp_path), base="the policy's"), FULL, batch_size=4)
    expected = [float(alone(trainer.model.eval(), tokenizer, *pair)) for pair in zip(CHATS, TEXTS, strict=True)]
    assert reward(CHATS, TEXTS) == pytest.approx(expected, abs=1e-5)
    chosen = [float(alone(trainer.model, tokenizer, chat, "Good")) for chat in CHATS]
    margins = [one - other for one, other in zip(chosen, expected, strict=True)]
    assert held_out["margin"] == pytest.approx(sum(margins) / 4, abs=1e-5)


def test_an_encoder_decoder_reads_the_same_number_of_ends_in_every_row(tmp_path):
    model = tiny_model("bart", "encoder-decoder")
    model.save_pretrained(tmp_path / "bart")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "bart")
    source = resolve(str(tmp_path / "bart"))
    scored = load_reward_model(source, FULL, tokenizer)
    scored.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    reward = load_reward(resolve_reward(str(tmp_path / "reward")), FULL)
    assert isinstance(reward, RewardModel)
    chats = [user("Hi"), user("Hi") + assistant("Yo") + user("So?")]
    found = reward(chats, ["No", "Yes"])
    for chat, reply, score in zip(chats, ["No", "Yes"], found, strict=True):
        ids = torch.tensor([reward.encode(chat, reply)])
        assert score == pytest.approx(float(scored.eval()(ids).logits), abs=1e-5)


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [("bert", Layout.RIGHT), ("xlnet", Layout.LEFT), ("funnel", Layout.AT_LEAST), ("canine", Layout.AT_LEAST),
     ("fnet", Layout.BY_LENGTH)],
)  # fmt: skip
def test_a_batch_has_the_scores_of_its_rows(tmp_path, model_type, layout):
    """XLNet reads its score at the last token, Funnel and CANINE pool neighbours, FNet mixes all tokens."""
    tiny_model(model_type, "decoder" if model_type == "xlnet" else "encoder").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    model = load_reward_model(resolve(str(tmp_path)), FULL, tokenizer).eval()
    assert pad_neutrally(model) is layout
    rows = [tokenizer(text).input_ids for text in ("a", "ab", *TEXTS)]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits for row in rows])
        assert torch.allclose(model(**batch, use_cache=False).logits, alone, atol=1e-5)  # as in training
        plain = type(model)(model.config).eval()
        plain.load_state_dict(model.state_dict())
        read = [row for row in rows if layout is not Layout.AT_LEAST or len(row) >= SHORTEST]  # by the model alone
        scores = [plain(torch.tensor([row])).logits[0] for row in read]
        assert torch.allclose(torch.stack(scores), alone[[rows.index(row) for row in read]], atol=1e-5)
    assert alone.std() > 1e-3


def test_a_model_without_positions_has_no_context_limit():
    assert usable_context(tiny_model("xlnet").config) is None


def test_two_labels_score_by_log_odds_and_say_so(tmp_path, capsys):
    names = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    model = classifier(tmp_path, 2, **names)
    reward = load_reward(resolve_reward(str(tmp_path)), FULL, batch_size=4)
    assert "log-odds of 'POSITIVE' against 'NEGATIVE'" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for chat, text, score in zip(CHATS, TEXTS, reward(CHATS, TEXTS), strict=True):
        shares = alone(model, tokenizer, chat, text).softmax(-1)
        assert score == pytest.approx(float((shares[1] / shares[0]).log()), abs=1e-4)
    # as the base of a reward model it gets a new head with one output
    trained = load_reward_model(resolve(str(tmp_path)), FULL, tokenizer)
    assert trained.config.num_labels == 1 and trained.classifier.out_features == 1


def test_three_labels_are_refused(tmp_path):
    classifier(tmp_path, 3)
    with pytest.raises(InputError, match="has 3 labels"):
        resolve_reward(str(tmp_path))


def test_the_context_of_an_encoder_limits_rows(tmp_path, capsys):
    model = classifier(tmp_path, 1)
    reward = load_reward(resolve_reward(str(tmp_path)), FULL)
    assert isinstance(reward, RewardModel)
    (score,) = reward([user("x" * 100)], ["yes"])
    features = reward.features(user("x" * 100), "yes")
    assert len(features["input_ids"]) == 80 and features["input_ids"].count(EOS) == 2
    inputs = {name: torch.tensor([ids]) for name, ids in features.items()}
    assert score == pytest.approx(float(model(**inputs).logits), abs=1e-5)
    assert "context of 80" in capsys.readouterr().out
    tokenizer = load_tokenizer(resolve(str(tmp_path)), classifier=True)
    rows = [{"prompt": "x" * n, "chosen": "a", "rejected": "b"} for n in (5, 200)]
    assert len(preference_rows(Dataset.from_list(rows), "d", tokenizer, 1024, None, 80, True)) == 1
    assert "left out 1 of 2 pairs, longer than the model's context of 80 tokens" in capsys.readouterr().out
    with pytest.raises(InputError, match="every pair"):
        preference_rows(Dataset.from_list(rows[1:]), "d", tokenizer, 1024, None, 80, True)


def test_what_predicts_no_token_is_no_policy(bert, tmp_path):
    classifier(tmp_path / "classifier", 1)
    with pytest.raises(InputError, match="is a BertForSequenceClassification; a language model is needed"):
        load_tokenizer(resolve(str(tmp_path / "classifier")))
    with pytest.raises(InputError, match="BertForMaskedLM is an encoder"):
        load_tokenizer(resolve(bert))
    # its embeddings are the head of the language model, so that nothing would be missing
    decoder = tiny_model("gpt2")
    GPT2ForSequenceClassification(decoder.config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="is a GPT2ForSequenceClassification"):
        load_tokenizer(resolve(str(tmp_path / "gpt2")))


def test_a_model_without_a_classifier_is_no_reward_base(tmp_path):
    tiny_model("mamba").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    with pytest.raises(InputError, match="no sequence classifier of type mamba"):
        load_reward_model(source, FULL, load_tokenizer(source, classifier=True))
