"""What PPOTrainer checks and prepares before it trains."""

import math
from typing import TypeAlias

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import disable_dropout_in_model

from rlhf.errors import InputError
from rlhf.models.adapters import VALUE, add_value_adapter, recompute_with_same_adapter
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.model import PolicyAndValue
from rlhf.rewards import RewardFunction, RewardModel

Model: TypeAlias = PreTrainedModel | PeftModel
EvalDataset: TypeAlias = Dataset | dict[str, Dataset] | None


def check_models(model: Model, ref_model: Model | None, reward_model: Model | None, value_model: Model | None) -> None:
    """Raise InputError for models that can't play their roles together."""
    if ref_model is model:
        raise InputError("ref_model is the policy itself. Pass a copy, or None.")
    if reward_model is not None and value_model is reward_model:
        raise InputError("value_model is the reward model itself, so training would change the reward. Pass a copy.")
    for name, classifier in (("reward_model", reward_model), ("value_model", value_model)):
        labels = getattr(getattr(classifier, "config", None), "num_labels", 1)
        if labels != 1:
            raise InputError(f"{name}: needs one output, found num_labels={labels}. Load it with num_labels=1.")


def check_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError if the pad token is missing or is the eos token."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise InputError("The tokenizer's pad token must be set and differ from eos, or no reply would end.")


def check_datasets(
    args: PPOConfig, model: Model, train: Dataset | None, held_out: EvalDataset, ptx: Dataset | None
) -> None:
    """Raise InputError for a dataset that is missing, has no prompts, or has prompts that are too long."""
    if args.eval_strategy != "no" and held_out is None:
        raise InputError("--eval_strategy: needs an eval_dataset; this one has none. Give one, or use 'no'.")
    by_name = held_out if isinstance(held_out, dict) else {"eval_dataset": held_out}
    check_prompts(train, "train_dataset", args.response_length, model)
    for name, rows in by_name.items():
        if rows is not None:
            check_prompts(rows, name, args.response_length, model)
    if args.ptx_coef > 0 and not ptx:
        raise InputError("--ptx_coef: needs texts to mix in. Give --ptx_dataset_name, or ptx_dataset in Python.")


def check_prompts(dataset: Dataset | None, name: str, response_length: int, model: Model) -> None:
    """Raise InputError for a dataset without prompts, or with prompts that leave no room for a response."""
    if dataset is None or len(dataset) == 0:
        raise InputError(f"{name}: PPO needs at least one prompt.")
    if "input_ids" not in dataset.column_names:
        raise InputError(
            f"{name}: needs a column input_ids with the prompts' tokens; found {sorted(dataset.column_names)}. "
            "rlhf.data.rows.prompt_rows makes it from text or messages."
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(ids) for ids in dataset["input_ids"])
    if longest == 0 or min(len(ids) for ids in dataset["input_ids"]) == 0:
        raise InputError(f"{name}: has a prompt without tokens.")
    if context is not None and longest + response_length > context:
        raise InputError(
            f"--response_length {response_length}: the longest prompt of {name} has {longest} tokens, together more "
            f"than the model's context of {context}. Shorten one of them."
        )


def policy_and_value(model: Model, value_model: Model | None, adapter_name: str, args: PPOConfig) -> PolicyAndValue:
    """The module to train: the policy, and `value_model` or else the value function that `args.value_function` names.

    Args:
        adapter_name: the policy's adapter, from which an adapter of the value function takes its shape.

    Raises:
        InputError: if the value function needs an adapter and the policy is not a PeftModel.
    """
    value_adapter = None
    if args.value_function == "adapter" and value_model is None:
        if not isinstance(model, PeftModel):
            raise InputError("--value_function adapter: needs a LoRA policy. Use 'head', or pass a value_model.")
        add_value_adapter(model, adapter_name)
        value_adapter = VALUE
    if args.activation_checkpointing:
        checkpoint_activations(model, args)
        checkpoint_activations(value_model, args)
    return PolicyAndValue(model, value_model, value_adapter)


def weighted_rewards(
    reward_model: Model | None,
    tokenizer: PreTrainedTokenizerBase,
    reward_funcs: list[RewardFunction] | None,
    args: PPOConfig,
) -> tuple[list[RewardFunction], list[float]]:
    """The reward model, if there is one, then the reward functions; and their weights.

    Raises:
        InputError: if there is no reward, or the number of `reward_weights` differs.
    """
    functions = list(reward_funcs or [])
    if reward_model is not None:
        functions.insert(0, RewardModel(reward_model, tokenizer, args.per_device_eval_batch_size))
    if not functions:
        raise InputError("PPO needs a reward: pass reward_model or reward_funcs.")
    weights = args.reward_weights or [1.0] * len(functions)
    if len(weights) != len(functions):
        raise InputError(
            f"--reward_weights: {len(weights)} weights for {len(functions)} rewards. Give one weight for each."
        )
    return functions, weights


def disable_dropout(module: nn.Module) -> None:
    """Disable all dropout, so that the ratio of new to old probabilities starts at 1."""
    disable_dropout_in_model(module)
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):  # functional dropout reads it on every forward
                setattr(part, name, 0.0)


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
