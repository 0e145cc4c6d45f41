"""In-context evaluation: log-likelihoods are lm-eval's, examples are drawn as said, results are what was answered."""

import json
import random
import re

import lm_eval
import pytest
import torch
from conftest import ROOT, VOCABULARY, run, save_tiny
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from trl import ModelConfig

import eval.in_context as script
from eval.measuring.harness import (
    SharedExamples,
    SharedPrefixLM,
    compare_with_baseline,
    find_tasks,
    sharpen_head,
    summarize_answers,
    write_task,
)
from eval.stats.intervals import Interval
from rlhf.data.encoding import encode_messages
from rlhf.errors import InputError
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import resolve


@pytest.fixture(scope="module")
def sharp(tokenizer, tmp_path_factory):
    """Folder of a tiny model whose answers depend on every token of the context."""
    return save_tiny(tmp_path_factory.mktemp("sharp"), tokenizer, initializer_range=0.6)


@pytest.fixture(scope="module")
def model(sharp, tokenizer):
    return load_causal_lm(resolve(sharp), ModelConfig(dtype="float32"), tokenizer, trainable=False).eval()


@pytest.fixture(scope="module")
def evaluated(sharp, tmp_path_factory):
    """Two runs: a first one, and the starter's untuned relative with the first as its baseline."""
    out = tmp_path_factory.mktemp("in-context")
    rows = [{"review": f"film {n}", "label": n % 2} for n in range(40)]
    (out / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "my.yaml").write_text(
        "task: mine\ncluster: own\nchoices: [bad, good]\ntemplates:\n  - prompt: '{{ review }} is'\n"
    )
    for split in ("train", "test"):
        lines = [json.dumps({"prompt": f"{split} {n}?", "choices": ["red", "blue"], "label": n % 2}) for n in range(14)]
        (out / f"{split}.jsonl").write_text("\n".join(lines))
    (out / "colours.yaml").write_text(
        (ROOT / "eval" / "measuring" / "multiple_choice.yaml").read_text()
        + f"task: colours\ndataset_kwargs: {{data_files: {{train: {out}/train.jsonl, test: {out}/test.jsonl}}}}\n"
    )
    arguments = ["--tasks", "question", "addition", out / "colours.yaml", "--dataset_name", out / "my.jsonl",
                 "--templates", out / "my.yaml",
                 "--limit", 8, "--num_fewshot", 2, 0, "--dtype", "float32"]  # fmt: skip
    first = run("eval/in_context.py", *arguments, "--model_name_or_path", sharp, "--output_dir", out / "a")
    return out, first.stdout, arguments


def read(folder):
    results = json.loads((folder / "results.json").read_text())
    answers = {
        k: [json.loads(line) for line in (folder / f"answers-{k}.jsonl").read_text().splitlines()] for k in (0, 2)
    }
    return results, answers


def test_log_likelihoods_are_those_of_lm_eval(model, tokenizer):
    rng = random.Random(0)

    def tokens(n):
        return [rng.randrange(100, VOCABULARY) for _ in range(n)]

    beginnings = [tokens(90), tokens(80), []]
    requests = []
    for number in range(36):
        context = beginnings[number % 3] + tokens(rng.randrange(1, 50))
        same = tokens(rng.randrange(0, 3))  # two answers that differ in their last token alone
        requests += [(("", ""), context, same + tokens(1)), (("", ""), context, same + tokens(1))]
        requests.append((("", ""), context, tokens(rng.randrange(1, 6))))
    requests.append((("", ""), tokens(300), tokens(4)))  # longer than the model's 256: cut on the left
    ours = SharedPrefixLM(model, tokenizer, 8)._loglikelihood_tokens(requests, disable_tqdm=True)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)._loglikelihood_tokens(
        requests, disable_tqdm=True
    )
    assert torch.allclose(torch.tensor([a for a, _ in ours]), torch.tensor([a for a, _ in theirs]), atol=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    other = [(texts, [5, *context[1:]], continuation) for texts, context, continuation in requests[:1]]
    (changed,) = SharedPrefixLM(model, tokenizer, 8)._loglikelihood_tokens(other, disable_tqdm=True)
    assert abs(changed[0] - ours[0][0]) > 1e-4  # so the first token of a context of 90 counts


def test_the_head_computes_in_float32_and_the_rest_stays(sharp, tokenizer):
    model = load_causal_lm(resolve(sharp), ModelConfig(dtype="bfloat16"), tokenizer, trainable=False).eval()
    ids = torch.tensor([[5, 6, 7]])
    hidden = model.model(ids).last_hidden_state
    sharpen_head(model)
    logits = model(ids).logits
    assert logits.dtype == torch.float32 and model.get_input_embeddings().weight.dtype == torch.bfloat16
    expected = hidden.float() @ model.get_input_embeddings().weight.float().T
    assert torch.allclose(logits, expected, atol=1e-4)
    assert len(logits.unique()) > 2 * len(logits.bfloat16().unique())


def test_ten_documents_share_their_examples_and_more_examples_begin_with_fewer():
    docs = [{"n": n, "label": int(n < 10)} for n in range(50)]

    def drawn(k, seed=1):
        sampler = SharedExamples(docs)
        sampler.set_rnd(seed)
        return [sampler.sample(k) for _ in range(20)]

    four, eight = drawn(4), drawn(8)
    assert four[:10] == [four[0]] * 10 and four[10:] == [four[10]] * 10 and four[0] != four[10]
    assert [examples[:4] for examples in eight] == four
    assert drawn(4) == four != drawn(4, seed=2)
    assert all([sum(doc["label"] for doc in examples) for examples in (e[:2], e[:4], e)] == [1, 2, 4] for e in eight)
    orders = {tuple(doc["label"] for doc in examples[:2]) for examples in drawn(2, seed=3) + drawn(2, seed=4)}
    assert orders == {(0, 1), (1, 0)}
    sampler = SharedExamples(docs)
    sampler.set_rnd(1)
    assert four[0][0] not in sampler.sample(49, eval_doc=four[0][0])


def test_prompts_have_the_examples_with_their_answers_and_the_question_last(model, tokenizer, tmp_path):
    rows = {
        split: [{"prompt": f"{split} {n}?", "choices": ["red", "blue"], "label": n % 2} for n in range(6)]
        for split in ("train", "test")
    }
    for chat in (False, True):
        results = lm_eval.simple_evaluate(
            SharedPrefixLM(model, tokenizer, 8), tasks=[write_task("colours", rows, tmp_path)], num_fewshot=2,
            apply_chat_template=chat, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
        for sample in results["samples"]["colours"]:
            texts = [text for text, _ in sample["arguments"]]
            assert texts[0] == texts[1]
            assert [answer.strip() for _, answer in sample["arguments"]] == ["red", "blue"]
            assert len(re.findall(r"train \d\?", texts[0])) == 2 and len(re.findall(r"test \d\?", texts[0])) == 1
            for n in range(6):
                if f"train {n}?" in texts[0]:
                    between = "<|im_end|>\n<|im_start|>assistant\n" if chat else " "
                    assert f"train {n}?{between}{['red', 'blue'][n % 2]}" in texts[0]
            end = f"test {sample['doc_id']}?" + ("<|im_end|>\n<|im_start|>assistant\n" if chat else "")
            assert texts[0].endswith(end)


def answered(scores, cluster="c"):
    return [{"score": score, "doc": {"cluster": cluster}} for score in scores]


def test_results_by_hand():
    none = {"a": answered([0, 0, 1, 1]), "b": answered([1, 1]), "other": [{"score": 1.0, "doc": {}}] * 2}
    some = {"a": answered([1, 1, 1, 1]), "b": answered([0, 1]), "other": [{"score": 0.0, "doc": {}}] * 2}
    results = summarize_answers({0: none, 4: some}, seed=0)
    assert results["tasks"]["a"]["0"]["mean"] == 0.5 and results["tasks"]["a"]["4"]["mean"] == 1
    assert results["differences"]["a"]["mean"] == 0.5 and results["differences"]["b"]["mean"] == -0.5
    assert results["clusters"] == {"c": {"0": results["clusters"]["c"]["0"], "4": results["clusters"]["c"]["4"]}}
    assert results["clusters"]["c"]["0"]["mean"] == pytest.approx(4 / 6)
    gains = compare_with_baseline({4: some}, {4: none}, seed=0)
    assert gains["cluster"]["c"]["4"]["mean"] == pytest.approx(1 / 6) and gains["cluster"]["c"]["4"]["n"] == 6
    assert gains["task"]["other"]["4"]["mean"] == -1
    for changed in ([{"score": 0.0, "doc": {}}], [{"score": 0.0, "doc": {"x": n}} for n in range(2)]):
        with pytest.raises(InputError, match=f"--baseline_dir: task 'other' has {len(changed)} rows here and 2 in"):
            compare_with_baseline({4: {**some, "other": changed}}, {4: none}, seed=0)
    assert [script.verdict(Interval(*numbers)) for numbers in (
        (0.2, 0.1, 0.3), (0.1, -0.1, 0.2), (0, 0, 0), (-0.1, -0.2, 0.1), (-0.2, -0.3, -0.1)
    )] == ["yes", "yes, not significant", "equal", "no, not significant", "no"]  # fmt: skip


def test_the_run_reports_what_was_answered(evaluated):
    out, log, _ = evaluated
    results, answers = read(out / "a")
    assert set(results["tasks"]) == {"question", "addition", "mine", "colours"}
    assert set(results["clusters"]) == {"sentence", "arithmetic", "own"}
    for k, rows in answers.items():
        for row in rows:
            logprobs = [logprob for logprob, _ in row["responses"]]
            assert row["score"] == float(logprobs.index(max(logprobs)) == row["doc"]["label"])
        for task in results["tasks"]:
            scores = [row["score"] for row in rows if row["task"] == task]
            cell = results["tasks"][task][str(k)]
            assert cell["mean"] == pytest.approx(sum(scores) / len(scores)) and cell["n"] == len(scores)
            assert cell["low"] <= cell["mean"] <= cell["high"]
    assert answers[0][0]["responses"] != answers[2][0]["responses"]  # the examples were read
    assert results["chance"] == {"question": 0.5, "addition": 0.25, "mine": 0.5}
    assert results["num_fewshot"] == [0, 2]
    assert "2 examples beat 0 on" in log and "of 4 tasks (significantly on" in log
    report = (out / "a" / "report.html").read_text()
    assert (out / "a" / "in_context.png").exists() and "Accuracy in context" in report


def again(monkeypatch, *arguments):
    """The recipe in this process, where lm-eval is loaded already."""
    monkeypatch.setattr("sys.argv", ["eval/in_context.py", *map(str, arguments)])
    script.main()


def test_a_second_model_is_compared_pair_by_pair(evaluated, tiny, monkeypatch, capsys):
    out, _, arguments = evaluated
    again(monkeypatch, *arguments, "--model_name_or_path", tiny, "--baseline_dir", out / "a", "--output_dir", out / "b")
    (_, first), (results, second) = read(out / "a"), read(out / "b")
    gains = results["against_baseline"]
    for k in (0, 2):
        pairs = [(new["score"], old["score"]) for new, old in zip(second[k], first[k], strict=True)
                 if new["task"] == "mine"]  # fmt: skip
        mean = sum(new - old for new, old in pairs) / len(pairs)
        assert gains["task"]["mine"][str(k)]["mean"] == gains["cluster"]["own"][str(k)]["mean"] == pytest.approx(mean)
    assert "cluster arithmetic, 0 examples:" in capsys.readouterr().out


def test_an_interrupted_run_asks_only_what_is_left(evaluated, sharp, monkeypatch, capsys):
    out, _, arguments = evaluated
    arguments = [*arguments, "--model_name_or_path", sharp, "--output_dir", out / "a"]
    results, _ = read(out / "a")
    again(monkeypatch, *arguments)
    assert "already finished" in capsys.readouterr().out
    run_file, none, some = (out / "a" / name for name in ("run.json", "answers-0.jsonl", "answers-2.jsonl"))
    run_file.write_text(json.dumps({**json.loads(run_file.read_text()), "finished": False}))
    before, when = some.read_bytes(), none.stat().st_mtime_ns
    some.unlink()
    again(monkeypatch, *arguments)
    assert some.read_bytes() == before and none.stat().st_mtime_ns == when
    assert read(out / "a")[0] == results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "sentimen"], "--tasks sentimen: neither a starter task"),
        (["--tasks", "gone.yaml"], "--tasks gone.yaml: no such file"),
        (["--num_fewshot", "-1"], "--num_fewshot -1: must be from 0 to 200"),
        (["--limit", "0"], "--limit 0: must be at least 1"),
        (["--tasks", "addition", "--limit", "2"], "starter task 'addition': 2 rows are too few"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, message, monkeypatch, tmp_path):
    with pytest.raises(InputError) as error:
        again(monkeypatch, *arguments, "--output_dir", tmp_path / "out")
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_other_questions_are_no_baseline(evaluated, sharp, monkeypatch, tmp_path):
    out, _, arguments = evaluated
    other = [*arguments, "--seed", 7, "--model_name_or_path", sharp, "--baseline_dir", out / "a"]
    with pytest.raises(InputError, match="has other questions in task 'question'"):
        again(monkeypatch, *other, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_examples_than_training_rows_are_refused_before_a_model_is_loaded(evaluated, monkeypatch, tmp_path):
    _, _, arguments = evaluated
    with pytest.raises(InputError, match="--num_fewshot 40: task 'mine' has 36 training rows"):
        words = [str(word) for word in arguments]
        place = words.index("--num_fewshot") + 1  # the numbers behind it give way to 40
        end = next((i for i in range(place, len(words)) if words[i].startswith("--")), len(words))
        again(monkeypatch, *words[:place], 40, *words[end:], "--model_name_or_path", "starter",
              "--output_dir", tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_task_file_with_too_few_examples_is_refused_in_one_line(evaluated, sharp, monkeypatch, tmp_path):
    out, _, _ = evaluated
    with pytest.raises(InputError, match="--num_fewshot 20: lm-eval can't ask a task"):
        again(monkeypatch, "--tasks", out / "colours.yaml", "--num_fewshot", 20, "--model_name_or_path", sharp,
              "--limit", 2, "--dtype", "float32", "--output_dir", tmp_path / "out")  # fmt: skip


def test_control_tokens_in_questions_and_answers_are_text(model, tokenizer):
    typed = "what is <|im_end|> and <|im_start|>?"
    plain = SharedPrefixLM(model, tokenizer, 8)
    for text in (typed, "no such thing", "<|im_end|>"):
        assert plain.tok_encode(text) == [
            number for part in re.split(r"(<\|im_\w+\|>)", text)
            for number in tokenizer(part, split_special_tokens=True)["input_ids"]
        ]  # fmt: skip
    chat = SharedPrefixLM(model, tokenizer, 8)
    messages = [{"role": "user", "content": typed}, {"role": "assistant", "content": "a <|im_end|>"},
                {"role": "user", "content": "and?"}]  # fmt: skip
    prompt = chat.apply_chat_template(messages)
    assert chat.tok_encode(prompt) == encode_messages(tokenizer, messages, add_generation_prompt=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for lm, context in ((plain, typed), (chat, prompt)):
        context_ids, answer_ids = lm._encode_pair(context, "it is <|im_end|>")
        # lm-eval counts a context's last newline as part of the answer
        assert context_ids == lm.tok_encode(context.rstrip()) and end not in answer_ids
        assert tokenizer.decode(answer_ids).lstrip() == "it is <|im_end|>"
    ids, _ = chat.tok_batch_encode([prompt])
    assert tokenizer.decode(ids[0]).count(typed) == 1


def test_names_of_lm_eval_are_known():
    assert find_tasks(["arc_easy", str(ROOT / "eval" / "measuring" / "multiple_choice.yaml")])
    with pytest.raises(InputError, match="Did you mean arc_easy"):
        find_tasks(["arc_eazy"])
