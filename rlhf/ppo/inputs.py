"""What PPOTrainer is given → what it trains: models by name, the tokenizer, the tokens of prompts."""

import copy
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig
from trl.trainer.utils import get_config_model_id

from rlhf.data.rows import prompt_rows
from rlhf.errors import InputError
from rlhf.models.adapters import REFERENCE, new_adapter, refuse_prompt_learning, why_alone
from rlhf.models.causality import need_causal
from rlhf.models.fused_lora import fuse
from rlhf.models.loading import load_causal_lm, load_policy, load_reward_model
from rlhf.models.sources import Source, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.ppo.config import PPOConfig

Model: TypeAlias = PreTrainedModel | PeftModel


class Roles(NamedTuple):
    """The models of a run, loaded."""

    policy: Model
    tokenizer: PreTrainedTokenizerBase
    reference: Model | None
    value: Model | None
    model_args: ModelConfig  # how other models are loaded by name
    trust_remote_code: bool


def config_or_default(args: PPOConfig | None, model: str | Model | None) -> PPOConfig:
    """The configuration; by default, as in GRPO, one that writes to `<name of the model>-PPO`.

    Raises:
        InputError: if there is no model, or `args` is of another class.
    """
    if model is None:
        raise InputError("model: PPOTrainer needs a policy: a causal language model, or its Hub id or folder.")
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return PPOConfig(f"{Path(name).name}-PPO")
    if not isinstance(args, PPOConfig):
        raise InputError(f"args: give an rlhf.ppo.PPOConfig; found {type(args).__module__}.{type(args).__name__}.")
    return args


def check_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError if the pad token is missing or is the eos token."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise InputError("The tokenizer's pad token must be set and differ from eos, or no reply would end.")


def check_model_init_kwargs(args: PPOConfig, *given: object) -> None:
    """Raise InputError if `args.model_init_kwargs` is given and none of the models is a name."""
    words = [item for value in given for item in (value if isinstance(value, list) else [value])]
    if args.model_init_kwargs and not any(isinstance(word, str) for word in words):
        raise InputError("model_init_kwargs: the models are loaded already. Leave it out, or give their names.")


def load_roles(
    args: PPOConfig,
    model: str | Model,
    tokenizer: PreTrainedTokenizerBase | None,
    ref_model: str | Model | None,
    value_model: str | Model | None,
    peft_config: PeftConfig | None,
) -> Roles:
    """Load the models that are given by name, and the policy's tokenizer if none is given.

    A policy that is the name of an adapter becomes two adapters, as in recipes/ppo.py: a trainable copy, and the frozen
    one as the reference.

    Raises:
        InputError: if a name stands for no such model, the pad token is eos, or `peft_config` meets a PeftModel.
    """
    revision, model_args, trust_remote_code = _loading(args.model_init_kwargs or {})
    source = resolve(model, "model", revision, trust_remote_code=trust_remote_code) if isinstance(model, str) else None
    if tokenizer is None:
        tokenizer = load_tokenizer(source or _source_of(model))
    if source is not None:
        model_args.use_peft = source.adapter is not None
        model = load_policy(source, model_args, tokenizer)
        if source.adapter is not None and ref_model is None and args.ref_adapter_name is None:
            args.ref_adapter_name = REFERENCE
    assert not isinstance(model, str)
    need_causal(model.get_base_model() if isinstance(model, PeftModel) else model, "model")
    check_pad_token(tokenizer)
    tokenizer.is_encoder_decoder = model.config.is_encoder_decoder  # for encode_prompt
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise InputError("peft_config: the model is a PeftModel already. Leave it out, or merge_and_unload first.")
        model = new_adapter(model, peft_config)
    refuse_prompt_learning(model, "model")
    fuse(model)
    if ref_model is None and isinstance(model, PeftModel):
        for why in filter(None, map(why_alone, model.peft_config.values())):
            raise InputError(f"model: the reference is the policy's base, and the policy is an adapter: {why}")
    if ref_model is None and not isinstance(model, PeftModel):
        ref_model = copy.deepcopy(model).eval().requires_grad_(False)
    if isinstance(ref_model, str):
        found = resolve(ref_model, "ref_model", trust_remote_code=trust_remote_code)
        ref_model = load_causal_lm(found, model_args, tokenizer, trainable=False)
    if isinstance(value_model, str):
        found = resolve(value_model, "value_model", trust_remote_code=trust_remote_code)
        model_args.use_peft = found.adapter is not None
        value_model = load_reward_model(found, model_args, tokenizer)
    return Roles(model, tokenizer, ref_model, value_model, model_args, trust_remote_code)


def _loading(options: dict[str, Any] | str) -> tuple[str | None, ModelConfig, bool]:
    """The policy's revision, how to load models, and whether to trust their code, from `model_init_kwargs`."""
    if not isinstance(options, dict):
        raise InputError(f"model_init_kwargs: needs a dict, like {{'dtype': 'bfloat16'}}; found {options!r}.")
    unknown = set(options) - {"revision", "dtype", "attn_implementation", "trust_remote_code"}
    if unknown:
        raise InputError(
            f"model_init_kwargs: {', '.join(sorted(unknown))}: here are possible revision, dtype, attn_implementation "
            "and trust_remote_code. Load the model yourself for others, and pass it."
        )
    model_args = ModelConfig(
        dtype=str(options.get("dtype", "float32")).removeprefix("torch."),
        attn_implementation=options.get("attn_implementation"),
    )
    return options.get("revision"), model_args, options.get("trust_remote_code", False)


def _source_of(model: Model) -> Source:
    name = get_config_model_id(model.config)
    if not name:
        raise InputError("processing_class: the model has no name to load a tokenizer by. Pass the tokenizer.")
    return resolve(name, "processing_class", weights=False)


def tokenized(
    dataset: object, name: str, tokenizer: PreTrainedTokenizerBase, response_length: int, context: int | None
) -> Dataset:
    """A dataset of prompts with their tokens. The column `prompt`, text or messages, is tokenized as in recipes/ppo.py.

    Raises:
        InputError: if it is no `datasets.Dataset`, has no prompts, or a prompt leaves no room for a response.
    """
    if isinstance(dataset, IterableDataset):
        raise InputError(f"{name}: PPO draws rows by number, and an IterableDataset has none. Load it whole.")
    if dataset is None or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise InputError(f"{name}: PPO needs at least one prompt.")
    if not isinstance(dataset, Dataset):
        raise InputError(f"{name}: needs a datasets.Dataset; found {type(dataset).__name__}. Pass one split of it.")
    if "input_ids" in dataset.column_names:
        return dataset.with_format(None)
    try:
        return prompt_rows(dataset.with_format(None), name, tokenizer, response_length, context)
    except InputError as error:
        raise InputError(str(error).replace(f"--dataset_name {name}", name)) from error
