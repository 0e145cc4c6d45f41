"""One notion of the end: everything that samples stops at the eos ids of tokenizer and generation_config alike."""

import math
import shutil

import pytest
from conftest import LORA, VOCABULARY, make_adapter, ppo_config, save_tiny, user
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig
from trl import ModelConfig

from eval.measuring.replies import sample_replies
from rlhf.data.rows import prompt_rows
from rlhf.errors import InputError
from rlhf.feedback.sampling import sample_tasks
from rlhf.feedback.speakers import load_speakers, resolve_speakers
from rlhf.models.generation import Sampling, sample_completions
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import resolve
from rlhf.models.tokenizers import end_ids, load_tokenizer
from rlhf.ppo import PPOTrainer
from rlhf.rewards import completion_text
from rlhf.rloo import RLOOConfig, RLOOTrainer

SAMPLING = Sampling(max_new_tokens=12, batch_size=8)
PLAIN = ModelConfig(dtype="float32")
ENDS = range(20, VOCABULARY, 14)  # a random model draws one of them at every 14th token; most are ordinary words


@pytest.fixture(scope="module")
def ending(tokenizer, tmp_path_factory):
    """A tiny model whose generation_config has many eos ids besides the tokenizer's."""
    folder = save_tiny(tmp_path_factory.mktemp("ending"), tokenizer)
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, *ENDS]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tokenizer):
    return prompt_rows(Dataset.from_list([{"prompt": user(f"Say {n}.")} for n in range(16)]), "d", tokenizer, 12, 256)


def check(replies, longest=12):
    """Every reply ends at its first end, or at the length limit; and both happen."""
    replies = list(replies)
    for ids in replies:
        ends = [place for place, number in enumerate(ids) if number in ENDS]
        assert ends in ([], [len(ids) - 1]) and (ends or len(ids) == longest), ids
    assert any(ids[-1] in ENDS for ids in replies) and any(len(ids) > 1 for ids in replies)


def counting(seen):
    """A reward function that keeps the ids and texts that it gets."""

    def reward(completions, completion_ids, **columns):
        seen.extend(zip(completion_ids, map(completion_text, completions), strict=True))
        return [float(len(ids)) for ids in completion_ids]

    return reward


def check_texts(seen, tokenizer):
    """The text has no end in it: it is that of the ids before the end."""
    for ids, text in seen:
        kept = ids[:-1] if ids[-1] in ENDS else ids
        assert text == tokenizer.decode(kept, skip_special_tokens=True), (text, ids)


@pytest.mark.parametrize(
    ("named", "found"), [(5, {2, 5}), ([5, 7], {2, 5, 7}), (None, {2}), ([], {2}), ([2, 5], {2, 5})]
)
def test_the_ends_of_tokenizer_and_generation_config_are_one_set(tiny, tokenizer, named, found):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.generation_config.eos_token_id = named
    assert tokenizer.eos_token_id == 2
    assert end_ids(model, tokenizer) == sorted(found)
    model.generation_config = None
    assert end_ids(model, tokenizer) == [2]


def test_a_model_without_a_generation_config_has_the_ends_of_its_config(tokenizer, tmp_path):
    folder = save_tiny(tmp_path, tokenizer, eos_token_id=[2, 50])
    (tmp_path / "generation_config.json").unlink()
    source = resolve(folder)
    assert load_causal_lm(source, PLAIN, load_tokenizer(source)).generation_config.eos_token_id == [2, 50]


def test_an_adapter_has_the_ends_of_its_base(ending, tokenizer, tmp_path):
    adapter = make_adapter(ending, tokenizer, tmp_path)
    source = resolve(adapter)
    model = load_causal_lm(source, PLAIN, load_tokenizer(source), trainable=False)
    assert set(ENDS) < set(end_ids(model, tokenizer))


def test_collecting_comparing_and_chatting_stop_there(ending, tokenizer, rows):
    source = resolve(ending)
    model = load_causal_lm(source, PLAIN, tokenizer, trainable=False)
    prompts = rows["input_ids"][:]
    sampled = [ids for several in sample_completions(model, tokenizer, prompts, SAMPLING) for ids in several]
    check(sampled)
    check(ids for ids in sample_replies(model, tokenizer, prompts, 1, SAMPLING, "m").ids)
    texts = {
        text for task in sample_tasks(model, tokenizer, {"test": rows}, SAMPLING, 1, "m") for text in task.completions
    }
    plain = {
        tokenizer.decode(ids[:-1] if ids[-1] in ENDS else ids, skip_special_tokens=True).strip() for ids in sampled
    }
    assert texts == plain - {""}
    sources = resolve_speakers([ending])
    speakers = load_speakers(sources, dict.fromkeys(sources, tokenizer), PLAIN, max_new_tokens=12, temperature=1.0)
    assert speakers[0].model.generation_config.eos_token_id == end_ids(model, tokenizer)


def test_an_end_that_is_also_the_pad_token_is_kept(ending, tokenizer, rows):
    """Qwen2.5 pads with the second of its ends."""
    model = load_causal_lm(resolve(ending), PLAIN, tokenizer, trainable=False)
    padded = load_tokenizer(resolve(ending))
    end = next(
        ids[-1] for (ids,) in sample_completions(model, tokenizer, rows["input_ids"][:], SAMPLING) if ids[-1] in ENDS
    )
    padded.pad_token = padded.convert_ids_to_tokens(end)
    check(ids for (ids,) in sample_completions(model, padded, rows["input_ids"][:], SAMPLING))


@pytest.mark.parametrize("peft", [True, False])
def test_ppo_stops_there(ending, tokenizer, rows, tmp_path, peft):
    seen: list[tuple[list[int], str]] = []
    model = load_causal_lm(resolve(ending), LORA if peft else PLAIN, tokenizer)
    if not peft:
        model.generation_config.eos_token_id = list(ENDS)  # as a user's own model has it
    config = ppo_config(tmp_path, total_episodes=8, ref_adapter_name=None, response_length=12, missing_eos_score=-1.0)
    ppo = PPOTrainer(config, tokenizer, model, train_dataset=rows, reward_funcs=[counting(seen)])
    batch = [rows[number] for number in range(8)]
    rollout = ppo.rollout(batch)
    scored = ppo.score(rollout)
    check(ids for ids, _ in seen)
    check_texts(seen, tokenizer)
    ended = [ids[-1] in ENDS for ids, _ in seen]
    assert rollout.ended.tolist() == ended and not all(ended)
    assert [score == -1.0 for score in scored.scores.tolist()] == [not end for end in ended]


def test_rloo_stops_there(ending, tokenizer, rows, tmp_path):
    seen: list[tuple[list[int], str]] = []
    model = load_causal_lm(resolve(ending), LORA, tokenizer)
    config = RLOOConfig(
        str(tmp_path), per_device_train_batch_size=8, num_generations=2, max_completion_length=12, max_steps=1,
        bf16=False, use_cpu=True, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = RLOOTrainer(
        model=model,
        args=config,
        reward_funcs=[counting(seen)],
        train_dataset=rows.remove_columns("input_ids"),
        processing_class=tokenizer,
    )
    trainer.train()
    check(ids for ids, _ in seen)
    check_texts(seen, tokenizer)
    cut = sum(ids[-1] not in ENDS for ids, _ in seen) / len(seen)
    (logged,) = [entry for entry in trainer.state.log_history if "completions/clipped_ratio" in entry]
    assert math.isclose(logged["completions/clipped_ratio"], cut)
    finished = [len(ids) for ids, _ in seen if ids[-1] in ENDS]
    assert math.isclose(logged["completions/mean_terminated_length"], sum(finished) / len(finished), rel_tol=1e-6)


def test_a_stop_token_that_the_model_cannot_draw_is_refused(ending, tokenizer, rows, tmp_path):
    model = load_causal_lm(resolve(ending), LORA, tokenizer)
    config = ppo_config(tmp_path, ref_adapter_name=None, stop_token_id=[9_999_999])
    with pytest.raises(InputError, match=f"--stop_token_id 9999999: the model samples ids from 0 to {VOCABULARY - 1}"):
        PPOTrainer(config, tokenizer, model, train_dataset=rows, reward_funcs=[counting([])])


@pytest.mark.parametrize("content", ["{", "[2, 50]", "", '{"eos_token_id": "</s>"}', '{"eos_token_id": [2, -5]}'])
def test_a_broken_generation_config_is_not_passed_over(tiny, tmp_path, content):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"--model_name_or_path .*: generation_config.json"):
        resolve(str(tmp_path / "model"))
