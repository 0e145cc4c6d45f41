"""What steers a run: KL controllers, warm-up, PPO-ptx, entropy, stop strings, evaluation, the best checkpoint."""

import json
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from conftest import count_a, logged, ppo_config, ppo_trainer
from datasets import Dataset
from transformers import TrainerCallback

from rlhf.errors import InputError
from rlhf.ppo.control import adapted_kl_coef
from rlhf.ppo.model import TokenOutputs
from rlhf.ppo.processes import Processes
from rlhf.ppo.update import UpdateSettings, ppo_loss, ptx_batches
from rlhf.rewards import completion_text


def test_adaptive_kl_is_the_closed_form_of_ziegler_et_al():
    assert adapted_kl_coef(0.2, kl=6.6, target=6.0, episodes=512, horizon=10_000) == pytest.approx(
        0.2 * (1 + 0.1 * 512 / 10_000)
    )
    assert adapted_kl_coef(0.2, kl=60.0, target=6.0, episodes=100, horizon=1000) == pytest.approx(0.2 * 1.02)  # clipped
    assert adapted_kl_coef(0.2, kl=0.0, target=6.0, episodes=100, horizon=1000) == pytest.approx(0.2 * 0.98)


def test_the_kl_coefficient_follows_the_target(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(
        sft, tokenizer, prompts, tmp_path, total_episodes=24, adaptive_kl_target=100.0, adaptive_kl_horizon=8
    )
    ppo.train()
    coefficients = [entry["objective/kl_coef"] for entry in logged(ppo)]
    assert coefficients == pytest.approx([0.05, 0.05 * 0.8, 0.05 * 0.64])  # far below the target: down by a fifth
    assert ppo.kl_coef == pytest.approx(0.05 * 0.8**3)


def test_an_update_ends_early_when_the_policy_has_moved_too_far(sft, tokenizer, prompts, tmp_path):
    settings = {"total_episodes": 8, "num_ppo_epochs": 4, "learning_rate": 0.1, "kl_coef": 0.0}
    free = ppo_trainer(sft, tokenizer, prompts, tmp_path, **settings)
    free.train()
    held = ppo_trainer(sft, tokenizer, prompts, tmp_path, target_kl=1e-4, **settings)
    held.train()
    assert logged(free)[0]["val/optimizer_steps"] == 8
    assert 1 < logged(held)[0]["val/optimizer_steps"] < 8


@pytest.mark.parametrize("value_function", ["head", "adapter"])
def test_value_warm_up_trains_the_value_function_alone(sft, tokenizer, prompts, tmp_path, value_function):
    ppo = ppo_trainer(
        sft, tokenizer, prompts, tmp_path, value_warmup_steps=1, weight_decay=0.1, value_function=value_function
    )
    policy = {name: p.detach().clone() for name, p in ppo.model.named_parameters() if ".default." in name}
    value = ppo.model.value_head.weight.detach().clone()
    moved = []
    record = ppo.record

    def spy(*steps):
        now = dict(ppo.model.named_parameters())
        moved.append(any(not torch.equal(policy[name], now[name]) for name in policy))
        record(*steps)

    ppo.record = spy
    ppo.train()
    assert moved == [False, True]
    assert not torch.equal(value, ppo.model.value_head.weight)


def test_ptx_loss_is_the_language_model_loss_and_pulls_towards_the_texts(sft, tokenizer, prompts, tmp_path):
    text = tokenizer("The quick brown fox jumps over the lazy dog")["input_ids"]
    rows = Dataset.from_list([{"input_ids": text, "labels": [-100, -100, *text[2:]]}])
    losses = []
    for coefficient in (0.0, 5.0):
        ppo = ppo_trainer(
            sft, tokenizer, prompts, tmp_path, [lambda prompts, completions, **_: [0.0] * len(completions)],
            extra={"ptx_dataset": rows}, ptx_coef=coefficient, total_episodes=64, learning_rate=3e-2, kl_coef=0.0,
        )  # fmt: skip
        before = _loss(ppo, text)
        ppo.train()
        losses.append((before, _loss(ppo, text), logged(ppo)[0].get("loss/ptx")))
    (start, without, nothing), (_, with_ptx, first) = losses
    assert nothing is None
    assert abs(first - start) < 0.5  # the mean over the first update's minibatches, which already learn
    assert abs(without - start) < 1e-3  # a reward of 0 teaches nothing
    assert with_ptx < start - 0.1


def _loss(ppo, text):
    ids = torch.tensor([text])
    labels = torch.tensor([[-100, -100, *text[2:]]])
    return float(ppo.model.policy.eval()(ids, labels=labels).loss.detach())


def test_ptx_batches_pad_and_mask():
    rows = Dataset.from_list(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    )
    batch = next(ptx_batches(rows, 8, 0, torch.device("cpu")))
    for row in zip(*(tensor.tolist() for tensor in batch), strict=True):
        assert row in (([5, 6, 7], [1, 1, 1], 2, [True, True]), ([8, 9, 0], [1, 1, 0], 1, [True, False]))
    again = next(ptx_batches(rows, 8, 0, torch.device("cpu")))
    assert torch.equal(batch.input_ids, again.input_ids)


def test_ptx_needs_texts(sft, tokenizer, prompts, tmp_path):
    with pytest.raises(InputError, match="--ptx_coef"):
        ppo_trainer(sft, tokenizer, prompts, tmp_path, ptx_coef=1.0)
    with pytest.raises(InputError, match=r"^--ptx_dataset_name starter: has no effect without --ptx_coef"):
        ppo_trainer(sft, tokenizer, prompts, tmp_path, ptx_dataset_name="starter")


def test_entropy_bonus_by_hand_and_through_the_model(sft, tokenizer, prompts, tmp_path):
    new = TokenOutputs(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
    mask = torch.ones(1, 2, dtype=torch.bool)
    zeros = torch.zeros(1, 2)
    settings = UpdateSettings(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, entropy_coef=0.5)
    sums = ppo_loss(new, zeros, zeros, zeros, zeros, mask, settings)
    assert sums.loss == -2.0
    entropies = []
    for coefficient in (0.0, 1.0):
        ppo = ppo_trainer(
            sft, tokenizer, prompts, tmp_path, [lambda prompts, completions, **_: [0.0] * len(completions)],
            entropy_coef=coefficient, total_episodes=64, kl_coef=0.0, vf_coef=0.0,
        )  # fmt: skip
        ppo.train()
        entropies.append(logged(ppo)[-1]["policy/entropy_avg"])
    assert entropies[1] > entropies[0]


def test_gradients_are_clipped_to_max_grad_norm(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, max_grad_norm=1e-3, total_episodes=8)
    norms = []
    step = ppo.optimizer.step

    def spy(*args, **kwargs):
        gradients = [p.grad for p in ppo.model.parameters() if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return step(*args, **kwargs)

    ppo.optimizer.step = spy
    ppo.train()
    assert norms and max(norms) < 1.01e-3
    assert logged(ppo)[0]["policy/grad_norm"] > 1e-3  # what is logged is the norm before


def test_stop_strings_end_a_completion(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, stop_strings=["a"], response_length=48)
    rollout = ppo.rollout(next(ppo.prompts()))
    stopped = [text for text, ended in zip(rollout.completions, rollout.ended.tolist(), strict=True) if ended]
    assert len(stopped) >= 4
    tokens = rollout.input_ids[:, -rollout.completion_mask.shape[1] :]
    for row, mask, ended in zip(tokens, rollout.completion_mask, rollout.ended.tolist(), strict=True):
        ids = row[mask].tolist()
        assert "a" not in tokenizer.decode(ids[:-1])  # nothing behind the token that brought it
        assert ended == ("a" in tokenizer.decode(ids) or ids[-1] == tokenizer.eos_token_id)


def test_rollouts_do_not_depend_on_how_rows_are_batched(sft, tokenizer, prompts, tmp_path):
    settings = {"response_length": 12, "temperature": 0.1}
    one = ppo_trainer(sft, tokenizer, prompts, tmp_path, local_rollout_forward_batch_size=8, **settings)
    two = ppo_trainer(sft, tokenizer, prompts, tmp_path, local_rollout_forward_batch_size=3, **settings)
    first, second = (ppo.rollout(next(ppo.prompts())) for ppo in (one, two))
    assert first.completions == second.completions
    torch.manual_seed(99)  # nor on the state of torch's generator
    assert one.rollout(next(one.prompts())).completions == first.completions


# ------------------------------------------------------------------------------------------------ evaluation


def length(prompts, completions, **_):
    return [-float(len(completion_text(c))) for c in completions]


def test_evaluation_scores_held_out_prompts_and_keeps_samples(sft, tokenizer, prompts, tmp_path):
    extra = {"eval_dataset": prompts.select(range(5)), "eval_reward_funcs": [length]}
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, extra=extra, eval_strategy="steps", eval_steps=1)
    ppo.train()
    evaluations = [entry for entry in ppo.state.log_history if "eval_score" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    wanted = {"eval_score", "eval_kl", "eval_length", "eval_ended", "eval_rewards/count_a/mean", "eval_held_out/length"}
    assert wanted <= set(evaluations[0])
    rows = [json.loads(line) for line in (tmp_path / "eval_samples" / "2.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and set(rows[0]) == {"prompt", "completion", "score"}
    assert sum(row["score"] for row in rows) / 5 == pytest.approx(evaluations[1]["eval_score"])
    assert ppo.evaluate()["eval_score"] == pytest.approx(evaluations[1]["eval_score"])  # same random numbers each time


def test_several_evaluation_sets_by_name_and_smaller_than_a_batch(sft, tokenizer, prompts, tmp_path):
    sets = {"first": prompts.select([0]), "rest": prompts.select(range(1, 10))}
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, extra={"eval_dataset": sets}, per_device_eval_batch_size=4)
    assert {"eval_first_score", "eval_rest_score"} <= set(ppo.evaluate())


def test_evaluation_without_prompts_is_refused(sft, tokenizer, prompts, tmp_path):
    with pytest.raises(InputError, match="--eval_strategy"):
        ppo_trainer(sft, tokenizer, prompts, tmp_path, eval_strategy="steps", eval_steps=1)


@pytest.mark.parametrize("saving", [("steps", 1), ("steps", 4), ("best", 1)])
def test_the_best_checkpoint_is_kept_and_loaded(saving, sft, tokenizer, prompts, tmp_path):
    weights = []

    class KeepWeights(TrainerCallback):
        def on_evaluate(self, args, state, control, model, metrics, **_):
            name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B.default" in n)
            if state.global_step:  # before the first update there is no checkpoint to go back to
                weights.append((metrics["eval_length"], name, parameter.detach().clone()))

    extra = {"eval_dataset": prompts, "callbacks": [KeepWeights()]}
    ppo = ppo_trainer(
        sft, tokenizer, prompts, tmp_path, extra=extra, eval_strategy="steps", eval_steps=1,
        save_strategy=saving[0], save_steps=saving[1], save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="eval_length", greater_is_better=False, learning_rate=5e-2, total_episodes=32,
        eval_on_start=True,
    )  # fmt: skip
    ppo.train()
    best = min(range(4), key=lambda number: weights[number][0])
    assert ppo.state.best_global_step == best + 1
    assert (tmp_path / f"checkpoint-{best + 1}").exists()  # save_total_limit=1 spares it
    assert torch.equal(dict(ppo.model.named_parameters())[weights[best][1]], weights[best][2])


def test_an_unknown_metric_for_the_best_model_is_named(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(
        sft, tokenizer, prompts, tmp_path, extra={"eval_dataset": prompts}, metric_for_best_model="eval_accuracy"
    )
    with pytest.raises(InputError, match="--metric_for_best_model eval_accuracy: not among"):
        ppo.evaluate()


def test_what_counts_as_one_reward_function_is_logged_once(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, [count_a, count_a], total_episodes=8)
    ppo.train()
    assert {"rewards/count_a_1/mean", "rewards/count_a_2/mean"} <= set(logged(ppo)[0])
    assert ppo_config(tmp_path).stop_token == "eos"


@pytest.mark.parametrize("value_function", ["head", "adapter"])
def test_the_value_function_has_a_learning_rate_of_its_own(value_function, sft, tokenizer, prompts, tmp_path):
    """Adam's first step is as long as the rate."""
    rates = {"learning_rate": 1e-4, "value_learning_rate": 1e-2, "num_ppo_epochs": 1, "num_mini_batches": 1,
             "adam_epsilon": 1e-12}  # fmt: skip
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, value_function=value_function, max_steps=1, **rates)
    before = {name: p.detach().clone() for name, p in ppo.model.named_parameters() if p.requires_grad}
    own = ppo.model.value_parameters()
    ppo.train()
    moved = {name: float((p - before[name]).abs().max()) for name, p in ppo.model.named_parameters() if name in before}
    assert {name for name in moved if moved[name] > 1.1e-4} <= own
    assert moved["value_head.bias"] == pytest.approx(1e-2, rel=0.01)
    assert max(size for name, size in moved.items() if name not in own) == pytest.approx(1e-4, rel=0.1)
    assert logged(ppo)[0]["lr"] == 1e-4


@pytest.mark.parametrize("each", [False, True])
def test_processes_average_after_each_microbatch_if_asked_to(each):
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=GradientAccumulationPlugin(sync_each_batch=each))
    model = torch.nn.Linear(1, 1)
    waits = []

    def no_sync(model):
        waits.append(model)
        return nullcontext()

    accelerator.no_sync = no_sync
    processes = Processes.of(accelerator, model)
    for last in (False, True):
        with processes.synchronized(last):
            pass
    assert waits == ([] if each else [model])
