"""Pretraining: rows, collators and models of the four objectives, the recipe, and compression beside xz and n-grams."""

import copy
import itertools
import json
import lzma
import math
import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, present, run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    EvalPrediction,
    pipeline,
)

from eval.compression import by_groups
from eval.measuring.bits import in_groups, text_logprobs, xz_bits
from eval.measuring.pretraining import metrics_of_choices
from eval.stats.intervals import interval
from eval.stats.ngrams import KneserNey, discounts
from rlhf.errors import InputError
from rlhf.pretraining.collators import (
    DataCollatorForSpanCorruption,
    SeededCollator,
    corrupt_spans,
    count_spans,
    random_lengths,
)
from rlhf.pretraining.config import NewModelConfig, PretrainingConfig, check_pretraining, check_special_tokens
from rlhf.pretraining.electra import ReplacedTokenModel
from rlhf.pretraining.model import new_config, new_model
from rlhf.pretraining.optimizers import MuonWithAdamW, layer_matrices
from rlhf.pretraining.rows import packed_rows, pretraining_rows, sentence_pair_rows
from rlhf.pretraining.tokenization import boundary, encode_texts, train_tokenizer
from rlhf.pretraining.trainer import PretrainingTrainer, pretraining_collator
from rlhf.starter.conversations import starter_dataset

TEXTS = [
    "\n".join(f"Do you like {a}? I like {b} more than {a}." for a in line)
    for line, b in zip(
        itertools.permutations(["tea", "rain", "the cat", "music", "snow"], 3), itertools.cycle(["chess", "pizza"])
    )
]
SMALL = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "4", "--block_size", "32",
         "--bf16", "false", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true",
         "--per_device_train_batch_size", "4", "--warmup_steps", "1", "--save_total_limit", "4"]  # fmt: skip


def settings_of(tmp="unused", **changes):
    return PretrainingConfig(output_dir=str(tmp), report_to="none", use_cpu=True, **changes)


@pytest.fixture(scope="module")
def own():
    return train_tokenizer(TEXTS, 400, extra_ids=20)


@pytest.fixture(scope="module")
def data(own, tmp_path_factory):
    """Folder with the tokenizer, and text.jsonl."""
    folder = tmp_path_factory.mktemp("pretrain")
    own.save_pretrained(folder / "tokenizer")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def pretrain(data, objective, out, *more, check=True):
    name = "pretrain" if objective == "causal" else f"pretrain_{objective}"
    return run(
        "recipes/pretrain.py", "--config", ROOT / "recipes" / "configs" / f"{name}.yaml", "--tokenizer_name",
        data / "tokenizer", "--dataset_name", data / "text.jsonl", "--output_dir", out, *SMALL, *more, check=check,
    )  # fmt: skip


def metrics_of(out):
    return json.loads((out / "run.json").read_text())["metrics"]


# ---------------------------------------------------------------------------------------------- data


def test_the_starters_text_never_shows_training_what_is_held_out():
    splits = {config: starter_dataset("pretrain", config) for config in ("small", "full")}
    train, test = (set(splits["full"][name]["text"]) for name in ("train", "test"))
    assert len(train) > 5000 and len(test) > 600 and not train & test
    assert set(splits["small"]["test"]["text"]) <= test and set(splits["small"]["train"]["text"]) <= train
    message = starter_dataset("held_out")["test"][0]["prompt"][0]["content"]
    assert any(message in text for text in test) and not any(message in text for text in train)


def test_packed_blocks_are_the_texts_one_behind_the_other(own):
    args = settings_of(block_size=16)
    stream = [id_ for ids in encode_texts(own, TEXTS) for id_ in [*ids, own.eos_token_id]]
    rows = packed_rows(TEXTS, own, args, "train")["input_ids"][:]
    assert rows == [stream[start : start + 16] for start in range(0, len(stream) - 15, 16)]
    framed = packed_rows(TEXTS, own, settings_of(block_size=16, objective="masked"), "train")
    stream = [id_ if id_ != own.eos_token_id else own.sep_token_id for id_ in stream]
    assert framed["input_ids"][:] == [
        [own.cls_token_id, *stream[start : start + 14], own.sep_token_id] for start in range(0, len(stream) - 13, 14)
    ]
    for ids, special in zip(framed["input_ids"], framed["special_tokens_mask"], strict=True):
        assert special == [int(id_ in (own.cls_token_id, own.sep_token_id)) for id_ in ids]
    with pytest.raises(InputError, match=r"--block_size 512: the test split has only \d+ tokens"):
        packed_rows(TEXTS[:2], own, settings_of(block_size=512), "test")


def test_half_of_the_sentence_pairs_follow_each_other(own):
    texts = [f"{word} one\n{word} two\n{word} three and more\n{word} four" for word in map(str, range(100, 400))]
    rows = sentence_pair_rows(texts, own, settings_of(block_size=48, objective="masked"), "train")
    joined = {text.replace("\n", "") for text in texts}
    for row in rows:
        ids, kinds = row["input_ids"], row["token_type_ids"]
        assert len(ids) == len(kinds) == len(row["special_tokens_mask"]) <= 48
        middle = ids.index(own.sep_token_id)
        assert kinds == [0] * (middle + 1) + [1] * (len(ids) - middle - 1) and ids[-1] == own.sep_token_id
        first, second = own.decode(ids[1:middle]), own.decode(ids[middle + 1 : -1])
        assert any(first + second in text for text in joined) == (row["next_sentence_label"] == 0)
    assert 0.4 < np.mean(rows["next_sentence_label"]) < 0.6
    with pytest.raises(InputError, match="needs texts of two lines or more; the test split has 0"):
        sentence_pair_rows(["one line"] * 9, own, settings_of(objective="masked"), "test")


# ---------------------------------------------------------------------------------------------- collators


def test_masking_hides_80_changes_10_and_leaves_10_of_15_percent(own):
    torch.manual_seed(0)
    rows = [{"input_ids": [own.cls_token_id, *[50 + n % 97 for n in range(510)]]} for _ in range(200)]
    batch = pretraining_collator(own, settings_of(objective="masked"))(rows)
    original = torch.tensor([row["input_ids"] for row in rows])
    chosen = batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    assert not chosen[:, 0].any()  # [CLS] is never chosen
    given, true = batch["input_ids"][chosen], original[chosen]
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.005)
    assert (given == own.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.015)
    # a random token is the original itself once in 400 times
    assert ((given != own.mask_token_id) & (given != true)).float().mean().item() == pytest.approx(0.1, abs=0.012)
    batch = pretraining_collator(own, settings_of(objective="replaced"))(rows)
    given, true = (batch[name][batch["labels"] != -100] for name in ("input_ids", "labels"))
    assert (given == own.mask_token_id).float().mean().item() == pytest.approx(0.85, abs=0.015)
    assert ((given == own.mask_token_id) | (given == true)).all()  # none is replaced before the generator does it


@pytest.mark.parametrize("objective", ["masked", "replaced"])
def test_every_row_has_a_masked_token(objective, own):
    rows = [{"input_ids": [own.cls_token_id, 60 + number % 200, own.sep_token_id]} for number in range(300)]
    batch = pretraining_collator(own, settings_of(objective=objective))(rows)
    assert (batch["labels"][:, 1] == torch.tensor([row["input_ids"][1] for row in rows])).all()
    assert (batch["labels"][:, [0, 2]] == -100).all()
    assert (batch["input_ids"][:, 1] == own.mask_token_id).float().mean() > 0.9


def test_texts_end_with_the_token_that_bits_per_byte_counts(own):
    """Where eos ends a turn, as in tokenizers of chat models, another token stands between texts."""
    own = copy.deepcopy(own)
    own.add_special_tokens({"eos_token": "<|im_end|>"})
    args = settings_of(objective="causal", block_size=8)
    ids = packed_rows(["tea", "bread"] * 9, own, args, "train")["input_ids"][0]
    end = own.convert_tokens_to_ids("<|endoftext|>")
    assert end != own.eos_token_id and boundary(own) == end
    assert end in ids and own.eos_token_id not in ids
    assert new_config(NewModelConfig(hidden_size=16, num_hidden_layers=1), args, own).eos_token_id == end


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(InputError, match="has no fast version"):
        check_special_tokens(ByT5Tokenizer(), "byt5", settings_of(objective="span"))


def test_every_way_to_cut_is_equally_likely():
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(tuple(random_lengths(6, 3, generator)) for _ in range(5000))
    possible = [cut for cut in itertools.product(range(1, 7), repeat=3) if sum(cut) == 6]
    assert set(drawn) == set(possible)
    assert all(count == pytest.approx(500, abs=90) for count in drawn.values())


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.integers(2, 300), st.floats(0.01, 0.9), st.floats(1, 10), st.integers(0, 2**31))
def test_a_corrupted_text_can_be_put_together_again(length, density, mean, seed):
    ids, marks = list(range(length)), list(range(1000, 1400))
    noise, spans = count_spans(length, density, mean)
    inputs, targets = corrupt_spans(ids, marks, noise, spans, torch.Generator().manual_seed(seed))
    missing: dict[int, list[int]] = {}
    for token in targets:
        if token >= 1000:
            missing[token] = current = []
        else:
            current.append(token)
    assert [t for token in inputs for t in (missing[token] if token >= 1000 else [token])] == ids
    assert list(missing) == [token for token in inputs if token >= 1000] == marks[:spans]
    assert all(missing.values()) and sum(map(len, missing.values())) == noise


def test_span_corruption_takes_15_percent_in_spans_of_three(own):
    assert count_spans(512, 0.15, 3.0) == (77, 26)
    rows = [{"input_ids": list(range(50, 178))} for _ in range(4)]
    collator = SeededCollator(DataCollatorForSpanCorruption(own), 0)
    batch = collator(rows)
    assert batch["input_ids"].shape == (4, 128 - 19 + 6 + 1) and batch["labels"].shape == (4, 19 + 6 + 1)
    assert (batch["input_ids"][:, -1] == own.eos_token_id).all() and (batch["labels"][:, -1] == own.eos_token_id).all()
    assert (batch["labels"][:, 0] == own.convert_tokens_to_ids("<extra_id_0>")).all()
    assert not torch.equal(batch["labels"][0], batch["labels"][1])  # each row has gaps of its own
    torch.randperm(9)  # what was drawn in between is of no account
    assert torch.equal(SeededCollator(DataCollatorForSpanCorruption(own), 0)(rows)["labels"], batch["labels"])
    assert not torch.equal(SeededCollator(DataCollatorForSpanCorruption(own), 1)(rows)["labels"], batch["labels"])
    assert not torch.equal(collator([*rows[:1], {"input_ids": list(range(49, 177))}])["labels"], batch["labels"][:2])


# ---------------------------------------------------------------------------------------------- models

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


@pytest.mark.parametrize(
    "model_type", ["gpt2", "llama", "bert", "gpt_neox", "opt", "qwen3", "gemma", "mistral", "falcon"]
)
def test_a_causal_model_has_the_sizes_asked_for_and_never_looks_ahead(model_type, own):
    model_args, args = NewModelConfig(model_type=model_type, **SIZES), settings_of(block_size=16)
    check_pretraining(args, model_args)
    model = new_model(new_config(model_args, args, own), args).eval()
    assert {name: getattr(model.config, name, 48) for name in SIZES} == SIZES
    assert any(48 in parameter.shape for parameter in model.parameters())
    assert model.config.vocab_size == len(own) and model.get_output_embeddings().weight is (
        model.get_input_embeddings().weight
    )
    ids = torch.randint(50, 300, (1, 16))
    changed = ids.clone()
    changed[0, 9:] = 49
    with torch.no_grad():
        same = (model(input_ids=ids).logits - model(input_ids=changed).logits).abs().amax(-1)[0]
    assert (same[:9] < 1e-5).all() and (same[9:] > 1e-5).any()


@pytest.mark.parametrize("objective, model_type", [("masked", "roberta"), ("masked", "distilbert"), ("span", "bart")])
def test_other_architectures_have_the_sizes_too(objective, model_type, own):
    model_args, args = NewModelConfig(model_type=model_type, **SIZES), settings_of(block_size=16, objective=objective)
    check_pretraining(args, model_args)
    model = new_model(new_config(model_args, args, own), args).eval()
    ids = torch.randint(50, 300, (1, 16))
    assert model(input_ids=ids, labels=ids).loss.isfinite()  # as many positions as a block has
    inner = {
        width
        for name, parameter in model.named_parameters()
        for width in parameter.shape
        if not any(word in name for word in ("embed", "lm_head", "vocab", "final_logits", "decoder.bias"))
    }
    assert inner <= {1, 32, 48, len(own), 64}, inner
    layers = sum(name.endswith(("self_attn.q_proj.weight", "self.query.weight", "q_lin.weight"))
                 for name, _ in model.named_parameters())  # fmt: skip
    assert layers == (6 if objective == "span" else 3)


@pytest.mark.parametrize(
    "objective, model_type", [("masked", "bert"), ("replaced", "electra"), ("replaced", "roformer"), ("span", "t5")]
)
def test_accumulated_batches_take_the_step_of_the_whole_batch(objective, model_type, own, tmp_path):
    model_args = NewModelConfig(model_type=model_type, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    logged = []
    for rows, accumulated in ((8, 1), (2, 4)):
        args = settings_of(
            tmp_path / str(rows), objective=objective, block_size=16, per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulated, max_steps=1, logging_steps=1, save_strategy="no",
        )  # fmt: skip
        model = new_model(new_config(model_args, args, own), args)
        texts = [f"text {number} about tea and bread" for number in range(60)]
        trainer = PretrainingTrainer(
            model=model, args=args, train_dataset=pretraining_rows(texts, own, args, "train"), processing_class=own,
            data_collator=pretraining_collator(own, args),
        )  # fmt: skip
        trainer.train()
        logged.append(trainer.state.log_history[0])
    assert logged[1]["loss"] == pytest.approx(logged[0]["loss"], rel=0.1)
    assert logged[1]["grad_norm"] < 2 * logged[0]["grad_norm"]


@pytest.mark.parametrize("model_type", ["roberta", "mpnet", "esm", "ibert", "roformer"])
def test_a_whole_row_has_positions(model_type, own):
    args = settings_of(objective="masked", block_size=32)
    model_args = NewModelConfig(model_type=model_type, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = new_model(new_config(model_args, args, own), args)
    rows = packed_rows(["tea and bread on the table"] * 40, own, args, "train")
    assert model(**pretraining_collator(own, args)([rows[0], rows[1]])).loss.isfinite()


def test_an_architecture_with_demands_of_its_own_says_so_in_one_line(own):
    args = settings_of(objective="masked", block_size=32)
    for model_type, message in (("funnel", "num_hidden_layers"), ("reformer", "axial_pos_embds")):
        model_args = NewModelConfig(model_type=model_type, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        with pytest.raises(InputError, match=rf"--model_type {model_type}: can't be made with these sizes .*{message}"):
            new_model(new_config(model_args, args, own), args)


def test_the_same_seed_gives_the_same_model(own):
    def weights(seed):
        args = settings_of(seed=seed)
        return new_model(new_config(NewModelConfig(hidden_size=16, num_hidden_layers=1), args, own), args).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.fixture
def electra(own):
    model_args = NewModelConfig(model_type="electra", hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    args = settings_of(objective="replaced", block_size=16)
    return new_model(new_config(model_args, args, own), args)


def test_electras_loss_is_the_generators_plus_50_times_the_discriminators(own, electra):
    ids = torch.randint(50, 300, (3, 16))
    labels = torch.where(torch.rand(3, 16) < 0.4, ids, -100)
    inputs = torch.where(labels == -100, ids, own.mask_token_id)
    output = electra.train()(input_ids=inputs, labels=labels)
    assert output.loss.item() == pytest.approx(
        output.generator_loss.item() + 50 * output.discriminator_loss.item(), rel=1e-5
    )
    masked = labels != -100
    assert output.replaced[~masked].sum() == 0
    filled = electra.generator(input_ids=inputs).logits
    expected = torch.nn.functional.cross_entropy(filled[masked], ids[masked])
    assert output.generator_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():  # a generator that is always right leaves nothing to detect
        electra.generator.generator_lm_head.bias.fill_(-1e4)
        electra.generator.generator_lm_head.bias[60] = 1e4
    one = torch.where(masked, 60, ids)
    output = electra(input_ids=inputs, labels=torch.where(masked, one, -100))
    assert output.replaced.sum() == 0
    output = electra(input_ids=inputs, labels=torch.where(masked, 61, -100))
    assert torch.equal(output.replaced, masked.long())


def test_detection_is_measured_by_order_and_at_even_odds():
    scores = np.array([[2.0, -1.0], [0.5, -0.5]])  # replaced ones 2 and -0.5: above the others in three of four pairs
    replaced = np.array([[1, 0], [0, 1]])
    compute = present(metrics_of_choices(settings_of(objective="replaced")))
    found = compute(EvalPrediction((scores, replaced, np.array([3.0, 5.0]), np.array([0.1, 0.3])), replaced))
    assert found["detection_auc"] == 0.75 and found["replaced_share"] == 0.5
    assert found["detection_accuracy"] == found["detection_precision"] == found["detection_recall"] == 0.5
    assert found["generator_loss"] == 4 and found["discriminator_loss"] == pytest.approx(0.2)
    nothing = compute(EvalPrediction((scores, 0 * replaced, np.ones(1), np.ones(1)), replaced))
    assert nothing["detection_auc"] == 0.5 and nothing["detection_recall"] == 0


@pytest.mark.parametrize("model_type", ["electra", "roformer"])
def test_electras_halves_share_embeddings_and_nothing_flows_through_the_samples(model_type, own, tmp_path):
    model_args = NewModelConfig(model_type=model_type, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    args = settings_of(objective="replaced", block_size=16)
    electra = new_model(new_config(model_args, args, own), args)
    assert isinstance(electra, ReplacedTokenModel)
    generator, discriminator = (half.base_model.embeddings for half in (electra.generator, electra.discriminator))
    for kind in ("word_embeddings", "token_type_embeddings"):
        assert getattr(generator, kind).weight is getattr(discriminator, kind).weight
    if model_type == "electra":  # RoFormer's positions aren't learned
        assert generator.position_embeddings.weight is discriminator.position_embeddings.weight
    assert electra.generator.get_output_embeddings().weight is discriminator.word_embeddings.weight
    assert electra.generator.config.hidden_size == 8 and electra.discriminator.config.hidden_size == 32
    ids = torch.randint(50, 300, (2, 16))
    output = electra.train()(input_ids=ids, labels=ids)
    (output.loss - electra.generator(input_ids=ids, labels=ids).loss).backward()
    body = [p.grad for name, p in electra.generator.named_parameters() if "encoder" in name]
    assert all(grad is None or grad.abs().max() < 1e-5 for grad in body)
    layers = [p for name, p in electra.discriminator.named_parameters() if "encoder.layer" in name]
    assert len(layers) > 10 and all(p.grad is not None for p in layers)
    electra.save_pretrained(tmp_path)
    again = ReplacedTokenModel.from_pretrained(tmp_path, config=electra.config, generator_hidden_size=0.25)
    assert again.generator.get_output_embeddings().weight is again.discriminator.get_input_embeddings().weight
    state = electra.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("objective,model_type,changes,message", [
    ("denoise", "gpt2", {}, "--objective denoise: unknown. Give one of causal, masked, replaced, span"),
    ("causal", "lama", {}, "--model_type lama: unknown. Did you mean llama?"),
    ("causal", "t5", {}, "--objective causal: t5 has no head for it. Give --model_type gpt2 or llama"),
    ("causal", "xlm", {}, "--objective causal: xlm has no head for it. Give --model_type gpt2 or llama"),
    ("masked", "gpt2", {}, "--objective masked: gpt2 has no head for it. Give --model_type bert"),
    ("replaced", "bert", {}, "--objective replaced: bert has no head for it. Give --model_type electra or roformer"),
    ("span", "llama", {}, "--objective span: llama has no head for it. Give --model_type t5"),
    ("masked", "electra", {"next_sentence_prediction": True}, "electra has no head for it. Give --model_type bert"),
    ("causal", "bert", {"next_sentence_prediction": True}, "needs --objective masked; found causal"),
    ("causal", "gpt2", {"use_muon": True, "fsdp": "full_shard"}, "--use_muon: needs whole matrices"),
    ("causal", "gpt2", {"hidden_size": 10}, "--num_attention_heads 4: must divide --hidden_size 10"),
    ("causal", "gpt2", {"max_position_embeddings": 8}, "--max_position_embeddings 8: less than --block_size 256"),
    ("masked", "bert", {"mlm_probability": 1.5}, "--mlm_probability 1.5: must be above 0 and below 1"),
    ("span", "t5", {"mean_noise_span_length": 0.5}, "--mean_noise_span_length 0.5: must be at least 1"),
])  # fmt: skip
def test_what_cannot_work_is_refused(objective, model_type, changes, message):
    of_model = {name: value for name, value in changes.items() if hasattr(NewModelConfig(), name)}
    rest = {name: value for name, value in changes.items() if name not in of_model}
    with pytest.raises(InputError) as error:
        check_pretraining(settings_of(objective=objective, **rest), NewModelConfig(model_type=model_type, **of_model))
    assert message in str(error.value)


def test_a_tokenizer_without_the_special_tokens_is_refused(own, tokenizer):
    check_special_tokens(own, "own", settings_of(objective="span", block_size=256))
    for objective, size, missing in (
        ("span", 512, "<extra_id_25>"),
        ("masked", 64, "mask_token, cls_token, sep_token"),
    ):
        with pytest.raises(InputError, match=f"has no {missing}, which --objective {objective} needs"):
            check_special_tokens(
                own if objective == "span" else tokenizer, "x", settings_of(objective=objective, block_size=size)
            )


def test_muon_turns_the_layers_matrices_and_adamw_the_rest(own):
    args = settings_of(block_size=16)
    model = new_model(new_config(NewModelConfig(hidden_size=16, num_hidden_layers=1), args, own), args)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, others = layer_matrices(model)
    assert all("layers.0." in names[id(p)] and p.ndim == 2 for p in matrices) and len(matrices) == 7
    assert "model.embed_tokens.weight" in {names[id(p)] for p in others}
    assert len(matrices) + len(others) == len(names)

    def make():
        return MuonWithAdamW(matrices, others, lr=0.1, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)

    def step(optimizer):
        torch.manual_seed(1)
        for parameter in names_to_parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return [parameter.detach().clone() for parameter in names_to_parameters]

    names_to_parameters = list(model.parameters())
    before = [parameter.detach().clone() for parameter in matrices]
    optimizer = make()
    step(optimizer)
    for start, parameter in zip(before, matrices, strict=True):  # all singular values of a step are about alike
        values = torch.linalg.svdvals(parameter.detach() - start)
        assert values[0] < 2 * values[-1] and 0.05 < values[0] / (0.1 * 0.2 * max(parameter.shape) ** 0.5) < 1.5
    state = copy.deepcopy(optimizer.state_dict())
    kept = [parameter.detach().clone() for parameter in names_to_parameters]
    once = step(optimizer)
    for parameter, value in zip(names_to_parameters, kept, strict=True):
        parameter.data.copy_(value)
    again = make()
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(once, step(again), strict=True))
    torch.optim.lr_scheduler.LambdaLR(again, lambda _: 0.0)  # its rates reach both halves, also after loading
    still = [parameter.detach().clone() for parameter in names_to_parameters]
    assert all(torch.equal(a, b) for a, b in zip(still, step(again), strict=True))


# ---------------------------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def causal(data, tmp_path_factory):
    """A run's folder and metrics."""
    out = tmp_path_factory.mktemp("causal") / "out"
    pretrain(data, "causal", out)
    return out, metrics_of(out)


def test_a_causal_run_says_what_it_reached(causal, own):
    out, metrics = causal
    model = AutoModelForCausalLM.from_pretrained(out)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert metrics["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert metrics["num_non_embedding_parameters"] == metrics["num_parameters"] - len(own) * 16
    assert metrics["train_tokens"] == 4 * 4 * 32 and metrics["tokens_per_second"] > 0
    assert metrics["bits_per_byte_low"] <= metrics["bits_per_byte"] <= metrics["bits_per_byte_high"]
    assert 1 < metrics["bits_per_byte"] < 8
    card = (out / "README.md").read_text()
    assert "from text alone" in card and "tokenizer" in card and "AutoModelForCausalLM" in card
    assert "base_model" not in card
    again = AutoTokenizer.from_pretrained(out)
    assert again.get_vocab() == own.get_vocab() and again.chat_template == own.chat_template
    reply = pipeline("text-generation", model=str(out))("Do you", max_new_tokens=3)[0]["generated_text"]
    assert reply.startswith("Do you")
    loaded = AutoModelForSequenceClassification.from_pretrained(out, num_labels=1)
    assert torch.equal(loaded.base_model.embed_tokens.weight, model.base_model.embed_tokens.weight)


def test_a_finished_run_is_skipped_and_another_tokenizer_is_another_run(data, causal):
    out, _ = causal
    before = (out / "model.safetensors").read_bytes()
    assert "already finished" in pretrain(data, "causal", out).stdout
    assert (out / "model.safetensors").read_bytes() == before
    kept = (data / "tokenizer" / "tokenizer.json").read_text()
    train_tokenizer(TEXTS, 300, extra_ids=20).save_pretrained(data / "tokenizer")
    try:
        other = pretrain(data, "causal", out, check=False)
    finally:
        (data / "tokenizer" / "tokenizer.json").write_text(kept)
    assert other.returncode == 2 and "these differ: content of" in other.stderr


@pytest.mark.parametrize("objective,loads,metric", [
    ("causal", AutoModelForCausalLM, None),
    ("masked", AutoModelForPreTraining, "eval_next_sentence_accuracy"),
    ("replaced", AutoModelForTokenClassification, "eval_detection_auc"),
    ("span", AutoModelForSeq2SeqLM, "eval_token_accuracy"),
])  # fmt: skip
def test_every_objective_trains_and_resumes_as_if_nothing_had_happened(objective, loads, metric, data, tmp_path):
    pretrain(data, objective, tmp_path / "out")
    metrics = metrics_of(tmp_path / "out")
    assert ("bits_per_byte" in metrics) == (objective == "causal") and metrics["eval_loss"] > 0
    assert metric is None or 0 <= metrics[metric] <= 1
    model = loads.from_pretrained(tmp_path / "out")
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    assert metrics["num_parameters"] == model.num_parameters()
    start = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    prefix = "discriminator." if objective == "replaced" else ""
    compared = [name for name in trained if prefix + name in start and start[prefix + name].dtype.is_floating_point]
    moved = [name for name in compared if not torch.equal(trained[name], start[prefix + name])]
    assert len(moved) > 0.8 * len(compared)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    (tmp_path / "out" / "run.json").write_text(json.dumps({**run, "finished": False}))
    (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "gone")
    assert "Resuming from" in pretrain(data, objective, tmp_path / "out").stdout
    again = metrics_of(tmp_path / "out")
    assert again["eval_loss"] == metrics["eval_loss"] and again["train_tokens"] == metrics["train_tokens"]
    resumed = loads.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(resumed[name], trained[name]) for name in trained)
    framed = AutoTokenizer.from_pretrained(tmp_path / "out")("tea")["input_ids"]
    tea = AutoTokenizer.from_pretrained(data / "tokenizer")("tea")["input_ids"]
    assert framed == {"causal": tea, "span": [*tea, 1]}.get(objective, [2, *tea, 3])  # 1 eos, 2 [CLS], 3 [SEP]


def test_a_masked_model_fills_in(data, tmp_path):
    pretrain(data, "masked", tmp_path / "out", "--next_sentence_prediction", "false")
    metrics = metrics_of(tmp_path / "out")
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.architectures == ["BertForMaskedLM"]
    assert len(pipeline("fill-mask", model=str(tmp_path / "out"))("Do you like [MASK]?", top_k=3)) == 3


def test_a_run_without_its_tokenizer_is_refused(data, tmp_path):
    result = pretrain(data, "causal", tmp_path / "out", "--tokenizer_name", tmp_path / "none", check=False)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert "no tokenizer there. Train one first" in result.stderr


# ---------------------------------------------------------------------------------------------- compression


def test_log_probabilities_of_texts_against_one_token_at_a_time(own):
    args = settings_of(block_size=64)
    model = new_model(new_config(NewModelConfig(hidden_size=16, num_hidden_layers=1), args, own), args)
    texts = ["the cat", TEXTS[0], "a"]
    whole = text_logprobs(model, own, texts, max_length=64, batch_size=2)
    in_windows = text_logprobs(model, own, texts, max_length=8, batch_size=2)
    for number, ids in enumerate(encode_texts(own, texts)):
        ids = [boundary(own), *ids, boundary(own)]
        for sums, size in ((whole, 64), (in_windows, 8)):
            expected, start = 0.0, 0
            for place in range(1, len(ids)):
                if place - start >= size:  # the next window begins half a window later
                    start += size // 2
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids[start:place]])).logits[0, -1]
                expected += logits.log_softmax(-1)[ids[place]].item()
            assert sums[number] == pytest.approx(expected, rel=1e-4)


def test_kneser_ney_by_hand_and_that_it_is_a_distribution():
    model = KneserNey(2, 3).fit([[1, 2, 1, 2, 1]], start=0)
    # bigrams 01 12 21 12 21; counts of counts don't allow estimates, so a half is taken off a 1, and 1 off a 2.
    # Unigrams by what comes before: 1 after {0, 2}, 2 after {1}: (2 - 1)/3 + (1.5/3)/3 = 1/2; (1 - .5)/3 + 1/6 = 1/3
    unigram = {0: 1 / 6, 1: 1 / 2, 2: 1 / 3}
    assert np.exp(model.logprobs([1], start=0))[0] == pytest.approx((1 - 0.5) / 1 + 0.5 * unigram[1])
    assert np.exp(model.logprobs([1, 2], start=0))[1] == pytest.approx((2 - 1) / 2 + 0.5 * unigram[2])
    draw = np.random.default_rng(0)
    sequences = [list(map(int, draw.zipf(1.5, 60) % 7)) for _ in range(30)]
    for order in (1, 2, 3):
        model = KneserNey(order, 7).fit(sequences, start=0)
        for context in ([], [1], [3, 2], [6, 6, 6, 6]):
            total = sum(np.exp(model.logprobs([*context, token], start=0))[-1] for token in range(7))
            assert total == pytest.approx(1)
    with pytest.raises(InputError, match="--ngram_order 9"):
        KneserNey(9, 4096)


def test_discounts_are_chen_and_goodmans():
    counts = np.asarray([1] * 8 + [2] * 4 + [3] * 2 + [4])
    y = 8 / 16
    assert discounts(counts)[1:] == pytest.approx([1 - 2 * y * 4 / 8, 2 - 3 * y * 2 / 4, 3 - 4 * y * 1 / 2])


def test_xz_is_paid_in_full(monkeypatch):
    texts = [f"text number {number}, größer than {number * 7919}" for number in range(10)]
    monkeypatch.setattr(os, "fork", None)  # torch has threads here

    def compressed(texts):
        return 8 * len(lzma.compress(b"".join(text.encode() + b"\0" for text in texts), preset=9))

    sizes = [compressed(texts[:end]) for end in range(1, 11)]
    assert xz_bits(texts, [], 10) == [sizes[0], *np.diff(sizes)]
    before = texts[3:7]
    sizes = [compressed(before + texts[:end]) for end in (0, 4, 7, 10)]
    assert xz_bits(texts, before, 3) == np.diff(sizes).tolist()


def test_texts_are_put_into_groups():
    assert in_groups(list(range(7)), 3) == [[0, 1, 2], [3, 4], [5, 6]]
    grouped = by_groups(interval([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 2.0]), 2)
    assert grouped.mean == 10 / 6 and grouped.sample == ([3.0, 7.0], [2.0, 4.0], "none")


def test_compression_writes_a_table_with_intervals_and_a_picture(causal, data, tmp_path):
    out, metrics = causal
    result = run(
        "eval/compression.py", "--models", f"mine={out}", "--dataset_name", data / "text.jsonl", "--dtype", "float32",
        "--max_length", 32, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    cells = results["bits_per_byte"]
    assert list(cells) == ["mine", "3-gram", "xz_primed", "xz"]
    assert all(cell["low"] <= cell["mean"] <= cell["high"] for cell in cells.values())
    assert cells["mine"]["mean"] == pytest.approx(metrics["bits_per_byte"], rel=1e-3)
    less = results["differences"]["mine_minus_xz"]
    assert less["mean"] == pytest.approx(cells["mine"]["mean"] - cells["xz"]["mean"])
    assert "less this" in result.stdout and (tmp_path / "out" / "compression.png").stat().st_size > 1000
    assert "Compression" in (tmp_path / "out" / "report.html").read_text()
    wrong = run("eval/compression.py", "--models", out, "--output_dir", tmp_path / "x", check=False)
    assert wrong.returncode == 2 and "error: --models" in wrong.stderr
