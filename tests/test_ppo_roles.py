"""One base, four roles: policy, reference, value and reward as adapters and heads over one model in memory."""

import pytest
import torch
from conftest import LORA, count_a, logged, ppo_config, ppo_trainer
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import SFTConfig

from rlhf.errors import InputError
from rlhf.feedback.speakers import load_speakers
from rlhf.models.adapters import REFERENCE, REWARD, VALUE, active_adapter
from rlhf.models.causality import need_causal
from rlhf.models.loading import load_causal_lm, load_policy, load_reward_model
from rlhf.models.losses import FUSED, fit_loss
from rlhf.models.prefix import Rows
from rlhf.models.sources import resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.ppo import PPOTrainer
from rlhf.rewards import RewardModel, load_reward, resolve_reward
from rlhf.rloo import RLOOConfig, RLOOTrainer

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
ROWS = Rows(IDS, torch.ones_like(IDS), torch.tensor([3]))


def load_model_reward(folder, policy):
    """A reward model as a reward function; an adapter is put beside the policy's own."""
    reward = load_reward(resolve_reward(str(folder)), LORA, policy=policy)
    assert isinstance(reward, RewardModel)
    return reward


def shared(sft, reward_adapter, tokenizer, prompts, folder, **changes):
    """A trainer whose reward model is an adapter over the policy's base."""
    policy = load_policy(resolve(sft), LORA, tokenizer)
    reward = load_model_reward(reward_adapter, policy)
    return PPOTrainer(
        ppo_config(folder, **changes), tokenizer, policy, train_dataset=prompts, reward_funcs=[reward]
    ), reward


def test_a_reward_adapter_over_the_policys_base_scores_as_the_separate_model(
    sft, reward_adapter, tokenizer, prompts, tmp_path
):
    _ppo, reward = shared(sft, reward_adapter, tokenizer, prompts, tmp_path)
    separate = load_reward_model(resolve(reward_adapter), LORA, tokenizer, trainable=False)
    alone = RewardModel(separate, load_tokenizer(resolve(reward_adapter)))
    chats = [row["prompt"] for row in prompts]
    replies = ["Hi there", "No.", "a", "Well, that is a longer one", ""] * 2
    ours, theirs = reward(chats, replies), alone(chats, replies)
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-5)
    assert len({round(score, 4) for score in ours}) > 4
    # and as transformers' own classifier computes it
    batch = tokenizer.pad({"input_ids": [alone.encode(chats[0], replies[0])]}, return_tensors="pt")
    assert abs(float(separate(**batch).logits) - ours[0]) < 1e-5


def saved_adapter(base, folder, auto_class=AutoModelForCausalLM, task="CAUSAL_LM", **settings):
    """Save an adapter that changes what its base says; returns its folder."""
    torch.manual_seed(1)
    model = auto_class.from_pretrained(base, **({"num_labels": 1} if task == "SEQ_CLS" else {}))
    model = get_peft_model(model, LoraConfig(task_type=task, r=2, target_modules=["q_proj"], **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 10
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


CHANGE_THE_BASE = (
    *({"init_lora_weights": start} for start in ("pissa", "olora")),
    *({"bias": kind} for kind in ("all", "lora_only")),
    {"layer_replication": [[0, 2], [1, 2]]},
)
LEAVE_THE_BASE = (
    *({"init_lora_weights": start} for start in (False, "gaussian", "eva", "orthogonal", "mica")),
    {"trainable_token_indices": [5, 6]},
    {"target_parameters": ["mlp.down_proj.weight"]},
)


@pytest.mark.parametrize("settings", CHANGE_THE_BASE, ids=str)
def test_an_adapter_that_changes_its_base_shares_it_with_no_other(settings, tiny, sft, tokenizer, prompts, tmp_path):
    name = next(iter(settings))
    folder = saved_adapter(tiny, tmp_path / "a", **settings)
    alone = load_causal_lm(resolve(folder), LORA, tokenizer).eval()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
    torch.testing.assert_close(alone(IDS).logits, plain(IDS).logits)
    for source, start in ((folder, folder), (sft, folder), (folder, sft), (tiny, folder)):
        with pytest.raises(InputError, match=f"^--model_name_or_path {folder}: its {name} .*the base, which other"):
            load_policy(resolve(source), LORA, tokenizer, start=resolve(start))
    with pytest.raises(InputError, match=f"^model: the reference is .* its {name} "):
        PPOTrainer(ppo_config(tmp_path), tokenizer, alone, train_dataset=prompts, reward_funcs=[count_a])
    with pytest.raises(InputError, match=f"^model: the reference uses .* its {name} "):
        RLOOTrainer(alone, count_a, RLOOConfig(str(tmp_path), use_cpu=True, bf16=False))
    both = {"a": resolve(folder), "b": resolve(sft)}
    one, other = load_speakers(both, dict.fromkeys(both, tokenizer), LORA, max_new_tokens=8, temperature=1.0)
    assert one.model is not other.model
    torch.testing.assert_close(one.model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("settings", LEAVE_THE_BASE, ids=str)
def test_policy_and_reference_are_the_adapter_of_plain_peft(settings, tiny, tokenizer, tmp_path):
    folder = saved_adapter(tiny, tmp_path, **settings)
    policy = load_policy(resolve(folder), LORA, tokenizer).eval()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
    for name in ("default", REFERENCE):
        with active_adapter(policy, name):
            torch.testing.assert_close(policy(IDS).logits, plain(IDS).logits)
    if not (FUSED and "trainable_token_indices" in settings):  # which that loss passes over, so that it is refused
        fit_loss(SFTConfig(tmp_path, use_cpu=True, bf16=False), policy)
    need_causal(policy.get_base_model(), "policy")


@pytest.mark.parametrize("settings", [*CHANGE_THE_BASE, *LEAVE_THE_BASE], ids=str)
def test_no_reward_adapter_moves_policy_or_reference(settings, tiny, sft, tokenizer, tmp_path):
    folder = saved_adapter(tiny, tmp_path, AutoModelForSequenceClassification, "SEQ_CLS", **settings)
    policy = load_policy(resolve(sft), LORA, tokenizer).eval()
    before = policy(IDS).logits
    reward = load_model_reward(folder, policy)
    chat = [{"role": "user", "content": "Hello"}]
    score = reward([chat], ["yes"])[0]
    for name in ("default", REFERENCE):
        with active_adapter(policy, name):
            assert torch.equal(policy(IDS).logits, before)
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    plain = PeftModel.from_pretrained(base, folder)
    assert score == pytest.approx(plain(torch.tensor([reward.encode(chat, "yes")])).logits.item(), abs=1e-5)


def test_one_base_in_memory_serves_all_roles(sft, reward_adapter, tokenizer, prompts, tmp_path):
    ppo, reward = shared(sft, reward_adapter, tokenizer, prompts, tmp_path, value_function="adapter")
    assert reward.model is ppo.model.policy
    assert ppo.ref_model is None and ppo.model.value_model is None
    base = sum(
        p.numel() for name, p in ppo.model.named_parameters() if "lora_" not in name and "value_head" not in name
    )
    plain = AutoModelForCausalLM.from_pretrained(resolve(sft).base)
    assert base == sum(p.numel() for p in plain.parameters())
    assert set(ppo.model.policy.peft_config) == {"default", REFERENCE, REWARD, VALUE}


def test_all_reward_adapters_share_the_base_and_score_as_separate_models(
    sft, reward_adapter, second_reward_adapter, tokenizer
):
    policy = load_policy(resolve(sft), LORA, tokenizer).eval()
    before, chat = policy(IDS).logits, [{"role": "user", "content": "Hello"}]
    folders = [reward_adapter, second_reward_adapter, reward_adapter]
    rewards = [load_model_reward(folder, policy) for folder in folders]
    assert [reward.adapter for reward in rewards] == [REWARD, "reward_2", "reward_3"]
    assert all(reward.model is policy for reward in rewards)
    for reward, folder in zip(rewards, folders, strict=True):
        base = AutoModelForSequenceClassification.from_pretrained(
            resolve(sft).base, num_labels=1, pad_token_id=tokenizer.pad_token_id
        )
        plain = PeftModel.from_pretrained(base, folder).eval()
        score = plain(torch.tensor([reward.encode(chat, "yes")])).logits.item()
        assert reward([chat], ["yes"]) == pytest.approx([score], abs=1e-5)
    first, second, again = (reward([chat], ["yes"])[0] for reward in rewards)
    assert first == again and abs(first - second) > 0.01
    assert torch.equal(policy(IDS).logits, before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_never_leak_between_roles(sft, reward_adapter, tokenizer, prompts, tmp_path, checkpointing):
    """Each loss alone reaches its own adapter, and both together give the same gradients."""
    settings = {"value_function": "adapter", "activation_checkpointing": checkpointing}
    ppo, _ = shared(sft, reward_adapter, tokenizer, prompts, tmp_path, **settings)
    ppo.score(ppo.rollout(next(ppo.prompts())))  # gives the value head its weights
    model = ppo.model.train()

    def gradients(*parts):
        model.zero_grad()
        output = model(ROWS, 1.0)
        sum(getattr(output, part).pow(2).sum() for part in parts).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    policy, value, both = gradients("logprobs"), gradients("values"), gradients("logprobs", "values")
    assert policy and all(".default." in name for name in policy)
    assert value and all(f".{VALUE}." in name or "value_head" in name for name in value)
    assert set(both) == set(policy) | set(value)
    for name, gradient in {**policy, **value}.items():
        assert torch.allclose(both[name], gradient, atol=1e-6), name


@pytest.mark.parametrize("value_function", ["head", "adapter"])
def test_activation_checkpointing_changes_no_gradient(sft, tokenizer, prompts, tmp_path, value_function):
    gradients = []
    for checkpointing in (False, True):
        ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, activation_checkpointing=checkpointing,
                          value_function=value_function)  # fmt: skip
        torch.nn.init.ones_(ppo.model.value_head.weight)
        assert ppo.model.policy.get_base_model().model.gradient_checkpointing is checkpointing
        output = ppo.model.train()(ROWS, 1.0)
        (output.logprobs.sum() + output.values.sum()).backward()
        gradients.append({name: p.grad for name, p in ppo.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_only_policy_and_value_adapters_move(sft, reward_adapter, tokenizer, prompts, tmp_path):
    ppo, _ = shared(sft, reward_adapter, tokenizer, prompts, tmp_path, value_function="adapter")
    before = {name: p.detach().clone() for name, p in ppo.model.named_parameters()}
    ppo.train()
    for name, parameter in ppo.model.named_parameters():
        trained = ".default." in name or f".{VALUE}." in name or "value_head" in name
        assert torch.equal(before[name], parameter) != trained, name
    assert abs(logged(ppo)[0]["objective/kl"]) < 1e-5


def test_policy_and_reference_start_from_sft_and_the_critic_from_the_reward_model(
    sft, reward_adapter, tokenizer, prompts, tmp_path
):
    ppo, reward = shared(
        sft, reward_adapter, tokenizer, prompts, tmp_path, value_function="adapter", normalize_reward=False
    )
    states = {
        name: get_peft_model_state_dict(ppo.model.policy, adapter_name=name) for name in ppo.model.policy.peft_config
    }
    assert all(torch.equal(states["default"][name], states[REFERENCE][name]) for name in states["default"])
    assert all(torch.equal(states[VALUE][name], states[REWARD][name]) for name in states[VALUE])
    rollout = ppo.rollout(next(ppo.prompts()))
    ppo.score(rollout)
    assert torch.equal(ppo.model.value_head.weight, reward.head.weight)


def test_the_critics_scale_is_that_of_the_normalized_reward(sft, reward_adapter, tokenizer, prompts, tmp_path):
    ppo, reward = shared(sft, reward_adapter, tokenizer, prompts, tmp_path, value_function="adapter")
    ppo.score(ppo.rollout(next(ppo.prompts())))
    hidden = torch.randn(4, reward.head.in_features)
    expected = (reward.head(hidden) - ppo.reward_scale.mean) / ppo.reward_scale.std
    assert torch.allclose(ppo.model.value_head(hidden), expected, atol=1e-4)


def test_active_adapter_leaves_requires_grad_alone_and_restores(sft, tokenizer):
    policy = load_policy(resolve(sft), LORA, tokenizer)
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    inside = policy(IDS).logits
    torch.nn.init.normal_(next(p for name, p in policy.named_parameters() if "lora_B.default" in name), std=1.0)
    changed = policy(IDS).logits
    with active_adapter(policy, REFERENCE):
        assert torch.equal(policy(IDS).logits, inside)
        assert {name for name, p in policy.named_parameters() if p.requires_grad} == trainable
        with active_adapter(policy, None):
            bare = policy(IDS).logits
    assert torch.equal(policy(IDS).logits, changed)
    with policy.disable_adapter():
        assert torch.equal(policy(IDS).logits, bare)


def test_an_adapter_value_function_needs_lora(tiny, tokenizer, prompts, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(tiny)
    args = ppo_config(tmp_path, value_function="adapter", ref_adapter_name=None)
    with pytest.raises(InputError, match="--value_function adapter"):
        PPOTrainer(args, tokenizer, policy, train_dataset=prompts, reward_funcs=[count_a])


def test_reentrant_checkpointing_is_refused_with_adapters(sft, tokenizer, prompts, tmp_path):
    with pytest.raises(InputError, match="use_reentrant"):
        ppo_trainer(sft, tokenizer, prompts, tmp_path, activation_checkpointing=True,
                    activation_checkpointing_kwargs={"use_reentrant": True})  # fmt: skip


def test_an_external_reward_model_keeps_its_own_tokenizer(sft, tiny, tokenizer, prompts, tmp_path):
    """A full classifier, saved with another chat template, is called with texts that it encodes itself."""
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    classifier.save_pretrained(tmp_path / "reward")
    other = load_tokenizer(resolve(tiny))
    other.chat_template = "{% for m in messages %}{{ m['role'] + '|' + m['content'] + eos_token }}{% endfor %}"
    other.save_pretrained(tmp_path / "reward")
    policy = load_policy(resolve(sft), LORA, tokenizer)
    reward = load_model_reward(tmp_path / "reward", policy)
    assert reward.model is not policy
    ids = reward.encode([{"role": "user", "content": "Hi"}], "Yo")
    assert other.decode(ids).startswith("user|Hi") and ids[-1] == other.eos_token_id
