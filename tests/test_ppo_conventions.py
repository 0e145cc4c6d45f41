"""PPOTrainer is used as SFTTrainer and GRPOTrainer are: names, raw prompts, callbacks, logs, several trainers."""

import copy
import json
import math

import pytest
import torch
from conftest import LORA, assistant, logged, ppo_trainer, present, user
from datasets import Dataset, IterableDataset
from torch.optim import AdamW
from torch.optim.lr_scheduler import ConstantLR
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer, get_peft_config

from rlhf.data.rows import prompt_rows
from rlhf.errors import InputError
from rlhf.models.adapters import REFERENCE
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.rewards import RewardError, RewardModel

CHATS = Dataset.from_list(
    [{"prompt": user(f"Tell me about {word}."), "word": word} for word in ("tea", "rain", "music")]
)
TEXTS = Dataset.from_list([{"prompt": f"{word} is"} for word in ("Tea", "Rain", "Music")])
SHORT = {
    "max_steps": 2, "per_device_train_batch_size": 2, "response_length": 4, "num_ppo_epochs": 1, "learning_rate": 1e-2,
    "report_to": "none", "save_strategy": "no", "num_sample_generations": 0, "disable_tqdm": True, "bf16": False,
}  # fmt: skip


def lengths(completions, **_):
    return [float(len(str(completion))) for completion in completions]


def short(folder, **changes):
    return PPOConfig(str(folder), **{**SHORT, **changes})


def numbers(trainer):
    """What a run logged, but for times, and its weights."""
    timed = ("time/", "eps", "train_runtime", "train_samples", "train_steps")
    log = [
        {key: value for key, value in entry.items() if not key.startswith(timed)} for entry in trainer.state.log_history
    ]
    return log, [parameter.detach().clone() for parameter in trainer.model.parameters()]


def assert_same(one, two):
    assert one[0] == two[0] and all(torch.equal(*pair) for pair in zip(one[1], two[1], strict=True))


# ----------------------------------------------------------------------------------------------- what it is given


def test_a_name_a_function_and_prompts_are_enough(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ppo = PPOTrainer(model=tiny, reward_funcs=lengths, train_dataset=TEXTS)
    assert ppo.args.output_dir == f"{tiny.split('/')[-1]}-PPO"
    assert ppo.args.total_episodes == 8 and ppo.model.policy.name_or_path == tiny
    ppo.args.total_episodes = 8
    result = ppo.train()
    assert result.global_step == 1 and ppo.processing_class.pad_token != ppo.processing_class.eos_token


def test_data_seed_orders_the_prompts(tiny, tmp_path):
    seen: dict[int | None, list] = {}
    for data_seed in (None, 42, 1):

        def witness(prompts, completions, now=data_seed, **_):
            seen.setdefault(now, []).append(prompts)
            return [0.0] * len(completions)

        args = short(tmp_path, data_seed=data_seed)
        PPOTrainer(args, model=tiny, reward_funcs=witness, train_dataset=TEXTS).train()
    assert seen[None] == seen[42] != seen[1]


@pytest.mark.parametrize("rows", [CHATS, TEXTS])
def test_raw_prompts_become_the_tokens_that_the_recipe_samples_behind(rows, tiny, tokenizer, tmp_path):
    seen = []

    def witness(prompts, completions, word=None, **_):
        seen.append((prompts, completions, word))
        return [0.0] * len(completions)

    given = {"model": tiny, "args": short(tmp_path), "reward_funcs": [witness], "eval_dataset": {"more": rows}}
    ppo = PPOTrainer(train_dataset=rows, **given)
    expected = prompt_rows(rows, "d", tokenizer, 4, 256)
    assert ppo.train_dataset["input_ids"][:] == ppo.eval_dataset["more"]["input_ids"][:] == expected["input_ids"][:]
    ready = PPOTrainer(train_dataset=expected, **given)
    ppo.train()
    ready.train()
    assert_same(numbers(ppo), numbers(ready))
    prompts, completions, words = seen[0]
    assert all(prompt in rows["prompt"][:] for prompt in prompts)
    if rows is CHATS:
        assert all(len(one) == 1 and one[0]["role"] == "assistant" for one in completions) and len(words) == 2
    else:
        assert all(isinstance(one, str) for one in completions)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "train_dataset: PPO needs at least one prompt"),
        (Dataset.from_list([]), "train_dataset: PPO needs at least one prompt"),
        (IterableDataset.from_generator(lambda: iter(CHATS)), "train_dataset: .*IterableDataset"),
        ([{"prompt": "Hi"}], "train_dataset: needs a datasets.Dataset; found list"),
        (Dataset.from_list([{"prompt": "Hi"}, {"prompt": ""}]), "^train_dataset: column 'prompt', row 1"),
        (Dataset.from_list([{"input_ids": [5, 999999]}]), "^train_dataset: input_ids has token 999999"),
        (Dataset.from_list([{"question": "Hi"}]), "^train_dataset: needs column 'prompt'"),
    ],
)
def test_other_datasets_are_refused_by_name(rows, message, tiny, tmp_path):
    with pytest.raises(InputError, match=message):
        PPOTrainer(model=tiny, args=short(tmp_path), reward_funcs=lengths, train_dataset=rows)


def test_models_by_name_are_those_that_the_recipe_loads(tiny, sft, reward_adapter, tokenizer, tmp_path):
    ppo = PPOTrainer(
        model=sft, args=short(tmp_path), reward_funcs=[reward_adapter, lengths, "starter"], train_dataset=CHATS
    )
    assert ppo.args.ref_adapter_name == REFERENCE and REFERENCE in ppo.model.policy.peft_config
    names = [type(reward).__name__ for reward in ppo.reward_funcs]
    assert names == ["RewardModel", "function", "function"]
    ppo.train()
    assert logged(ppo) == [] and ppo.last_metrics["rewards/starter_reward/mean"] <= 1  # PPOConfig logs every 10 updates
    full = PPOTrainer(
        short(tmp_path, model_init_kwargs={"dtype": "bfloat16"}),
        None,
        tiny,
        tiny,
        None,
        CHATS,
        tiny,
        reward_funcs=lengths,
    )
    assert (
        full.model.policy.dtype == present(full.ref_model).dtype == torch.bfloat16
        and full.model.value_model is not None
    )


def test_reward_models_are_taken_as_grpo_takes_them(tiny, tokenizer, tmp_path):
    judge = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    given = {"model": tiny, "args": short(tmp_path), "train_dataset": CHATS}
    with_its_own = PPOTrainer(reward_funcs=judge, **given)
    with_one = PPOTrainer(reward_funcs=[judge, lengths], reward_processing_classes=[tokenizer, None], **given)
    for ppo in (with_its_own, with_one):
        assert isinstance(ppo.reward_funcs[0], RewardModel) and ppo.reward_funcs[0].model is judge
    with pytest.raises(InputError, match="reward_processing_classes: 1 for 2 rewards"):
        PPOTrainer(reward_funcs=[judge, lengths], reward_processing_classes=tokenizer, **given)
    three = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3)
    with pytest.raises(
        InputError, match="reward_funcs: a reward model has one output, or two labels; found num_labels=3"
    ):
        PPOTrainer(reward_funcs=three, **given)


def test_what_would_be_ignored_is_refused(tiny, tokenizer, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(tiny)
    nameless = AutoModelForCausalLM.from_config(copy.deepcopy(policy.config))
    nameless.config._name_or_path = nameless.name_or_path = ""
    other = AdamW(AutoModelForCausalLM.from_pretrained(tiny).parameters())
    for changes, message in (
        ({"data_collator": DataCollatorWithPadding(tokenizer)}, "data_collator"),
        ({"args": short(tmp_path, model_init_kwargs={"dtype": "bfloat16"})}, "model_init_kwargs: .*loaded already"),
        ({"model": tiny, "args": short(tmp_path, model_init_kwargs={"device": 1})}, "model_init_kwargs: device"),
        ({"args": SFTConfig(str(tmp_path), bf16=False)}, "args: give an rlhf.ppo.PPOConfig"),
        ({"model": None}, "model: PPOTrainer needs a policy"),
        ({"model": nameless}, "processing_class: the model has no name"),
        ({"optimizers": (other, None)}, "optimizers: the optimizer holds no trained parameter of the policy"),
        ({"optimizers": (None, ConstantLR(other))}, "optimizers: the scheduler belongs to another optimizer"),
        ({"reward_funcs": [print]}, "reward_funcs: print: takes"),
        ({"reward_funcs": [lengths, 3]}, "reward_funcs: int: is of type int"),
        ({"reward_funcs": lambda completions, gold: [0.0]}, "needs the argument 'gold'.*: word"),
    ):
        given = {"model": policy, "args": short(tmp_path), "reward_funcs": lengths, "train_dataset": CHATS, **changes}
        with pytest.raises(InputError, match=message):
            PPOTrainer(**given)
    with pytest.raises(InputError, match="predict: PPO has no labels"):
        PPOTrainer(model=tiny, args=short(tmp_path), reward_funcs=lengths, train_dataset=CHATS).predict(CHATS)


def test_a_users_optimizer_trains_the_value_function_too(tiny, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(tiny)
    optimizer = AdamW(policy.parameters(), lr=0.01)
    schedule = ConstantLR(optimizer, factor=0.5, total_iters=1)
    ppo = PPOTrainer(
        model=policy, args=short(tmp_path, logging_steps=1), reward_funcs=lengths, train_dataset=CHATS,
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    ppo.train()
    assert ppo.model.value_head.weight.abs().sum() > 0
    assert [entry["lr"] for entry in logged(ppo)] == [0.005, 0.01]  # one step per update


# ----------------------------------------------------------------------------------------------- train and evaluate


def test_logging_steps_are_kept(sft, tokenizer, prompts, tmp_path):
    def steps(**changes):
        ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, max_steps=5, num_ppo_epochs=1, **changes)
        ppo.train()
        return [entry["step"] for entry in logged(ppo)]

    assert steps(logging_steps=2) == [2, 4]
    assert steps(logging_steps=3, logging_first_step=True) == [1, 3]
    assert steps(logging_strategy="no") == []


def test_train_and_evaluate_return_what_other_trainers_return(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, extra={"eval_dataset": {"a": prompts, "b": CHATS}})
    result = ppo.train()
    assert result.global_step == 2 and result.metrics["train_loss"] == result.training_loss
    expected = [entry["loss/policy_avg"] + 0.1 * entry["loss/value_avg"] for entry in logged(ppo)]
    assert result.training_loss == pytest.approx(sum(expected) / 2)
    assert {"train_runtime", "train_samples_per_second", "train_steps_per_second", "epoch"} <= set(result.metrics)
    assert ppo.state.log_history[-1]["train_loss"] == result.training_loss
    metrics = ppo.evaluate()
    assert metrics["eval_a_score"] >= 0 and metrics["eval_b_samples_per_second"] > 0 and "epoch" in metrics
    assert ppo.evaluate("a")["eval_a_score"] == metrics["eval_a_score"]
    assert ppo.evaluate(prompts, metric_key_prefix="test")["test_score"] == metrics["eval_a_score"]
    ppo.save_model()
    ppo.save_state()
    ppo.create_model_card()
    ppo.log_metrics("train", result.metrics)
    ppo.save_metrics("train", result.metrics)
    assert json.loads((tmp_path / "train_results.json").read_text())["train_loss"] == result.training_loss
    assert (tmp_path / "README.md").exists() and (tmp_path / "adapter_model.safetensors").exists()


def test_true_resumes_from_the_newest_checkpoint(sft, tokenizer, prompts, tmp_path):
    settings = {"total_episodes": 24, "save_strategy": "steps", "save_steps": 1}
    whole = ppo_trainer(sft, tokenizer, prompts, tmp_path / "whole", **settings)
    whole.train(resume_from_checkpoint=False)
    for last, resume in ((2, True), (1, str(tmp_path / "whole" / "checkpoint-1"))):
        for folder in (tmp_path / "whole").glob("checkpoint-*"):
            if int(folder.name.split("-")[1]) > last:
                folder.rename(tmp_path / f"{folder.name}-aside-{last}")
        again = ppo_trainer(sft, tokenizer, prompts, tmp_path / "whole", **settings)
        assert again.train(resume_from_checkpoint=resume).global_step == 3
        one, two = numbers(whole)[1], numbers(again)[1]
        assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
    fresh = ppo_trainer(sft, tokenizer, prompts, tmp_path / "fresh", **settings)
    with pytest.raises(InputError, match="resume_from_checkpoint: no whole checkpoint"):
        fresh.train(resume_from_checkpoint=True)


def test_callbacks_get_what_they_get_from_other_trainers(sft, tokenizer, prompts, tmp_path):
    events = []

    class Record(TrainerCallback):
        def __getattribute__(self, name):
            if not name.startswith("on_"):
                return super().__getattribute__(name)
            return lambda args, state, control, **given: events.append((name, state.global_step, given))

    ppo = ppo_trainer(
        sft, tokenizer, prompts, tmp_path, extra={"eval_dataset": prompts, "callbacks": [Record()]}, eval_steps=1,
        eval_strategy="steps", save_strategy="steps", save_steps=2, num_ppo_epochs=1, num_mini_batches=2,
    )  # fmt: skip
    ppo.train()
    one = ["on_step_begin", *["on_pre_optimizer_step", "on_optimizer_step"] * 2]
    expected = [
        "on_init_end", "on_train_begin", *one, "on_step_end", "on_log", "on_log", "on_evaluate", *one, "on_step_end",
        "on_log", "on_log", "on_evaluate", "on_save", "on_log", "on_train_end",
    ]  # fmt: skip
    assert [event for event, _, _ in events] == expected
    for event, _, given in events[1:]:
        assert given["model"] is ppo.model and given["processing_class"] is tokenizer, event
        assert given["optimizer"] is ppo.optimizer and given["lr_scheduler"] is ppo.lr_scheduler
        assert len(given["train_dataloader"]) == 2 and len(next(iter(given["train_dataloader"]))) == 8
    assert "eval_score" in next(given["metrics"] for event, _, given in events if event == "on_evaluate")


def test_a_callbacks_wishes_are_honoured(sft, tokenizer, prompts, tmp_path):
    class Wish(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_log = control.should_evaluate = control.should_save = state.global_step == 2
            control.should_training_stop = state.global_step == 3

    ppo = ppo_trainer(
        sft, tokenizer, prompts, tmp_path, extra={"eval_dataset": prompts, "callbacks": [Wish()]}, max_steps=9,
        logging_steps=1, num_ppo_epochs=1,
    )  # fmt: skip
    assert ppo.train().global_step == 3
    assert [entry["step"] for entry in logged(ppo)] == [2]
    assert [entry["step"] for entry in ppo.state.log_history if "eval_score" in entry] == [2]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


# ----------------------------------------------------------------------------------------------- what rewards log


def test_what_reward_functions_log_is_in_the_log_and_the_tables(sft, tokenizer, prompts, tmp_path, capsys):
    def judge(completions, number, trainer_state, log_metric, log_extra, **_):
        log_metric("judge/step", trainer_state.global_step)
        log_extra("verdict", [f"row {n}" for n in number])
        return [1.0] * len(completions)

    ppo = ppo_trainer(
        sft, tokenizer, prompts, tmp_path, [judge], extra={"eval_dataset": prompts}, max_steps=4, logging_steps=2,
        eval_strategy="steps", eval_steps=4, num_sample_generations=1, num_ppo_epochs=1,
    )  # fmt: skip
    ppo.train()
    assert [entry["judge/step"] for entry in logged(ppo)] == [0.5, 2.5]  # means since the last log
    assert [entry["eval_judge/step"] for entry in ppo.state.log_history if "eval_score" in entry] == [4.0]
    table = [json.loads(line) for line in (tmp_path / "eval_samples" / "4.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in table] == [f"row {n}" for n in range(10)]
    assert "verdict" in capsys.readouterr().out
    for name, moment in (("episode", "train"), ("epoch", "train"), ("kl", "evaluate")):
        ppo = ppo_trainer(
            sft, tokenizer, prompts, tmp_path, [lambda completions, log_metric, name=name: [0.0 for _ in completions
                                                if log_metric(name, 1) is None]],
            extra={"eval_dataset": prompts},
        )  # fmt: skip
        with pytest.raises(InputError, match=rf"log_metric\('{name}', ...\): the trainer logs this name itself"):
            getattr(ppo, moment)()


def test_a_completion_without_any_score_teaches_nothing(sft, tokenizer, prompts, tmp_path):
    def some(completions, number):
        return [None if n % 2 else 50.0 + n for n in number]

    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, [some], kl_coef=0.5)
    rollout = ppo.rollout(next(ppo.prompts()))
    with pytest.warns(UserWarning, match="'some': all returned None for some completions"):
        scored = ppo.score(rollout)
    odd = torch.tensor([n % 2 == 1 for n in rollout.columns["number"]])
    assert odd.any() and torch.equal(scored.scores.isnan(), odd)
    assert scored.scores[~odd].mean().abs() < 1e-4  # the scale is that of the completions with a score
    found = ppo.advantages(rollout, scored)
    assert (found.advantages[odd] == 0).all() and torch.equal(found.returns[odd], scored.values[odd])
    assert found.advantages[~odd][rollout.completion_mask[~odd]].std() == pytest.approx(1, abs=0.05)
    ppo.train()
    assert all(math.isfinite(value) for value in ppo.last_metrics.values())
    nobody = ppo_trainer(sft, tokenizer, prompts, tmp_path, [lambda completions: [None] * len(completions)])
    with pytest.raises(RewardError, match="'<lambda>': returned None for all 8 completions of a batch"):
        nobody.train()


def test_rewards_beyond_float32_in_sum_are_refused(sft, tokenizer, prompts, tmp_path):
    large = ppo_trainer(
        sft, tokenizer, prompts, tmp_path, [lambda completions: [3e38] * len(completions)], reward_weights=[2.0]
    )
    with pytest.raises(RewardError, match="weighted sum of <lambda> is beyond float32"):
        large.train()


# ----------------------------------------------------------------------------------------------- several trainers


class Fails(TrainerCallback):
    """Raises in the middle of a gradient accumulation or of an update."""

    def on_substep_end(self, args, state, control, **_):
        raise RuntimeError("on the way")

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == 1:
            raise RuntimeError("on the way")


def test_a_trainer_is_untouched_by_those_before_it(tiny, tokenizer, tmp_path):
    chats = Dataset.from_list([{"messages": row["prompt"] + assistant("Yes.")} for row in [*CHATS, *CHATS]])

    def ppo(callbacks=None, **changes):
        return PPOTrainer(
            model=tiny, args=short(tmp_path, logging_steps=1, **changes), reward_funcs=lengths, train_dataset=CHATS,
            callbacks=callbacks, peft_config=get_peft_config(LORA),
        )  # fmt: skip

    def sft_trainer(callbacks=None, **changes):
        args = SFTConfig(
            str(tmp_path / "sft"), max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1, learning_rate=1e-2,
            **{"bf16": False, **changes},
        )  # fmt: skip
        return SFTTrainer(tiny, args, train_dataset=chats, processing_class=tokenizer, callbacks=callbacks)

    def trained(trainer):
        trainer.train()
        return numbers(trainer)

    fresh, fresh_sft = trained(ppo()), trained(sft_trainer())
    assert_same(fresh, trained(ppo()))
    for make in (sft_trainer, ppo):
        broken = make([Fails()])
        with pytest.raises(RuntimeError, match="on the way"):
            broken.train()
        assert_same(fresh, trained(ppo()))
        assert_same(fresh_sft, trained(sft_trainer()))
    earlier = ppo()
    sft_trainer(bf16=True)  # accelerate keeps one precision for all trainers of a process
    assert_same(fresh, trained(earlier))
    earlier.train()
    assert len(logged(earlier)) == 2 and logged(earlier)[0]["lr"] == 1e-2  # a second call begins again
