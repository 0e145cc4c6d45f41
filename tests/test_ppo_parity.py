"""One seeded update agrees with TRL's own PPOTrainer, in the settings where TRL's is right.

The settings are: float32, one microbatch, one epoch, completions of one length, no gradient clipping. One difference
remains: TRL whitens advantages with Bessel's correction, a factor of sqrt(n / (n - 1)).
"""

import copy
import dataclasses
import sys
from typing import Any

import pytest
import torch
from conftest import logged, ppo_config, present
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.ppo import PPOTrainer
from rlhf.ppo.standalone import StandalonePPOConfig, StandaloneState
from rlhf.ppo.upstream import HAS_TRL_PPO, OnlineTrainerState, TRLPPOConfig, TRLPPOTrainer

if not HAS_TRL_PPO:
    pytest.skip("TRL removed its PPOTrainer in 1.13: nothing to compare with", allow_module_level=True)
TRL = sys.modules[TRLPPOTrainer.__module__]
SETTINGS: dict[str, Any] = {
    "total_episodes": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_mini_batches": 1,
    "num_ppo_epochs": 1, "response_length": 6, "learning_rate": 1e-3, "adam_epsilon": 1e-5, "temperature": 0.7,
    "kl_coef": 0.2, "vf_coef": 0.5, "num_sample_generations": 0, "logging_steps": 1, "report_to": "none",
}  # fmt: skip


def test_without_trls_class_flags_and_state_are_the_same():
    """What rlhf/ppo builds on with later releases of TRL has the fields of 1.12, with their types and defaults."""
    theirs_differ = {"sft_model_path", "reward_model_path"}  # TRL's defaults are models; ours are none
    for own, theirs in ((StandalonePPOConfig, TRLPPOConfig), (StandaloneState, OnlineTrainerState)):
        ours, trls = ({field.name: field for field in dataclasses.fields(kind)} for kind in (own, theirs))
        assert {*ours} == {*trls}
        for name in ours.keys() - theirs_differ:
            for part in ("default", "default_factory"):
                assert getattr(ours[name], part) == getattr(trls[name], part), name
    assert StandalonePPOConfig("out", use_cpu=True).bf16


@pytest.fixture
def models(tiny):
    """Policy, a reference that differs from it, reward and value models."""
    torch.manual_seed(4)
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny) for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for classifier in (reward, value):
            classifier.score.weight.normal_()
            classifier.config.pad_token_id = policy.config.pad_token_id
    return policy, reference, reward, value


def test_one_update_agrees_with_trl(models, tokenizer, prompts, tmp_path, monkeypatch):
    policy, reference, reward, value = (copy.deepcopy(model) for model in models)
    # of one length, so that TRL pads nothing, and as many as a batch, or it would look for more for ever
    rows = prompts.select([0, 3, 6, 9] * 2).select_columns(["input_ids"])
    ours = PPOTrainer(
        ppo_config(tmp_path / "ours", **SETTINGS, ref_adapter_name=None, normalize_reward=False, max_grad_norm=0.0,
                   stop_token=None),
        tokenizer, policy, reference, None, rows, value, reward_funcs=[lambda prompts, **_: [0.0] * len(prompts)],
    )  # fmt: skip
    rollout = ours.rollout(next(ours.prompts()))
    scores = TRL.get_reward(reward, rollout.input_ids, tokenizer.pad_token_id, rollout.input_ids.shape[1] - 6)[1]
    ours.reward_funcs = [lambda prompts, completions, **_: scores.tolist()]
    ours.train()

    def same_rollout(model, queries, *_):
        """In place of TRL's sampling: our completions, with the logits that they have under TRL's policy."""
        left = list(range(len(rollout.input_ids)))
        order = []
        for query in queries:  # TRL shuffles the dataset in its own way
            row = next(n for n in left if torch.equal(rollout.input_ids[n, : queries.shape[1]], query))
            left.remove(row)
            order.append(row)
        sequences = rollout.input_ids[order]
        with torch.no_grad():
            logits = model(sequences).logits[:, queries.shape[1] - 1 : -1] / (SETTINGS["temperature"] + 1e-7)
        return sequences, logits

    monkeypatch.setattr(TRL, "batch_generation", same_rollout)
    policy, reference, reward, value = (copy.deepcopy(model) for model in models)
    args = TRLPPOConfig(output_dir=str(tmp_path / "trl"), bf16=False, use_cpu=True, save_strategy="no",
                        gradient_checkpointing=False, disable_tqdm=True, **SETTINGS)  # fmt: skip
    theirs = TRLPPOTrainer(args, tokenizer, policy, reference, reward, rows, value)
    theirs.train()

    mine, other = logged(ours)[0], logged(theirs)[0]
    for key in ("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
                "objective/scores", "loss/value_avg", "val/ratio", "policy/entropy_avg", "lr", "episode"):  # fmt: skip
        assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
    start = dict(models[0].named_parameters())
    for pair in ((ours.model.policy, theirs.model.policy), (present(ours.model.value_model), theirs.model.value_model)):
        for (name, one), (_, two) in zip(*(model.named_parameters() for model in pair), strict=True):
            assert torch.allclose(one, two, atol=0.05 * SETTINGS["learning_rate"]), name
    moved = [(one - start[name]).abs().max() for name, one in ours.model.policy.named_parameters()]
    assert max(moved) > 0.5 * SETTINGS["learning_rate"]
