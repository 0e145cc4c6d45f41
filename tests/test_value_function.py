"""A value function that is saved, and starts another run."""

import pytest
import torch
from conftest import count_a, ppo_trainer
from safetensors.torch import load_file

from rlhf.errors import InputError
from rlhf.models.adapters import active_adapter
from rlhf.ppo.config import VALUE_FILE
from rlhf.ppo.value_function import load_value_function, save_value_function
from rlhf.rewards import RewardScale


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


def test_the_head_is_put_on_the_new_scale(sft, tokenizer, prompts, tmp_path):
    """Raw scores 10 + 4 V are (10 + 4 V - 6) / 2 = 2 V + 2 on a scale with mean 6 and standard deviation 2."""
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path)
    head = ppo.model.value_head
    weights = {"value_head.weight": torch.ones_like(head.weight), "value_head.bias": torch.tensor([0.5])}
    save_value_function(tmp_path, weights, RewardScale(10.0, 4.0))
    load_value_function(str(tmp_path), ppo.model, RewardScale(6.0, 2.0))
    assert head.weight.unique().tolist() == [2.0]
    assert head.bias.tolist() == [3.0]  # 2 * 0.5 + 2


def test_other_folders_and_forms_are_refused(sft, tokenizer, prompts, tmp_path):
    with pytest.raises(InputError, match=r"--value_model_path .*nowhere: has no value_function.safetensors"):
        ppo_trainer(sft, tokenizer, prompts, tmp_path, value_model_path=str(tmp_path / "nowhere"))
    save_value_function(tmp_path, {"value_head.weight": torch.ones(1, 3)}, RewardScale(0.0, 1.0))
    with pytest.raises(InputError, match="another form or size"):
        ppo_trainer(sft, tokenizer, prompts, tmp_path, value_model_path=str(tmp_path))
