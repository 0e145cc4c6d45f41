"""The monitor says what is wrong when it is wrong, and nothing about a healthy run."""

import pytest
from conftest import count_a, ppo_trainer

from rlhf.ppo.monitor import RULES, remarks

HEALTHY = {
    "objective/kl": 2.0, "val/first_ratio": 1.0, "completions/ended": 0.9, "policy/entropy_avg": 3.0,
    "completions/mean_length": 20.0, "rewards/r/mean": 0.1, "rewards/r/std": 1.0, "val/explained_variance": 0.3,
    "sampling/kl": 1e-7,
}  # fmt: skip


def run(length=10, *, last=None, every=None, evaluations=()):
    history = [{**HEALTHY, **(every or {}), "step": step + 1} for step in range(length)]
    history[-1].update(last or {})
    return remarks([*history, *evaluations], response_length=32)


def test_nothing_is_said_about_a_healthy_run():
    assert run() == [] and run(1) == [] and remarks([], 32) == []
    better = [{"eval_score": 0.1, "eval_held_out/gold": 0.2}, {"eval_score": 0.3, "eval_held_out/gold": 0.4}]
    assert run(evaluations=better) == []


@pytest.mark.parametrize(
    ("name", "symptom", "words"),
    [
        ("kl_negative", {"last": {"objective/kl": -3.2}}, "-3.2 nats"),
        ("kl_exploding", {"last": {"objective/kl": 44.0}}, "44.0 nats"),
        ("first_ratio", {"last": {"val/first_ratio": 0.9}}, "0.900"),
        ("engine_drifts", {"last": {"sampling/kl": 0.05}}, "0.0500 nats per token (at first 0.0000)"),
        ("engine_drifts", {"every": {"sampling/kl": 0.0002}, "last": {"sampling/kl": 0.003}}, "0.0030 nats"),
        ("no_reply_ends", {"last": {"completions/ended": 0.0}}, "response_length=32"),
        ("entropy_collapsing", {"last": {"policy/entropy_avg": 0.4}}, "from 3.00 to 0.40"),
        ("length_running_away", {"last": {"completions/mean_length": 32.0}}, "from 20 to 32"),
        ("length_running_away", {"last": {"completions/mean_length": 3.0}}, "from 20 to 3"),
        ("reward_saturated", {"last": {"rewards/r/std": 0.01}}, "'r'"),
        ("value_explains_nothing", {"every": {"val/explained_variance": -0.4}}, "-0.40"),
        ("value_explains_nothing", {"every": {"val/explained_variance": 0.04}}, "0.04"),
        (
            "reward_hacking",
            {"evaluations": [{"eval_score": 0.1, "eval_held_out/gold": 0.5, "step": 4},
                             {"eval_score": 0.9, "eval_held_out/gold": 0.2, "step": 8}]},
            "fell by 0.300 from its best (step 4)",
        ),
    ],
)  # fmt: skip
def test_each_symptom_gets_its_sentence(name, symptom, words):
    said = run(**symptom)
    assert [remark.name for remark in said] == [name]
    assert words in said[0].text and said[0].step == 10


def test_a_reward_may_rest_while_another_one_teaches():
    assert run(last={"rewards/kind/std": 0.0}) == []
    assert [said.name for said in run(last={"rewards/kind/std": 0.0, "rewards/r/std": 0.0})] == ["reward_saturated"]


def test_every_rule_has_a_test():
    names = {mark for mark in test_each_symptom_gets_its_sentence.pytestmark[0].args[1] for mark in [mark[0]]}
    assert names == {rule.__name__.lstrip("_") for rule in RULES}


def test_a_run_prints_its_remarks_once_and_keeps_them(sft, tokenizer, prompts, tmp_path, capsys):
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, [count_a], stop_token_id=1, response_length=4)
    ppo.train()
    said = [entry for entry in ppo.state.log_history if entry.get("remark") == "no_reply_ends"]
    assert [entry["step"] for entry in said] == [1]
    assert capsys.readouterr().out.count("[monitor, update 1] No completion ended by itself") == 1
