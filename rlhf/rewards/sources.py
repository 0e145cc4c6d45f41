"""Finding rewards by name: the starter's scorer, a judge, reward models, and functions by import path."""

import importlib
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig
from trl.trainer.utils import get_config_model_id

from rlhf.comparisons import Prompt
from rlhf.errors import InputError
from rlhf.models.adapters import add_frozen_adapter, fits_beside, next_reward_name
from rlhf.models.loading import load_reward_model, place, score_labels
from rlhf.models.sources import Source, base_config, is_decoder, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards.answers import Completion, completion_text
from rlhf.rewards.calling import ARGUMENTS, RewardFunction, check_reward_function, reward_name
from rlhf.rewards.ensemble import Combination, RewardEnsemble
from rlhf.rewards.judge import JudgeReward, JudgeSource, refuse_judge_flags, resolve_judge
from rlhf.rewards.model import RewardModel
from rlhf.rewards.rubrics import JUDGE, JudgeArguments
from rlhf.starter.model import STARTER
from rlhf.starter.scorer import gold_scores


def starter_reward(prompts: list[Prompt], completions: list[Completion], **columns: object) -> list[float]:
    """The starter's scorer as a reward function: VADER sentiment in [-1, 1]."""
    return gold_scores([completion_text(completion) for completion in completions])


class RewardSource(NamedTuple):
    """Where a reward comes from: a reward model, a function, or a judge."""

    name: str  # as the user gave it
    model: Source | None
    function: RewardFunction | None
    judge: JudgeSource | None = None


def resolve_reward(
    name: str,
    flag: str = "--reward_model_path",
    *,
    allow_functions: bool = False,
    base: str | None = None,
    columns: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    judge: JudgeArguments | None = None,
) -> RewardSource:
    """Find a reward by name, before any model is loaded.

    Args:
        name: `starter`, or a reward model (folder or Hub id).
        flag: the flag that gave the name, for error messages.
        allow_functions: `name` may also be `judge`, or the import path of a function, like
            `my_package.my_module.my_function`.
        base: the policy's base model; a reward adapter of another decoder is announced, as it needs its own in memory.
        columns: the dataset's columns, which a function may need.
        trust_remote_code: see `resolve`.
        judge: the flags of `judge`; default: their defaults.

    Raises:
        InputError: see `resolve_judge`; or if there is no such function, its module can't be imported, it takes other
            arguments than a reward function, or the model is a language model.
    """
    if name == STARTER:
        return RewardSource(name, None, starter_reward)
    if name == JUDGE and allow_functions:
        return RewardSource(name, None, None, resolve_judge(judge or JudgeArguments(), trust_remote_code))
    is_import_path = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name) and not Path(name).exists()
    if allow_functions and Path(f"{name.removesuffix('.py')}.py").is_file() and not Path(name).is_dir():
        module = ".".join(part for part in Path(name.removesuffix(".py")).parts if part.isidentifier())
        raise InputError(f"{flag} {name}: names a file of functions. Name the function too: {module}.<function>.")
    if allow_functions and is_import_path:
        return RewardSource(name, None, _imported(name, flag, columns))
    return RewardSource(name, _resolve_reward_model(name, flag, base, trust_remote_code), None)


class RewardFlags(Protocol):
    """The flags that name rewards, of PPOConfig, RLOOConfig and eval/overoptimization.py; these are JudgeArguments."""

    @property
    def reward_model_path(self) -> list[str] | str | None: ...  # RLOOConfig's is one name

    reward_funcs: list[str] | None
    reward_weights: list[float] | None
    trust_remote_code: bool


def resolve_rewards(
    args: RewardFlags, base: str | None = None, columns: Sequence[str] | None = None
) -> list[RewardSource]:
    """The rewards that the flags name; the starter's scorer if they name none.

    Raises:
        InputError: see `resolve_reward`; if the numbers of `reward_weights` and rewards differ, where an ensemble is
            one reward; if --reward_ensemble has nothing to combine or --uwo_coef no effect; or if there are flags of a
            judge and no judge.
    """
    trust, paths = args.trust_remote_code, reward_model_paths(args)
    judge = args if isinstance(args, JudgeArguments) else None
    how = getattr(args, "reward_ensemble", "mean")  # RLOO has none
    if how != "mean" and len(paths) < 2:
        raise InputError(f"--reward_ensemble {how}: combines several models. Give two or more to --reward_model_path, "
                         "or leave it out.")  # fmt: skip
    uwo_coef = getattr(args, "uwo_coef", None)
    if how != "uwo" and uwo_coef != getattr(type(args), "uwo_coef", None):
        raise InputError(f"--uwo_coef {uwo_coef}: has no effect with --reward_ensemble {how}. Give --reward_ensemble "
                         "uwo, or leave it out.")  # fmt: skip
    judging = [*(args.reward_funcs or []), *(getattr(args, "eval_reward_funcs", None) or [])]
    if judge is not None and JUDGE not in judging:
        refuse_judge_flags(judge)
    rewards = [resolve_reward(path, base=base, trust_remote_code=trust) for path in paths]
    rewards += resolve_reward_functions(args.reward_funcs, "--reward_funcs", base, columns, trust, judge)
    rewards = rewards or [resolve_reward(STARTER)]
    if args.reward_weights is not None and len(args.reward_weights) != len(rewards) - max(0, len(paths) - 1):
        names = [reward.name for reward in rewards]
        one = " The models of --reward_model_path are one ensemble, with one weight." if len(paths) > 1 else ""
        raise InputError(f"--reward_weights: {len(args.reward_weights)} weights for the rewards {names}.{one}")
    return rewards


def reward_model_paths(args: RewardFlags) -> list[str]:
    """The names behind --reward_model_path."""
    given = args.reward_model_path
    return [given] if isinstance(given, str) else given or []


def resolve_reward_functions(
    names: list[str] | None,
    flag: str,
    base: str | None = None,
    columns: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    judge: JudgeArguments | None = None,
) -> list[RewardSource]:
    """The rewards of a flag that takes functions as well as models; see `resolve_reward`."""
    return [
        resolve_reward(
            name,
            flag,
            allow_functions=True,
            base=base,
            columns=columns,
            trust_remote_code=trust_remote_code,
            judge=judge,
        )
        for name in names or []
    ]


def _imported(name: str, flag: str, columns: Sequence[str] | None) -> RewardFunction:
    module_name, _, function_name = name.rpartition(".")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # find the user's own file in the current folder, as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the module does, exit() included
        what = f"it calls exit({error.code!r})" if isinstance(error, SystemExit) else str(error)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if Path(frame.filename).stem == module_name.rpartition(".")[2]]  # fmt: skip
        place = f", line {lines[-1]}" if lines else ""
        raise InputError(
            f"{flag} {name}: can't import {module_name}{place} ({type(error).__name__}: {what})."
        ) from error
    if not hasattr(module, function_name):
        raise InputError(f"{flag} {name}: {module_name} has no function {function_name!r}.")
    function = getattr(module, function_name)
    check_reward_function(function, f"{flag} {name}", columns)
    return function


def _resolve_reward_model(name: str, flag: str, base: str | None, trust_remote_code: bool) -> Source:
    source = resolve(name, flag, trust_remote_code=trust_remote_code)
    if source.peft_config is None:
        architecture = (base_config(source).architectures or ["none"])[0]
        if "SequenceClassification" not in architecture:
            raise InputError(
                f"{flag} {name}: a reward model is a sequence classifier; found {architecture}. Train one with "
                "recipes/reward.py."
            )
    elif not source.is_reward_adapter:
        raise InputError(
            f"{flag} {name}: is an adapter for {source.peft_config.task_type}, and a reward model is a sequence "
            "classifier (SEQ_CLS). Train one with recipes/reward.py."
        )
    elif base is not None and source.base != base and is_decoder(base_config(source)):
        print(
            f"{flag} {name}: an adapter of {Path(source.base).name}, which is loaded beside the policy's own base "
            f"{Path(base).name}. A reward adapter of the policy's base would share its memory."
        )
    labels = score_labels(source)
    if labels > 2:
        raise InputError(
            f"{flag} {name}: has {labels} labels; a score needs one output, or two labels (the log-odds of one). "
            "Train a reward model with recipes/reward.py, or make a score of the labels in a function (--reward_funcs)."
        )
    return source


def _say_what_two_labels_score(source: RewardSource, config: PreTrainedConfig) -> None:
    names = config.id2label
    print(
        f"{source.name}: has two labels; the score is the log-odds of {names[1]!r} against {names[0]!r}. A negative "
        "weight (--reward_weights) turns it around."
    )


def load_reward(
    source: RewardSource,
    model_args: ModelConfig,
    *,
    policy: PreTrainedModel | PeftModel | None = None,
    batch_size: int = 32,
) -> RewardFunction:
    """The reward function that `resolve_reward` found.

    Args:
        policy: a PeftModel. A reward adapter over the same base is put beside the policy's own adapter, so that no
            second base is in memory. A judge that is that base is the policy with its adapters off.
    """
    if source.judge is not None:
        return JudgeReward(source.judge.load(model_args, policy, batch_size), source.judge.criteria)
    if source.model is None:
        assert source.function is not None
        return source.function
    tokenizer = load_tokenizer(source.model, classifier=True)
    if isinstance(policy, PeftModel) and fits_beside(policy, source.model):
        name = next_reward_name(policy)
        head = add_frozen_adapter(policy, source.model, name)
        return RewardModel(policy, tokenizer, batch_size, Path(source.name).name, name, head)
    model = load_reward_model(source.model, model_args, tokenizer, trainable=False)
    if model.config.num_labels == 2:
        _say_what_two_labels_score(source, model.config)
    return RewardModel(place(model), tokenizer, batch_size, Path(source.name).name)


class EnsembleFlags(RewardFlags, Protocol):
    """The flags that combine reward models, of PPOConfig and eval/overoptimization.py."""

    reward_ensemble: Combination
    uwo_coef: float


def load_rewards(
    sources: list[RewardSource],
    args: EnsembleFlags,
    model_args: ModelConfig,
    *,
    policy: PreTrainedModel | PeftModel | None = None,
    batch_size: int = 32,
) -> list[RewardFunction]:
    """The functions of what `resolve_rewards` found. Several models of --reward_model_path become one ensemble.

    Args:
        policy: see `load_reward`.
    """
    functions = [load_reward(source, model_args, policy=policy, batch_size=batch_size) for source in sources]
    count = len(reward_model_paths(args))
    if count < 2:
        return functions
    return [RewardEnsemble(functions[:count], args.reward_ensemble, args.uwo_coef), *functions[count:]]


RewardArgument: TypeAlias = RewardFunction | PreTrainedModel | PeftModel | str


def reward_functions(
    given: RewardArgument | Sequence[RewardArgument] | None,
    where: str,
    model_args: ModelConfig,
    *,
    tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
    policy: PreTrainedModel | PeftModel | None = None,
    columns: Sequence[str] | None = None,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    judge: JudgeArguments | None = None,
) -> list[RewardFunction]:
    """The `reward_funcs` of a trainer as functions. As in GRPO, each is a function, a reward model, or a name.

    Args:
        where: the argument, for errors.
        model_args: how to load a reward model by its name.
        tokenizers: one for each of `given`, None for functions and names. A model without one gets that of its name.
        policy: see `load_reward`.
        columns: the dataset's columns, which a function may need.
        judge: the flags of `judge`.

    Raises:
        InputError: see `resolve_reward` and `check_reward_function`; or if the numbers of `tokenizers` and rewards
            differ, or a model has several outputs.
    """
    rewards: list[Any] = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    tokens = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] if tokenizers else []
    if tokens and len(tokens) != len(rewards):
        raise InputError(f"reward_processing_classes: {len(tokens)} for {len(rewards)} rewards. Give one for each.")
    hidden = sorted({*(columns or ())} & {*ARGUMENTS})
    if rewards and hidden:
        warnings.warn(
            f"Columns {', '.join(hidden)} don't reach reward functions: arguments of these have those names.",
            stacklevel=2,
        )
    functions: list[RewardFunction] = []
    for reward, tokenizer in zip(rewards, tokens or [None] * len(rewards), strict=True):
        if isinstance(reward, str):
            source = resolve_reward(
                reward, where, allow_functions=True, columns=columns, trust_remote_code=trust_remote_code, judge=judge
            )
            functions.append(load_reward(source, model_args, policy=policy, batch_size=batch_size))
        elif isinstance(reward, PreTrainedModel | PeftModel):
            functions.append(_reward_model(reward, where, tokenizer, batch_size))
        else:
            check_reward_function(reward, f"{where}: {reward_name(reward)}", columns)
            functions.append(reward)
    return functions


def _reward_model(
    model: PreTrainedModel | PeftModel, where: str, tokenizer: PreTrainedTokenizerBase | None, batch_size: int
) -> RewardModel:
    name = get_config_model_id(model.config)
    if model.config.num_labels not in (1, 2):
        raise InputError(
            f"{where}: a reward model has one output, or two labels; found num_labels={model.config.num_labels}."
        )
    if tokenizer is None and not name:
        raise InputError(f"{where}: the reward model has no name to load a tokenizer by. Give "
                         "reward_processing_classes.")  # fmt: skip
    tokenizer = tokenizer or load_tokenizer(resolve(name, where, weights=False), classifier=True)
    return RewardModel(place(model), tokenizer, batch_size, Path(name).name or "reward_model")
