"""Ensembles of reward models: hand numbers, one base in memory, exact resume, and the proxy of over-optimization."""

import json
import math

import pytest
import torch
from conftest import LORA, TINY_PPO, assistant, count_a, logged, ppo_config, ppo_trainer, present, run, user
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rlhf.comparisons import Prompt
from rlhf.errors import InputError
from rlhf.models.adapters import REWARD
from rlhf.models.loading import load_policy
from rlhf.models.sources import resolve
from rlhf.ppo import PPOTrainer
from rlhf.rewards import (
    Combination,
    Completion,
    RewardEnsemble,
    RewardError,
    RewardLog,
    RewardModel,
    load_rewards,
    resolve_rewards,
)
from rlhf.run.files import write_jsonl

PROMPTS: list[Prompt] = ["p", "q"]
TEXTS: list[Completion] = ["a", "bb", "ccc"]
SCORES = {"a": (0.0, 200.0), "bb": (2.0, 210.0), "ccc": (4.0, 190.0)}  # what two models say


def first(completions, **_):
    return [SCORES[text][0] for text in completions]


def second(completions, **_):
    return [SCORES[text][1] for text in completions]


def test_scores_are_combined_on_one_scale_that_the_first_batch_sets():
    # of `a` and `bb`: means 1 and 205, standard deviations 1 and 5; so `ccc` has 3 and -3
    expected = {"mean": [-1.0, 1.0, 0.0], "wco": [-1.0, 1.0, -3.0], "uwo": [-1.0, 1.0, -0.5 * 9.0]}
    hows: tuple[Combination, ...] = ("mean", "wco", "uwo")
    for how in hows:
        one, other, third = expected[how]
        ensemble, log = RewardEnsemble([first, second], how, 0.5), RewardLog()
        assert ensemble(PROMPTS, TEXTS[:2]) == [one, other]
        assert ensemble(PROMPTS[:1], TEXTS[2:], log_metric=log.log_metric) == [third]
        assert ensemble.scales == [(1.0, 1.0), (205.0, 5.0)]
        assert log.means() == {"ensemble/spread": 3.0} and ensemble.raw == {"first": [4.0], "second": [190.0]}
    constant = RewardEnsemble([first, lambda completions: [7.0] * len(completions)])
    assert constant(PROMPTS, TEXTS[:2]) == [-0.5, 0.5]


def test_what_cant_be_combined_is_refused():
    with pytest.raises(InputError, match="two reward models or more; found 1"):
        RewardEnsemble([first])
    silent = RewardEnsemble([first, lambda completions: [1.0, None]])
    with pytest.raises(RewardError, match=r"'<lambda>' of an ensemble returned None .*number 1"):
        silent(PROMPTS, TEXTS[:2])


def ensemble_trainer(folder, sft, adapters, tokenizer, prompts, extra=None, **changes):
    """A trainer whose reward models are adapters over the policy's base; `extra` is PPOTrainer's."""
    policy = load_policy(resolve(sft), LORA, tokenizer)
    args = ppo_config(folder, reward_model_path=list(adapters), **changes)
    rewards = load_rewards(resolve_rewards(args), args, LORA, policy=policy)
    return PPOTrainer(args, tokenizer, policy, train_dataset=prompts, reward_funcs=rewards, **(extra or {}))


def members_of(ensemble):
    """The models of an ensemble."""
    assert all(isinstance(member, RewardModel) for member in ensemble.members)
    return ensemble.members


@pytest.fixture
def adapters(reward_adapter, second_reward_adapter):
    return reward_adapter, second_reward_adapter


def test_ppo_learns_from_an_ensemble_and_resumes_with_its_scales(sft, adapters, tokenizer, prompts, tmp_path):
    settings = {"reward_ensemble": "uwo", "total_episodes": 24, "save_strategy": "steps", "save_steps": 1}
    whole, resumed = (
        ensemble_trainer(tmp_path / name, sft, adapters, tokenizer, prompts, **settings) for name in ("whole", "again")
    )
    (ensemble,) = whole.ensembles()
    assert {member.model for member in members_of(ensemble)} == {whole.model.policy}
    whole.train()
    entry, after = logged(whole)[:2]
    names = [member.__name__ for member in members_of(ensemble)]
    for name, scale in zip(names, present(ensemble.scales), strict=True):
        assert entry[f"rewards/ensemble/{name}/mean"] == pytest.approx(scale.mean, abs=1e-6)
        assert entry[f"rewards/ensemble/{name}/std"] == pytest.approx(scale.std, abs=1e-6)
        assert after[f"rewards/ensemble/{name}/mean"] != entry[f"rewards/ensemble/{name}/mean"]
    assert entry["ensemble/spread"] > 0.1
    # both models have mean 0 there: what is left is the penalty, which is the mean of spread² / 10
    assert -0.1 <= entry["rewards/ensemble/mean"] < -0.1 * entry["ensemble/spread"] ** 2 + 1e-6
    evaluated = ensemble_trainer(
        tmp_path / "evaluated", sft, adapters, tokenizer, prompts, **{**settings, "total_episodes": 8},
        eval_strategy="steps", eval_on_start=True, extra={"eval_dataset": prompts.select([0])},
    )  # fmt: skip
    evaluated.train()
    assert evaluated.ensembles()[0].scales == ensemble.scales  # not those of the evaluation before
    assert evaluated.state.log_history[0]["eval_ensemble/spread"] > 0 and logged(evaluated)[0]["objective/kl"] == 0
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert resumed.ensembles()[0].scales == ensemble.scales
    last = [load_file(tmp_path / name / "checkpoint-3" / "trainable.safetensors") for name in ("whole", "again")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_an_adapter_value_function_starts_as_the_first_model(sft, adapters, tokenizer, prompts, tmp_path):
    ppo = ensemble_trainer(tmp_path, sft, adapters, tokenizer, prompts, value_function="adapter", reward_weights=[2.0])
    ppo.score(ppo.rollout(next(ppo.prompts())))
    (ensemble,) = ppo.ensembles()
    model, scale = members_of(ensemble)[0], present(ensemble.scales)[0]
    assert model.adapter == REWARD
    hidden = torch.randn(4, model.head.in_features)
    score = 2.0 * (model.head(hidden) - scale.mean) / scale.std
    expected = (score - present(ppo.reward_scale).mean) / present(ppo.reward_scale).std
    assert torch.allclose(ppo.model.value_head(hidden), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_reward_models_in_python_is_an_ensemble(kind, sft, tiny, tokenizer, prompts, tmp_path):
    models = [AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1) for _ in range(2)]
    given = kind(models)
    policy = load_policy(resolve(sft), LORA, tokenizer)
    args = ppo_config(tmp_path, reward_ensemble="wco", reward_weights=[1.0, 0.5])
    ppo = PPOTrainer(args, tokenizer, policy, reward_model=given, train_dataset=prompts, reward_funcs=[count_a])
    (ensemble,) = ppo.ensembles()
    assert [member.model for member in members_of(ensemble)] == models and ensemble.how == "wco"
    assert ppo.reward_funcs == [ensemble, count_a]
    scores = ppo.score(ppo.rollout(next(ppo.prompts()))).raw_scores
    assert scores.isfinite().all()
    with pytest.raises(InputError, match=r"^--reward_ensemble wco: combines several models\. Pass a list"):
        ppo_trainer(sft, tokenizer, prompts, tmp_path, reward_ensemble="wco")
    with pytest.raises(InputError, match=r"^value_model is the reward model itself"):
        PPOTrainer(args, tokenizer, policy, reward_model=given, train_dataset=prompts, value_model=models[1])


def test_over_optimization_measures_the_ensemble_of_the_run(sft, adapters, tokenizer, tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", [{"prompt": user(f"Say {n}, {split}.")} for n in range(6)])
    words = ["--model_name_or_path", sft, "--dataset_name", tmp_path / "data", "--reward_model_path", *adapters,
             "--reward_ensemble", "wco", "--output_dir", tmp_path / "ppo", *TINY_PPO]  # fmt: skip
    run("recipes/ppo.py", *words)
    assert "wco" in (tmp_path / "ppo" / "README.md").read_text()
    run("eval/overoptimization.py", "--model_name_or_path", tmp_path / "ppo", "--dtype", "float32", "--max_prompts", 8,
        "--best_of_n", 2, "--eval_reward_funcs", "starter", "--output_dir", tmp_path / "over")  # fmt: skip
    results = json.loads((tmp_path / "over" / "overoptimization.json").read_text())
    assert results["proxy"].startswith("wco of ")
    samples = [json.loads(line) for line in (tmp_path / "over" / "samples.jsonl").open()]
    models = [
        PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(
                resolve(sft).base, num_labels=1, pad_token_id=tokenizer.pad_token_id
            ),
            folder,
        ).eval()
        for folder in adapters
    ]

    def score(model, prompt, reply):
        ids = tokenizer.apply_chat_template([*prompt, *assistant(reply)], return_tensors="pt", return_dict=True)
        return float(model(**ids).logits)

    scales = None
    for point in results["ppo"]:
        scores = [[score(model, row["prompt"], row[point["name"]]) for row in samples] for model in models]
        if scales is None:  # the replies of the start
            means = [sum(own) / len(own) for own in scores]
            scales = [(mean, math.sqrt(sum((s - mean) ** 2 for s in own) / len(own)))
                      for mean, own in zip(means, scores, strict=True)]  # fmt: skip
        shown = [[(s - mean) / std for s in own] for own, (mean, std) in zip(scores, scales, strict=True)]
        worst = [min(both) for both in zip(*shown, strict=True)]
        assert point["proxy"]["mean"] == pytest.approx(sum(worst) / len(worst), abs=1e-3)
