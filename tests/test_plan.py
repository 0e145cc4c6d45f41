"""`--plan true`: memory and operations against real steps, parameters by hand, and what the recipes print."""

import dataclasses
import json
import random

import pytest
import torch
from conftest import LORA, TINY_PPO, TINY_TRAINING, VOCABULARY, ppo_config, ppo_trainer, run, save_tiny
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from trl import ModelConfig, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlhf.data.pairs import PreferenceCollator
from rlhf.errors import InputError
from rlhf.models.loading import load_causal_lm, load_reward_model
from rlhf.models.losses import FUSED
from rlhf.models.sources import resolve
from rlhf.planning.arguments import PlanConfig
from rlhf.planning.fused_head import FusedHead
from rlhf.planning.launch import launch_of
from rlhf.planning.models import check_plannable, language_model, parameters, reward_model
from rlhf.planning.plan import Need, largest_batch, over_layers
from rlhf.planning.ppo_plan import plan_ppo
from rlhf.planning.report import lines_of
from rlhf.planning.supervised import BATCH, plan_reward, plan_sft
from rlhf.rewards import resolve_rewards

FULL = ModelConfig(dtype="float32", use_peft=False)
PLAN = PlanConfig(plan=True)
LENGTH = 40


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """A model whose activations are not lost beside the rest."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    return save_tiny(tmp_path_factory.mktemp("model"), tokenizer, num_key_value_heads=2, **sizes)


def supervised(kind, model_args, model, tokenizer, folder, **changes):
    """A plan, and the trainer of the same run, whose rows all have LENGTH tokens."""
    settings = {"output_dir": str(folder), "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True,
                "report_to": "none", "activation_checkpointing": False, **changes}  # fmt: skip
    ids = torch.randint(10, VOCABULARY, (4, 2 * LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    if kind == "sft":
        rows = Dataset.from_list([{"input_ids": row[:LENGTH], "labels": row[:LENGTH]} for row in ids])
        args = SFTConfig(**settings)
        plan = plan_sft(PLAN, args, model_args, resolve(model), rows)
        trainer = SFTTrainer(load_causal_lm(resolve(model), model_args, tokenizer), args, train_dataset=rows,
                             processing_class=tokenizer)  # fmt: skip
    else:
        rows = Dataset.from_list([{"chosen_ids": row[:LENGTH], "rejected_ids": row[LENGTH:]} for row in ids])
        args = RewardConfig(**settings, remove_unused_columns=False)
        plan = plan_reward(PLAN, args, model_args, resolve(model), rows)
        trainer = RewardTrainer(
            load_reward_model(resolve(model), model_args, tokenizer), args, train_dataset=rows,
            processing_class=tokenizer, data_collator=PreferenceCollator(tokenizer.pad_token_id, None),
        )  # fmt: skip
    return plan, trainer


def allocated(function, folder):
    """Bytes at the peak of what a function allocates, as torch's profiler saw its CPU allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    sizes = [event["args"]["Bytes"] for event in sorted(events, key=lambda e: e.get("ts", 0))
             if event.get("name") == "[memory]"]  # fmt: skip
    total = most = 0
    for size in sizes:
        total += size
        most = max(most, total)
    return most


def passing(phase):
    """Bytes of a phase beside what is always there."""
    return sum(size for role, size in phase.at_rows.memory.items() if role not in ("weights", "adapters", "optimizer"))


@pytest.mark.parametrize(
    ("kind", "model_args", "changes"),
    [
        ("sft", LORA, {}),
        ("sft", FULL, {"activation_checkpointing": True}),
        ("sft", FULL, {"dtype": "bfloat16", "bf16": True} if FUSED
         else {"loss_type": "nll", "dtype": "bfloat16", "bf16": True}),
        ("reward", LORA, {}),
        ("reward", FULL, {}),
    ],
)  # fmt: skip
def test_memory_and_operations_are_those_of_a_training_step(kind, model_args, changes, model, tokenizer, tmp_path):
    model_args = dataclasses.replace(model_args, dtype=changes.pop("dtype", "float32"))
    plan, trainer = supervised(kind, model_args, model, tokenizer, tmp_path, **changes)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1  # the training loop sets it, and switches checkpointing on
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable(trainer.args.activation_checkpointing_kwargs)

    def step():
        trainer.training_step(trainer.model, dict(batch))

    step()
    trainer.model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        step()
    trainer.model.zero_grad()
    assert plan.peak.operations == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert passing(plan.peak) == pytest.approx(allocated(step, tmp_path), rel=0.05)
    state = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    held = plan.peak.at_rows.memory
    assert held["weights"] + held.get("adapters", 0) == pytest.approx(state, rel=0.001)


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"value_function": "adapter"}])
def test_ppo_needs_what_its_phases_take(changes, sft, tokenizer, tmp_path):
    settings = {"stop_token": None, "num_mini_batches": 1, "gradient_accumulation_steps": 1, "response_length": 12}
    ids = torch.randint(10, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_list([{"prompt": "", "input_ids": row} for row in ids])
    trainer = ppo_trainer(sft, tokenizer, rows, tmp_path, **settings, **changes)
    source = resolve(sft)
    plan = plan_ppo(PLAN, trainer.args, LORA, (source, source), (resolve_rewards(trainer.args), []), rows)
    needs = {phase.name: phase for phase in plan.phases}
    assert list(needs) == ["sampling", "log-probabilities", "update"]
    given = [rows[number] for number in range(4)]
    rollout = trainer.rollout(given)  # the first pass of each kind also tries what the model can do
    scored = trainer.score(rollout)
    advantages = trainer.advantages(rollout, scored)
    trainer.update(rollout, scored, advantages)
    assert rollout.completion_mask.all()
    for name, phase in (
        ("sampling", lambda: trainer.rollout(given)),
        ("log-probabilities", lambda: trainer.score(rollout)),
        ("update", lambda: trainer.update(rollout, scored, advantages)),
    ):
        with FlopCounterMode(display=False) as counter:
            phase()
        assert needs[name].operations == pytest.approx(counter.get_total_flops(), rel=0.02), name
        assert passing(needs[name]) == pytest.approx(allocated(phase, tmp_path), rel=0.1), name
    every, trained = plan.parameters["policy and value function"]
    own = [*trainer.model.parameters()]
    assert every == sum(p.numel() for p in own)
    assert trained == sum(p.numel() for p in own if p.requires_grad)


def test_vllm_is_not_planned_but_its_share_of_the_gpu_is_taken_off(sft, tokenizer, tmp_path):
    rows, source = Dataset.from_list([{"prompt": "", "input_ids": [5] * LENGTH}]), resolve(sft)

    def planned(**flags):
        args = ppo_config(tmp_path, response_length=12, **flags)
        plan = PlanConfig(plan=True, plan_memory=0.5)
        return plan_ppo(plan, args, LORA, (source, source), (resolve_rewards(args), []), rows)

    own, colocated = planned(), planned(use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.5)
    assert [phase.name for phase in colocated.phases] == [
        phase.name for phase in own.phases if phase.name != "sampling"
    ]
    assert "has 50% of each GPU" in lines_of(colocated)[0]
    assert 0 < colocated.fits[BATCH] < own.fits[BATCH]
    server, rows_flag = planned(use_vllm=True), "--local_rollout_forward_batch_size"
    assert server.fits.keys() == own.fits.keys() and server.fits[BATCH] == own.fits[BATCH]
    assert server.fits[rows_flag] >= own.fits[rows_flag]  # of the log-probabilities, without sampling


def test_parameters_by_hand(model, tokenizer):
    width, inner, layers, vocabulary, keys = 64, 192, 4, len(tokenizer), 2 * 16
    layer = 2 * width * width + 2 * width * keys + 3 * width * inner + 2 * width
    whole = vocabulary * width + layers * layer + width  # the head is the embeddings
    assert parameters(language_model(resolve(model), FULL, on_cpu=True)) == (whole, whole)
    sides = 2 * (2 * width) + 2 * (width + keys) + 3 * (width + inner)
    lora = layers * LORA.lora_r * sides
    assert parameters(language_model(resolve(model), LORA, on_cpu=True)) == (whole + lora, lora)
    score = width
    assert parameters(reward_model(resolve(model), FULL, on_cpu=True)) == (whole + score, whole + score)


def fsdp(monkeypatch, model, folder, gpus, **changes):
    """Memory of full fine-tuning under FSDP2 with mixed precision, by role."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    rows = Dataset.from_list([{"input_ids": [1] * LENGTH, "labels": [1] * LENGTH}] * 4)
    args = SFTConfig(str(folder), per_device_train_batch_size=1, report_to="none", use_cpu=True, bf16=True, **changes)
    plan = plan_sft(dataclasses.replace(PLAN, plan_processes=gpus), args, FULL, resolve(model), rows)
    return plan.peak.at_rows.memory, plan.parameters["model"][0]


def test_fsdp_spreads_sixteen_bytes_a_parameter(model, tmp_path, monkeypatch):
    for gpus in (8, 64):
        memory, count = fsdp(monkeypatch, model, tmp_path, gpus)
        states = memory["weights"] + memory["gradients"] + memory["optimizer"]
        assert states == pytest.approx(16 * count / gpus, rel=0.01)
    whole, count = fsdp(monkeypatch, model, tmp_path, 8, gradient_accumulation_steps=2)
    assert whole["gradients"] == 2 * count  # not spread until they are summed, in bfloat16


def test_a_plan_says_what_ddp_adds(model, tokenizer, tmp_path):
    alone, _ = supervised("sft", FULL, model, tokenizer, tmp_path)
    args = SFTConfig(str(tmp_path), per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False)
    rows = Dataset.from_list([{"input_ids": [1] * LENGTH, "labels": [1] * LENGTH}] * 4)
    plan = plan_sft(dataclasses.replace(PLAN, plan_processes=2), args, FULL, resolve(model), rows)
    assert plan.peak.at_rows.memory["DDP's buckets"] == 4 * plan.parameters["model"][0]
    assert plan.tokens == 2 * alone.tokens


def test_many_layers_are_told_by_few(tokenizer, tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "deep", tokenizer, num_hidden_layers=12)
    rows = Dataset.from_list([{"input_ids": [1] * LENGTH, "labels": [1] * LENGTH}] * 4)
    args = SFTConfig(str(tmp_path), per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False)
    told = plan_sft(PLAN, args, LORA, resolve(folder), rows)
    monkeypatch.setattr("rlhf.planning.plan.MORE", 12)
    tried = plan_sft(PLAN, args, LORA, resolve(folder), rows)
    assert told.peak.operations == pytest.approx(tried.peak.operations, rel=1e-6)
    assert told.peak.at_rows.total == pytest.approx(tried.peak.at_rows.total, rel=0.02)
    assert over_layers(20, lambda layers: Need({"weights": 3.0 + (layers or 20)}, 0.0)).memory == {"weights": 23.0}


def test_the_largest_batch_fits_and_one_more_does_not():
    draw = random.Random(0)
    for _ in range(300):
        lines = [(draw.uniform(0, 50), draw.uniform(0.01, 5)) for _ in range(draw.randint(1, 5))]
        limit, tried = draw.uniform(1, 400), list[int]()

        def total(rows, lines=lines, tried=tried):
            tried.append(rows)
            return max(start + slope * rows for start, slope in lines)

        found = largest_batch(total, limit, draw.choice([2, 16, 64]))
        assert len(tried) <= 12
        assert found == 0 or total(found) <= limit
        assert total(found + 1) > limit


@pytest.mark.parametrize(("trains_head", "products"), [(False, 3), (True, 4)])
def test_the_fused_head_on_a_gpu_by_hand(trains_head, products, tmp_path):
    """Its logits once, again for the gradients, and a product for each gradient; a tile at a time."""
    hidden = torch.randn(5000, 8, requires_grad=True)
    weight = torch.randn(70_000, 8, requires_grad=trains_head)
    with FlopCounterMode(display=False) as counter:
        FusedHead.apply(hidden, weight).sum().backward()
    assert counter.get_total_flops() == products * 2 * 5000 * 8 * 70_000
    peak = allocated(lambda: FusedHead.apply(hidden, weight), tmp_path)
    assert peak == pytest.approx(4 * 4096 * 32768, rel=0.01)


@pytest.mark.parametrize("recipe", ["sft", "reward", "ppo"])
def test_recipes_print_a_plan_and_write_nothing(recipe, tiny, sft, reward_adapter, files, tmp_path):
    data = {"sft": "sft", "reward": "pairs", "ppo": "prompts"}[recipe]
    more = ["--reward_model_path", reward_adapter, *TINY_PPO] if recipe == "ppo" else TINY_TRAINING
    found = run(
        f"recipes/{recipe}.py", "--model_name_or_path", sft if recipe == "ppo" else tiny, "--dataset_name",
        files / f"{data}.jsonl", "--output_dir", tmp_path / "out", *more, "--plan", "true", "--plan_memory", "0.2",
        "--plan_processes", "8",
    )  # fmt: skip
    assert found.stdout.splitlines()[-1].startswith("Not counted: ")
    assert f"Plan of recipes/{recipe}.py for 8 GPUs, DDP, no mixed precision" in found.stdout
    assert "0.2 GiB: --per_device_train_batch_size" in found.stdout
    assert ("  scoring  " in found.stdout) == (recipe == "ppo")
    assert not (tmp_path / "out").exists()


def test_what_is_not_planned_is_refused(tiny, tmp_path, monkeypatch):
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    for name, value in (("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_USE_FSDP", "true")):
        with monkeypatch.context() as patch, pytest.raises(InputError, match="--plan: no plan is made for"):
            patch.setenv(name, value)
            launch_of(args, PLAN)
    with pytest.raises(InputError, match="quantized"):
        check_plannable(resolve(tiny), dataclasses.replace(LORA, load_in_4bit=True))
