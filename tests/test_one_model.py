"""Commands that measure several models have one of them in memory at a time."""

import weakref

import pytest
from conftest import LORA, assistant, user
from datasets import Dataset
from trl import ModelConfig

from eval.compression import CompressionArguments, measure_compression
from eval.measuring import replies
from eval.measuring.comparison import ComparisonPlan, compare
from eval.overoptimization import OverOptimizationArguments, Scorer, measure_policies
from rlhf.data.rows import prompt_rows
from rlhf.models.generation import Sampling
from rlhf.models.sources import resolve
from rlhf.rewards import resolve_reward
from rlhf.rewards import sources as reward_sources

FLOAT32 = ModelConfig(dtype="float32")
SAMPLING = Sampling(max_new_tokens=4, seed=1)


@pytest.fixture
def loaded(monkeypatch):
    """Weak references to all models that were loaded; a load fails while one of them is still there."""
    references: list[weakref.ref] = []

    def watch(module, name):
        load = getattr(module, name)

        def watched(*args, **kwargs):
            assert [reference for reference in references if reference() is not None] == []
            model = load(*args, **kwargs)
            references.append(weakref.ref(model))
            return model

        monkeypatch.setattr(module, name, watched)

    watch(replies, "load_causal_lm")
    watch(reward_sources, "load_reward_model")
    return references


def all_gone(references):
    return all(reference() is None for reference in references)


def test_compare(loaded, tiny, sft, reward_adapter, tokenizer, tmp_path):
    rows = [{"prompt": user(f"Number {n}?"), "completion": assistant("Yes, it is.")} for n in range(4)]
    models = {"base": resolve(tiny), "sft": resolve(sft)}
    prompts = prompt_rows(Dataset.from_list(rows), "d", tokenizer, 4, 256)
    plan = ComparisonPlan(models, "sft", prompts, True, SAMPLING, 2, FLOAT32, tmp_path, {})
    found = compare(plan, resolve_reward(reward_adapter), {})
    assert set(found.metrics) == {"base", "sft", "best_of_2"} and "human_loss" in found.metrics["base"]
    assert len(loaded) == 5 and all_gone(loaded)  # two to sample, the reward model, base and reference


def test_overoptimization(loaded, tiny, sft):
    scorer = Scorer(resolve_reward("starter"), [resolve_reward("starter")], OverOptimizationArguments(), FLOAT32)
    models = {"start": resolve(tiny), "checkpoint-1": resolve(sft), "checkpoint-2": resolve(sft)}
    points, policies = measure_policies(models, [user("Hello"), user("Well?")], scorer, SAMPLING, 4, FLOAT32)
    assert [point.name for point in points] == list(models) and points[0].kl.mean == 0
    assert (len(policies["start"].candidates.ids), len(policies["start"].chosen.ids)) == (8, 2)
    assert len(loaded) == 4 and all_gone(loaded)


def test_compression(loaded, tiny, sft):
    models = {"base": resolve(tiny), "sft": resolve(sft)}
    args = CompressionArguments(ngram_order=2, max_length=16)
    cells = measure_compression(models, ["a text"] * 3, ["another text", "one more"], args, LORA)
    assert list(cells) == ["base", "sft", "2-gram", "xz_primed", "xz"]
    assert len(loaded) == 2 and all_gone(loaded)
