"""Engines: where completions end, continuous batching beside the own loop, the mismatch and its correction, refusals.

Nothing here stands in for a vLLM server: `make engines` starts a real one.
"""

import functools
import json
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import LORA, VOCABULARY, count_a, logged, ppo_config, ppo_trainer, run
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import GRPOConfig

from rlhf.engines.arguments import EngineArguments, SamplerArguments
from rlhf.engines.completions import check_weights, make_sampler
from rlhf.engines.continuous_batching import ContinuousBatching
from rlhf.engines.own_loop import OwnLoop
from rlhf.engines.seam import Completions, Decoding, Stops, completions_of
from rlhf.engines.vllm_sampling import PolicyFiles
from rlhf.engines.vllm_server import read_choice, request_body
from rlhf.errors import InputError
from rlhf.models.generation import Sampling, sample_completions
from rlhf.models.loading import load_causal_lm, load_policy
from rlhf.models.sources import resolve
from rlhf.ppo import PPOTrainer
from rlhf.ppo.engine import make_engine, need_engine
from rlhf.ppo.mismatch import check_engine, importance_weights, mismatch_metrics
from rlhf.ppo.model import PolicyAndValue, TokenOutputs
from rlhf.ppo.update import UpdateSettings, ppo_loss
from rlhf.starter.model import starter_model

NAN = float("nan")
CONTINUOUS: dict[str, Any] = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"page_size": 16},
}

# ------------------------------------------------------------------------------------------ the mismatch, by hand

# ratios of policy to engine: 2, 1/2 | 4, unknown | 1, padding
POLICY = torch.log(torch.tensor([[0.4, 0.1], [0.8, 0.5], [0.3, 0.9]]))
ENGINE = torch.log(torch.tensor([[0.2, 0.2], [0.2, NAN], [0.3, 0.1]]))
MASK = torch.tensor([[True, True], [True, True], [True, False]])


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", None, 3.0, [[2, 0.5], [3, 1], [1, 1]]),
        ("token_truncate", 0.8, None, [[2, 0.8], [4, 1], [1, 1]]),
        ("token_mask", None, 3.0, [[2, 0.5], [0, 1], [1, 1]]),
        ("token_mask", 0.8, 3.0, [[2, 0], [0, 1], [1, 1]]),
        ("sequence_truncate", None, 3.0, [[1, 1], [3, 3], [1, 1]]),  # 2 × 1/2; 4 × unknown
        ("sequence_mask", None, 3.0, [[1, 1], [0, 0], [1, 1]]),
        ("sequence_mask", None, None, [[1, 1], [4, 4], [1, 1]]),
    ],
)
def test_importance_weights_by_hand(mode, low, high, expected):
    weights = importance_weights(POLICY, ENGINE, MASK, mode, low, high)
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float32))


def test_mismatch_metrics_by_hand():
    weights = importance_weights(POLICY, ENGINE, MASK, "token_truncate", None, 3.0)
    metrics = mismatch_metrics(POLICY, ENGINE, MASK, weights)
    log = torch.tensor([2.0, 0.5, 4.0, 1.0]).log()
    expected = {
        "sampling/kl": (torch.tensor([2.0, 0.5, 4.0, 1.0]) - 1 - log).mean(),
        "sampling/max_ratio": 4.0,
        "sampling/sampling_logp_difference/mean": log.abs().mean(),
        "sampling/sampling_logp_difference/max": log.abs().max(),
        "sampling/importance_sampling_ratio/min": 0.5,
        "sampling/importance_sampling_ratio/mean": (2 + 0.5 + 3 + 1 + 1) / 5,
        "sampling/importance_sampling_ratio/max": 3.0,
    }
    assert metrics == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


def test_weights_multiply_the_policy_loss_and_nothing_else():
    settings = UpdateSettings(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1)
    ratio = torch.tensor([[1.1, 1.0]])
    new = TokenOutputs(ratio.log(), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.1]]))
    rest = (torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, -2.0]]), torch.ones(1, 2), torch.ones(1, 2) > 0)
    plain, weighted = (ppo_loss(new, *rest, settings, weights) for weights in (None, torch.tensor([[3.0, 0.5]])))
    assert torch.isclose(plain.policy_loss, torch.tensor(-1.1 + 2.0))
    assert torch.isclose(weighted.policy_loss, torch.tensor(3 * -1.1 + 0.5 * 2.0))
    assert torch.isclose(weighted.loss - plain.loss, weighted.policy_loss - plain.policy_loss)
    assert weighted.value_loss == plain.value_loss and weighted.entropy == plain.entropy
    assert weighted.ratio == plain.ratio and weighted.approxkl == plain.approxkl


def test_other_weights_than_the_policys_are_refused():
    mask = torch.ones(4, 5, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    policy = -torch.rand(4, 5, generator=generator) - 1
    rounded = policy + 0.02 * torch.randn(4, 5, generator=generator)
    reference = policy + 0.1 * torch.randn(4, 5, generator=generator)
    check_engine(policy, reference, rounded, mask, "Look.", first=True)
    with pytest.raises(InputError, match=r"differ from the policy's by 0\.\d+ nats .* other weights .* Look\."):
        check_engine(policy, reference, policy * 1.4, mask, "Look.", first=True)
    check_engine(policy, reference, policy * 1.4, mask, "Look.", first=False)  # then the monitor says it
    old = reference + 0.002 * torch.randn(4, 5, generator=generator)
    with pytest.raises(InputError, match=r"those of the reference .* never arrived in the engine\. Look\."):
        check_engine(policy, reference, old, mask, "Look.", first=False)
    with pytest.raises(InputError, match="no log-probability of any token"):
        check_engine(policy, reference, torch.full((4, 5), NAN), mask, "Look.", first=False)


# ------------------------------------------------------------------------------------------ where completions end


def test_completions_end_where_the_own_loop_ends_them(tiny, tokenizer):
    policy = AutoModelForCausalLM.from_pretrained(tiny)
    prompts = [tokenizer.encode("Tell me about tea and"), tokenizer.encode("Yes")] * 16
    free = Decoding(24, 1.0, [], [])
    uniforms = torch.rand(32, 24, generator=torch.Generator().manual_seed(0))
    loop = OwnLoop(policy, tokenizer, 32)
    drawn = loop.sample(prompts, free, uniforms).tokens.tolist()
    for stops in ([], list(range(0, VOCABULARY, 30))):
        decoding = Decoding(24, 1.0, stops, ["an", "e r", "tea and", " T"])
        expected = loop.sample(prompts, decoding, uniforms)
        rule = Stops(decoding, tokenizer)
        found = [rule.first(prompt, row) for prompt, row in zip(prompts, drawn, strict=True)]
        assert [stop or 24 for stop in found] == expected.lengths.tolist()
        assert [stop is not None for stop in found] == expected.ended.tolist()
        assert 0 < sum(stop is None for stop in found) < 32


def test_an_answer_of_vllm_is_read_with_our_ends():
    """The choice is one that vLLM 0.32 gave for the starter (make engines asks a real server)."""
    tokenizer = AutoTokenizer.from_pretrained(starter_model())
    tokens, logprobs = [19556, 28, 10668, 288], [-2.1, -1.5, None, -0.1]  # "Hello", ",", " welcome", " to"
    choice = {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "length"}
    read = lambda *stops, **changes: read_choice(  # noqa: E731
        {**choice, **changes}, [5], Stops(Decoding(4, 1.0, *stops), tokenizer)
    )
    assert read([2], [])[0] == tokens and read([2], [])[2] is False
    assert torch.tensor(read([2], [])[1]).isnan().tolist() == [False, False, True, False]
    assert read([2, 28], [])[::2] == ([19556, 28], True)  # the stop token is kept
    assert read([2], ["wel"])[::2] == ([19556, 28, 10668], True)  # so is the token with the stop string
    assert read([2], [], finish_reason="stop")[2] is True
    for broken in ({"token_ids": None}, {"logprobs": None}, {"logprobs": {"token_logprobs": [-1.0]}}):
        with pytest.raises(InputError, match="sent no token ids with log-probabilities"):
            read([2], [], **broken)


def test_a_request_says_everything_that_the_server_would_take_from_the_model():
    body = request_body("m", [1, 2], 7, Decoding(9, 0.7, [2, 3], ["x"]))
    assert body["prompt"] == [1, 2] and body["max_tokens"] == 9 and body["temperature"] == 0.7 and body["seed"] == 7
    assert body["stop_token_ids"] == [2, 3] and body["stop"] == ["x"] and body["ignore_eos"] is True
    assert (body["top_k"], body["top_p"], body["repetition_penalty"]) == (0, 1.0, 1.0)
    assert json.loads(json.dumps(body)) == body


def test_rows_become_padded_tensors():
    found = completions_of([[5, 6], [7]], [[-1.0, -2.0], [-0.5]], [False, True], 9, torch.device("cpu"))
    expected = Completions(
        torch.tensor([[5, 6], [7, 9]]), torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]), torch.tensor([2, 1]),
        torch.tensor([False, True]),
    )  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------ continuous batching


def test_continuous_batching_samples_from_the_policys_distribution(sft, tokenizer):
    policy = load_policy(resolve(sft), LORA, tokenizer).eval()
    policy.generation_config.repetition_penalty = 3.0  # of the model; it has no effect
    prompts = [tokenizer.encode("Tell me about tea " * number) for number in (1, 4, 2, 9, 1)]
    decoding = Decoding(8, 0.7, list(range(0, VOCABULARY, 6)), [])
    uniforms = torch.full((5, 8), 0.5)
    engine = ContinuousBatching(policy, tokenizer, 2, CONTINUOUS["transformers_continuous_batching_config"])
    found = engine.sample(prompts, decoding, uniforms)
    for prompt, row, logprobs, length, ended in zip(prompts, *found, strict=True):
        ids = row[:length]
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + ids.tolist()])).logits[0, len(prompt) - 1 : -1]
        right = (logits / 0.7).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        assert torch.allclose(logprobs[:length], right, atol=1e-4)
        assert [int(token) % 6 == 0 for token in ids] == [False] * (int(length) - 1) + [bool(ended)]
        assert bool(ended) or length == 8
    assert 0 < int(found.ended.sum()) < 5
    assert torch.equal(found.tokens, engine.sample(prompts, decoding, uniforms).tokens)  # the numbers decide
    assert not torch.equal(found.tokens[:, 0], engine.sample(prompts, decoding, uniforms + 0.1).tokens[:, 0])
    greedy = decoding._replace(response_length=1, temperature=0.001)
    for found in (
        engine.sample(prompts, greedy, uniforms),
        OwnLoop(policy, tokenizer, 5).sample(prompts, greedy, uniforms),
    ):
        for prompt, first in zip(prompts, found.tokens[:, 0], strict=True):
            with torch.no_grad():
                logits = policy(torch.tensor([prompt])).logits[0, -1]
            assert logits[first] > logits.max() - 0.02  # of those that tie at this temperature either is right


def test_commands_that_only_sample_do_so_with_continuous_batching(sft, tokenizer, capfd, caplog):
    model = load_causal_lm(resolve(sft), LORA, tokenizer, trainable=False)
    prompts = [tokenizer.encode("Tell me about tea " * number) for number in (3, 1, 2)]
    own = Sampling(6, temperature=0.7, batch_size=4, seed=3)
    other = own._replace(engine=make_sampler(SamplerArguments(**CONTINUOUS), "unused", []))
    greedy = [sample_completions(model, tokenizer, prompts, way, do_sample=False) for way in (own, other)]
    assert greedy[0] == greedy[1]
    drawn = [
        sample_completions(model, tokenizer, prompts, other._replace(seed=seed), num_return_sequences=2)
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and [len(several) for several in drawn[0]] == [2, 2, 2]
    assert all(len(ids) == 6 or ids[-1] == tokenizer.eos_token_id for several in drawn[0] for ids in several)
    assert make_sampler(SamplerArguments(), "unused", []) is None
    assert sample_completions(model, tokenizer, [], other) == []
    # small pages hold long rows too; what can't be held is one line, without transformers' traceback
    long = [[5 + number % 9 for number in range(200)]] * 3
    assert [len(ids) for (ids,) in sample_completions(model, tokenizer, long, other)] == [6] * 3
    few = {"page_size": 16, "num_blocks": 2}
    small = own._replace(
        engine=make_sampler(SamplerArguments(**{**CONTINUOUS, "transformers_continuous_batching_config": few}), "", [])
    )
    with pytest.raises(InputError, match=r"sampled 0 of 3 completions .*--transformers_continuous_batching_config"):
        sample_completions(model, tokenizer, long, small)
    assert "Traceback" not in caplog.text + capfd.readouterr().err


def test_completions_of_other_weights_are_refused(sft, tokenizer):
    model = load_causal_lm(resolve(sft), LORA, tokenizer, trainable=False)
    prompts, uniforms = [[5, 6, 7], [8, 9]], torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    found = OwnLoop(model, tokenizer, 2).sample(prompts, Decoding(4, 0.7, [], []), uniforms)
    check_weights(model, prompts, found, 0.7, "")
    for wrong, said in (
        (found.logprobs - 1, "differ from the model's by 1 nats per token: it samples from other weights .* Look"),
        (found.logprobs * NAN, "gave no log-probability of any token. Look"),
    ):
        with pytest.raises(InputError, match=said):
            check_weights(model, prompts, found._replace(logprobs=wrong), 0.7, "Look.")


def test_collect_with_continuous_batching(sft, files, tmp_path):
    words = ["--model_name_or_path", sft, "--dataset_name", files / "prompts.jsonl", "--dtype", "float32",
             "--max_new_tokens", 6, "--use_transformers_continuous_batching", "true"]  # fmt: skip
    run("recipes/collect.py", *words, "--output_dir", tmp_path)
    tasks = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert len(tasks) == 8 and all(len(task["completions"]) > 1 for task in tasks)


def test_ppo_with_continuous_batching_has_no_mismatch(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, temperature=0.7, **CONTINUOUS)
    before = ppo.model.policy.config._attn_implementation
    ppo.train()
    for entry in logged(ppo):
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
        assert entry["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-3)
        assert abs(entry["val/first_ratio"] - 1) < 1e-5
    assert abs(logged(ppo)[-1]["objective/kl"]) > 1e-4  # the policy that it sampled with has moved
    assert ppo.model.policy.config._attn_implementation == before


def test_the_own_loop_has_no_mismatch_and_no_weights(sft, tokenizer, prompts, tmp_path):
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, temperature=0.7, stop_strings=["e"])
    scored = ppo.score(ppo.rollout(next(ppo.prompts())))
    assert scored.sampling_weights is None
    ppo.train()
    for entry in logged(ppo):
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
        assert not any(name.startswith("sampling/importance") for name in entry)


def test_an_engine_with_other_weights_ends_the_run(sft, tokenizer, prompts, tmp_path):
    """Its second rollout comes from the adapter as it was: what a server does that never got the new one."""
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, learning_rate=0.1, **CONTINUOUS)
    old = load_policy(resolve(sft), LORA, tokenizer).eval()
    ppo.engine.model = old.get_base_model()
    with pytest.raises(InputError, match="never arrived in the engine"):
        ppo.train()
    assert ppo.state.global_step == 1


def test_continuous_batching_refuses_a_model_that_it_cannot_do(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": len(tokenizer)}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    with pytest.raises(InputError, match="transformers can't do it for mamba"):
        ContinuousBatching(model, tokenizer, 4)


# ------------------------------------------------------------------------------------------ flags and refusals


def test_the_flags_have_the_defaults_of_trl_where_these_can_work():
    ours, theirs = EngineArguments(), GRPOConfig("x", bf16=False, use_cpu=True)
    differ = {name for name in vars(ours) if getattr(ours, name) != getattr(theirs, name)}
    # a server needs nothing in this environment; a client has no business with 0.0.0.0
    assert differ == {"vllm_mode", "vllm_server_host"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"use_vllm": True, "vllm_enable_sleep_mode": True}, "--vllm_enable_sleep_mode: has no effect without"),
        ({"vllm_gpu_memory_utilization": 0.5}, "--use_vllm true --vllm_mode colocate"),
        ({"use_vllm": True, "use_transformers_continuous_batching": True}, "exclude each other"),
        ({"vllm_server_base_url": "127.0.0.1:8000"}, "--vllm_server_base_url 127.0.0.1:8000: needs an address"),
        ({"vllm_importance_sampling_clip_min": 3.0}, "--vllm_importance_sampling_clip_min 3.0: must be below"),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "token_truncate: needs a bound",
        ),
        ({"transformers_continuous_batching_config": {"page_size": 16}}, "has no effect without"),
        ({**CONTINUOUS, "transformers_continuous_batching_config": '{"pages": 1}'}, "unknown field 'pages'"),
        ({**CONTINUOUS, "transformers_continuous_batching_config": {"seed": 7}}, "'seed' is not yours to set; --seed"),
        ({**CONTINUOUS, "transformers_continuous_batching_config": {"page_size": 0}}, "--transformers_continuous_"),
        (
            {**CONTINUOUS, "transformers_continuous_batching_config": {"num_blocks": 1.5}},
            "'num_blocks' must be a whole",
        ),
    ],
)
def test_flags_that_cannot_work_are_refused(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        ppo_config(tmp_path, **flags)


def test_commands_that_only_sample_take_a_server():
    with pytest.raises(InputError, match=r"--vllm_mode colocate: is for recipes/ppo.py; .* give --vllm_mode server"):
        SamplerArguments(use_vllm=True, vllm_mode="colocate")


def test_a_typed_config_of_continuous_batching_is_read(tmp_path):
    args = ppo_config(tmp_path, **{**CONTINUOUS, "transformers_continuous_batching_config": '{"page_size": 32}'})
    assert args.transformers_continuous_batching_config == {"page_size": 32}


def test_absent_servers_are_refused_before_a_model_is_loaded(tiny, files, tmp_path):
    def refused(*flags):
        result = run(
            "recipes/ppo.py", "--model_name_or_path", tiny, "--dataset_name", files / "prompts.jsonl",
            "--output_dir", tmp_path / "run", "--use_vllm", "true", *flags, check=False,
        )  # fmt: skip
        assert result.returncode == 2, result.stderr
        return result.stderr.strip().splitlines()[-1]

    said = refused("--vllm_mode", "colocate")
    assert said.startswith("error: --vllm_mode colocate: needs vLLM in this environment")
    said = refused("--vllm_server_port", "1", "--vllm_server_timeout", "0.1")
    assert said.startswith("error: --use_vllm true: the server http://127.0.0.1:1 does not answer")


def test_vllm_takes_decoders_only_and_no_tied_head_on_a_cpu(tiny, tokenizer, tmp_path):
    args = ppo_config(tmp_path, use_vllm=True, vllm_server_port=1, vllm_server_timeout=0.01)
    rows = Dataset.from_list([{"prompt": "go", "input_ids": [3]}])
    full = AutoModelForCausalLM.from_pretrained(tiny)
    with pytest.raises(InputError, match="does not renew a head that is tied"):
        PPOTrainer(args, tokenizer, full, train_dataset=rows, reward_funcs=[count_a])
    with pytest.raises(InputError, match="does not answer"):
        need_engine(args, full.config, use_peft=True)
    assert need_engine(ppo_config(tmp_path), full.config, use_peft=True) is None
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    model = PolicyAndValue(T5ForConditionalGeneration(T5Config(**sizes)))
    for flags in (CONTINUOUS, {"use_vllm": True}):
        with pytest.raises(InputError, match="decoders only, and t5 is an encoder-decoder"):
            make_engine(ppo_config(tmp_path, **flags), model, "default", tokenizer, Accelerator(cpu=True), 4)


def test_the_policys_files_hold_the_weights_that_it_has_now(sft, tiny, tokenizer, tmp_path):
    """An adapter and a whole model, of its own weights and of those that processes have gathered."""
    adapted = load_policy(resolve(sft), LORA, tokenizer)
    untied = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                          num_attention_heads=2))  # fmt: skip
    state = Accelerator(cpu=True)
    for policy, adapter, name in ((adapted, "default", "adapter_model"), (untied, "default", "model")):
        own = {key: tensor for key, tensor in policy.named_parameters() if tensor.requires_grad}
        whole = {key: torch.full_like(tensor, 2.0) for key, tensor in own.items()}
        for given in (None, whole):
            files = PolicyFiles(
                policy, adapter, tmp_path / "files", state, functools.partial(dict, given) if given else lambda: None
            )
            places = [files.renew(writes=True) for _ in range(2)]
            assert places[0] != places[1]  # never a name twice
            saved = load_file(places[1] / f"{name}.safetensors")
            expected = {key.replace(".default", ""): tensor for key, tensor in (given or own).items()}
            assert set(saved) == set(expected)
            assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())
            assert files.remove() and not places[1].exists() and not files.remove()
    assert not files.renew(writes=False).exists()
