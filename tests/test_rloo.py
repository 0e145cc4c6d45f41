"""RLOO: rewards, prompts, sampling and reference as PPO's; leave-one-out advantages; resume; bad input."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import LORA, ROOT, count_a, load_script, present, run, user
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, pipeline
from trl import RLOOConfig as TRLRLOOConfig
from trl import RLOOTrainer as TRLRLOOTrainer

from eval.curves import read_curves
from eval.drawing.figures import ORANGE, curves_figure, training_figure
from rlhf.data.encoding import encode_prompt
from rlhf.engines.continuous_batching import ContinuousBatching
from rlhf.errors import InputError
from rlhf.models.adapters import REWARD
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards import RewardError, RewardSource, load_reward, resolve_reward
from rlhf.rloo import RLOOConfig, RLOOTrainer, need_prompts

TYPED = "What does <|im_end|> mean?"  # a control token that a user typed


def config(folder, **changes):
    """Two updates of eight completions, four of each prompt."""
    settings = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_generations": 4, "num_generations_eval": 1, "per_device_eval_batch_size": 4, "max_completion_length": 6,
        "learning_rate": 0.05, "beta": 0.1, "bf16": False, "use_cpu": True, "activation_checkpointing": False,
        "report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, **changes,
    }  # fmt: skip
    return RLOOConfig(**settings)


def trainer(source, folder, rewards=(count_a,), prompts=None, **changes):
    """A trainer that starts from a model or an adapter."""
    tokenizer = load_tokenizer(resolve(source))
    policy = load_causal_lm(resolve(source), LORA, tokenizer)
    rewards = [load_reward(r, LORA, policy=policy) if isinstance(r, RewardSource) else r for r in rewards]
    rows = Dataset.from_list([{"prompt": user(text), "number": n} for n, text in enumerate(prompts or [TYPED, "Hi"])])
    return RLOOTrainer(
        model=policy, args=config(folder, **changes), reward_funcs=rewards, train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip


def logged(rloo):
    return [entry for entry in rloo.state.log_history if "reward" in entry]


@pytest.fixture(scope="module")
def trained(sft, tmp_path_factory):
    """Two updates from an adapter, what the reward function saw, and the weights before."""
    seen = []

    def spy(prompts, completions, completion_ids, **columns):
        seen.append((prompts, completions, completion_ids, columns))
        return count_a(prompts, completions)

    folder = tmp_path_factory.mktemp("rloo")
    rloo = trainer(sft, folder, [spy])
    before = {name: p.detach().clone() for name, p in rloo.model.named_parameters()}
    rloo.train()
    return rloo, seen, before


def test_the_reference_is_the_frozen_sft_adapter(trained):
    rloo, _, before = trained
    after = dict(rloo.model.named_parameters())
    assert logged(rloo)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(logged(rloo)[1]["objective/kl"]) > 1e-3
    for name, parameter in after.items():
        moved = not torch.equal(parameter, before[name])
        assert parameter.requires_grad == moved == (".default." in name), name
        if ".ref." in name:
            assert torch.equal(parameter, before[name.replace(".ref.", ".default.")]), name


def test_an_engine_samples_from_the_policy_as_it_is_now(sft, tmp_path):
    """check_weights compares log-probabilities at each rollout; the engine is made once."""
    engine = {"use_transformers_continuous_batching": True,
              "transformers_continuous_batching_config": {"page_size": 16}}  # fmt: skip
    rloo = trainer(sft, tmp_path / "run", **engine)
    made, new_engine = [], rloo.sampler._new_engine

    def noted(*words):
        made.append(new_engine(*words))
        return made[-1]

    rloo.sampler._new_engine = noted
    rloo.train()
    assert [type(engine) for engine in made] == [ContinuousBatching] and rloo.args.use_transformers_continuous_batching
    assert abs(logged(rloo)[1]["objective/kl"]) > 1e-3 and logged(rloo)[1]["episode"] == 16
    other = load_causal_lm(resolve(sft), LORA, rloo.processing_class).get_base_model()
    other.get_output_embeddings().weight.data.mul_(50)
    made[0].model = other
    with pytest.raises(InputError, match="samples from other weights"):
        rloo.evaluate()
    for flags, said in (({"top_p": 0.9}, "--top_p: has no effect"), ({"generation_kwargs": {"top_k": 4}}, "--gener")):
        with pytest.raises(InputError, match=said):
            config(tmp_path / "other", **engine, **flags)


def test_the_kl_is_a_sum_over_tokens_and_episodes_are_counted(trained):
    rloo, _, _ = trained
    for number, entry in enumerate(logged(rloo), 1):
        assert entry["objective/kl"] == pytest.approx(entry["kl"] * entry["completions/mean_length"])
        assert entry["episode"] == 8 * number


def test_rewards_see_prompts_completions_and_columns(trained):
    rloo, seen, _ = trained
    prompts, completions, ids, columns = seen[0]
    assert len(prompts) == len(completions) == len(ids) == len(columns["number"]) == 8
    assert all(isinstance(one, list) and one[0]["role"] == "assistant" for one in completions)
    eos = rloo.processing_class.eos_token_id
    assert all(1 <= len(row) <= 6 and eos not in row[:-1] for row in ids)
    assert columns["trainer_state"].max_steps == rloo.state.max_steps == 2 and len({str(p) for p in prompts}) == 2


def test_a_control_token_that_a_user_typed_stays_text(trained):
    rloo, _, _ = trained
    (ids,), _, _ = rloo._tokenize_prompts([user(TYPED)])
    stock = TRLRLOOTrainer._tokenize_prompts(rloo, [user(TYPED)])[0][0]
    end = rloo.processing_class.eos_token_id
    assert ids == encode_prompt(rloo.processing_class, user(TYPED))
    assert ids.count(end) == stock.count(end) - 1
    hello = [user("Hello")]
    assert rloo._tokenize_prompts(hello)[0] == TRLRLOOTrainer._tokenize_prompts(rloo, hello)[0]


def test_advantages_leave_one_out(sft, tmp_path):
    """Against the formula written out: R_i less the mean of the others, R = reward - beta * KL."""
    rewards = iter([1.0, 2.0, 4.0, 5.0, -1.0, 0.0, 0.0, 3.0])
    rloo = trainer(sft, tmp_path, [lambda prompts, completions, **_: [next(rewards) for _ in completions]])
    rloo.model.train()
    inputs = [{"prompt": user(text)} for text in ("a", "b") for _ in range(4)]
    advantages = rloo._generate_and_score_completions(inputs)["advantages"].tolist()
    assert advantages == pytest.approx(
        [1 - 11 / 3, 2 - 10 / 3, 4 - 8 / 3, 5 - 7 / 3, -2, -2 / 3, -2 / 3, 10 / 3], abs=1e-4
    )


def test_padding_reaches_no_token(sft, tmp_path):
    rloo = trainer(sft, tmp_path)
    ids = torch.tensor([[9, 8, 7, 6, 5, 4]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    seen = []
    rloo.model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs), with_kwargs=True)
    whole = rloo._get_per_token_logps_and_entropies(rloo.model, ids, torch.ones_like(ids), 2)[0]
    mask = torch.tensor([[0] * 3 + [1] * 6])
    behind = rloo._get_per_token_logps_and_entropies(rloo.model, padded, mask, 2)[0]
    assert torch.allclose(whole, behind, atol=1e-5)
    assert seen[1]["input_ids"][:, :6].equal(ids)  # the padding has gone to the right
    assert seen[1]["attention_mask"].tolist() == [[1] * 6 + [0] * 3]


def test_a_reward_model_over_the_policys_base(sft, reward_adapter, tmp_path):
    """Its evaluation mode must not leak: TRL logs by the policy's mode. And it is neither trained nor saved."""
    rloo = trainer(sft, tmp_path, [resolve_reward(reward_adapter)], max_steps=1)
    before = {n: p.detach().clone() for n, p in rloo.model.named_parameters() if f".{REWARD}." in n}
    rloo.train()
    entry = logged(rloo)[0]
    assert math.isfinite(entry["reward"]) and entry["reward_std"] > 0 and "entropy" in entry
    assert before and all(torch.equal(p, before[n]) for n, p in rloo.model.named_parameters() if n in before)
    rloo.save_model()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} <= {"runs"}


def test_per_token_rewards_add_up_and_nan_is_refused(sft, tmp_path):
    def ones(prompts, completions, completion_ids, **columns):
        return [[1.0] * len(ids) for ids in completion_ids]

    def silent(prompts, completions, **columns):
        return [None] * len(completions)

    rloo = trainer(sft, tmp_path, [ones, silent])
    texts = [[{"role": "assistant", "content": "x"}]] * 2
    rewards = rloo._calculate_rewards([{"prompt": user("a")}] * 2, [user("a")] * 2, texts, [[5, 6], [7]])
    assert rewards[:, 0].tolist() == [2.0, 1.0] and rewards[:, 1].isnan().all()
    rloo.reward_funcs = [silent]
    with pytest.raises(RewardError, match="'silent': returned None for all 2 completions"):
        rloo._calculate_rewards([{"prompt": user("a")}] * 2, [user("a")] * 2, texts, [[5, 6], [7]])
    rloo.reward_funcs = [lambda prompts, completions, **columns: [math.nan] * len(completions)]
    with pytest.raises(RewardError, match="nan"):
        rloo._calculate_rewards([{"prompt": user("a")}] * 2, [user("a")] * 2, texts, [[5, 6], [7]])


def test_full_fine_tuning_has_a_reference_of_the_same_precision(tiny, tmp_path):
    source = resolve(tiny)
    tokenizer = load_tokenizer(source)
    policy = load_causal_lm(source, dataclasses.replace(LORA, use_peft=False), tokenizer)
    rows = Dataset.from_list([{"prompt": user("Hi")}, {"prompt": user("Ho")}])
    rloo = RLOOTrainer(
        policy, args=config(tmp_path), reward_funcs=[count_a], train_dataset=rows, processing_class=tokenizer
    )
    rloo.train()
    assert rloo.ref_model.dtype == policy.dtype
    assert logged(rloo)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(logged(rloo)[1]["objective/kl"]) > 1e-3


def test_a_resumed_run_ends_as_if_nothing_had_happened(sft, tmp_path):
    whole = trainer(sft, tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    whole.train()
    assert not list((tmp_path / "checkpoint-2").glob("ref/*"))
    again = trainer(sft, tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    first, second = dict(whole.model.named_parameters()), dict(again.model.named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert logged(whole)[-1]["objective/kl"] == logged(again)[-1]["objective/kl"]
    assert logged(again)[-1]["episode"] == 24


def test_a_step_makes_the_better_completion_likelier(sft, tmp_path):
    rloo = trainer(sft, tmp_path, beta=0.0)
    rloo.model.train()
    prompt, completion = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([[999, 5], [6, 7]])
    ids, mask = torch.cat([prompt, completion], 1), torch.ones(2, 5, dtype=torch.long)

    def gap():
        logps = rloo._get_per_token_logps_and_entropies(rloo.model, ids, mask, 2)[0].sum(1).detach()
        return logps, float(logps[0] - logps[1])

    old_logps, before = gap()
    optimizer = torch.optim.SGD([p for p in rloo.model.parameters() if p.requires_grad], lr=1e-3)
    loss = rloo.compute_loss(rloo.model, {
        "prompt_ids": prompt, "prompt_mask": mask[:, :3], "completion_ids": completion, "completion_mask": mask[:, :2],
        "advantages": torch.tensor([1.0, -1.0]), "old_logps": old_logps,
    })  # fmt: skip
    loss.backward()
    optimizer.step()
    assert gap()[1] > before + 1e-3


@pytest.fixture(scope="module")
def recipe(sft, files, tmp_path_factory):
    """A run of the recipe, folder and output."""
    out = tmp_path_factory.mktemp("recipe")
    words = ["--model_name_or_path", sft, "--dataset_name", files / "prompts.jsonl", "--output_dir", out / "rloo",
             "--max_steps", 2, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1,
             "--max_completion_length", 6, "--dtype", "float32", "--bf16", "false", "--per_device_eval_batch_size", 4,
             "--save_steps", 1]  # fmt: skip
    return out, run("recipes/rloo.py", *words)


def test_the_recipe_leaves_an_ordinary_adapter_a_report_and_a_card(recipe, tiny):
    out, said = recipe
    run_file = json.loads((out / "rloo" / "run.json").read_text())
    assert run_file["finished"] and set(run_file["metrics"]) >= {"eval_reward", "eval_objective/kl"}
    assert "'objective/kl': '0'" in said.stdout or "'objective/kl': '-0'" in said.stdout
    card = (out / "rloo" / "README.md").read_text()
    assert "recipes/rloo.py" in card and "held-out reward" in card and "reward function | starter" in card
    assert (out / "rloo" / "training.png").stat().st_size > 5000 and (out / "rloo" / "report.html").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(out / "rloo"))
    reply = pipeline("text-generation", model=str(out / "rloo"))(user("Hi"), max_new_tokens=3)
    assert reply[0]["generated_text"][-1]["role"] == "assistant"
    log = json.loads((out / "rloo" / "trainer_state.json").read_text())["log_history"]
    assert len(present(training_figure("rloo", log)).axes) == 6
    panel = present(training_figure("sft", [{"step": 2, "eval_loss": 1.0}])).axes[0]  # held out alone keeps its colour
    assert [line.get_color() for line in panel.get_lines()] == [ORANGE] and panel.get_legend() is not None


def fake(folder, recipe, points, **settings):
    """A finished run with a log."""
    folder.mkdir()
    key = {"ppo": "objective/raw_scores", "rloo": "reward"}[recipe]
    log = [{"step": n, "episode": e, key: r, "objective/kl": kl} for n, (e, r, kl) in enumerate(points, 1)]
    (folder / "run.json").write_text(json.dumps({"recipe": recipe, "settings": settings, "finished": True}))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*log, {"step": 9, "remark": "x"}]}))
    return str(folder)


def test_curves_are_read_from_both_recipes_and_drawn(tmp_path):
    ppo = fake(tmp_path / "p", "ppo", [(8, 0.1, 0.0), (16, 0.3, 2.0)], learning_rate=1)
    one = fake(tmp_path / "r", "rloo", [(8, 0.2, 0.0), (16, 0.4, 1.0)])
    two = fake(tmp_path / "s", "rloo", [(8, 0.4, 0.0), (16, 0.6, 3.0)])
    curves = read_curves([f"ppo={ppo}", f"rloo={one}", f"rloo={two}"])
    assert curves[0]["points"] == [{"episode": 8, "reward": 0.1, "kl": 0.0}, {"episode": 16, "reward": 0.3, "kl": 2.0}]
    reward, kl, _ = curves_figure(curves).axes
    lines = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in reward.lines}
    assert lines["rloo, mean of 2"] == pytest.approx([0.3, 0.5]) and lines["ppo"] == [0.1, 0.3]
    (mean,) = (line for line in kl.lines if line.get_label() == "rloo, mean of 2")
    assert np.asarray(mean.get_ydata()).tolist() == [0.0, 2.0]


def test_runs_that_differ_in_their_reward_are_not_compared(tmp_path):
    ppo = fake(tmp_path / "p", "ppo", [(8, 0.1, 0.0)], reward_model_path="a")
    other = fake(tmp_path / "r", "rloo", [(8, 0.1, 0.0)], reward_model_path="b")
    with pytest.raises(InputError, match=r"differs from .* in reward_model_path"):
        read_curves([f"ppo={ppo}", f"rloo={other}"])
    with pytest.raises(InputError, match="no finished run"):
        read_curves([f"ppo={tmp_path}"])
    empty = fake(tmp_path / "e", "rloo", [], reward_model_path="a")
    with pytest.raises(InputError, match="no reward and KL in its log"):
        read_curves([f"ppo={ppo}", f"rloo={empty}"])
    with pytest.raises(InputError, match="--models ppo: give name=model pairs"):
        read_curves(["ppo"])


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(InputError, match="8 prompts; a batch of 64 completions, 4 of each, takes 16"):
        need_prompts(range(8), "d", config(tmp_path, per_device_train_batch_size=32))
    with pytest.raises(InputError, match=r"--save_steps 3.*multiple of 2"):
        config(tmp_path, num_iterations=2, save_strategy="steps", save_steps=3)
    # 6 passes per batch, 4 per update: batch and update end together after 12
    uneven = {"steps_per_generation": 6, "gradient_accumulation_steps": 4, "save_strategy": "steps"}
    with pytest.raises(InputError, match=r"are 3 updates apart.*multiple of 3"):
        config(tmp_path, **uneven, save_steps=1)
    assert config(tmp_path, **uneven, save_steps=6).save_steps == 6
    with pytest.raises(InputError, match="--beta -1"):
        config(tmp_path, beta=-1)


def test_too_few_prompts_are_refused_before_the_folder_is_claimed(tiny, files, tmp_path, monkeypatch):
    module = load_script("recipes/rloo.py")
    words = ["--model_name_or_path", tiny, "--dataset_name", files / "prompts.jsonl", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["rloo.py", *map(str, words)])
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=r"prompts\.jsonl: 7 prompts; a batch of 64"):
        module.main()
    assert not (tmp_path / "out").exists()


def test_functions_written_for_grpo_work_and_what_they_log_arrives(sft, tmp_path):
    seen = []

    async def judge(prompts, completions, completion_ids, number, trainer_state, log_metric, log_extra, **given):
        seen.append((trainer_state.global_step, sorted(given)))
        log_metric("judge/number", sum(number) / len(number))
        if trainer_state.global_step:  # the table has no such column for the first batch
            log_extra("verdict", [f"row {n}" for n in number])
        completions[0].clear()
        return [None if n else float(len(ids)) for n, ids in zip(number, completion_ids, strict=True)]

    with pytest.warns(UserWarning, match="'judge': all returned None for some completions"):
        rloo = trainer(sft, tmp_path, [judge])
        rloo.train()
    assert seen == [(0, []), (1, [])]
    assert [entry["judge/number"] for entry in logged(rloo)] == [0.5, 0.5]
    assert {"rewards/judge/mean", "rewards/judge/std"} <= set(logged(rloo)[0])
    table = rloo._logs
    assert len(table["prompt"]) == len(table["extra"]["verdict"]) == len(table["rewards"]["judge"]) == 8
    assert {*table["extra"]["verdict"]} == {"row 0", "row 1"}
    twice = trainer(sft, tmp_path, [count_a, count_a])
    assert twice.reward_func_names == ["count_a_1", "count_a_2"]
    wrong = trainer(sft, tmp_path, [lambda completions, log_extra: [log_extra("x", [1]) or 0.0] * len(completions)])
    with pytest.raises(RewardError, match=r"log_extra\('x', ...\) .*values for 8 completions"):
        wrong.train()


def test_names_of_the_trainer_are_refused(sft, tmp_path):
    def log_as(name, what):
        def reward(completions, log_metric, log_extra):
            log_metric(name, 1.0) if what == "metric" else log_extra(name, completions)
            return [0.0] * len(completions)

        return reward

    for name in ("kl", "entropy", "epoch"):
        with pytest.raises(InputError, match=rf"log_metric\('{name}', ...\): the trainer logs this name itself"):
            trainer(sft, tmp_path, [log_as(name, "metric")]).train()
    with pytest.raises(InputError, match=r"log_extra\('completion', ...\): the tables have this column"):
        trainer(sft, tmp_path, [log_as("completion", "extra")]).train()


def test_a_name_a_function_and_prompts_are_enough_for_rloo(tiny, reward_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_list([{"prompt": "Tea is"}, {"prompt": "Rain is"}] * 4)
    assert RLOOTrainer(tiny, count_a, None, rows).args.output_dir == f"{tiny.split('/')[-1]}-RLOO"
    rloo = RLOOTrainer(tiny, [reward_adapter, "starter"], config(tmp_path, max_steps=1), rows)
    rloo.train()
    assert f"rewards/{reward_adapter.split('/')[-1]}/mean" in logged(rloo)[0]
    with pytest.raises(InputError, match=r"args: give an rlhf\.rloo\.RLOOConfig"):
        RLOOTrainer(tiny, count_a, TRLRLOOConfig(str(tmp_path), bf16=False), rows)
    with pytest.raises(InputError, match="reward_funcs: print: takes"):
        RLOOTrainer(tiny, print, config(tmp_path), rows)
