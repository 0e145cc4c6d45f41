"""Reward functions and reward models behind one call: `(prompts, completions, **columns) -> list[float]`.

That is the signature of `reward_funcs` in TRL's GRPO and RLOO, and so are its details: the completions of
conversational prompts are lists of one assistant message, others are texts; `completion_ids` and the dataset's other
columns come by name; None says that a function has no opinion on a completion; a function may be async. Beyond TRL's, a
function may return a list of rewards for a completion, one per token of its `completion_ids`.
"""

import asyncio
import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, TaskType
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.comparisons import Messages, Prompt, as_message
from rlhf.data.encoding import encode_messages, encode_text_with_end
from rlhf.errors import InputError
from rlhf.models.adapters import REWARD, active_adapter, add_frozen_adapter, trunk
from rlhf.models.loading import load_reward_model, place
from rlhf.models.prefix import forward_sharing_prefix, rows_of_prompts
from rlhf.models.sources import Source, resolve, usable_context
from rlhf.models.tokenizers import load_tokenizer
from rlhf.starter.labeler import gold_scores
from rlhf.starter.model import STARTER

Completion = str | Messages
Score = float | list[float] | None
RewardFunction = Callable[..., Any]


class RewardError(ValueError):
    """A reward function raised, or returned what is no score; the message names it and shows the completion."""


def completion_text(completion: Completion) -> str:
    """The text of a completion, whichever form it has."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def reward_name(function: RewardFunction) -> str:
    """What a reward function is called in logs and errors."""
    return getattr(function, "__name__", type(function).__name__)


class RewardModel:
    """A trained reward model as a reward function, with its own tokenizer and chat template.

    It scores texts, so the policy's tokenizer doesn't matter. A completion is scored as a finished reply: what was
    sampled behind the stop token is not seen. Of what is longer than its context, the beginning of the prompt is left
    out, and that is printed once.

    Args:
        model: a sequence classifier with one output; or the policy, together with `adapter` and `head`: the reward
            model is then an adapter and a head over the policy's own base, and no second base is in memory.
        adapter: the policy's adapter that scores.
        head: from the last hidden state (…, d) to the score (…, 1).
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        name: str = "reward_model",
        adapter: str | None = None,
        head: nn.Linear | None = None,
    ) -> None:
        self.model, self.tokenizer, self.batch_size, self.__name__ = model, tokenizer, batch_size, name
        self.adapter, self.head = adapter, head
        self.longest, self._cut_something = usable_context(model.config), False
        if adapter is None:
            model.eval().requires_grad_(False)

    def encode(self, prompt: Prompt, completion: str) -> list[int]:
        """Token ids of a prompt and a completion, ending with the token at which the score is read."""
        if isinstance(prompt, str):
            ids = encode_text_with_end(self.tokenizer, prompt + completion)
        else:
            ids = encode_messages(self.tokenizer, [*prompt, *as_message(prompt, completion)])
        if self.longest is None or len(ids) <= self.longest:
            return ids
        if not self._cut_something:
            print(f"{self.__name__}: {len(ids)} tokens of prompt and reply are more than the reward model's context of "
                  f"{self.longest}: it sees the end of such prompts only.")  # fmt: skip
            self._cut_something = True
        return [ids[0], *ids[len(ids) - self.longest + 1 :]]  # the first token is where an encoder reads its score

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt], completions: list[Completion], **columns: list[Any]) -> list[float]:
        """One score per completion."""
        texts = [completion_text(completion) for completion in completions]
        rows = [self.encode(*pair) for pair in zip(prompts, texts, strict=True)]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        scores = [0.0] * len(rows)
        side = "left" if self._reads_the_last_token() else "right"
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            batch = self.tokenizer.pad(
                {"input_ids": [rows[number] for number in numbers]}, padding_side=side, return_tensors="pt"
            ).to(self.model.device)
            for number, score in zip(numbers, self._scores(**batch).tolist(), strict=True):
                scores[number] = score
        return scores

    def _reads_the_last_token(self) -> bool:
        """True of decoders; an encoder pools in its own way."""
        classifier = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return self.head is not None or hasattr(classifier, "score")

    def _scores(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        """Scores (B,) float32."""
        self.model.eval()
        if not self._reads_the_last_token():
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()[:, 0]
        body = trunk(self.model)
        # a pad token may lie outside of the embeddings; masked, any other token does as well
        ids = input_ids.masked_fill(attention_mask == 0, 0)
        with nullcontext() if self.adapter is None else active_adapter(self.model, self.adapter):
            output = forward_sharing_prefix(body, body.config, rows_of_prompts(ids, attention_mask)).output
        hidden = output[0][:, -1]
        if self.head is None:
            classifier = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            return classifier.score(hidden).float()[:, 0]
        return self.head.to(hidden.device)(hidden.float())[:, 0]


def starter_reward(prompts: list[Prompt], completions: list[Completion], **columns: list[Any]) -> list[float]:
    """The starter's scorer as a reward function: VADER sentiment in [-1, 1]."""
    return gold_scores([completion_text(completion) for completion in completions])


# ------------------------------------------------------------------------------------------------- calling them


def call_rewards(
    functions: list[RewardFunction],
    prompts: list[Prompt],
    completions: list[Completion],
    completion_ids: list[list[int]],
    **columns: list[Any],
) -> list[list[Score]]:
    """Every function's scores, in the order of the functions. Async functions run at the same time.

    Raises:
        RewardError: if one raises, or returns a wrong number of scores or something that is no finite number.
    """
    inputs: dict[str, Any] = {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        **columns,
    }
    results: dict[int, Any] = {}

    async def gather() -> None:
        waiting = [number for number, function in enumerate(functions) if _is_async(function)]
        answers = await asyncio.gather(*(functions[number](**inputs) for number in waiting), return_exceptions=True)
        results.update(zip(waiting, answers, strict=True))

    if any(_is_async(function) for function in functions):
        asyncio.run(gather())
    for number, function in enumerate(functions):
        if number not in results:
            try:
                results[number] = function(**inputs)
            except Exception as error:
                results[number] = error
        if isinstance(results[number], Exception):
            raise _blame(function, results[number], inputs) from results[number]
    return [
        check_scores(function, results[number], completions, completion_ids)
        for number, function in enumerate(functions)
    ]


def _is_async(function: RewardFunction) -> bool:
    """Whether calling it gives something to await; also for objects whose class defines an async `__call__`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _blame(function: RewardFunction, error: Exception, inputs: dict[str, Any]) -> RewardError:
    """The error with the first completion that raises it when it is scored alone."""

    def score(number: int) -> None:
        one = {name: [values[number]] if isinstance(values, list) else values for name, values in inputs.items()}
        answer = function(**one)
        if inspect.iscoroutine(answer):
            asyncio.run(answer)

    shown, where = inputs["completions"][0], "a batch that begins with the completion"
    for number, completion in enumerate(inputs["completions"]):
        try:
            score(number)
        except Exception:
            shown, where = completion, "the completion"
            break
    return RewardError(
        f"Reward function {reward_name(function)!r} raised {type(error).__name__}: {error}, on {where} "
        f"{completion_text(shown)[:200]!r}."
    )


def check_scores(
    function: RewardFunction, scores: Any, completions: list[Completion], completion_ids: list[list[int]] | None = None
) -> list[Score]:
    """The scores as floats, lists of floats (rewards per token) or None.

    Raises:
        RewardError: if there are not as many as completions, or one is no finite number; it names the reward function
            and shows the offending completion.
    """
    name, scores = reward_name(function), list(scores)
    if len(scores) != len(completions):
        raise RewardError(f"Reward function {name!r} returned {len(scores)} scores for {len(completions)} completions.")
    checked: list[Score] = []
    for number, (score, completion) in enumerate(zip(scores, completions, strict=True)):
        text = completion_text(completion)[:200]
        score = score.tolist() if isinstance(score, torch.Tensor) else score
        values = score if isinstance(score, list | tuple) else [] if score is None else [score]
        try:
            fine = all(math.isfinite(value) for value in values)
        except TypeError:
            fine = False
        if not fine:
            raise RewardError(f"Reward function {name!r} returned {score!r} for the completion {text!r}.")
        tokens = len(completion_ids[number]) if completion_ids is not None else len(values)
        if isinstance(score, list | tuple) and len(score) != tokens:
            raise RewardError(
                f"Reward function {name!r} returned {len(score)} rewards for the {tokens} tokens of the completion "
                f"{text!r}."
            )
        checked.append(
            [float(value) for value in score]
            if isinstance(score, list | tuple)
            else None
            if score is None
            else float(score)
        )
    return checked


# ------------------------------------------------------------------------------------------------- finding them


class RewardSource(NamedTuple):
    """Where a reward comes from: a reward model, or a function."""

    name: str  # as the user gave it
    model: Source | None
    function: RewardFunction | None


def resolve_reward(name: str, flag: str = "--reward_model_path", base: str | None = None) -> RewardSource:
    """Find a reward by name, before any model is loaded.

    Args:
        name: `starter`, a reward model (folder or Hub id), or with the flag `--reward_funcs` also the import path of a
            function, like `my_package.my_module.my_function`.
        base: the policy's base model, which a reward adapter has to share.

    Raises:
        InputError: if there is no such function, or the model is a language model or an adapter of another base.
    """
    if name == STARTER:
        return RewardSource(name, None, starter_reward)
    is_import_path = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name) and not Path(name).exists()
    if flag != "--reward_model_path" and is_import_path:
        return RewardSource(name, None, _imported(name, flag))
    return RewardSource(name, _resolve_reward_model(name, flag, base), None)


def resolve_rewards(args: Any, base: str | None = None) -> tuple[list[RewardSource], list[RewardSource]]:
    """The rewards that PPOConfig or RLOOConfig names, to train on and only to evaluate with; else the starter's scorer.

    Raises:
        InputError: see `resolve_reward`; or if `reward_weights` are not as many as rewards.
    """
    rewards = [resolve_reward(args.reward_model_path, base=base)] if args.reward_model_path else []
    rewards += [resolve_reward(name, "--reward_funcs", base) for name in args.reward_funcs or []]
    rewards = rewards or [resolve_reward(STARTER)]
    if args.reward_weights is not None and len(args.reward_weights) != len(rewards):
        names = [reward.name for reward in rewards]
        raise InputError(f"--reward_weights: {len(args.reward_weights)} weights for the rewards {names}.")
    held_out = getattr(args, "eval_reward_funcs", None) or []  # RLOOConfig has none
    return rewards, [resolve_reward(name, "--eval_reward_funcs", base) for name in held_out]


def _imported(name: str, flag: str) -> RewardFunction:
    module_name, _, function_name = name.rpartition(".")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as with `python -m`: the user's own file beside which they stand
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"{flag} {name}: can't import {module_name} ({error}).") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{flag} {name}: {module_name} has no function {function_name!r}.")
    return function


def _resolve_reward_model(name: str, flag: str, base: str | None) -> Source:
    source = resolve(name, flag)
    if source.peft_config is None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source.base, revision=source.revision)
        architecture = (config.architectures or ["none"])[0]
        if "SequenceClassification" not in architecture or config.num_labels != 1:
            raise InputError(
                f"{flag} {name}: a reward model is a sequence classifier with one output; found "
                f"{architecture} with {config.num_labels}. Train one with recipes/reward.py."
            )
        return source
    if source.peft_config.task_type != TaskType.SEQ_CLS:
        raise InputError(
            f"{flag} {name}: a reward adapter has task type SEQ_CLS; found "
            f"{source.peft_config.task_type}. Train one with recipes/reward.py."
        )
    if base is not None and source.base != base:
        raise InputError(
            f"{flag} {name}: this adapter belongs to the base {source.base}, the policy to {base}. Train "
            "a reward adapter on the policy's base, or merge this one into a full model (merge_and_unload)."
        )
    return source


def load_reward(
    source: RewardSource,
    model_args: ModelConfig,
    *,
    policy: PreTrainedModel | PeftModel | None = None,
    batch_size: int = 32,
    trust_remote_code: bool = False,
) -> RewardFunction:
    """The reward function that `resolve_reward` found.

    Args:
        policy: a PeftModel on the base of a reward adapter. The adapter is then put beside the policy's own, instead of
            a second base in memory. One adapter finds room there.
    """
    if source.model is None:
        assert source.function is not None
        return source.function
    tokenizer = load_tokenizer(source.model, trust_remote_code=trust_remote_code)
    if isinstance(policy, PeftModel) and _fits_beside(policy, source.model):
        head = add_frozen_adapter(policy, source.model, REWARD)
        return RewardModel(policy, tokenizer, batch_size, Path(source.name).name, REWARD, head)
    model = load_reward_model(source.model, model_args, tokenizer, trainable=False, trust_remote_code=trust_remote_code)
    return RewardModel(place(model), tokenizer, batch_size, Path(source.name).name)


def _fits_beside(policy: PeftModel, source: Source) -> bool:
    """Whether a reward model is a plain LoRA adapter over the policy's base, and the first such one."""
    config = source.peft_config
    return (
        config is not None
        and REWARD not in policy.peft_config
        and config.peft_type == policy.peft_type
        and source.base == policy.get_base_model().name_or_path
        and config.revision == policy.peft_config[policy.active_adapter].revision
        and set(config.modules_to_save or []) <= {"score", "classifier"}
    )
