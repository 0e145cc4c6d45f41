"""Reward functions: several at once, async, per token, by import path, and what is said when one fails."""

import asyncio
import math

import pytest
import torch
from conftest import assistant, count_a, logged, ppo_config, ppo_trainer, user
from transformers import LlamaConfig, RobertaConfig, RobertaForSequenceClassification

from rlhf.errors import InputError
from rlhf.models.sources import usable_context
from rlhf.ppo.advantages import estimate_advantages
from rlhf.ppo.scoring import RewardScale, shape_scores
from rlhf.ppo.types import Rewards
from rlhf.rewards import RewardError, RewardModel, call_rewards, completion_text, resolve_reward, resolve_rewards

PROMPTS, TEXTS, TOKENS = ["p", "q", "r"], ["a", "bb", "boom"], [[1], [1, 2], [1, 2, 3]]


def length(prompts, completions, **_):
    return [float(len(completion_text(c))) for c in completions]


def call(*functions, **columns):
    return call_rewards(list(functions), PROMPTS, TEXTS, TOKENS, **columns)


def test_functions_get_prompts_completions_tokens_and_columns_by_name():
    def reward(prompts, completions, completion_ids, answer):
        return [float(len(ids)) + extra for ids, extra in zip(completion_ids, answer, strict=True)]

    assert call(reward, length, answer=[0.5, 0.5, 0.5]) == [[1.5, 2.5, 3.5], [1.0, 2.0, 4.0]]


def test_async_functions_run_at_the_same_time():
    arrived = []

    async def first(prompts, completions, **_):
        arrived.append("first")
        while len(arrived) < 2:  # would wait for ever, were the second called after the first
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    class Second:
        async def __call__(self, prompts, completions, **_):
            arrived.append("second")
            return [2.0] * len(completions)

    assert call(first, length, Second()) == [[1.0] * 3, [1.0, 2.0, 4.0], [2.0] * 3]


def test_a_function_that_raises_is_named_with_the_completion_that_did_it():
    def picky(prompts, completions, **_):
        if "boom" in completions:
            raise KeyError("no such word")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'picky' raised KeyError: 'no such word', on the completion 'boom'"):
        call(picky, trainer_state=object(), answer=["x", "y", "z"])

    async def also_picky(prompts, completions, **_):
        return picky(prompts, completions)

    with pytest.raises(RewardError, match=r"'also_picky' raised KeyError.*'boom'"):
        call(also_picky)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], "returned 2 scores for 3 completions"),
        ([1.0, math.nan, 2.0], "returned nan for the completion 'bb'"),
        ([1.0, 2.0, math.inf], "returned inf for the completion 'boom'"),
        ([1.0, "good", 2.0], "returned 'good' for the completion 'bb'"),
        ([1.0, [1.0], 2.0], "returned 1 rewards for the 2 tokens of the completion 'bb'"),
        ([1.0, [1.0, math.nan], 2.0], "for the completion 'bb'"),
    ],
)
def test_answers_that_are_no_scores_stop_with_the_name_and_the_completion(answer, message):
    def wrong(prompts, completions, **_):
        return answer

    with pytest.raises(RewardError, match=message) as raised:
        call(wrong)
    assert "'wrong'" in str(raised.value)


def test_tensors_and_missing_opinions_are_scores_too():
    def some(prompts, completions, **_):
        return [torch.tensor(1.5), None, torch.tensor([0.5, 0.25, 0.25])]

    assert call(some) == [[1.5, None, [0.5, 0.25, 0.25]]]


def test_rewards_are_weighted_and_logged_by_name(sft, tokenizer, prompts, tmp_path):
    def no_opinion_on_some(prompts, completions, number, **_):
        return [None if n % 2 else 2.0 for n in number]

    ppo = ppo_trainer(
        sft, tokenizer, prompts, tmp_path, [count_a, no_opinion_on_some], reward_weights=[1.0, 0.5], total_episodes=8
    )
    rows = next(ppo.prompts())
    rewards = ppo.rewards(ppo.rollout(rows))
    numbers = torch.tensor([row["number"] for row in rows])
    expected = rewards.by_function["count_a"] + torch.where(numbers % 2 == 1, 0.0, 1.0)
    assert torch.allclose(rewards.scores, expected)
    ppo.train()
    entry = logged(ppo)[0]
    assert entry["rewards/no_opinion_on_some/mean"] == 2.0 and entry["rewards/no_opinion_on_some/std"] == 0.0
    assert "rewards/count_a/mean" in entry and "rewards/count_a/std" in entry


def test_rewards_per_token_stay_at_their_tokens():
    rewards = Rewards({}, torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    settings = {"score_clip": None, "length_penalty": 0.0, "missing_eos_penalty": None, "missing_eos_score": None}
    lengths, ended = torch.tensor([3, 2]), torch.tensor([True, True])
    scores, per_token = shape_scores(rewards, RewardScale(1.0, 2.0), lengths, ended, **settings)
    assert scores.tolist() == [1.0, 0.0] and per_token[0].tolist() == [0.5, 0.0, 1.0]
    mask = torch.tensor([[True, True, True], [True, True, False]])
    zeros = torch.zeros(2, 3)
    result = estimate_advantages(
        scores, zeros, zeros, zeros, mask, kl_coef=0.1, gamma=1.0, lam=1.0, per_token=per_token
    )
    # what the tokens don't say of the score, -0.5, lands on the last one
    assert result.rewards.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
    assert result.returns[0].tolist() == [1.0, 0.5, 0.5]


def test_scores_are_normalized_clipped_and_penalized_in_this_order():
    rewards = Rewards({}, torch.tensor([11.0, 3.0, 5.0]), None)
    ended, lengths = torch.tensor([True, True, False]), torch.tensor([4, 2, 10])
    settings = {"score_clip": 2.0, "length_penalty": 0.1}
    scale = RewardScale(5.0, 2.0)
    scores, _ = shape_scores(
        rewards, scale, lengths, ended, **settings, missing_eos_penalty=1.0, missing_eos_score=None
    )
    assert torch.allclose(scores, torch.tensor([2.0 - 0.4, -1.0 - 0.2, 0.0 - 1.0 - 1.0]))
    scores, _ = shape_scores(
        rewards, scale, lengths, ended, **settings, missing_eos_penalty=None, missing_eos_score=-1.0
    )
    assert torch.allclose(scores, torch.tensor([1.6, -1.2, -1.0]))


def test_clipping_shrinks_token_rewards_with_their_sum():
    rewards = Rewards({}, torch.tensor([4.0]), torch.tensor([[1.0, 3.0]]))
    scores, per_token = shape_scores(
        rewards, RewardScale(0.0, 1.0), torch.tensor([2]), torch.tensor([True]), score_clip=2.0, length_penalty=0.0,
        missing_eos_penalty=None, missing_eos_score=None,
    )  # fmt: skip
    assert scores.tolist() == [2.0] and per_token.tolist() == [[0.5, 1.5]]


def test_functions_are_found_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_a_test.py").write_text("def kind(prompts, completions, **_):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    found = resolve_reward("my_rewards_for_a_test.kind", "--reward_funcs", allow_functions=True)
    assert found.model is None and found.function([""], [""]) == [1.0]
    for name, message in (("my_rewards_for_a_test.mean", "has no function 'mean'"), ("no_such.module", "can't import")):
        with pytest.raises(InputError, match=f"--reward_funcs {name}: .*{message}"):
            resolve_reward(name, "--reward_funcs", allow_functions=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"--reward_model_path my_rewards_for_a_test\.kind: "):
        resolve_reward("my_rewards_for_a_test.kind")  # a model's flag takes no function


def test_weights_have_to_match_before_a_model_is_loaded(tmp_path):
    with pytest.raises(InputError, match=r"--reward_weights: 2 weights for the rewards \['starter'\]"):
        resolve_rewards(ppo_config(tmp_path, reward_weights=[1.0, 2.0]))


def test_conversational_completions_look_as_in_trl(sft, tokenizer, prompts, tmp_path):
    """TRL's own reward functions work: think_format_reward reads completion[0]['content']."""
    from trl.rewards import think_format_reward

    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, [think_format_reward], total_episodes=8)
    assert ppo.rewards(ppo.rollout(next(ppo.prompts()))).scores.tolist() == [0.0] * 8
    assert think_format_reward([[{"role": "assistant", "content": "<think>x</think>y"}]]) == [1.0]
    assert user("x")[0]["role"] == "user"


def test_a_reward_model_sees_the_end_of_what_is_longer_than_its_context(tokenizer, capsys):
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, pad_token_id=1, num_labels=1,
    )  # fmt: skip
    assert usable_context(config) == 32 and usable_context(LlamaConfig(max_position_embeddings=34)) == 34
    torch.manual_seed(0)
    reward = RewardModel(RobertaForSequenceClassification(config), tokenizer, name="judge")
    prompts = [user("word " * 60 + "What is it?"), user("Hi"), user("Then what? " * 30)]
    scores = reward(prompts, [assistant("A cat.")] * 3)
    ids = tokenizer.apply_chat_template(prompts[0] + assistant("A cat."), return_dict=True)["input_ids"]
    seen = [ids[0], *ids[-31:]]
    assert reward.encode(prompts[0], "A cat.") == seen
    assert scores[0] == pytest.approx(reward.model(input_ids=torch.tensor([seen])).logits.item(), abs=1e-5)
    said = capsys.readouterr().out
    assert said.count("judge:") == 1 and "context of 32" in said
