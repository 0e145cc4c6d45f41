"""PPOTrainer on a tiny model: what moves, what doesn't, what is logged and what a resume brings back."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import LORA, count_a, logged, ppo_config, ppo_trainer, present, save_tiny, user
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)
from trl import ModelConfig

from rlhf.errors import InputError
from rlhf.models.adapters import REFERENCE
from rlhf.models.loading import load_causal_lm, load_policy
from rlhf.models.prefix import Rows
from rlhf.models.sources import resolve
from rlhf.ppo import PPOTrainer
from rlhf.ppo.rollout import prompt_order
from rlhf.ppo.upstream import TRLPPOTrainer
from rlhf.rewards import completion_text


def test_before_the_first_update_kl_is_zero_and_the_ratio_one(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path)
    result = ppo.train()
    first, last = logged(ppo)[0], logged(ppo)[-1]
    assert isinstance(ppo, TRLPPOTrainer)  # of TRL's class, where there is one
    assert abs(first["objective/kl"]) < 1e-5
    assert abs(first["val/first_ratio"] - 1) < 1e-5
    assert abs(last["objective/kl"]) > 1e-4
    assert last["episode"] == 16
    assert {"time/rollout", "time/reward", "time/logprobs", "time/update"} <= set(last)
    # each entry has the seconds of its own update
    assert sum(ppo.args.batch_size / entry["eps"] for entry in logged(ppo)) <= result.metrics["train_runtime"]


def test_passes_without_gradients_read_as_many_rows_as_sampling(sft, tokenizer, prompts, tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, local_rollout_forward_batch_size=8, **settings)
    ppo.train()  # what is tried once has been tried
    read: list[int] = []
    rollout = ppo.rollout([prompts[number] for number in range(8)])
    layer = ppo.model.policy.get_base_model().model.layers[0]
    handle = layer.register_forward_pre_hook(lambda _layer, inputs: read.append(len(inputs[0])))
    ppo.score(rollout)
    handle.remove()
    assert max(read) == 8 and read.count(8) == 2  # the policy and the reference


def test_policy_and_value_move_and_nothing_else(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path)
    before = {name: p.detach().clone() for name, p in ppo.model.named_parameters()}
    trainable = {name for name, p in ppo.model.named_parameters() if p.requires_grad}
    ppo.train()
    for name, parameter in ppo.model.named_parameters():
        moved = not torch.equal(before[name], parameter)
        assert moved == (name in trainable), name
    assert any("value_head" in name for name in trainable)
    assert not any(REFERENCE in name for name in trainable)
    assert {name for name, p in ppo.model.named_parameters() if p.requires_grad} == trainable


def test_one_optimizer_step_per_minibatch(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path)
    steps = []
    ppo.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    ppo.train()
    assert len(steps) == 2 * 2 * 2  # updates × epochs × minibatches
    assert ppo.state.global_step == 2


def test_at_learning_rate_zero_the_ratio_stays_one(sft, tokenizer, prompts, tmp_path):
    policy = load_policy(resolve(sft), LORA, tokenizer)
    policy.generation_config.repetition_penalty = 3.0
    args = ppo_config(tmp_path, learning_rate=0.0, temperature=0.7)
    ppo = PPOTrainer(args, tokenizer, policy, train_dataset=prompts, reward_funcs=[count_a])
    ppo.train()
    for entry in logged(ppo):
        assert abs(entry["val/ratio"] - 1) < 1e-5
        assert entry["policy/approxkl_avg"] < 1e-9
        assert entry["policy/clipfrac_avg"] == 0


def test_it_learns_what_is_rewarded(tmp_path):
    words = ["<pad>", "<eos>", "<unk>", "go", *"abcdefghijklmnop"]
    vocabulary = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    folder = save_tiny(tmp_path / "model", tokenizer, hidden_size=32)
    rows = Dataset.from_list([{"prompt": "go", "input_ids": [3]}])

    def share_of_a(prompts, completions, **columns):
        return [completion.split().count("a") / 6 for completion in completions]

    args = ppo_config(
        tmp_path, total_episodes=32 * 30, per_device_train_batch_size=32, gradient_accumulation_steps=1,
        num_mini_batches=1, num_ppo_epochs=4, learning_rate=1e-2, kl_coef=0.0, stop_token=None, ref_adapter_name=None,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(folder)
    ppo = PPOTrainer(args, tokenizer, policy, train_dataset=rows, reward_funcs=[share_of_a])
    ppo.train()
    scores = [entry["objective/raw_scores"] for entry in logged(ppo)]
    assert scores[0] < 0.2
    assert sum(scores[-3:]) / 3 > 0.95


def test_reward_functions_get_prompts_texts_and_columns(sft, tokenizer, prompts, tmp_path):
    seen = []

    def spy(prompts, completions, completion_ids, number, **columns):
        seen.append((prompts, completions, number))
        return [0.0] * len(completions)

    ppo_trainer(sft, tokenizer, prompts, tmp_path, [spy], total_episodes=8).train()
    given, completions, numbers = seen[0]
    assert given == [prompts[n]["prompt"] for n in numbers]
    assert len(completions) == 8  # in the form of their prompts, as TRL's GRPO has it
    assert all(message[0]["role"] == "assistant" for message in completions)
    assert all("<|im_end|>" not in message[0]["content"] for message in completions)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompts, completions, **_: [1.0], "returned 1 scores for 8"),
        (lambda prompts, completions, **_: [float("nan")] * 8, "returned nan for the completion"),
    ],
)
def test_bad_rewards_stop_with_their_name(sft, tokenizer, prompts, tmp_path, reward, message):
    with pytest.raises(ValueError, match=message):
        ppo_trainer(sft, tokenizer, prompts, tmp_path, [reward]).train()


def test_replies_that_never_end_are_penalized(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(
        sft, tokenizer, prompts, tmp_path, [count_a], missing_eos_penalty=2.0, stop_token_id=17, normalize_reward=False
    )
    rows = next(ppo.prompts())
    rollout = ppo.rollout(rows)
    rollout = rollout._replace(ended=torch.arange(8) % 2 == 0)
    scored = ppo.score(rollout)
    assert torch.equal(scored.raw_scores - scored.scores, torch.tensor([0.0, 2.0] * 4))
    assert ppo.stop_token_ids == [17]


def test_rewards_are_normalized_on_the_first_batch(sft, tokenizer, prompts, tmp_path):
    def offset(prompts, completions, **columns):
        return [1000.0 + 5 * len(completion_text(completion)) for completion in completions]

    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, [offset])
    rollout = ppo.rollout(next(ppo.prompts()))
    scores = ppo.score(rollout).scores
    assert abs(scores.mean()) < 1e-2 and abs(scores.std(unbiased=False) - 1) < 1e-2
    assert ppo.reward_scale.mean > 1000
    ppo.reward_funcs = [lambda prompts, completions, **_: [ppo.reward_scale.mean + 3 * ppo.reward_scale.std] * 8]
    assert torch.allclose(ppo.score(rollout).scores, torch.tensor(3.0), atol=1e-3)  # the scale stays
    plain = ppo_trainer(sft, tokenizer, prompts, tmp_path / "plain", [offset], normalize_reward=False)
    assert plain.score(rollout).scores.min() >= 1000


def test_the_score_does_not_depend_on_what_follows_the_stop_token(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, response_length=24)
    ppo.stop_token_ids = [int(ppo.rollout(next(ppo.prompts())).input_ids[0, -10])]
    rollout = ppo.rollout(next(ppo.prompts()))
    assert rollout.ended.any()
    tokens = rollout.input_ids[:, -rollout.completion_mask.shape[1] :]
    assert (tokens[~rollout.completion_mask] == tokenizer.pad_token_id).all()
    for row, mask in zip(tokens, rollout.completion_mask, strict=True):
        assert ppo.stop_token_ids[0] not in row[mask][:-1]


def test_a_resumed_run_ends_exactly_as_an_uninterrupted_one(sft, tokenizer, prompts, tmp_path):
    settings = {"total_episodes": 32, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    whole = ppo_trainer(sft, tokenizer, prompts, tmp_path / "whole", **settings)
    whole.train()
    whole.save_model()
    folders = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert folders == ["checkpoint-3", "checkpoint-4"]  # older ones are dropped
    half = ppo_trainer(sft, tokenizer, prompts, tmp_path / "half", **{**settings, "save_total_limit": None})
    half.train()
    resumed = ppo_trainer(sft, tokenizer, prompts, tmp_path / "resumed", **settings)
    torch.randn(100)  # another random state than the interrupted run had
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    resumed.save_model()
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert first and all(torch.equal(first[name], second[name]) for name in first)
    timeless = lambda entries: [  # noqa: E731
        {key: value for key, value in entry.items() if not key.startswith("time/") and key != "eps"}
        for entry in entries
    ]
    assert timeless(logged(whole)) == timeless(logged(resumed))


def test_what_is_saved_loads_with_plain_peft_and_in_a_pipeline(sft, tiny, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path)
    ppo.train()
    ppo.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in names and REFERENCE not in names
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    ids = torch.tensor([[5, 6, 7]])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(tmp_path))
    policy = ppo.accelerator.unwrap_model(ppo.model).policy.eval()
    torch.testing.assert_close(loaded(ids).logits, policy(ids).logits)  # plain PEFT uses torch's attention
    before = PeftModel.from_pretrained(loaded.unload(), sft)(ids).logits
    assert not torch.allclose(policy(ids).logits, before, atol=1e-4)
    reply = pipeline("text-generation", model=str(tmp_path))(user("Hi"), max_new_tokens=4)
    assert reply[0]["generated_text"][-1]["role"] == "assistant"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_full_fine_tuning_with_trls_own_arguments(tiny, tokenizer, prompts, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(tiny)
    classifier = lambda: AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)  # noqa: E731
    reward_model, value_model = classifier(), classifier()
    rewards_before = copy.deepcopy(reward_model.state_dict())
    args = ppo_config(tmp_path, ref_adapter_name=None)
    ids_only = prompts.select_columns(["input_ids"])
    ppo = PPOTrainer(args, tokenizer, policy, None, reward_model, ids_only, value_model)
    values_before = copy.deepcopy(value_model.state_dict())
    reference = present(ppo.ref_model)
    reference_before = copy.deepcopy(reference.state_dict())
    ppo.train()
    assert all(torch.equal(rewards_before[name], tensor) for name, tensor in reward_model.state_dict().items())
    assert all(torch.equal(reference_before[name], tensor) for name, tensor in reference.state_dict().items())
    assert any(not torch.equal(values_before[name], tensor) for name, tensor in value_model.state_dict().items())
    assert abs(logged(ppo)[0]["objective/kl"]) < 1e-5 < abs(logged(ppo)[-1]["objective/kl"])
    ppo.save_model()
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_no_dropout_is_left_in_training_mode(tokenizer, prompts, tmp_path):
    folder = save_tiny(tmp_path / "dropout", tokenizer, attention_dropout=0.5)
    lora = ModelConfig(dtype="float32", use_peft=True, lora_r=4, lora_target_modules=["all-linear"], lora_dropout=0.5)
    policy = load_causal_lm(resolve(folder), lora, tokenizer)
    args = ppo_config(tmp_path, ref_adapter_name=None)
    ppo = PPOTrainer(args, tokenizer, policy, train_dataset=prompts, reward_funcs=[count_a])
    ids = torch.tensor([[5, 6, 7, 8]])
    ppo.model.train()
    first, second = (ppo.model(Rows(ids, torch.ones_like(ids), torch.tensor([3])), 1.0).logprobs for _ in range(2))
    assert torch.equal(first, second)


def test_every_logged_metric_is_in_the_glossary(sft, tokenizer, prompts, tmp_path):
    extra = {"eval_dataset": prompts, "eval_reward_funcs": [count_a], "ptx_dataset": prompts}
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, extra=extra, eval_strategy="steps", eval_steps=1, ptx_coef=1.0)
    ppo.train()
    glossary = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    names = {key for entry in ppo.state.log_history for key in entry if "remark" not in entry}
    names -= {"step", "epoch", "total_flos", "train_loss"}  # the Trainer's own
    names = {name for name in names if not name.endswith(("_runtime", "_per_second"))}
    general = {re.sub("time/.*", "time/*", name.replace("count_a", "<name>")) for name in names}
    assert len(general) > 30
    assert not {name for name in general if f"`{name}`" not in glossary}


def test_settings_that_cannot_work_are_refused(sft, tokenizer, prompts, tmp_path):
    for changes, message in (
        ({"kl_estimator": "k3"}, "--kl_estimator"),
        ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha: has no effect"),
        ({"use_liger_kernel": True}, "--use_liger_kernel: has no effect"),
        ({"num_mini_batches": 3}, "--num_mini_batches"),
        ({"missing_eos_penalty": -1.0}, "--missing_eos_penalty"),
        ({"temperature": 0.0}, "--temperature"),
        ({"response_length": 0}, "--response_length"),
        ({"save_strategy": "epoch"}, "--save_strategy"),
    ):
        with pytest.raises(InputError, match=message):
            ppo_config(tmp_path, **changes)
    policy = load_policy(resolve(sft), LORA, tokenizer)
    with pytest.raises(InputError, match="needs a reward"):
        PPOTrainer(ppo_config(tmp_path), tokenizer, policy, train_dataset=prompts)
    broken = copy.deepcopy(tokenizer)
    broken.pad_token = broken.eos_token
    with pytest.raises(InputError, match="pad token"):
        PPOTrainer(ppo_config(tmp_path), broken, policy, train_dataset=prompts, reward_funcs=[count_a])


def test_prompt_order_is_gapless_seeded_and_fresh_each_pass():
    whole = prompt_order(5, 0, 15, seed=1)
    assert [sorted(whole[start : start + 5]) for start in (0, 5, 10)] == [list(range(5))] * 3
    assert whole[:5] != whole[5:10]
    pieces = [number for start in range(0, 15, 3) for number in prompt_order(5, start, 3, seed=1)]
    assert pieces == whole
    assert prompt_order(5, 0, 15, seed=2) != whole
