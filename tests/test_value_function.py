"""A value function that is saved, and starts another run."""

import pytest
import torch
from conftest import LORA, count_a, ppo_config, ppo_trainer
from safetensors.torch import load_file

from rlhf.errors import InputError
from rlhf.models.adapters import active_adapter
from rlhf.models.loading import load_policy, load_reward_model
from rlhf.models.sources import resolve
from rlhf.ppo import PPOTrainer
from rlhf.ppo.config import VALUE_FILE
from rlhf.ppo.model import PolicyAndValue
from rlhf.ppo.value_function import check_value_function, load_value_function, save_value_function
from rlhf.rewards import RewardModel, RewardScale, load_reward, resolve_reward


def twice_as_many(prompts, completions, **_):
    """Scores on another scale than those of count_a."""
    return [2 * count + 1 for count in count_a(prompts, completions)]


@pytest.mark.parametrize("value_function", ["head", "adapter"])
def test_a_run_starts_with_the_value_function_of_another(value_function, sft, tokenizer, prompts, tmp_path):
    first = ppo_trainer(sft, tokenizer, prompts, tmp_path / "first", value_function=value_function)
    first.train()
    first.save_model()
    saved = load_file(tmp_path / "first" / VALUE_FILE)
    assert saved["value_head.weight"].abs().max() > 0
    second = ppo_trainer(
        sft, tokenizer, prompts, tmp_path / "second", [twice_as_many], value_function=value_function,
        value_model_path=str(tmp_path / "first"),
    )  # fmt: skip
    rollout = second.rollout([second.train_dataset[n] for n in range(8)])
    scored = second.score(rollout)
    old, new = first.reward_scale, second.reward_scale
    assert new.std != old.std
    weight = saved["value_head.weight"][0] * old.std / new.std
    bias = (saved["value_head.bias"][0] * old.std + old.mean - new.mean) / new.std
    policy = second.model.policy
    for row in range(8):  # by plain transformers, without padding
        kept = rollout.attention_mask[row].bool()
        ids, count = rollout.input_ids[row][kept][None], int(rollout.completion_mask[row].sum())
        with torch.no_grad(), active_adapter(policy, "value" if value_function == "adapter" else "default"):
            hidden = policy.get_base_model().model(ids).last_hidden_state[0, -count - 1 : -1]
        torch.testing.assert_close(scored.values[row, :count], hidden @ weight + bias, rtol=1e-4, atol=1e-4)


def on_reward_model(sft, reward_adapter, tokenizer, prompts, folder, **changes):
    """A trainer whose value function is by default a head on the frozen reward adapter of the policy's base."""
    policy = load_policy(resolve(sft), LORA, tokenizer)
    reward = load_reward(resolve_reward(str(reward_adapter)), LORA, policy=policy)
    args = ppo_config(folder, **changes)
    return PPOTrainer(args, tokenizer, policy, train_dataset=prompts, reward_funcs=[reward])


def test_a_head_on_the_reward_model_starts_as_the_reward_model(sft, reward_adapter, tokenizer, prompts, tmp_path):
    ppo = on_reward_model(sft, reward_adapter, tokenizer, prompts, tmp_path)
    rollout = ppo.rollout([ppo.train_dataset[n] for n in range(8)])
    scored, scale = ppo.score(rollout), ppo.reward_scale
    separate = load_reward_model(resolve(reward_adapter), LORA, tokenizer, trainable=False)
    for row in range(8):  # the classifier of plain transformers on each beginning of the reply
        ids, count = rollout.input_ids[row][rollout.attention_mask[row].bool()], int(rollout.completion_mask[row].sum())
        with torch.no_grad():
            raw = [float(separate(ids[None, : len(ids) - n]).logits) for n in range(count, 0, -1)]
        expected = (torch.tensor(raw) - scale.mean) / scale.std
        torch.testing.assert_close(scored.values[row, :count], expected, rtol=1e-4, atol=1e-4)
        assert not scored.values[row, count:].any()


def test_a_head_on_the_reward_model_learns_and_the_reward_model_does_not(
    sft, reward_adapter, tokenizer, prompts, tmp_path, monkeypatch
):
    """What is read once per rollout gives the same run as reading it again in each step."""
    once = on_reward_model(sft, reward_adapter, tokenizer, prompts, tmp_path / "once")
    reward = {name: p.detach().clone() for name, p in once.model.named_parameters() if ".reward." in name}
    assert once.model.value_parameters() == {"value_head.weight", "value_head.bias"}
    once.train()
    ends = {name: p.detach().clone() for name, p in once.model.named_parameters()}
    assert len(reward) > 4 and all(torch.equal(ends[name], reward[name]) for name in reward)
    monkeypatch.setattr(PolicyAndValue, "frozen_states", lambda *_: None)
    again = on_reward_model(sft, reward_adapter, tokenizer, prompts, tmp_path / "again")
    start = again.model.value_head.weight.detach().clone()
    again.train()
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, ends[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ends["value_head.weight"], start)


@pytest.mark.parametrize(("value_function", "reads", "rate"), [(None, "reward", 1e-2), ("head", None, 1e-3)])
def test_by_default_the_head_reads_the_reward_model_and_learns_ten_times_as_fast(
    value_function, reads, rate, sft, reward_adapter, tokenizer, prompts, tmp_path
):
    ppo = on_reward_model(
        sft, reward_adapter, tokenizer, prompts, tmp_path, value_function=value_function, learning_rate=1e-3
    )
    assert ppo.model.value_adapter == reads
    own = ppo.model.value_parameters()
    rates = {
        (name in own): group["lr"]
        for group in ppo.optimizer.param_groups
        for name, parameter in ppo.model.named_parameters()
        if any(parameter is one for one in group["params"])
    }
    assert rates == {True: pytest.approx(rate), False: 1e-3}
    functions = ppo_trainer(sft, tokenizer, prompts, tmp_path)  # none of its rewards is a model
    assert functions.model.value_adapter is None


def test_a_checkpoint_keeps_its_value_function(sft, reward_adapter, tokenizer, prompts, tmp_path):
    """A head on the trunk and one on the reward adapter have equal names and shapes."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    on_reward_model(sft, reward_adapter, tokenizer, prompts, tmp_path, value_function="head", **settings).train()
    settings["max_steps"] = 2
    other = on_reward_model(sft, reward_adapter, tokenizer, prompts, tmp_path, **settings)
    with pytest.raises(InputError, match="has another value function"):
        other.train(resume_from_checkpoint=True)
    same = on_reward_model(sft, reward_adapter, tokenizer, prompts, tmp_path, value_function="head", **settings)
    assert same.train(resume_from_checkpoint=True).global_step == 2


def test_an_evaluation_reads_no_values(sft, reward_adapter, tokenizer, prompts, tmp_path, monkeypatch):
    ppo = on_reward_model(sft, reward_adapter, tokenizer, prompts, tmp_path)
    monkeypatch.setattr(PolicyAndValue, "frozen_states", lambda *_: pytest.fail("read the reward adapter"))
    assert ppo.evaluate_prompts(ppo.train_dataset, "eval")["eval_kl"] == pytest.approx(0.0, abs=1e-4)


def test_a_head_on_the_reward_model_needs_one(sft, tokenizer, prompts, tmp_path):
    with pytest.raises(InputError, match="--value_function reward: needs a LoRA policy, and a reward adapter"):
        ppo_trainer(sft, tokenizer, prompts, tmp_path, value_function="reward")
    head, other = (ppo_trainer(sft, tokenizer, prompts, tmp_path).model for _ in range(2))
    other.value_adapter = "reward"
    weights = {name: p.detach() for name, p in head.named_parameters() if name in head.value_parameters()}
    save_value_function(tmp_path, weights, RewardScale(0.0, 1.0), head)
    check_value_function(str(tmp_path), head)
    with pytest.raises(InputError, match="a head on the policy"):
        check_value_function(str(tmp_path), other)


def test_a_held_out_reward_model_never_reaches_the_value_function(sft, reward_adapter, tokenizer, prompts, tmp_path):
    for value_function in ("reward", "adapter", None):
        policy = load_policy(resolve(sft), LORA, tokenizer)
        held_out = load_reward(resolve_reward(str(reward_adapter)), LORA, policy=policy)
        assert isinstance(held_out, RewardModel) and held_out.adapter == "reward"
        args = ppo_config(tmp_path, value_function=value_function)
        given = {"train_dataset": prompts, "reward_funcs": [count_a], "eval_reward_funcs": [held_out]}
        if value_function == "reward":
            with pytest.raises(InputError, match="--value_function reward: needs"):
                PPOTrainer(args, tokenizer, policy, **given)
        elif value_function is None:
            assert PPOTrainer(args, tokenizer, policy, **given).model.value_adapter is None
        else:
            ppo = PPOTrainer(args, tokenizer, policy, **given)
            weights = dict(ppo.model.named_parameters())
            copied = [name for name in weights if ".value." in name]
            assert copied
            assert all(torch.equal(weights[name], weights[name.replace(".value.", ".default.")]) for name in copied)


def test_the_head_is_put_on_the_new_scale(sft, tokenizer, prompts, tmp_path):
    """Raw scores 10 + 4 V are (10 + 4 V - 6) / 2 = 2 V + 2 on a scale with mean 6 and standard deviation 2."""
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path)
    head = ppo.model.value_head
    weights = {"value_head.weight": torch.ones_like(head.weight), "value_head.bias": torch.tensor([0.5])}
    save_value_function(tmp_path, weights, RewardScale(10.0, 4.0), ppo.model)
    load_value_function(str(tmp_path), ppo.model, RewardScale(6.0, 2.0))
    assert head.weight.unique().tolist() == [2.0]
    assert head.bias.tolist() == [3.0]  # 2 * 0.5 + 2


def test_other_folders_and_forms_are_refused(sft, tokenizer, prompts, tmp_path):
    with pytest.raises(InputError, match=r"--value_model_path .*nowhere: has no value_function.safetensors"):
        ppo_trainer(sft, tokenizer, prompts, tmp_path, value_model_path=str(tmp_path / "nowhere"))
    other = ppo_trainer(sft, tokenizer, prompts, tmp_path).model
    save_value_function(tmp_path, {"value_head.weight": torch.ones(1, 3)}, RewardScale(0.0, 1.0), other)
    with pytest.raises(InputError, match="another form or size"):
        ppo_trainer(sft, tokenizer, prompts, tmp_path, value_model_path=str(tmp_path))
