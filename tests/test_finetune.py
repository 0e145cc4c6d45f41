"""Fine-tuning with labels: token ids, heads, losses, what is trained and saved, metrics, the recipe as users run it."""

import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run, save_tiny
from datasets import ClassLabel, Dataset, Features, Value
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import BertProcessing, TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
    pipeline,
)
from trl import ModelConfig

from eval.metrics import metric, metric_results
from eval.stats.intervals import over_rows_and_seeds
from rlhf.data.datasets import Row
from rlhf.errors import InputError
from rlhf.models.sources import resolve
from rlhf.starter.labels import NAMES, finetuning_dataset
from rlhf.tasks.finetuning import (
    FinetuneArguments,
    FinetuningTrainer,
    auxiliary_loss,
    check_arguments,
    finetuning_config,
    in_float32,
    language_model_head,
    load_finetuning_model,
    load_options,
)
from rlhf.tasks.labelled import LABEL_KINDS, LabelledTask, read_task
from rlhf.tasks.labelled_rows import (
    _encode_spans,
    _encode_texts,
    data_collator,
    finetuning_rows,
    load_reading_tokenizer,
    predict_labels,
)

LORA = ModelConfig(dtype="float32", use_peft=True, lora_r=4, lora_target_modules="all-linear")
FULL = ModelConfig(dtype="float32")
THINGS = ["tea", "rain", "the cat", "music", "a long walk", "pizza", "snow", "chess"]
ROWS: dict[str, list[Row]] = {
    "sentences": [{"text": f"I {verb} {thing}.", "label": label} for thing in THINGS
                  for verb, label in (("love", "good"), ("hate", "bad"), ("know", "neutral"))],
    "pairs": [{"text": f"Do you like {thing}?", "text_pair": answer, "label": label} for thing in THINGS
              for answer, label in ((f"Yes, I like {thing}.", "yes"), ("No, not at all.", "no"))],
    "tags": [{"tokens": ["we", "saw", *thing.split(), "in", "unbelievable", "paris"],
              "tags": ["O", "O", *("THING" for _ in thing.split()), "O", "O", "CITY"]} for thing in THINGS],
    "spans": [{"question": "What is liked?", "context": f"Some people like {thing} very much.",
               "answers": {"text": [thing], "answer_start": [17]}} for thing in THINGS],
}  # fmt: skip


@pytest.fixture(scope="module")
def small():
    """A byte-level tokenizer with few tokens, which makes models fast."""
    pieces = Tokenizer(BPE())
    pieces.pre_tokenizer, pieces.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=400,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    pieces.train_from_iterator([str(row) for rows in ROWS.values() for row in rows], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def bases(small, tmp_path_factory):
    """Folders of tiny random models: two decoders, and an encoder that was pretrained without a pooler."""
    folder = tmp_path_factory.mktemp("bases")
    llama = save_tiny(folder / "llama", small)
    torch.manual_seed(1)
    gpt2 = GPT2Config(vocab_size=len(small), n_embd=16, n_layer=1, n_head=2, n_positions=256)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    small.save_pretrained(folder / "gpt2")
    letters = [*"abcdefghijklmnopqrstuvwxyz.,?'I"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    pieces = Tokenizer(WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    pieces.pre_tokenizer = BertPreTokenizer()
    pieces.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=pieces, mask_token="[MASK]", **special).save_pretrained(folder / "bert")
    bert = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=len(words), **bert)).save_pretrained(folder / "bert")
    return {"llama": llama, "gpt2": str(folder / "gpt2"), "bert": str(folder / "bert")}


def prepared(base, kind, model_args=FULL, rows=None, **arguments):
    """What the recipe makes before training: task, tokenizer, model and rows of the training split."""
    args = FinetuneArguments(**{"max_length": 64, **arguments})
    data = Dataset.from_list(rows or ROWS[kind])
    task, source = read_task(data, data, "d"), resolve(base)
    config = finetuning_config(source, task)
    check_arguments(args, model_args.use_peft, source, config, task)
    tokenizer = load_reading_tokenizer(source, config, None)
    torch.manual_seed(0)
    model = load_finetuning_model(source, config, task, args, model_args, tokenizer)
    encoded = finetuning_rows(task.train, task, tokenizer, args.max_length, "training")
    head = language_model_head(source, config, model) if args.lm_coef else None
    return SimpleNamespace(
        task=task, source=source, config=config, tokenizer=tokenizer, model=model, rows=encoded, head=head, args=args
    )


def trainer_of(made, folder, steps=2, **changes):
    settings = {
        "max_steps": steps, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "report_to": "none",
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, **changes,
    }  # fmt: skip
    return FinetuningTrainer(
        model=made.model, args=TrainingArguments(str(folder), **settings), train_dataset=made.rows,
        processing_class=made.tokenizer, data_collator=data_collator(made.task, made.tokenizer),
        lm_coef=made.args.lm_coef, lm_head=made.head,
    )  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------------------------------------- token ids


def test_a_decoder_reads_the_class_at_eos_also_when_cut_and_after_saving(bases, tmp_path):
    made = prepared(bases["llama"], "pairs", max_length=16, rows=[
        {"text": "Hi there", "text_pair": "Hello", "label": "a"},
        {"text": "word " * 30, "text_pair": "other " * 30, "label": "b"},
    ])  # fmt: skip
    short, long = made.rows["input_ids"]
    newline = made.tokenizer("\n")["input_ids"][0]
    assert made.tokenizer.decode(short) == "Hi there\nHello</s>"
    assert len(long) == 16 and long[-1] == made.tokenizer.eos_token_id and newline in long
    made.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("Hi there", "Hello")["input_ids"] == short and again("Hi")["input_ids"][-1] == short[-1]
    assert again.padding_side == "right"


def test_bos_stays_in_front_where_a_tokenizer_has_it(bases, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    plain = tokenizer("Hello")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    save_tiny(tmp_path / "bos", tokenizer)
    made = prepared(str(tmp_path / "bos"), "sentences")
    expected = [tokenizer.bos_token_id, *plain, tokenizer.eos_token_id]
    assert made.tokenizer("Hello")["input_ids"] == expected


def test_cut_texts_are_counted(bases, capsys):
    prepared(bases["llama"], "sentences", max_length=8,
             rows=[{"text": "word " * 30, "label": "a"}, {"text": "Hi", "label": "b"}])  # fmt: skip
    assert "training: 1 of 2 texts are longer than --max_length 8 and were cut" in capsys.readouterr().out


@pytest.mark.parametrize("base", ["llama", "bert"])
def test_tags_stand_at_the_first_token_of_each_word(bases, base):
    made = prepared(bases[base], "tags")
    row, words = made.rows[2], made.task.train["tokens"][2]  # we saw the cat in unbelievable paris
    for word, tag, token in zip(words, made.task.train["tags"][2], row["first_tokens"], strict=True):
        piece = made.tokenizer.decode([row["input_ids"][token]]).strip(" #")
        assert piece and word.startswith(piece)
        assert made.task.labels[row["labels"][token]] == tag
    assert sum(label != -100 for label in row["labels"]) == len(words) < len(row["labels"])
    # what is read off the logits are the tags again; a word beyond the end has none
    logits = np.eye(3)[np.maximum(0, [row["labels"]])]
    rows = [{**row, "first_tokens": [*row["first_tokens"][:-1], -1]}]
    tags = predict_labels(made.task, Dataset.from_list(rows), logits)[0]
    assert tags == [*made.task.train["tags"][2][:-1], None]


@pytest.mark.parametrize("base", ["llama", "bert"])
def test_spans_are_found_in_whichever_window_has_them(bases, base):
    rows = []
    for before in range(10, 40):  # in some rows a window ends within the answer
        context = "go " * before + "a long walk" + " to go" * 30
        answers = {"text": ["a long walk"], "answer_start": [context.index("a long")]}
        rows.append({"question": "what?", "context": context, "answers": answers})
    made = prepared(bases[base], "spans", rows=rows)
    assert set(made.rows["example"]) == set(range(len(rows))) and len(made.rows) > 2 * len(rows)
    length, whole, logits = max(len(ids) for ids in made.rows["input_ids"]), set(), []
    for row in made.rows:
        start, end, context = row["start_positions"], row["end_positions"], rows[row["example"]]["context"]
        if row["offsets"][start] == [-1, -1]:  # points at [CLS] or eos
            assert start == end == (0 if base == "bert" else len(row["input_ids"]) - 1)
        else:
            whole.add(row["example"])
            assert context[row["offsets"][start][0] : row["offsets"][end][1]].strip() == "a long walk"
        logits.append([5.0 * np.eye(length)[start], 5.0 * np.eye(length)[end]])
    assert len(whole) == len(rows)
    starts, ends = np.array(logits).transpose(1, 0, 2)
    assert predict_labels(made.task, made.rows, (starts, ends)) == ["a long walk"] * len(rows)
    # an end before its start, and spans of more than 30 tokens, are never chosen
    offsets = [[-1, -1], *([n, n + 1] for n in range(40)), [-1, -1]]
    rows = Dataset.from_list([{"example": 0, "offsets": offsets}])
    starts, ends = np.zeros((2, 1, 42))
    starts[0, 35], ends[0, 3], ends[0, 38] = 3, 5, 4
    starts[0, 0] = ends[0, 41] = 99  # no characters of the context
    task = LabelledTask("spans", [], rows, Dataset.from_dict({"context": ["0123456789" * 4]}))
    assert predict_labels(task, rows, (starts, ends)) == ["4567"]
    starts[0, 1], ends[0, 38] = 9, 9
    assert len(predict_labels(task, rows, (starts, ends))[0]) <= 30


# ---------------------------------------------------------------------------------------------- labels


def test_an_answer_may_begin_with_a_space(bases):
    context, answer = "Some people like tea very much.", " tea "
    row = {"question": "What?", "context": context, "answers": {"text": [answer], "answer_start": [16]}}
    tokenizer = prepared(bases["bert"], "spans").tokenizer
    encoded = _encode_spans(tokenizer, 64)(Dataset.from_list([row])[:], [0])
    (first,), (last,) = encoded["start_positions"], encoded["end_positions"]
    assert (encoded["offsets"][0][first][0], encoded["offsets"][0][last][1]) == (17, 20)


@pytest.mark.parametrize("base", ["llama", "bert"])
def test_control_tokens_in_a_text_stay_text(bases, base):
    made = prepared(bases[base], "pairs")
    tokenizer = made.tokenizer
    nasty = " ".join(tokenizer.all_special_tokens)
    rows = Dataset.from_list([{"text": f"a {nasty} b", "text_pair": nasty, "label": "yes"}])
    plain = Dataset.from_list([{"text": "a b", "text_pair": "c", "label": "yes"}])
    encode, special = _encode_texts(tokenizer, 256, {"yes": 0}), {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    count = [sum(id_ in special for id_ in encode(batch[:])["input_ids"][0]) for batch in (rows, plain)]
    assert count[0] == count[1] > 0


def test_whatever_is_trained_is_trained_in_float32(bases):
    model = AutoModelForSequenceClassification.from_pretrained(bases["llama"], dtype=torch.bfloat16)
    model.model.embed_tokens.requires_grad_(False)
    in_float32(model)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_labels_of_a_class_label_keep_their_names_and_order():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes", "maybe"])})
    data = Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}], features=features)
    task = read_task(data, data, "d")
    assert task.labels == ["no", "yes", "maybe"] and list(task.train["label"]) == ["yes", "no"]
    numbers = Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    assert read_task(numbers, numbers, "d").labels == ["0", "1"]


BAD_ROWS = {
    "unknown test label": ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], [{"text": "c", "label": "z"}],
                           "test has the label 'z', which no training row has"),
    "one label": ([{"text": "a", "label": "x"}], None, "at least 2 different labels; found ['x']"),
    "missing label": ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], None,
                      "row 1: a label must be a name or an integer; found None"),
    "a number as label": ([{"text": "a", "label": 0.5}], None,
                          "row 0: a label must be a name or an integer; found 0.5"),
    "empty text": ([{"text": "a", "label": "x"}, {"text": " ", "label": "y"}], None, "column 'text', row 1 is empty"),
    "tags that don't match": ([{"tokens": ["a", "b"], "tags": ["X"]}], None, "row 0 has 2 tokens and 1 tags"),
    "answer elsewhere": ([{"question": "q", "context": "abc", "answers": {"text": ["b"], "answer_start": [2]}}], None,
                         "the answer 'b' is not at character 2"),
    "no answer": ([{"question": "q", "context": "abc", "answers": {"text": [""], "answer_start": []}}], None,
                  "with at least one answer"),
    "no context": ([{"question": "q", "context": None, "answers": {"text": ["b"], "answer_start": [0]}}], None,
                   "row 0: column 'context' must be text; found None"),
    "columns": ([{"sentence": "a", "label": "x"}], None, "found ['label', 'sentence']"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case):
    train, test, message = BAD_ROWS[case]
    with pytest.raises(InputError) as error:
        read_task(Dataset.from_list(train), Dataset.from_list(test or train), "d")
    assert message in str(error.value) and str(error.value).startswith("--dataset_name d: ")


# ---------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("base, kind", [("llama", "spans"), ("llama", "tags"), ("gpt2", "pairs"), ("bert", "pairs")])
def test_the_body_comes_from_the_checkpoint(bases, base, kind):
    """LlamaForQuestionAnswering calls its body otherwise than the checkpoint does, and would start from nothing."""
    made = prepared(bases[base], kind)
    body, pretrained = made.model.base_model.state_dict(), AutoModel.from_pretrained(bases[base]).state_dict()
    for name, weight in pretrained.items():
        if "pooler" not in name:  # which the checkpoint hasn't got
            assert torch.equal(body[name], weight), name
    fresh = prepared(bases[base], kind, from_scratch=True).model.base_model.state_dict()
    assert not any(torch.equal(fresh[name], body[name]) for name in fresh if name.endswith("embeddings.weight"))


@pytest.mark.parametrize("how", ["full", "frozen", "lora"])
@pytest.mark.parametrize(
    "base, kind", [("llama", "sentences"), ("bert", "pairs"), ("llama", "tags"), ("gpt2", "spans")]
)
def test_what_moves_is_what_should(bases, base, kind, how, tmp_path):
    made = prepared(bases[base], kind, LORA if how == "lora" else FULL, freeze_body=how == "frozen")
    before = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    trainer_of(made, tmp_path, steps=3).train()
    moved = {name for name, parameter in made.model.named_parameters() if not torch.equal(parameter, before[name])}
    new = {name for name in before if any(word in name for word in ("score", "classifier", "qa_outputs", "pooler"))}
    if how == "full":
        # rows of words and positions that never occur keep their values, a whole parameter doesn't
        assert moved == set(before)
    elif how == "frozen":
        assert moved == new
    else:
        heads = {name for name in new if "modules_to_save" in name}
        assert heads and heads <= moved
        assert moved == heads | {name for name in before if "lora_" in name}
        assert not [name for name in before if "lora_" in name and name in new]  # no adapters in what is trained whole


@pytest.mark.parametrize(
    "base, kind", [("llama", "sentences"), ("llama", "tags"), ("llama", "spans"), ("bert", "pairs")]
)
def test_an_adapter_comes_back_with_plain_peft(bases, base, kind, tmp_path):
    """The head is in it, and so is BERT's pooler, which was new."""
    made = prepared(bases[base], kind, LORA)
    trainer = trainer_of(made, tmp_path, steps=3)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    batch = made.tokenizer.pad(made.rows.select_columns(["input_ids", "attention_mask"])[:2], return_tensors="pt")
    torch.manual_seed(9)
    loaded = LABEL_KINDS[kind].auto_class.from_pretrained(bases[base], **load_options(made.task, made.config))
    loaded = PeftModel.from_pretrained(loaded, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected, found = made.model.eval()(**batch)[0], loaded(**batch)[0]
    assert torch.allclose(expected, found, atol=1e-6)


# ---------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_the_auxiliary_loss_is_that_of_the_language_model_and_is_added_with_its_weight(bases, base, tmp_path):
    made = prepared(bases[base], "sentences", lm_coef=0.5)
    batch = data_collator(made.task, made.tokenizer)(list(made.rows.select(range(10, 15))))
    assert 0 in batch["attention_mask"]
    whole = AutoModelForCausalLM.from_pretrained(bases[base])
    whole.eval()
    each = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        text = ids[mask.bool()][None]
        each.append(whole(input_ids=text, labels=text).loss.item())
    made.model.eval()
    outputs = made.model(**batch, output_hidden_states=True)
    auxiliary = auxiliary_loss(outputs.hidden_states[-1], made.head, batch["input_ids"], batch["attention_mask"])
    assert auxiliary.item() == pytest.approx(np.mean(each), rel=1e-5)
    trainer = trainer_of(made, tmp_path)
    assert trainer.compute_loss(made.model, dict(batch)).item() == pytest.approx(outputs.loss.item())
    for module in made.model.modules():
        module.training = isinstance(module, type(made.model))  # training, but without dropout
    loss = trainer.compute_loss(made.model, dict(batch)).item()
    assert loss == pytest.approx(outputs.loss.item() + 0.5 * np.mean(each), rel=1e-5)


def test_untied_models_use_their_own_output_embeddings(small, tmp_path):
    base = save_tiny(tmp_path / "untied", small, tie_word_embeddings=False)
    made = prepared(base, "sentences", lm_coef=0.5)
    assert torch.equal(made.head, AutoModelForCausalLM.from_pretrained(base).lm_head.weight)
    assert not torch.equal(made.head, made.model.get_input_embeddings().weight)


def test_accumulated_batches_take_the_step_of_the_whole_batch(bases, tmp_path):
    weights = []
    for size, accumulated in ((8, 1), (2, 4)):
        made = prepared(bases["llama"], "sentences", lm_coef=0.5)
        trainer_of(made, tmp_path, steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
                   optim="sgd", max_grad_norm=0.0, seed=3).train()  # fmt: skip
        weights.append(made.model.score.weight.detach().clone())
    assert torch.allclose(*weights, atol=1e-5)


# ---------------------------------------------------------------------------------------------- metrics


def test_span_f1_by_hand():
    result = metric_results("span_f1", predictions=["in the old house", "Lima!", "", "a dog"],
                            references=[["an old house"], ["Oslo", "the lima"], [""], ["a cat"]])  # fmt: skip
    assert result["values"] == pytest.approx([0.8, 1, 1, 0])  # 2 shared words of 3 and 2: 2 · 2 / 5
    assert result["mean"] == pytest.approx(0.7) and result["exact_match"]["mean"] == 0.5


def test_tag_f1_by_hand():
    entity = metric("tag_f1", predictions=[["B-PER", "I-PER", "O", "I-LOC"]], references=[["B-PER", "I-PER", "O", "O"]])
    assert entity.mean == pytest.approx(2 / 3)
    half = metric("tag_f1", predictions=[["B-PER", "O"]], references=[["B-PER", "I-PER"]])
    assert half.mean == 0  # only a whole entity is right
    plain = metric("tag_f1", predictions=[["X", "O", "Y"], ["O", "O"]], references=[["X", "Y", "Y"], ["O", "O"]])
    assert plain.mean == pytest.approx(2 * 2 / 5) and plain.n == 1
    two = metric("tag_f1", predictions=[["B-A", "B-A"]], references=[["B-A", "I-A"]])
    assert two.mean == 0


# ---------------------------------------------------------------------------------------------- the starter's labels


def test_starter_tags_and_spans_are_right_and_held_out():
    spans = finetuning_dataset("spans", max_train=60, max_test=30)
    for split, used in (("train", NAMES[:10]), ("test", NAMES[10:])):
        for row in spans[split]:
            (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
            assert row["context"][start : start + len(text)] == text
            asked = [name for name in NAMES if f" {name} " in f" {row['question'].rstrip('?')} "]
            assert len(asked) == 1 and asked[0] in used
            # the fact before the answer is about the one asked for
            assert asked[0] in row["context"][:start].rsplit(". ", 1)[-1]
    tags = finetuning_dataset("tags", max_train=60, max_test=30)
    for row in tags["test"]:
        assert row["tags"][0] == "CAPITAL" and "O" in row["tags"]
        assert all(word == word.lower() for word in row["tokens"])
    assert not {" ".join(r["tokens"]) for r in tags["train"]} & {" ".join(r["tokens"]) for r in tags["test"]}
    with pytest.raises(InputError, match="--dataset_config nope: the starter has sentiment"):
        finetuning_dataset("nope")
    assert set(finetuning_dataset("question", 20, 10)["train"].column_names) == {"text", "label"}


# ---------------------------------------------------------------------------------------------- the recipe

TINY = ["--dtype", "float32", "--bf16", "false", "--per_device_train_batch_size", "8", "--max_length", "64",
        "--learning_rate", "1e-2", "--use_peft", "false"]  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    return {kind: write_rows(folder / f"{kind}.jsonl", rows * 6) for kind, rows in ROWS.items()}


def recipe(monkeypatch, *words, script="recipes/finetune.py"):
    """Run a recipe in this process, which spares its imports."""
    monkeypatch.setattr(sys, "argv", [script, *(str(word) for word in words)])
    runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.fixture(scope="module")
def finished(bases, labelled, tmp_path_factory):
    """Folder of a run on sentences, as a user starts it."""
    out = tmp_path_factory.mktemp("finetune") / "sentences"
    arguments = ["--model_name_or_path", bases["llama"], "--dataset_name", labelled["sentences"], *TINY,
                 "--num_train_epochs", 3, "--lm_coef", 0.1, "--output_dir", out]  # fmt: skip
    return out, run("recipes/finetune.py", *arguments), arguments


def test_a_run_learns_and_leaves_what_others_use(finished):
    out, process, _ = finished
    state = json.loads((out / "run.json").read_text())
    assert state["finished"] and state["metrics"]["accuracy"] > 0.9
    evaluation = json.loads((out / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    cell = evaluation["metrics"]["accuracy"]
    assert evaluation["labels"] == ["bad", "good", "neutral"] and cell["n"] == len(lines) == evaluation["n"]
    assert cell["mean"] == pytest.approx(np.mean([line["prediction"] == line["label"] for line in lines]))
    assert cell["low"] <= cell["mean"] <= cell["high"] and "held-out accuracy" in process.stdout
    assert "lm_loss" in (out / "trainer_state.json").read_text()
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and 'pipeline("text-classification", model="sentences")' in card
    assert "held-out accuracy" in card and str(out) not in card
    assert (out / "training.png").exists() and "finetune" in (out / "report.html").read_text()
    saved = json.loads((out / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None  # those of the call that cut the rows


def test_the_pipeline_says_label_names(finished):
    out, _, _ = finished
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    classify = pipeline("text-classification", model=str(out))
    found = classify([line["text"] for line in lines])
    assert [answer["label"] for answer in found] == [line["prediction"] for line in lines]


def test_a_finished_run_is_skipped_and_the_seed_makes_the_same_numbers(finished, monkeypatch, capsys, tmp_path):
    out, _, arguments = finished
    recipe(monkeypatch, *arguments)
    assert "already finished" in capsys.readouterr().out
    again = [tmp_path / "again" if word == out else word for word in arguments]
    recipe(monkeypatch, *again)
    first, second = (json.loads((folder / "run.json").read_text())["metrics"] for folder in (out, tmp_path / "again"))
    assert first == second


@pytest.mark.parametrize("kind, score", [("tags", "f1"), ("spans", "exact_match")])
def test_tags_and_spans_are_learned(bases, labelled, kind, score, monkeypatch, tmp_path):
    recipe(monkeypatch, "--model_name_or_path", bases["llama"], "--dataset_name", labelled[kind], "--output_dir",
           tmp_path / kind, *TINY, "--num_train_epochs", 8, "--eval_strategy", "no")  # fmt: skip
    metrics = json.loads((tmp_path / kind / "run.json").read_text())["metrics"]
    assert metrics[score] > 0.8, metrics
    tag = {"tags": "token-classification", "spans": "question-answering"}[kind]
    assert f"pipeline_tag: {tag}" in (tmp_path / kind / "README.md").read_text()


def write_run(folder, scores, seed, text="row"):
    """A finished run's folder, as far as the comparison reads it."""
    folder.mkdir()
    settings = {"seed": seed, "dataset_name": "d"}
    state = {"recipe": "finetune", "command": "c", "settings": settings, "finished": True, "metrics": {}}
    (folder / "run.json").write_text(json.dumps(state))
    (folder / "evaluation.json").write_text(json.dumps({"task": "sentences"}))
    rows = [{"text": f"{text} {number}", "score": score} for number, score in enumerate(scores)]
    write_rows(folder / "predictions.jsonl", rows)


def test_transfer_compares_runs_paired_by_row_and_seed(monkeypatch, tmp_path, capsys):
    rng = np.random.default_rng(0)
    hard = rng.random(300)  # the same rows are hard for all
    models, scores = [], {}
    for name, skill in (("scratch", 0.6), ("full", 0.7), ("copy", 0.6)):
        for seed in (1, 2, 3):
            folder = tmp_path / f"{name}-{seed}"
            scores[name, seed] = [float(skill > value) for value in hard]
            write_run(folder, scores[name, seed], seed)
            models.append(f"{name}={folder}")
    out = tmp_path / "transfer"
    recipe(monkeypatch, "--models", *models, "--output_dir", out, script="eval/transfer.py")
    assert "scratch" in capsys.readouterr().out
    result = json.loads((out / "transfer.json").read_text())
    cells, gains = result["models"], result["differences"]
    assert cells["full"]["mean"] == pytest.approx(np.mean(scores["full", 1])) and len(cells["full"]["seeds"]) == 3
    assert gains["full"]["mean"] == pytest.approx(np.mean(scores["full", 1]) - np.mean(scores["scratch", 1]))
    assert gains["copy"]["low"] == gains["copy"]["high"] == 0  # unpaired, it would not be
    assert gains["full"]["low"] > 0 and gains["full"]["high"] - gains["full"]["low"] < 0.1
    assert (out / "transfer.png").exists() and "Ways of fine-tuning" in (out / "report.html").read_text()
    write_run(tmp_path / "other", scores["full", 1], 1, text="another row")
    for wrong, message in (
        (models[:5], "are compared seed by seed"),
        ([models[0], models[0]], "a run with --seed 1 already"),
        ([f"scratch={tmp_path}"], "no finished run of recipes/finetune.py"),
        (models[3:6], "--reference scratch: not among"),
        ([models[0], f"other={tmp_path / 'other'}"], "was evaluated on other rows"),
    ):
        with pytest.raises(SystemExit):
            recipe(monkeypatch, "--models", *wrong, "--output_dir", tmp_path / "x", script="eval/transfer.py")
        assert message in capsys.readouterr().err


def test_long_rows_of_tags_weigh_more():
    cell, seeds = over_rows_and_seeds(np.array([[1.0, 0.0], [0.5, 0.0]]), np.array([9.0, 1.0]), 0)
    assert seeds == pytest.approx([0.9, 0.45]) and cell.mean == pytest.approx(0.675)
    assert cell.low >= 0 and cell.high <= 1


def test_the_two_way_bootstrap_knows_rows_and_seeds():
    rng = np.random.default_rng(0)
    rows = rng.random((1, 400)) < 0.7
    alike, _ = over_rows_and_seeds(np.repeat(rows, 3, axis=0).astype(float), np.ones(400), 0)
    width = 1.96 * (0.7 * 0.3 / 400) ** 0.5  # of one seed's mean: equal seeds add nothing
    assert alike.high - alike.mean == pytest.approx(width, rel=0.15)
    apart, _ = over_rows_and_seeds(np.stack([np.zeros(400), np.ones(400)]), np.ones(400), 0)
    assert (apart.low, apart.mean, apart.high) == pytest.approx((0, 0.5, 1))


BAD_FLAGS = {
    "lm_coef of an encoder": ("bert", "sentences", ["--lm_coef", "0.5"], "--lm_coef 0.5: bert is an encoder"),
    "lm_coef on tags": ("llama", "tags", ["--lm_coef", "0.5"], "needs sentences or pairs"),
    "negative lm_coef": ("llama", "sentences", ["--lm_coef", "-1"], "--lm_coef -1.0: must be at least 0"),
    "lm_coef and frozen": ("llama", "sentences", ["--lm_coef", "1", "--freeze_body", "true"], "true freezes. Drop one"),
    "frozen and LoRA": ("llama", "sentences", ["--freeze_body", "true", "--use_peft", "true"], "Drop one"),
    "scratch and LoRA": ("llama", "sentences", ["--from_scratch", "true", "--use_peft", "true"], "random weights"),
    "too many rows": ("llama", "sentences", ["--max_train_samples", "9999"], "--max_train_samples 9999: there are"),
    "too long": ("llama", "sentences", ["--max_length", "4096"], "8 to the model's context of 256"),
    "starter data": ("llama", None, ["--dataset_name", "starter", "--dataset_config", "nope"], "--dataset_config nope"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_get_one_clear_line(case, bases, labelled, monkeypatch, capsys, tmp_path):
    base, kind, flags, message = BAD_FLAGS[case]
    data = ["--dataset_name", labelled[kind]] if kind else []
    with pytest.raises(SystemExit) as stop:
        recipe(monkeypatch, "--model_name_or_path", bases[base], *data, "--output_dir", tmp_path / "out", *TINY, *flags)
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


def test_an_adapter_as_base_is_refused(sft, labelled, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        recipe(monkeypatch, "--model_name_or_path", sft, "--dataset_name", labelled["sentences"], "--output_dir",
               tmp_path / "out", *TINY)  # fmt: skip
    assert "is an adapter. Merge it" in capsys.readouterr().err
