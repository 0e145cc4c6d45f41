"""Models and functions as labelers."""

import json

import pytest
import torch
from conftest import present, run
from transformers import LlamaConfig
from trl import ModelConfig

import rlhf.feedback.labelers
from eval.compare import CompareArguments, judges_of
from rlhf.comparisons import make_task
from rlhf.errors import InputError
from rlhf.feedback.labelers import JudgeLabeler, LabelerArguments, LabelerSettings, ScoreLabeler, make_labeler
from rlhf.models.sources import resolve
from rlhf.rewards import JudgeSource, resolve_judge
from rlhf.rewards.local_judge import LocalJudge, load_judge
from rlhf.rewards.rubrics import Criterion, choice_question

MODEL_ARGS = ModelConfig(dtype="float32")


def tasks():
    return [
        make_task("train", [{"role": "user", "content": "Hi"}], ["bb", "a", "ccc"], ["m"] * 3),
        make_task("train", [{"role": "user", "content": "Ho"}], ["x", "y"], ["m"] * 2),
    ]


def test_a_function_prefers_what_it_scores_higher(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "taste.py").write_text(
        "def longer(prompts, completions, completion_ids, **columns):\n"
        "    assert all(ids for ids in completion_ids)\n"
        "    return [float(len(completion[0]['content'])) for completion in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    labeler = ScoreLabeler(["taste.longer"], MODEL_ARGS, tokenizer)
    first, second = labeler.compare(tasks())
    assert [(c.first, c.second, c.preferred, c.certainty) for c in first] == [
        (0, 1, "first", None), (0, 2, "second", None), (1, 2, "second", None),
    ]  # fmt: skip
    assert [c.preferred for c in second] == ["tie"]
    assert labeler.name == "reward taste.longer"


def test_a_reply_without_a_score_ties_with_every_other(tokenizer, tmp_path, monkeypatch, capsys):
    (tmp_path / "shy.py").write_text(
        "def rate(completions, **columns):\n"
        "    texts = [completion[0]['content'] for completion in completions]\n"
        "    return [None if text == 'a' else float(len(text)) for text in texts]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    first, second = ScoreLabeler(["shy.rate"], MODEL_ARGS, tokenizer).compare(tasks())
    assert [c.preferred for c in first] == ["tie", "second", "tie"]
    assert [c.preferred for c in second] == ["tie"]
    assert "no score for 1 of 5 replies" in capsys.readouterr().out


class OneSided(torch.nn.Module):
    """A judge that says A with a set probability, whatever it reads."""

    def __init__(self, tokenizer, share):
        super().__init__()
        self.device, self.config = torch.device("cpu"), LlamaConfig()
        logits = torch.full((len(tokenizer),), -30.0)
        self.head = torch.nn.Identity()
        for letter, probability in zip("AB", share, strict=True):
            logits[tokenizer.encode(f" {letter}", add_special_tokens=False)[-1]] = torch.tensor(probability).log()
        logits[0] = torch.tensor(max(1e-9, 1 - sum(share))).log()
        self.logits = logits

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **_):
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def judge_of(model, tokenizer, *criteria):
    """The labeler of a model that is there already."""

    class Found(JudgeSource):
        def load(self, *_, **__):
            return LocalJudge(model, tokenizer, 16, "one-sided")

    return JudgeLabeler(Found([Criterion("", text, weight) for text, weight in criteria], None, None), MODEL_ARGS)


def judge(tokenizer, share):
    return judge_of(OneSided(tokenizer, share), tokenizer, ("Choose the shorter reply.", 1.0))


def test_asking_both_orders_cancels_position_bias(tokenizer):
    answers = judge(tokenizer, (0.9, 0.1)).compare(tasks())
    assert all(abs(answer.certainty - 0.5) < 1e-6 for given in answers for answer in given)


def test_a_judge_that_answers_neither_is_an_error_and_nothing_is_made_up(tokenizer, capsys):
    with pytest.raises(InputError, match="neither A nor B to any question"):
        judge(tokenizer, (0.01, 0.01)).compare(tasks())
    assert "4 of 4 questions" in capsys.readouterr().out


def test_the_judge_reads_principle_conversation_and_both_replies(tiny, tokenizer):
    local = load_judge(resolve(tiny), MODEL_ARGS)
    question = choice_question("Be kind.", [{"role": "user", "content": "Hi <|im_end|>"}], "one", "other")
    for part in ("Be kind.", "user: Hi <|im_end|>", "Reply A:\n```\none\n```", "Reply B:\n```\nother\n```"):
        assert part in question
    ids = local.encode(question, "A")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == local.encode("harmless", "A").count(end)  # the user's text ends no turn


def test_a_real_model_judges_from_its_probabilities(tiny, monkeypatch):
    settings = LabelerArguments(judge_model_name_or_path=str(tiny), principle="Be kind.")
    labeler = JudgeLabeler(resolve_judge(settings), MODEL_ARGS)
    monkeypatch.setattr(rlhf.feedback.labelers, "LEAST_ANSWERED", 0.0)  # a random model answers anything
    answers = labeler.compare(tasks())
    assert [len(given) for given in answers] == [3, 1]
    assert all(0.5 <= present(answer.certainty) <= 1 for given in answers for answer in given)
    assert answers == labeler.compare(tasks())


@pytest.mark.parametrize(
    ("settings", "flag"),
    [({"labeler": "nobody"}, "--labeler nobody"), ({"labeler": "judge", "principle": " "}, "--principle"),
     ({"labeler": "human", "overlap": 2.0}, "--overlap"),
     ({"labeler": "reward", "reward_funcs": []}, "--reward_funcs"),
     ({"labeler": "reward", "reward_funcs": ["needy.right"]}, "--reward_funcs needy.right: needs .*, which is not"),
     ({"labeler": "judge", "labeler_temperature": 0.3}, "--labeler_temperature 0.3: .* --labeler simulated"),
     ({"reward_funcs": ["a.b", "c"]}, "--reward_funcs a.b c: scores nothing here. Add --labeler reward")],
)  # fmt: skip
def test_wrong_settings_are_named(settings, flag, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("def right(completions, answer): return [1.0 for _ in completions]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=flag):
        arguments = LabelerArguments(**settings)
        make_labeler(arguments.labeler, arguments, MODEL_ARGS, tokenizer, str(tmp_path), 0)


def test_rewards_of_other_data_judge_by_default(tokenizer):
    settings = LabelerSettings(reward_funcs=["starter"])
    assert [*judges_of(CompareArguments(), settings, "mine.jsonl", MODEL_ARGS, tokenizer)] == ["reward"]
    with pytest.raises(InputError, match=r"^--reward_funcs starter: scores nothing here\. Add reward to --judges"):
        judges_of(CompareArguments(), settings, "starter", MODEL_ARGS, tokenizer)


def test_replies_that_are_all_alike_make_no_finished_dataset(tiny, files, tmp_path):
    words = ["--model_name_or_path", tiny, "--dataset_name", files / "prompts.jsonl", "--output_dir",
             tmp_path / "pairs", "--dtype", "float32", "--max_new_tokens", 4, "--temperature", 0.001]  # fmt: skip
    said = run("recipes/collect.py", *words, check=False)
    line = said.stderr.splitlines()[-1]
    assert said.returncode == 2 and line.startswith("error: --labeler simulated: prefers no reply to another")
    assert not json.loads((tmp_path / "pairs" / "run.json").read_text())["finished"]


def test_a_rubric_weighs_its_criteria(tokenizer):
    class Alternating(OneSided):
        """Says A to the questions of one criterion and, in both orders, what is the first reply to the other's."""

        def forward(self, input_ids, **_):
            logits = super().forward(input_ids).logits.clone()
            a, b = (tokenizer.encode(f" {letter}", add_special_tokens=False)[-1] for letter in "AB")
            for row, ids in enumerate(input_ids):
                text = tokenizer.decode(ids)
                if "Prefer x." in text and text.index("x\n") > text.index("y\n"):
                    logits[row, :, [a, b]] = logits[row, :, [b, a]]
            return type("Output", (), {"logits": logits})

    labeler = judge_of(Alternating(tokenizer, (0.9, 0.1)), tokenizer, ("Prefer x.", 3.0), ("Be kind.", 1.0))
    (answer,) = labeler.compare(tasks()[1:])[0]
    assert answer.preferred == "first" and present(answer.certainty) == pytest.approx((3 * 0.9 + 0.5) / 4)
