"""What trl.experimental.ppo 1.12.0 gets wrong, one test for each: done right here, or refused with a clear error.

30 and 31 need two processes and stand in test_distributed.py.
"""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import LORA, VOCABULARY, count_a, logged, ppo_config, ppo_trainer, present, save_tiny
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from rlhf.errors import InputError
from rlhf.models.loading import load_policy
from rlhf.models.sources import resolve
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo.advantages import whiten
from rlhf.ppo.rollout import sample_rollout


def steps_of(ppo):
    """Train and count the optimizer's steps."""
    steps = []
    ppo.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    ppo.train()
    return len(steps)


@pytest.fixture
def train(sft, tokenizer, prompts, tmp_path):
    """Make a trainer; positional: reward functions."""

    def make(*reward_funcs, **changes):
        return ppo_trainer(sft, tokenizer, prompts, tmp_path, reward_funcs or (count_a,), **changes)

    return make


def classifier(tiny, **changes):
    return AutoModelForSequenceClassification.from_pretrained(tiny, **{"num_labels": 1, **changes})


# ------------------------------------------------------------------------------------ what changes what is learned


def test_defect_01_the_last_batch_takes_no_extra_steps(train):
    assert steps_of(train(total_episodes=8, num_mini_batches=1, num_ppo_epochs=1)) == 1


def test_defect_02_nor_do_updates_after_an_evaluation(train, prompts):
    ppo = train(
        extra={"eval_dataset": prompts}, eval_strategy="steps", eval_steps=1, total_episodes=24, num_mini_batches=1,
        num_ppo_epochs=1,
    )  # fmt: skip
    assert steps_of(ppo) == 3


@pytest.mark.parametrize("num_mini_batches", [1, 2, 4])
def test_defect_03_one_step_per_minibatch_and_epoch(train, num_mini_batches):
    ppo = train(total_episodes=8, per_device_train_batch_size=2, gradient_accumulation_steps=4,
                num_mini_batches=num_mini_batches)  # fmt: skip
    assert steps_of(ppo) == 2 * num_mini_batches


@pytest.mark.parametrize("setting", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"top_k": 2}])
def test_defect_04_the_models_own_generation_config_stays_out(sft, tokenizer, prompts, tmp_path, setting):
    policy = load_policy(resolve(sft), LORA, tokenizer)
    for name, value in setting.items():
        setattr(policy.generation_config, name, value)
    args = ppo_config(tmp_path, learning_rate=0.0, temperature=0.7, total_episodes=8, response_length=16)
    plain = ppo_trainer(sft, tokenizer, prompts, tmp_path, temperature=0.7, response_length=16)
    ppo = PPOTrainer(args, tokenizer, policy, train_dataset=prompts, reward_funcs=[count_a])
    rows = next(ppo.prompts())
    assert ppo.rollout(rows).completions == plain.rollout(rows).completions
    ppo.train()
    assert abs(logged(ppo)[0]["val/ratio"] - 1) < 1e-5


def test_defect_05_k3_as_a_reward_is_refused(tmp_path):
    with pytest.raises(InputError, match="--kl_estimator k3"):
        ppo_config(tmp_path, kl_estimator="k3")


def test_defect_06_pad_equal_to_eos_is_refused(sft, tokenizer, prompts, tmp_path):
    broken = copy.deepcopy(tokenizer)
    broken.pad_token = broken.eos_token
    with pytest.raises(InputError, match="pad token"):
        ppo_trainer(sft, broken, prompts, tmp_path)


def test_defect_07_the_eos_penalty_knows_every_stop_token(train):
    first = train(response_length=16)
    ids = first.rollout(next(first.prompts())).input_ids[:, -5].tolist()
    ppo = train(response_length=16, stop_token_id=ids, missing_eos_penalty=5.0, normalize_reward=False)
    rollout = ppo.rollout(next(ppo.prompts()))
    scored = ppo.score(rollout)
    assert rollout.ended.sum() >= 4
    assert torch.equal(scored.raw_scores - scored.scores, torch.where(rollout.ended, 0.0, 5.0))


def test_defect_08_the_eos_score_replaces_and_negative_penalties_are_refused(train, tmp_path):
    ppo = train(missing_eos_score=-1.0, normalize_reward=False)
    rollout = ppo.rollout(next(ppo.prompts()))
    rollout = rollout._replace(ended=torch.arange(8) % 2 == 0)
    scored = ppo.score(rollout)
    assert torch.equal(scored.scores, torch.where(rollout.ended, scored.raw_scores, -1.0))
    with pytest.raises(InputError, match=r"--missing_eos_penalty -1\.0"):
        ppo_config(tmp_path, missing_eos_penalty=-1.0)


def test_defect_09_microbatches_don_t_change_the_gradient(train):
    results = []
    for size, accumulation in ((4, 1), (1, 4)):
        ppo = train(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, num_mini_batches=1,
                    num_ppo_epochs=1, total_episodes=4, response_length=16)  # fmt: skip
        ppo.stop_token_ids = list(range(0, VOCABULARY, 8))  # completions of many lengths
        rollout = ppo.rollout(next(ppo.prompts()))
        assert len(set(rollout.completion_mask.sum(1).tolist())) > 1
        ppo.train()
        results.append((logged(ppo)[0], {n: p.detach() for n, p in ppo.model.named_parameters() if p.requires_grad}))
    (whole, weights), (parts, weights_of_parts) = results
    for key in ("loss/policy_avg", "loss/value_avg", "policy/grad_norm", "policy/entropy_avg"):
        assert abs(whole[key] - parts[key]) < 1e-4, key
    assert all(torch.allclose(weights[name], weights_of_parts[name], atol=1e-4) for name in weights)


def test_defect_10_max_grad_norm_is_honoured(train):
    norms = []
    for limit in (1e-4, 1e4):
        ppo = train(max_grad_norm=limit, total_episodes=8, num_mini_batches=1, num_ppo_epochs=1)
        ppo.optimizer.optimizer.register_step_pre_hook(
            lambda *_, model=ppo.model: norms.append(
                float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
            )
        )
        ppo.train()
    assert norms[0] < 1.01e-4 < norms[1]


def test_defect_11_bf16_holds_in_rollouts_and_in_updates_alike(train):
    ppo = train(bf16=True, learning_rate=0.0, total_episodes=8)
    seen = set()
    ppo.model.policy.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda *_: seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    )
    ppo.train()
    assert seen == {(False, True), (True, True)}
    assert abs(logged(ppo)[0]["val/ratio"] - 1) < 1e-3


def test_defect_12_identical_models_have_identical_logprobs_in_bf16(tiny, tokenizer, prompts, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    args = ppo_config(tmp_path, ref_adapter_name=None)
    ppo = PPOTrainer(args, tokenizer, policy, train_dataset=prompts, reward_funcs=[count_a])
    scored = ppo.score(ppo.rollout(next(ppo.prompts())))
    assert torch.equal(scored.logprobs, scored.reference_logprobs)
    assert scored.logprobs.dtype == torch.float32


def test_defect_13_one_token_is_whitened_to_a_finite_number():
    mask = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[3.0, 0.0]]), mask).isfinite().all()


def test_defect_14_one_model_as_value_and_reward_is_refused(tiny, tokenizer, prompts, tmp_path):
    both = classifier(tiny)
    policy = AutoModelForCausalLM.from_pretrained(tiny)
    with pytest.raises(InputError, match="value_model is the reward model itself"):
        PPOTrainer(ppo_config(tmp_path), tokenizer, policy, None, both, prompts, both)


def test_defect_15_attention_dropout_is_off_as_well(tokenizer, prompts, tmp_path):
    folder = save_tiny(tmp_path / "dropout", tokenizer, attention_dropout=0.5)
    args = ppo_config(tmp_path, ref_adapter_name=None, learning_rate=0.0, total_episodes=8)
    policy = AutoModelForCausalLM.from_pretrained(folder)
    ppo = PPOTrainer(args, tokenizer, policy, train_dataset=prompts, reward_funcs=[count_a])
    ppo.train()
    assert abs(logged(ppo)[0]["val/ratio"] - 1) < 1e-5


def test_defect_16_the_seed_fixes_everything(train):
    results = []
    for noise in (1, 2):
        ppo = train(per_device_train_batch_size=2, gradient_accumulation_steps=4)
        np.random.seed(noise)
        torch.manual_seed(noise)
        ppo.train()
        results.append({name: p.detach() for name, p in ppo.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_defect_17_a_sampled_pad_token_does_not_end_the_completion(tiny, tokenizer):
    policy = AutoModelForCausalLM.from_pretrained(tiny)
    head = torch.nn.Linear(policy.config.hidden_size, len(tokenizer))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-50.0)
        head.bias[[tokenizer.pad_token_id, 300]] = 0.0  # either of the two, with equal probability
    policy.lm_head = head
    rollout = sample_rollout(
        policy, tokenizer, [{"prompt": "x", "input_ids": [5, 6]}] * 4, response_length=12, temperature=1.0,
        stop_token_ids=[tokenizer.eos_token_id], batch_size=4, uniforms=torch.rand(4, 12), device=torch.device("cpu"),
    )  # fmt: skip
    assert (rollout.input_ids[:, 2:] == tokenizer.pad_token_id).any()
    assert rollout.completion_mask.all() and rollout.completion_mask.shape == (4, 12) and not rollout.ended.any()


def test_defect_18_completions_end_at_eos_by_default(tokenizer, prompts, tmp_path, tiny):
    args = PPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", save_strategy="no")
    policy = AutoModelForCausalLM.from_pretrained(tiny)
    ppo = PPOTrainer(args, tokenizer, policy, train_dataset=prompts, reward_funcs=[count_a])
    assert ppo.stop_token_ids == [tokenizer.eos_token_id]


# ------------------------------------------------------------------------------------------------- wrong numbers


def test_defect_19_statistics_are_not_diluted_by_minibatches(train):
    entries = []
    for num_mini_batches in (1, 2, 4):
        ppo = train(learning_rate=0.0, total_episodes=8, num_mini_batches=num_mini_batches,
                    per_device_train_batch_size=2, gradient_accumulation_steps=4)  # fmt: skip
        ppo.train()
        entries.append(logged(ppo)[0])
    for key in ("val/ratio", "loss/value_avg", "policy/entropy_avg", "policy/approxkl_avg"):
        assert entries[0][key] == pytest.approx(entries[1][key], abs=1e-5), key
        assert entries[0][key] == pytest.approx(entries[2][key], abs=1e-5), key
    assert entries[0]["val/ratio"] == pytest.approx(1.0, abs=1e-5) and entries[0]["policy/entropy_avg"] > 1


def test_defect_20_averages_leave_padding_out(train):
    ppo = train(learning_rate=0.0, total_episodes=8, response_length=16)
    ppo.stop_token_ids = list(range(0, VOCABULARY, 8))
    rollout = ppo.rollout(next(ppo.prompts()))
    entropies = []
    with torch.no_grad():
        for row, mask, attention in zip(
            rollout.input_ids, rollout.completion_mask, rollout.attention_mask, strict=True
        ):
            ids = row[attention.bool()][None]
            count = int(mask.sum())
            logprobs = torch.log_softmax(ppo.model.policy(ids).logits[0, -count - 1 : -1] / ppo.args.temperature, -1)
            entropies += (-(logprobs.exp() * logprobs).sum(-1)).tolist()
    assert not rollout.completion_mask.all()
    ppo.train()
    assert logged(ppo)[0]["policy/entropy_avg"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-3)


def test_defect_21_eos_tokens_are_counted_once_per_completion(train):
    ppo = train(total_episodes=8, response_length=16)
    ppo.stop_token_ids = list(range(0, VOCABULARY, 8))
    ended = ppo.rollout(next(ppo.prompts())).ended
    ppo.train()
    assert 0 < ended.sum() <= 8
    assert logged(ppo)[0]["val/num_eos_tokens"] == ended.sum()
    assert logged(ppo)[0]["completions/ended"] == pytest.approx(float(ended.float().mean()))


def test_defect_22_the_raw_score_is_logged_beside_the_one_learned_from(train):
    ppo = train(lambda prompts, completions, **_: [3.0] * len(completions), total_episodes=8, missing_eos_penalty=1.0,
                normalize_reward=False, stop_token_id=1)  # fmt: skip
    ppo.train()
    assert logged(ppo)[0]["objective/raw_scores"] == 3.0
    assert logged(ppo)[0]["objective/scores"] == 2.0


def test_defect_23_the_ratios_variance_is_a_number_with_one_minibatch(train):
    ppo = train(total_episodes=8, num_mini_batches=1, num_ppo_epochs=1, gradient_accumulation_steps=1,
                per_device_train_batch_size=8)  # fmt: skip
    ppo.train()
    assert logged(ppo)[0]["val/ratio_var"] == 0.0


# ----------------------------------------------------------------------------------- ignored settings, crashes, hangs


def test_defect_24_a_dataset_smaller_than_a_batch_is_gone_through_again(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(sft, tokenizer, prompts.select(range(3)), tmp_path)
    ppo.train()
    assert ppo.state.episode == 16


def test_defect_25_activation_checkpointing_reaches_policy_and_value_model(tiny, tokenizer, prompts, tmp_path):
    args = ppo_config(tmp_path, activation_checkpointing=True, ref_adapter_name=None, total_episodes=8)
    policy, value = AutoModelForCausalLM.from_pretrained(tiny), classifier(tiny)
    ppo = PPOTrainer(args, tokenizer, policy, None, classifier(tiny), prompts, value)
    assert ppo.model.policy.is_gradient_checkpointing and present(ppo.model.value_model).is_gradient_checkpointing
    ppo.train()


def test_defect_26_eval_strategy_evaluates(train, prompts):
    ppo = train(extra={"eval_dataset": prompts}, eval_strategy="steps", eval_steps=2, total_episodes=32)
    ppo.train()
    assert [entry["step"] for entry in ppo.state.log_history if "eval_score" in entry] == [2, 4]


def test_defect_27_evaluation_sets_may_be_named_and_small(train, prompts):
    ppo = train(extra={"eval_dataset": {"one": prompts.select([0])}}, per_device_eval_batch_size=64)
    assert "eval_one_score" in ppo.evaluate()


def test_defect_28_logging_steps_and_stopping_are_honoured(train):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 3

    ppo = train(extra={"callbacks": [Stop()]}, total_episodes=80, logging_steps=2)
    ppo.train()
    assert ppo.state.global_step == 3
    assert [entry["step"] for entry in logged(ppo)] == [2]  # every second


def test_defect_29_training_resumes(train, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "total_episodes": 24}
    whole = train(**settings)
    whole.train()
    again = train(**settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, one), (_, two) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_defect_32_a_run_has_as_many_episodes_as_asked(train, sft, tokenizer, prompts, tmp_path):
    with pytest.raises(InputError, match=r"--total_episodes 9: .* Give 8 or 16"):
        train(total_episodes=9)
    ppo = train(total_episodes=None, num_train_epochs=1)
    ppo.train()
    assert ppo.state.episode == ppo.args.total_episodes == 8  # whole batches of the ten prompts


def test_defect_33_prompts_and_models_that_can_t_work_are_refused(sft, tiny, tokenizer, prompts, tmp_path):
    with pytest.raises(InputError, match=r"train_dataset: needs column 'prompt', .* found \['number'\]"):
        ppo_trainer(sft, tokenizer, prompts.select_columns("number"), tmp_path)
    with pytest.raises(InputError, match=r"--response_length 300: .* context of 256"):
        ppo_trainer(sft, tokenizer, prompts, tmp_path, response_length=300)
    policy = AutoModelForCausalLM.from_pretrained(tiny)
    args = ppo_config(tmp_path, ref_adapter_name=None)
    with pytest.raises(InputError, match="reward_model: needs one output, found num_labels=3"):
        PPOTrainer(args, tokenizer, policy, None, classifier(tiny, num_labels=3), prompts, classifier(tiny))


def test_defect_33_text_columns_and_the_padding_side_do_no_harm(sft, tokenizer, prompts, tmp_path):
    right = copy.deepcopy(tokenizer)
    right.padding_side = "right"
    rows = Dataset.from_list([{**row, "note": "some text"} for row in prompts])
    one, two = (ppo_trainer(sft, t, d, tmp_path) for t, d in ((tokenizer, prompts), (right, rows)))
    assert one.rollout(next(one.prompts())).completions == two.rollout(next(two.prompts())).completions
    two.train()


# -------------------------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_defect_34_no_scores_of_a_whole_rollout_are_kept(train, tokenizer):
    ppo = train(response_length=40)  # kept scores would be 8 x 40 x 49,152 numbers
    rows = next(ppo.prompts())
    ppo.score(ppo.rollout(rows))  # once, the ways to compute are tried on 24 tokens
    with Largest() as largest:
        ppo.rollout(rows)
    assert largest.numel <= 16 * len(tokenizer)  # the embeddings; one step's logits are half of it
    rollout = ppo.rollout(rows)
    with Largest() as largest:
        ppo.score(rollout)
    assert largest.numel <= 4 * 41 * len(tokenizer)  # the logits of one microbatch


def test_defect_35_no_logits_for_prompts_and_no_hidden_states_of_all_layers(train):
    ppo = train(response_length=5, total_episodes=8, local_rollout_forward_batch_size=4)
    ppo.score(ppo.rollout(next(ppo.prompts())))  # once, the ways to compute are tried on 24 tokens
    widths, asked = [], []
    base = ppo.model.policy.get_base_model()
    base.lm_head.register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0][..., 0].numel()))
    base.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: asked.append(kwargs.get("output_hidden_states")), with_kwargs=True
    )
    ppo.train()
    assert max(widths) <= 4 * 5  # four rows at a time: the positions before their completion tokens and no others
    assert not any(asked)


@pytest.mark.parametrize("value_function", ["head", "adapter"])
def test_defect_36_with_lora_the_value_function_trains_no_base_either(train, value_function):
    ppo = train(value_function=value_function)
    trained = [name for name, p in ppo.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "value_head" in name for name in trained)
    ppo.train()
    sizes = sum(p.numel() for name, p in ppo.model.named_parameters() if name in trained)
    kept = sum(v.numel() for s in ppo.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim())
    assert kept == 2 * sizes  # Adam's two moments


def test_every_defect_has_a_test():
    from pathlib import Path

    here = Path(__file__).parent
    text = here.joinpath("test_ppo_defects.py").read_text() + here.joinpath("test_distributed.py").read_text()
    missing = [number for number in range(1, 37) if f"def test_defect_{number:02d}_" not in text]
    assert not missing, json.dumps(missing)
