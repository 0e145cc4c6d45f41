"""Reward functions: several at once, async, per token, by import path, and what is said when one fails."""

import asyncio
import copy
import functools
import itertools
import math
import os
import sys
import threading
from decimal import Decimal

import numpy as np
import pytest
import torch
from conftest import assistant, count_a, logged, ppo_config, ppo_trainer, present, user
from transformers import LlamaConfig, RobertaConfig, RobertaForSequenceClassification, TrainerState

from rlhf.comparisons import Prompt
from rlhf.errors import InputError
from rlhf.models.sources import usable_context
from rlhf.ppo.advantages import estimate_advantages
from rlhf.ppo.scoring import RewardScale, shape_scores
from rlhf.ppo.types import Rewards
from rlhf.rewards import (
    Completion,
    RewardError,
    RewardFunction,
    RewardLog,
    RewardModel,
    call_rewards,
    completion_text,
    gathered_means,
    resolve_reward,
    resolve_rewards,
    total_scores,
)

PROMPTS: list[Prompt] = ["p", "q", "r"]
TEXTS: list[Completion] = ["a", "bb", "boom"]
TOKENS = [[1], [1, 2], [1, 2, 3]]


def length(prompts, completions, **_):
    return [float(len(completion_text(c))) for c in completions]


def call(*functions, **columns):
    return call_rewards(list(functions), PROMPTS, TEXTS, TOKENS, **columns)


def test_functions_get_prompts_completions_tokens_and_columns_by_name():
    def reward(prompts, completions, completion_ids, answer):
        return [float(len(ids)) + extra for ids, extra in zip(completion_ids, answer, strict=True)]

    assert call(reward, length, answer=[0.5, 0.5, 0.5]) == [[1.5, 2.5, 3.5], [1.0, 2.0, 4.0]]


def test_async_functions_run_at_the_same_time():
    arrived = []

    async def first(prompts, completions, **_):
        arrived.append("first")
        while len(arrived) < 2:  # would wait for ever, were the second called after the first
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    class Second:
        async def __call__(self, prompts, completions, **_):
            arrived.append("second")
            return [2.0] * len(completions)

    assert call(first, length, Second()) == [[1.0] * 3, [1.0, 2.0, 4.0], [2.0] * 3]


def test_async_functions_share_one_loop_in_one_thread_over_all_calls():
    places = []

    class Judge:
        """Keeps a worker from one batch to the next, as clients and connections do."""

        queue: asyncio.Queue | None = None

        async def work(self, queue):
            while True:
                text, answer = await queue.get()
                answer.set_result(float(len(text)))

        async def __call__(self, completions, **_):
            places.append((asyncio.get_running_loop(), threading.get_ident()))
            if self.queue is None:
                self.queue = asyncio.Queue()
                self.worker = asyncio.create_task(self.work(self.queue))
            answers = [asyncio.get_running_loop().create_future() for _ in completions]
            for pair in zip(completions, answers, strict=True):
                self.queue.put_nowait(pair)
            return await asyncio.gather(*answers)

    async def plus(completions, added, **_):
        places.append((asyncio.get_running_loop(), threading.get_ident()))
        return [len(text) + added for text in completions]

    judge = Judge()

    async def notebook():
        return call(judge, functools.partial(plus, added=1.0))  # a loop runs in this thread

    expected = [[1.0, 2.0, 4.0], [2.0, 3.0, 5.0]]
    assert call(judge, functools.partial(plus, added=1.0)) == expected == asyncio.run(notebook())
    assert len(set(places)) == 1 and places[0][1] != threading.get_ident()


def test_an_async_function_that_exits_is_named_and_the_next_call_works():
    async def leave():
        sys.exit(3)

    async def leaves(completions, **_):
        return await asyncio.gather(*[asyncio.create_task(leave()) for _ in completions])

    async def stays(completions, **_):
        return [1.0] * len(completions)

    for _ in range(2):
        with pytest.raises(RewardError, match=r"'leaves' ended the program with exit\(3\)"):
            call(stays, leaves)
        assert call(stays) == [[1.0] * 3]


def test_nothing_a_function_does_to_its_inputs_reaches_another():
    seen = []

    def vandal(prompts, completions, completion_ids, answer, trainer_state, **_):
        prompts[0][0]["content"] = completions[0][0]["content"] = "changed"
        completions[1].clear()
        completion_ids[0].append(99)
        answer[0]["choices"].append("x")
        trainer_state.global_step = 7
        trainer_state.log_history.append({})
        return [0.0, 0.0]

    def witness(**inputs):
        seen.append({name: inputs[name] for name in ("prompts", "completions", "completion_ids", "answer")})
        assert inputs["trainer_state"].global_step == 0 and inputs["trainer_state"].log_history == []
        return [0.0, 0.0]

    given = {
        "prompts": [user("a"), user("b")], "completions": [assistant("c"), assistant("d")],
        "completion_ids": [[1], [2]], "answer": [{"choices": ["p"]}, {"choices": ["q"]}],
    }  # fmt: skip
    before = repr(given)
    state = TrainerState()
    call_rewards([vandal, witness], *list(given.values())[:3], answer=given["answer"], trainer_state=state)
    assert repr(seen[0]) == before == repr(given) and state.global_step == 0 and not state.log_history


def test_a_function_that_goes_to_another_folder_goes_alone(tmp_path):
    here, seen = os.getcwd(), []

    def wander(completions):
        seen.append(os.getcwd())
        os.chdir(tmp_path)
        return [0.0] * len(completions)

    async def wander_later(completions):
        return wander(completions)

    call_rewards([wander, wander, wander_later], ["a"], ["b"], [[1]])
    assert seen[:2] == [here, here] and os.getcwd() == here


def test_a_function_without_keywords_gets_what_it_names_and_reserved_columns_stay_out():
    def few(completions, functions):
        return [float(len(text)) + extra for text, extra in zip(completions, functions, strict=True)]

    def all_of_it(prompts, completions, completion_ids, **_):
        assert (prompts, completions, completion_ids) == (PROMPTS, TEXTS, TOKENS)
        return [0.0] * 3

    answers = call(few, all_of_it, functions=[1, 1, 1], completions=["x"] * 3, prompts=None, completion_ids=[0] * 3)
    assert answers[0] == [2.0, 3.0, 5.0]


def test_a_function_that_raises_is_named_with_the_completion_that_did_it():
    def picky(prompts, completions, **_):
        if "boom" in completions:
            raise KeyError("no such word")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'picky' raised KeyError: 'no such word', on the completion 'boom'"):
        call(picky, trainer_state=object(), answer=["x", "y", "z"])

    async def also_picky(prompts, completions, **_):
        return picky(prompts, completions)

    with pytest.raises(RewardError, match=r"'also_picky' raised KeyError.*'boom'"):
        call(also_picky)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], "returned 2 scores for 3 completions"),
        ([1.0, math.nan, 2.0], "returned nan for the completion 'bb'"),
        ([1.0, 2.0, math.inf], "returned inf for the completion 'boom'"),
        ([1.0, "good", 2.0], "returned 'good' for the completion 'bb'"),
        ([1.0, [1.0], 2.0], "returned 1 rewards for the 2 tokens of the completion 'bb'"),
        ([1.0, [1.0, math.nan], 2.0], "for the completion 'bb'"),
        (None, "returned None instead of a list of 3 scores"),
        (0.5, "returned 0.5 instead of a list of 3 scores"),
        (torch.tensor(0.5), "returned 0.5 instead of a list"),
        ("abc", "returned 'abc' instead of a list"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "instead of a list"),
        ({1.0, 2.0, 3.0}, "instead of a list"),
        (TypeError, "instead of a list"),
        ([1.0] * 4, "returned more than 3 scores for 3 completions"),
        (torch.ones(1, 3), "returned 1 scores for 3 completions"),
        (iter([1.0, 2.0]), "returned 2 scores for 3 completions"),
        ([1.0, 1e39, 2.0], r"returned 1e\+39 for the completion 'bb' \(number 1 of the batch\)"),
        ([1.0, 10**400, 2.0], "returned 1000.* for the completion 'bb'"),
        ([1.0, 2j, 2.0], "returned 2j for the completion 'bb'"),
        (np.array([1, 2, 3j]), "returned .* for the completion 'a'"),
        ([1.0, np.str_("0.5"), 2.0], "for the completion 'bb'"),
        ([1.0, {"score": 1.0}, 2.0], "for the completion 'bb'"),
        ([1.0, [[1.0], [1.0]], 2.0], "for the completion 'bb'"),
        ([1.0, np.ones(3), 2.0], "returned 3 rewards for the 2 tokens of the completion 'bb'"),
    ],
)
def test_answers_that_are_no_scores_stop_with_the_name_and_the_completion(answer, message):
    def wrong(prompts, completions, **_):
        return copy.copy(answer)

    with pytest.raises(RewardError, match=message) as raised:
        call(wrong)
    assert "'wrong'" in str(raised.value)


def test_tensors_and_missing_opinions_are_scores_too():
    def some(prompts, completions, **_):
        return [torch.tensor(1.5), None, torch.tensor([0.5, 0.25, 0.25])]

    assert call(some) == [[1.5, None, [0.5, 0.25, 0.25]]]


@pytest.mark.parametrize(
    "answer",
    [
        (1, 0, 1), (x for x in [True, False, True]), np.array([1, 0, 1]), torch.tensor([[1.0], [0.0], [1.0]]),
        np.array([[True], [False], [True]]), torch.tensor([1, 0, 1], dtype=torch.bfloat16, requires_grad=False),
        [Decimal(1), np.float32(0), torch.tensor([1.0])], torch.tensor([1.0, 0.0, 1.0], requires_grad=True),
    ],
)  # fmt: skip
def test_every_kind_of_numbers_counts(answer):
    assert call(lambda completions: answer) == [[1.0, 0.0, 1.0]]


def test_rewards_per_token_may_be_arrays():
    per_token = [np.array([1.0]), torch.tensor([0.5, 0.25]), (1, 2, 3)]
    assert call(lambda completions: per_token) == [[1.0, [0.5, 0.25], [1.0, 2.0, 3.0]]]


def test_a_generator_without_end_and_one_that_raises_are_refused():
    def raising(completions):
        yield 1.0
        raise LookupError("gone")

    with pytest.raises(RewardError, match="returned more than 3 scores for 3 completions"):
        call(lambda completions: itertools.repeat(1.0))
    with pytest.raises(RewardError, match=r"'raising' raised LookupError: gone, .* \(test_rewards.py, line [0-9]+\)"):
        call(raising)


def test_a_function_that_exits_is_named_and_an_interrupt_passes():
    def leaves(completions):
        raise SystemExit(5)

    def interrupted(completions):
        raise KeyboardInterrupt

    async def interrupted_too(completions):
        raise KeyboardInterrupt

    with pytest.raises(RewardError, match=r"'leaves' ended the program with exit\(5\)"):
        call(leaves)
    for function in (interrupted, interrupted_too):
        with pytest.raises(KeyboardInterrupt):
            call(function)


def test_the_search_for_the_completion_computes_no_more_than_another_batch():
    computed = []

    def judge(completions):
        computed.append(len(completions))
        if "no" in completions:
            raise ValueError("no")
        return [0.0] * len(completions)

    texts: list[Completion] = ["yes"] * 32
    texts[21] = "no"
    with pytest.raises(RewardError, match="on the completion 'no'"):
        call_rewards([judge], ["p"] * 32, texts, [[1]] * 32)
    assert sum(computed) <= 32 + 32 + 1


def test_what_is_logged_is_averaged_and_of_the_right_length():
    log = RewardLog()
    for value in (1.0, np.float64(2.0), torch.tensor(6.0), math.nan):
        log.log_metric("length", value)
    log.log_extra("verdict", (text for text in TEXTS))
    log.check(3)
    assert gathered_means(log.means()) == {"length": 3.0} and log.gathered_extra(3) == {"verdict": TEXTS}
    with pytest.raises(RewardError, match=r"log_extra\('verdict', ...\) .*3 values for 2 completions"):
        log.check(2)

    def wrong(completions, log_metric):
        log_metric("length", "much")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="'wrong' raised TypeError"):
        call(wrong, log_metric=log.log_metric)
    assert call(lambda completions, log_metric, log_extra, trainer_state: [0.0] * 3) == [[0.0] * 3]


def test_rewards_are_weighted_and_logged_by_name(sft, tokenizer, prompts, tmp_path):
    def no_opinion_on_some(prompts, completions, number, **_):
        return [None if n % 2 else 2.0 for n in number]

    ppo = ppo_trainer(
        sft, tokenizer, prompts, tmp_path, [count_a, no_opinion_on_some], reward_weights=[1.0, 0.5], total_episodes=8
    )
    rows = next(ppo.prompts())
    rewards = ppo.rewards(ppo.rollout(rows))
    numbers = torch.tensor([row["number"] for row in rows])
    expected = rewards.by_function["count_a"] + torch.where(numbers % 2 == 1, 0.0, 1.0)
    assert torch.allclose(rewards.scores, expected)
    ppo.train()
    entry = logged(ppo)[0]
    assert entry["rewards/no_opinion_on_some/mean"] == 2.0 and entry["rewards/no_opinion_on_some/std"] == 0.0
    assert "rewards/count_a/mean" in entry and "rewards/count_a/std" in entry


def test_rewards_per_token_stay_at_their_tokens():
    rewards = Rewards({}, torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    lengths, ended = torch.tensor([3, 2]), torch.tensor([True, True])
    scores, per_token = shape_scores(
        rewards, RewardScale(1.0, 2.0), lengths, ended, score_clip=None, length_penalty=0.0, missing_eos_penalty=None,
        missing_eos_score=None,
    )  # fmt: skip
    assert scores.tolist() == [1.0, 0.0] and present(per_token)[0].tolist() == [0.5, 0.0, 1.0]
    mask = torch.tensor([[True, True, True], [True, True, False]])
    zeros = torch.zeros(2, 3)
    result = estimate_advantages(
        scores, zeros, zeros, zeros, mask, kl_coef=0.1, gamma=1.0, lam=1.0, per_token=per_token
    )
    # what the tokens don't say of the score, -0.5, lands on the last one
    assert result.rewards.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
    assert result.returns[0].tolist() == [1.0, 0.5, 0.5]


def test_scores_are_normalized_clipped_and_penalized_in_this_order():
    rewards = Rewards({}, torch.tensor([11.0, 3.0, 5.0]), None)
    ended, lengths = torch.tensor([True, True, False]), torch.tensor([4, 2, 10])
    settings = {"score_clip": 2.0, "length_penalty": 0.1}
    scale = RewardScale(5.0, 2.0)
    scores, _ = shape_scores(
        rewards, scale, lengths, ended, **settings, missing_eos_penalty=1.0, missing_eos_score=None
    )
    assert torch.allclose(scores, torch.tensor([2.0 - 0.4, -1.0 - 0.2, 0.0 - 1.0 - 1.0]))
    scores, _ = shape_scores(
        rewards, scale, lengths, ended, **settings, missing_eos_penalty=None, missing_eos_score=-1.0
    )
    assert torch.allclose(scores, torch.tensor([1.6, -1.2, -1.0]))


def test_clipping_shrinks_token_rewards_with_their_sum():
    rewards = Rewards({}, torch.tensor([4.0]), torch.tensor([[1.0, 3.0]]))
    scores, per_token = shape_scores(
        rewards, RewardScale(0.0, 1.0), torch.tensor([2]), torch.tensor([True]), score_clip=2.0, length_penalty=0.0,
        missing_eos_penalty=None, missing_eos_score=None,
    )  # fmt: skip
    assert scores.tolist() == [2.0] and present(per_token).tolist() == [[0.5, 1.5]]


def test_functions_are_found_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_a_test.py").write_text("def kind(prompts, completions, **_):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    found = resolve_reward("my_rewards_for_a_test.kind", "--reward_funcs", allow_functions=True)
    assert found.model is None and present(found.function)([""], [""]) == [1.0]
    for name, message in (("my_rewards_for_a_test.mean", "has no function 'mean'"), ("no_such.module", "can't import")):
        with pytest.raises(InputError, match=f"--reward_funcs {name}: .*{message}"):
            resolve_reward(name, "--reward_funcs", allow_functions=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"--reward_model_path my_rewards_for_a_test\.kind: "):
        resolve_reward("my_rewards_for_a_test.kind")  # a model's flag takes no function


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os.system", r"takes \(command\)"),
        ("builtins.print", "takes"),
        ("builtins.max", "arguments can't be found out"),
        ("builtins.dict", "is a class"),
        ("os.path", "is of type module"),
        ("math.pi", "is of type float"),
        ("math.sin", "takes"),
        ("broken_rewards_for_a_test.f", r"can't import .*SyntaxError.*line 2"),
        ("leaving_rewards_for_a_test.f", r"can't import leaving_rewards_for_a_test, line 2 .*exit\(4\)"),
        ("raising_rewards_for_a_test.f", r"can't import raising_rewards_for_a_test, line 1 \(ZeroDivisionError"),
        ("raising_rewards_for_a_test", r"Name the function too: raising_rewards_for_a_test\.<function>"),
        ("raising_rewards_for_a_test.py", r"Name the function too: raising_rewards_for_a_test\.<function>"),
        ("needing_rewards_for_a_test.f", "needs the argument 'gold', which is no column .*: answer"),
    ],
)
def test_what_is_no_reward_function_is_refused_before_a_model_is_loaded(name, message, tmp_path, monkeypatch):
    for module, text in (
        ("broken", "x = 1\ndef f(completions) return 1"),
        ("leaving", "import sys\nsys.exit(4)"),
        ("raising", "1 / 0"),
        ("needing", "def f(completions, gold, answer): ..."),
    ):
        (tmp_path / f"{module}_rewards_for_a_test.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^--reward_funcs {name}: .*{message}"):
        resolve_reward(name, "--reward_funcs", allow_functions=True, columns=["prompt", "answer"])


def test_weights_have_to_match_before_a_model_is_loaded(tmp_path):
    with pytest.raises(InputError, match=r"--reward_weights: 2 weights for the rewards \['starter'\]"):
        resolve_rewards(ppo_config(tmp_path, reward_weights=[1.0, 2.0]))


def test_conversational_completions_look_as_in_trl(sft, tokenizer, prompts, tmp_path):
    """TRL's own reward functions work: think_format_reward reads completion[0]['content']."""
    from trl.rewards import think_format_reward

    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, [think_format_reward], total_episodes=8)
    assert ppo.rewards(ppo.rollout(next(ppo.prompts()))).scores.tolist() == [0.0] * 8
    assert think_format_reward([[{"role": "assistant", "content": "<think>x</think>y"}]]) == [1.0]
    assert user("x")[0]["role"] == "user"


def test_a_reward_model_sees_the_end_of_what_is_longer_than_its_context(tokenizer, capsys):
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, pad_token_id=1, num_labels=1,
    )  # fmt: skip
    assert usable_context(config) == 32 and usable_context(LlamaConfig(max_position_embeddings=34)) == 34
    torch.manual_seed(0)
    reward = RewardModel(RobertaForSequenceClassification(config), tokenizer, name="judge")
    prompts = [user("word " * 60 + "What is it?"), user("Hi"), user("Then what? " * 30)]
    scores = reward(prompts, [assistant("A cat.")] * 3)
    ids = tokenizer.apply_chat_template(prompts[0] + assistant("A cat."), return_dict=True)["input_ids"]
    seen = [ids[0], *ids[-31:]]
    assert reward.encode(prompts[0], "A cat.") == seen
    assert scores[0] == pytest.approx(reward.model(input_ids=torch.tensor([seen])).logits.item(), abs=1e-5)
    said = capsys.readouterr().out
    assert said.count("judge:") == 1 and "context of 32" in said


def test_what_has_no_score_is_not_compared():
    functions: list[RewardFunction] = [length, lambda completions: [0.0] * len(completions)]
    assert total_scores(functions, [[1.0, None], [None, [0.5, 0.25]]], [2.0, 4.0], TEXTS[:2]) == [2.0, 3.0]
    with pytest.raises(RewardError, match=r"'length', '<lambda>': returned None for the completion 'bb' \(number 1"):
        total_scores(functions, [[1.0, None], [1.0, None]], [1.0, 1.0], TEXTS[:2])


def test_processes_meet_behind_the_passes_of_reward_models(sft, tokenizer, prompts, tmp_path, monkeypatch):
    """Among the passes, one that needs more of them under FSDP2 would wait for the other forever."""
    inside, met = [False], []

    def watched(function, *models):
        inside[0] = True
        result = function()
        inside[0] = False
        return result

    def gather(own):
        met.append(inside[0])
        return own

    def noting(prompts, completions, log_metric, **_):
        log_metric("length", 2.0)
        return [0.0] * len(prompts)

    monkeypatch.setattr("rlhf.ppo.trainer.whole", watched)
    monkeypatch.setattr("rlhf.rewards.log.gather_object", gather)
    ppo = ppo_trainer(sft, tokenizer, prompts, tmp_path, [noting], total_episodes=8)
    ppo.train()
    assert met == [False]
    assert logged(ppo)[0]["length"] == 2.0
