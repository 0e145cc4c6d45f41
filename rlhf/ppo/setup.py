"""What PPOTrainer checks and prepares before it trains."""

import math
from collections.abc import Sequence
from typing import TypeAlias

from datasets import Dataset
from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.encoding import tokens_needed
from rlhf.errors import InputError
from rlhf.models.adapters import REWARD, VALUE, add_value_adapter, recompute_with_same_adapter
from rlhf.models.tokenizers import end_ids
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.inputs import Model
from rlhf.ppo.model import PolicyAndValue
from rlhf.ppo.zero import VALUE_GROUP, split_value_groups
from rlhf.rewards import RewardEnsemble, RewardFunction

EvalDataset: TypeAlias = Dataset | dict[str, Dataset] | None

# Times learning_rate: the rate of a head on frozen states. With less it falls behind the returns, which rise from
# update to update; the policy doesn't feel it, as the head shares nothing with it.
FROZEN_STATES_RATE = 10


def _has_token_scores(classifier: Model) -> bool:
    """Whether a sequence classifier scores hidden states, as a decoder's does. Others pool them first."""
    return hasattr(classifier, "score") and not classifier.config.is_encoder_decoder


def check_models(
    model: str | Model,
    ref_model: str | Model | None,
    reward_model: str | Model | Sequence[str | Model] | None,
    value_model: str | Model | None,
) -> None:
    """Raise InputError for models that can't play their roles together. Names stand for models of their own."""
    if ref_model is model and not isinstance(model, str):
        raise InputError("ref_model is the policy itself. Pass a copy, or None.")
    rewards = reward_model if isinstance(reward_model, list | tuple) else [reward_model]
    if isinstance(value_model, PreTrainedModel | PeftModel) and any(value_model is reward for reward in rewards):
        raise InputError("value_model is the reward model itself, so training would change the reward. Pass a copy.")
    if isinstance(value_model, PreTrainedModel | PeftModel) and not _has_token_scores(value_model):
        raise InputError(
            f"value_model: {type(value_model).__name__} gives no value for each token. Pass a decoder's sequence "
            "classifier, or None, which puts the value function on the policy."
        )
    for name, classifier in (*(("reward_model", reward) for reward in rewards), ("value_model", value_model)):
        labels = getattr(getattr(classifier, "config", None), "num_labels", 1)
        if labels != 1 and not (name == "reward_model" and labels == 2):
            raise InputError(f"{name}: needs one output, found num_labels={labels}. Load it with num_labels=1.")


def stop_ids(args: PPOConfig, model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end a completion: `stop_token_id`, or with `stop_token="eos"` all of `end_ids`.

    Raises:
        InputError: if the model can't sample one of `stop_token_id`.
    """
    rows = model.config.get_text_config().vocab_size
    for number in args.stop_token_id or []:
        if not 0 <= number < rows:
            raise InputError(f"--stop_token_id {number}: the model samples ids from 0 to {rows - 1}. Give one of them.")
    return end_ids(model, tokenizer) if args.stop_token == "eos" else args.stop_token_id or []


def check_ptx_flags(args: PPOConfig) -> None:
    """Raise InputError for texts to mix in that have no weight."""
    if args.ptx_dataset_name is not None and args.ptx_coef == 0:
        raise InputError(f"--ptx_dataset_name {args.ptx_dataset_name}: has no effect without --ptx_coef. Give its "
                         "weight, or leave it out.")  # fmt: skip


def check_extra_datasets(args: PPOConfig, held_out: EvalDataset, ptx: Dataset | None) -> None:
    """Raise InputError if the datasets beside the prompts are missing where a setting needs them, or have no effect."""
    check_ptx_flags(args)
    if args.eval_strategy != "no" and held_out is None:
        raise InputError("--eval_strategy: needs an eval_dataset; this one has none. Give one, or use 'no'.")
    if args.ptx_coef > 0 and not ptx:
        raise InputError("--ptx_coef: needs texts to mix in. Give --ptx_dataset_name, or ptx_dataset in Python.")
    if ptx and "input_ids" not in ptx.column_names:
        raise InputError(f"ptx_dataset: needs a column input_ids, and perhaps labels; found {ptx.column_names}.")


def check_prompts(
    dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, response_length: int, context: int | None
) -> None:
    """Raise InputError for prompts without tokens or with unknown ones, or that leave no room for a response."""
    longest = max(len(ids) for ids in dataset["input_ids"])
    if longest == 0 or min(len(ids) for ids in dataset["input_ids"]) == 0:
        raise InputError(f"{name}: has a prompt without tokens.")
    largest = max(max(ids) for ids in dataset["input_ids"])
    if largest >= len(tokenizer):
        raise InputError(f"{name}: input_ids has token {largest}, and the tokenizer {len(tokenizer)} tokens. Is it the "
                         "model's? Leave input_ids out to have 'prompt' tokenized.")  # fmt: skip
    if context is not None and tokens_needed(tokenizer, longest, response_length) > context:
        raise InputError(
            f"--response_length {response_length}: the longest prompt of {name} has {longest} tokens, together more "
            f"than the model's context of {context}. Shorten one of them."
        )


def check_optimizers(optimizers: tuple[Optimizer | None, LRScheduler | None], model: PolicyAndValue) -> None:
    """Add the value function's parameters to the user's optimizer if it lacks them: the trainer has just made them.

    Raises:
        InputError: if a scheduler comes without its optimizer, or the optimizer holds nothing of the policy.
    """
    optimizer, scheduler = optimizers
    if scheduler is not None and getattr(scheduler, "optimizer", None) is not optimizer:
        raise InputError("optimizers: the scheduler belongs to another optimizer. Pass both as a pair.")
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = model.value_parameters()
    if not any(id(parameter) in held for name, parameter in trained.items() if name not in own):
        raise InputError("optimizers: the optimizer holds no trained parameter of the policy. Make it from the policy.")
    missing = [parameter for name, parameter in trained.items() if name in own and id(parameter) not in held]
    if missing:
        optimizer.add_param_group({"params": missing})


def set_value_learning_rate(model: PolicyAndValue, optimizer: Optimizer, args: PPOConfig, own_optimizer: bool) -> None:
    """Give the value function groups of its own in the optimizer, with their rate, before there is a scheduler.

    Args:
        own_optimizer: the user made it.

    Raises:
        InputError: for `value_learning_rate` if the user made it: it has its rates.
    """
    rate = args.value_learning_rate
    if rate is None and model.value_adapter == REWARD and not own_optimizer:
        rate = FROZEN_STATES_RATE * args.learning_rate
    if rate is None:
        return
    if own_optimizer:
        raise InputError("--value_learning_rate: has no effect on an optimizer of your own. Give the value function a "
                         "group in it, or leave one of them out.")  # fmt: skip
    own = model.value_parameters()
    split_value_groups(optimizer, {parameter for name, parameter in model.named_parameters() if name in own})
    for group in optimizer.param_groups:
        if group.pop(VALUE_GROUP):
            group["lr"] = rate


def policy_and_value(
    model: Model, value_model: Model | None, adapter_name: str, args: PPOConfig, reward_trains: bool
) -> PolicyAndValue:
    """The module to train: the policy, and `value_model` or else the value function that `args.value_function` names.

    Args:
        adapter_name: the policy's adapter, from which an adapter of the value function takes its shape.
        reward_trains: the adapter `reward` is trained on, not held out for evaluation (see `trains_on_reward`).

    Raises:
        InputError: if the value function needs an adapter and the policy is not a PeftModel.
    """
    value_adapter = None
    if args.value_function == "adapter" and value_model is None:
        if not isinstance(model, PeftModel):
            raise InputError("--value_function adapter: needs a LoRA policy. Use 'head', or pass a value_model.")
        add_value_adapter(model, REWARD if reward_trains else adapter_name)
        value_adapter = VALUE
    reads_reward = args.value_function == "reward" or (args.value_function is None and reward_trains)
    if reads_reward and value_model is None:
        if not reward_trains:
            raise InputError(
                "--value_function reward: needs a LoRA policy, and a reward adapter of its base (--reward_model_path). "
                "Use 'head'."
            )
        value_adapter = REWARD
    if args.activation_checkpointing:
        checkpoint_activations(model, args)
        checkpoint_activations(value_model, args)
    return PolicyAndValue(model, value_model, value_adapter)


def same_for_each(given: object, tokenizer: PreTrainedTokenizerBase) -> list[PreTrainedTokenizerBase | None]:
    """The tokenizer for each reward model of `reward_model`: that of the policy."""
    count = len(given) if isinstance(given, list | tuple) else 0 if given is None else 1
    return [tokenizer] * count


def one_reward(functions: list[RewardFunction], args: PPOConfig) -> list[RewardFunction]:
    """Several reward models as one ensemble."""
    return functions if len(functions) < 2 else [RewardEnsemble(functions, args.reward_ensemble, args.uwo_coef)]


def trains_on_reward(functions: list[RewardFunction]) -> bool:
    """Whether one of these rewards is, or an ensemble has, the first reward adapter on the policy's base.

    Without such a reward, that adapter may be held out for evaluation, and the value function must not see it.
    """
    models = [one for function in functions for one in getattr(function, "members", [function])]
    return any(getattr(model, "adapter", None) == REWARD for model in models)


def reward_weights(functions: list[RewardFunction], args: PPOConfig) -> list[float]:
    """The weight of each reward function.

    Raises:
        InputError: if there is no reward, the number of `reward_weights` differs, or `reward_ensemble` has nothing to
            combine.
    """
    if not functions:
        raise InputError("PPO needs a reward: pass reward_model or reward_funcs.")
    if args.reward_ensemble != "mean" and not any(isinstance(function, RewardEnsemble) for function in functions):
        raise InputError(f"--reward_ensemble {args.reward_ensemble}: combines several models. Pass a list of them as "
                         "reward_model, or leave it out.")  # fmt: skip
    weights = args.reward_weights or [1.0] * len(functions)
    if len(weights) != len(functions):
        raise InputError(
            f"--reward_weights: {len(weights)} weights for {len(functions)} rewards. Give one weight for each."
        )
    return weights


def checkpoint_activations(model: Model | None, args: PPOConfig) -> None:
    """Save memory in the update at the cost of time: recompute activations instead of keeping them."""
    if model is None:
        return
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = dict(args.activation_checkpointing_kwargs or {"use_reentrant": False})
    if isinstance(model, PeftModel):
        if settings.get("use_reentrant", True):
            raise InputError(
                "--activation_checkpointing_kwargs: with adapters, use_reentrant must be false, so that a layer is "
                "recomputed with the adapter that it ran with."
            )
        settings["context_fn"] = recompute_with_same_adapter(model)
    inner.enable_input_require_grads()
    inner.activation_checkpointing_enable(settings)


def set_sizes(args: PPOConfig, dataset_length: int, processes: int) -> None:
    """Fill in the sizes that TRL's PPOConfig derives from the others.

    Raises:
        InputError: if `total_episodes` is given and is not a multiple of the batch size.
    """
    args.world_size = processes
    args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.micro_batch_size = args.per_device_train_batch_size * processes
    args.batch_size = args.local_batch_size * processes
    args.mini_batch_size = args.batch_size // args.num_mini_batches
    args.local_mini_batch_size = args.local_batch_size // args.num_mini_batches
    if args.max_steps > 0:
        args.total_episodes = args.max_steps * args.batch_size
    elif args.total_episodes is None:
        args.total_episodes = max(1, int(args.num_train_epochs * dataset_length / args.batch_size)) * args.batch_size
    elif args.total_episodes % args.batch_size or args.total_episodes < 1:
        below = args.total_episodes // args.batch_size * args.batch_size
        raise InputError(
            f"--total_episodes {args.total_episodes}: must be a multiple of the batch size {args.batch_size} "
            f"(per_device_train_batch_size × gradient_accumulation_steps × processes). Give "
            f"{f'{below} or ' if below else ''}{below + args.batch_size}."
        )
    args.num_total_batches = math.ceil(args.total_episodes / args.batch_size)
