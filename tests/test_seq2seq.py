"""Encoder-decoder policies: labels, the decoder's beginning, SFT, RLOO and the commands that refuse them.

Sampling, log-probabilities and values against plain transformers: test_families.py.
"""

import json

import pytest
import torch
from conftest import LORA, assistant, load_script, user
from datasets import Dataset
from tiny_models import BOS, EOS, PAD, tiny_model, tiny_tokenizer
from transformers import AutoModelForSeq2SeqLM, T5EncoderModel
from trl import ModelConfig, SFTConfig

from eval.measuring.comparison import _human_reply
from eval.measuring.replies import reply_logprobs
from rlhf.data.encoding import encode_prompt
from rlhf.data.rows import language_model_rows, prompt_rows, sft_rows
from rlhf.engines.arguments import SamplerArguments
from rlhf.engines.completions import make_sampler
from rlhf.errors import InputError
from rlhf.feedback.chat import Chat, Conversation
from rlhf.feedback.speakers import load_speakers, resolve_speakers
from rlhf.hub import write_card
from rlhf.models.causality import need_causal
from rlhf.models.loading import load_causal_lm
from rlhf.models.prefix import Rows, rows_of
from rlhf.models.seq2seq import decoder_prefix, seq2seq_inputs
from rlhf.models.sources import resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.ppo.model import PolicyAndValue
from rlhf.ppo.update import language_model_loss, ptx_batches
from rlhf.rewards.local_judge import load_judge
from rlhf.rloo import RLOOConfig, RLOOTrainer
from rlhf.tasks.seq2seq import ReplyCollator, Seq2SeqSFTTrainer, check_seq2seq_arguments

FULL = ModelConfig(dtype="float32")


def saved(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """Folder of a tiny random T5."""
    return saved(tiny_model("t5", "encoder-decoder"), tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    """Folder of a tiny BART whose generation_config forces a first token, as that of facebook/bart-large does."""
    model = tiny_model("bart", "encoder-decoder")
    model.generation_config.forced_bos_token_id = BOS
    return saved(model, tmp_path_factory.mktemp("bart"))


def test_each_reply_of_a_conversation_is_a_row(t5, capsys):
    tokenizer = load_tokenizer(resolve(t5))
    chats = Dataset.from_list([{"messages": user("Hi") + assistant("Yo<eos>") + user("So?") + assistant("No.")}])
    rows = sft_rows(chats, "d", tokenizer)
    texts = [[tokenizer.decode(row[key]) for key in ("input_ids", "labels")] for row in rows]
    assert texts == [["Hi", "Yo<eos><eos>"], ["User: Hi\nAssistant: Yo<eos>\nUser: So?", "No.<eos>"]]
    assert rows[0]["labels"].count(EOS) == 1  # a control token inside a message stays text
    assert rows[1]["input_ids"] == encode_prompt(tokenizer, chats[0]["messages"][:3])
    pairs = Dataset.from_list([{"prompt": "Say it. ", "completion": "It is so"}])
    cut = sft_rows(pairs, "d", tokenizer, SFTConfig("unused", max_length=5, report_to="none", bf16=False, use_cpu=True))
    assert (len(cut[0]["input_ids"]), len(cut[0]["labels"])) == (5, 5)
    assert "cut 1 of 1 rows" in capsys.readouterr().out
    with pytest.raises(InputError, match="columns"):
        sft_rows(Dataset.from_list([{"text": "only a text"}]), "d", tokenizer)


def test_replies_that_a_decoder_can_not_learn(t5, capsys):
    tokenizer = load_tokenizer(resolve(t5))
    asked = {"messages": user("Hi")}
    rows = sft_rows(Dataset.from_list([asked, {"messages": user("Hi") + assistant("Yo")}]), "d", tokenizer)
    assert len(rows) == 1 and "left out 1 of 2 rows" in capsys.readouterr().out
    with pytest.raises(InputError, match="nothing is left to learn"):
        sft_rows(Dataset.from_list([asked]), "d", tokenizer)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for more in ({"tool_calls": [call]}, {"thinking": "Hm."}, {"reasoning": "Hm."}, {"weight": 0}):
        reply = {"role": "assistant", "content": "Yo", **more}
        with pytest.raises(InputError, match=f"row 0.*message 1 has '{next(iter(more))}'"):
            sft_rows(Dataset.from_list([{"messages": [*user("Hi"), reply]}]), "d", tokenizer)


def test_the_template_renders_prompts_where_there_is_one(t5, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = load_tokenizer(resolve(t5), chat_template_path=str(template))
    assert tokenizer.decode(encode_prompt(tokenizer, user("Hi"))) == "user:Hi;assistant:"


def test_prompt_and_reply_fill_contexts_of_their_own(t5):
    tokenizer = load_tokenizer(resolve(t5))
    prompts = Dataset.from_list([{"prompt": "x" * 100}])
    assert len(prompt_rows(prompts, "d", tokenizer, 100, 128)) == 1
    for new, context in ((128, 128), (10, 99)):
        with pytest.raises(InputError, match="context"):
            prompt_rows(prompts, "d", tokenizer, new, context)


def test_the_decoder_begins_alike_in_training_and_sampling(bart):
    tokenizer = load_tokenizer(resolve(bart))
    model = load_causal_lm(resolve(bart), FULL, tokenizer)
    start = model.config.decoder_start_token_id
    assert decoder_prefix(model) == [start, BOS]
    pairs = [([10, 11, 12], [20, 21, EOS]), ([10], [30, EOS])]
    batch = ReplyCollator(tokenizer, prefix=(start, BOS))([{"input_ids": a, "labels": b} for a, b in pairs])
    ids, mask = rows_of([a + b for a, b in pairs], torch.device("cpu"))
    inputs = seq2seq_inputs(Rows(ids, mask, torch.tensor([3, 2])), [start, BOS], PAD)
    assert all(torch.equal(batch[name], inputs[name]) for name in inputs)
    assert batch["decoder_input_ids"].tolist() == [[start, BOS, 20, 21], [start, BOS, 30, EOS]]
    assert batch["labels"].tolist() == [[-100, 20, 21, EOS], [-100, 30, EOS, -100]]


@pytest.mark.parametrize("model_args", [FULL, LORA], ids=["full", "lora"])
def test_sft_takes_the_loss_of_transformers_and_saves_what_it_trained(t5, tmp_path, model_args):
    source = resolve(t5)
    tokenizer = load_tokenizer(source)
    pairs = Dataset.from_list([{"prompt": f"{n}?", "completion": "y" * n} for n in range(1, 5)])
    rows = sft_rows(pairs, "d", tokenizer)
    args = SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, per_device_eval_batch_size=4, learning_rate=1e-2,
        gradient_accumulation_steps=2, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Seq2SeqSFTTrainer(load_causal_lm(source, model_args, tokenizer), args, rows, rows, tokenizer)
    plain = AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    batch = ReplyCollator(tokenizer, prefix=tuple(decoder_prefix(plain)))(list(rows))
    loss = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss), abs=1e-5)
    trainer.train()
    trainer.save_model()
    write_card(str(tmp_path), "recipes/sft.py", [], source=source, datasets=["d"], metrics={})
    assert "AutoModelForSeq2SeqLM.from_pretrained" in (tmp_path / "README.md").read_text()
    after = trainer.evaluate()["eval_loss"]
    assert after < float(loss) - 1e-3
    again = load_causal_lm(resolve(str(tmp_path)), model_args, tokenizer, trainable=False).eval()
    assert float(again(**{key: part.to(again.device) for key, part in batch.items()}).loss) == pytest.approx(
        after, abs=1e-5
    )


def test_flags_of_decoders_are_refused(tmp_path):
    args = SFTConfig(str(tmp_path), report_to="none", completion_only_loss=False, bf16=False, use_cpu=True)
    with pytest.raises(InputError, match="--completion_only_loss false"):
        check_seq2seq_arguments(args)


def test_rloo_scores_completions_as_plain_transformers(t5, tmp_path):
    source = resolve(t5)
    tokenizer = load_tokenizer(source)
    args = RLOOConfig(
        str(tmp_path), max_steps=1, num_generations=2, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        max_completion_length=6, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        temperature=0.7, beta=0.1, learning_rate=1e-3,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": user(text)} for text in ("Hi", "What is it?")])
    trainer = RLOOTrainer(
        model=load_causal_lm(source, LORA, tokenizer), args=args, train_dataset=prompts, processing_class=tokenizer,
        reward_funcs=[lambda completions, **_: [float(len(completion[0]["content"])) for completion in completions]],
    )  # fmt: skip
    ids = torch.tensor([[PAD, 10, 11, 20, 21, EOS], [12, 13, 14, 30, EOS, PAD]])
    mask = (ids != PAD).long()
    found, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3)
    plain = AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    for row, prompt, reply in ((0, [10, 11], [20, 21, EOS]), (1, [12, 13, 14], [30, EOS])):
        logits = plain(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[PAD, *reply[:-1]]])).logits[0]
        expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]
        assert torch.allclose(found[row, : len(reply)], expected, atol=1e-4)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert abs(logged["objective/kl"]) < 1e-4  # before the first step the policy is the reference


def test_ptx_takes_the_mean_loss_of_the_replies(t5, tmp_path):
    tokenizer = load_tokenizer(resolve(t5))
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": "y" * n}) + "\n" for n in range(1, 9)))
    rows = language_model_rows(str(file), tokenizer, None)
    batch = next(ptx_batches(rows, 3, 0, torch.device("cpu")))
    plain = AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    loss = language_model_loss(PolicyAndValue(plain), batch)
    sums, tokens = 0.0, 0
    for ids, mask, length in zip(batch.input_ids, batch.attention_mask, batch.lengths.tolist(), strict=True):
        row = ids[mask.bool()]
        labels = row[-length:][None]
        sums += float(plain(input_ids=row[:-length][None], labels=labels).loss) * length
        tokens += length
    assert float(loss) == pytest.approx(sums / tokens, abs=1e-5)


def test_chat_comparison_and_judge(t5, bart):
    sources = resolve_speakers([f"a={bart}"])
    tokenizer = load_tokenizer(sources["a"])
    speakers = load_speakers(sources, {"a": tokenizer}, FULL, max_new_tokens=5, temperature=1.0)
    chat, conversation = Chat(speakers, None, max_new_tokens=5, seed=0), Conversation()
    chat.say(conversation, "Hello")
    streamed = "".join(chat.reply(conversation, 0))
    assert conversation.replies == [streamed.strip()] and 0 < len(streamed) <= 5 * len("<unused99>")

    plain = AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    tokenizer = load_tokenizer(resolve(t5))
    reply = _human_reply(tokenizer, {"prompt": user("Hi"), "completion": assistant("Yo")})
    assert tokenizer.decode(reply) == "Yo<eos>"
    prompts = [encode_prompt(tokenizer, text) for text in ("Hi", "A longer prompt")]
    found = reply_logprobs(plain, tokenizer, prompts, [reply, reply[:1]])
    for prompt, labels, total in zip(prompts, (reply, reply[:1]), found.sums, strict=True):
        loss = plain(input_ids=torch.tensor([prompt]), labels=torch.tensor([labels])).loss
        assert total == pytest.approx(-float(loss) * len(labels), abs=1e-4)

    judge = load_judge(resolve(t5), FULL)
    question = "Which? A or B?"
    (one,) = judge.answers([question], ("A", "B"))
    letter = tokenizer("A", add_special_tokens=False)["input_ids"][0]
    logits = plain(input_ids=torch.tensor([judge.encode(question, "A")]), decoder_input_ids=torch.tensor([[PAD]]))
    assert one[0] == pytest.approx(float(logits.logits[0, -1].softmax(-1)[letter]), abs=1e-5)


def test_half_an_encoder_decoder_is_refused(t5, tmp_path):
    saved(T5EncoderModel.from_pretrained(t5), tmp_path / "half")
    with pytest.raises(InputError, match="T5EncoderModel is an encoder"):
        load_tokenizer(resolve(str(tmp_path / "half")))


@pytest.mark.parametrize(
    "arguments", [SamplerArguments(use_vllm=True), SamplerArguments(use_transformers_continuous_batching=True)]
)
def test_no_other_engine_samples_it_which_is_said_before_anything_is_loaded(t5, arguments):
    with pytest.raises(InputError, match=f"{arguments.sampler_flag}: samples decoders only, and t5 is an encoder-dec"):
        make_sampler(arguments, "", [resolve(t5)])


def test_examples_in_the_context_are_for_decoders(t5, tmp_path, monkeypatch):
    command = ["in_context.py", "--model_name_or_path", t5, "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(InputError, match="encoder-decoder"):
        load_script("eval/in_context.py").main()


def test_a_decoder_that_changes_with_its_length_is_refused(tmp_path):
    """ProphetNet's, in transformers 5.23: a token's log-probability depends on how many tokens follow."""
    model = tiny_model("prophetnet", "encoder-decoder")
    with pytest.raises(InputError, match="model: this prophetnet model sees the tokens"):
        need_causal(model, "model")
    need_causal(tiny_model("t5", "encoder-decoder"), "model")
