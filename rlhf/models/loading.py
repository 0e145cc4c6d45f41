"""Base models, tokenizers, adapters and heads.

Wherever a recipe takes a model it takes a Hub id, a local folder, the word `starter`, or the adapter of any of them (a
folder or a repo); an adapter's base is found from its `adapter_config.json`.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.reward_trainer import suppress_seqcls_warning

from rlhf.data.datasets import looks_local
from rlhf.data.encoding import control_ids, encode_messages
from rlhf.errors import InputError
from rlhf.models.attention import group_attention
from rlhf.models.lstm import LSTMConfig  # noqa: F401 (importing it makes saved LSTMs loadable)
from rlhf.starter.model import STARTER, starter_model

# Tokens that model families keep for padding or never use, in order of preference.
PAD_CANDIDATES = (
    "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<unk>", "[UNK]",
    "<|padding|>", "<|fim_pad|>", "<|vision_pad|>", "<|image_pad|>", "<|endoftext|>", "<|endofprompt|>",
    "<empty_output>",
)  # fmt: skip
# their positions begin behind that of the pad token
ROBERTA = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod", "esm",
    "ibert", "luke", "mpnet",
)  # fmt: skip
# For base models without a chat template: plain words, so that no token has to be learned from nothing.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class Source(NamedTuple):
    """Where a model comes from."""

    name: str  # as the user gave it
    base: str  # what `from_pretrained` of a full model takes
    adapter: str | None  # what `PeftModel.from_pretrained` takes, or None for a full model
    revision: str | None  # of the adapter if there is one, else of the base
    peft_config: PeftConfig | None


def resolve(name: str | None, flag: str = "--model_name_or_path", revision: str | None = None) -> Source:
    """Find out what a model name stands for, without loading weights.

    Raises:
        InputError: if there is no such folder or repo, a Hub id can't be reached, or an adapter's base is missing.
    """
    if name is None or name == STARTER:
        return Source(STARTER, starter_model(), None, None, None)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            return _resolve_adapter(name, str(path), flag, None)
        if (path / "config.json").exists():
            return Source(name, str(path), None, None, None)
        raise InputError(f"{flag} {name}: neither config.json nor adapter_config.json in this folder. Is it a model?")
    if path.exists() or looks_local(name):
        raise InputError(f"{flag} {name}: no such model folder. Train it first or check the path.")
    revision = None if revision == "main" else revision
    if _hub_file(name, "adapter_config.json", flag, revision):
        return _resolve_adapter(name, name, flag, revision)
    if not _hub_file(name, "config.json", flag, revision):
        raise InputError(f"{flag} {name}: this Hub repo has neither config.json nor adapter_config.json.")
    return Source(name, name, None, revision, None)


def _hub_file(repo: str, file: str, flag: str, revision: str | None) -> bool:
    cached = try_to_load_from_cache(repo, file, revision=revision)
    if isinstance(cached, str):
        return True
    in_cache = any(
        isinstance(try_to_load_from_cache(repo, name, revision=revision), str)
        for name in ("config.json", "adapter_config.json")
    )
    try:
        hf_hub_download(repo, file, revision=revision)
        return True
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if in_cache:  # the repo was downloaded before, and without this file
            return False
        raise InputError(
            f"{flag} {repo}: not a local folder, and the Hub can't be reached to look for it there. Go online, "
            "download it before, or give a local folder or 'starter'."
        ) from error
    except EntryNotFoundError:
        return False
    except (HfHubHTTPError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = "it doesn't exist or needs a token (hf auth login)" if status in (401, 403, 404) else str(error)[:150]
        raise InputError(f"{flag} {repo}: no such local folder, and the Hub says no: {why}.") from error
    except OSError as error:
        raise InputError(f"{flag} {repo}: no such local folder, and the Hub can't be reached ({error}).") from error


def _resolve_adapter(name: str, adapter: str, flag: str, revision: str | None) -> Source:
    config = PeftConfig.from_pretrained(adapter, revision=revision)
    base = config.base_model_name_or_path
    if not base:
        raise InputError(f"{flag} {name}: adapter_config.json names no base model (base_model_name_or_path). Add it.")
    if Path(base).name.startswith("starter-") and not Path(base).exists():
        base = starter_model()  # the cache was cleared or is elsewhere: the starter can be made again
    try:
        source = resolve(base, flag)
    except InputError as error:
        raise InputError(f"{flag} {name}: the adapter's base model is missing. {error}") from error
    if source.adapter is not None:
        raise InputError(f"{flag} {name}: its base {base!r} is itself an adapter. Merge that one into its base first.")
    return Source(name, source.base, adapter, revision, config)


def base_revision(source: Source) -> str | None:
    """The revision of the base: the one asked for, or the one that an adapter's config names."""
    return source.revision if source.peft_config is None else source.peft_config.revision


def refuse_single_model(model_args: ModelConfig) -> None:
    """Refuse the flags for one model where --models names them all, as they would reach none.

    Raises:
        InputError: if --model_name_or_path or --model_revision is given.
    """
    if model_args.model_name_or_path is not None:
        raise InputError(f"--model_name_or_path {model_args.model_name_or_path}: models are given with --models here.")
    if model_args.model_revision not in (None, "main"):
        raise InputError(
            f"--model_revision {model_args.model_revision}: would reach none of --models. Download that revision (hf "
            "download <id> --revision <revision> --local-dir <folder>) and give its folder."
        )


def context_length(source: Source, trust_remote_code: bool = False) -> int | None:
    """How many tokens the base takes at once, or None where its config sets no limit."""
    config = AutoConfig.from_pretrained(
        source.base, revision=base_revision(source), trust_remote_code=trust_remote_code
    )
    return usable_context(config)


def first_position(model_type: str, pad_token_id: int | None) -> int:
    """Where a model's positions begin: for RoBERTa's kind behind that of the pad token, for MPNet always at 2."""
    return max(pad_token_id or 0, 1) + 1 if model_type in ROBERTA else 0


def usable_context(config: PreTrainedConfig) -> int | None:
    """How many tokens a model takes at once, or None where its config sets no limit."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return positions and positions - first_position(config.model_type, config.pad_token_id)


def load_tokenizer(
    source: Source,
    *,
    eos_token: str | None = None,
    pad_token: str | None = None,
    chat_template_path: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token that differs from eos and with a chat template.

    A tokenizer saved with an adapter is preferred to the base's. Where pad is missing or equals eos, an unused token of
    the vocabulary takes its place: were they equal, every end of a reply would be masked as padding and the model would
    never learn to stop.

    Args:
        chat_template_path: a .jinja file, or a model whose template is taken.

    Raises:
        InputError: if `pad_token` is eos, one of the two isn't in the vocabulary or can't be found, or the chat
            template ends replies with another token than `eos_token`.
    """
    folder = source.adapter if source.adapter and _has_tokenizer(source.adapter, source.revision) else source.base
    revision = source.revision if folder == source.adapter else base_revision(source)
    tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise InputError(f"--eos_token {eos_token!r}: not in the vocabulary of {source.name}.")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token is None:
        raise InputError(f"The tokenizer of {source.name} has no eos_token, so replies could never end. Set one.")
    set_pad_token(tokenizer, source, pad_token)
    if chat_template_path and chat_template_path.endswith((".jinja", ".j2")):
        if not Path(chat_template_path).is_file():
            raise InputError(f"--chat_template_path {chat_template_path}: no such file.")
        tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
    elif chat_template_path:
        other = resolve(chat_template_path, "--chat_template_path")
        tokenizer.chat_template = AutoTokenizer.from_pretrained(other.base).chat_template
    if tokenizer.chat_template is None:
        print(
            f"{source.name} has no chat template; using 'User: ... Assistant: ...' (change it: --chat_template_path)."
        )
        tokenizer.chat_template = PLAIN_TEMPLATE
    _end_turns_with_eos(tokenizer, source)
    if eos_token not in (None, tokenizer.eos_token):
        raise InputError(
            f"--eos_token {eos_token!r}: the chat template ends a reply with {tokenizer.eos_token!r}. Leave it off, or "
            "give a template that agrees with --chat_template_path."
        )
    return tokenizer


def _end_turns_with_eos(tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    """Make the control token that ends an assistant's turn the eos token, so that sampling stops where training ended.

    Base models often carry a chat template whose turns end with another token (<|im_end|>) than their eos.
    """
    last = encode_messages(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[-1]
    if last != tokenizer.eos_token_id and last in control_ids(tokenizer) and last != tokenizer.pad_token_id:
        token = tokenizer.convert_ids_to_tokens(last)
        print(
            f"{source.name}: its chat template ends a reply with {token!r}; eos was {tokenizer.eos_token!r}, now that."
        )
        tokenizer.eos_token = token


def _has_tokenizer(adapter: str, revision: str | None) -> bool:
    if Path(adapter).is_dir():
        return (Path(adapter) / "tokenizer_config.json").exists()
    return _hub_file(adapter, "tokenizer_config.json", "--model_name_or_path", revision)


def set_pad_token(tokenizer: PreTrainedTokenizerBase, source: Source, pad_token: str | None) -> None:
    """Give the tokenizer a pad token that differs from eos; see `load_tokenizer`."""
    vocabulary = tokenizer.get_vocab()
    if pad_token is not None:
        if pad_token not in vocabulary:
            raise InputError(f"--pad_token {pad_token!r}: not in the vocabulary of {source.name}.")
        tokenizer.pad_token = pad_token
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise InputError(
                f"--pad_token {pad_token!r} is also the eos token of {source.name}: the end of replies would be masked "
                "as padding. Name another token."
            )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        taken = {tokenizer.eos_token, tokenizer.bos_token}
        unused = [token for token in PAD_CANDIDATES if token in vocabulary and token not in taken]
        if not unused:
            raise InputError(
                f"The pad token of {source.name} is {tokenizer.pad_token!r} and its eos token {tokenizer.eos_token!r}; "
                "they must differ, and no unused token was found. Name one with --pad_token (sft.py, reward.py, "
                "finetune.py), or set pad_token in the tokenizer_config.json of a local copy."
            )
        print(f"{source.name}: pad token was {tokenizer.pad_token!r}, now {unused[0]!r}, so that it differs from eos.")
        tokenizer.pad_token = unused[0]


def _load_base(source: Source, model_args: ModelConfig, auto_class: Any, trust_remote_code: bool, **kwargs):
    dtype = model_args.dtype if model_args.dtype in ("auto", None) else getattr(torch, model_args.dtype)
    model = auto_class.from_pretrained(
        source.base,
        revision=base_revision(source),
        dtype=dtype,
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=trust_remote_code,
        quantization_config=get_quantization_config(model_args),
        use_safetensors=True,
        **kwargs,
    )
    if model_args.attn_implementation is None:
        group_attention(model)
    return model


def load_causal_lm(
    source: Source,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trainable: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """A language model to train or to sample from.

    An adapter's weights go on being trained in that adapter. A full model gets a new LoRA adapter with
    `model_args.use_peft`, and is trained whole without.
    """
    if source.peft_config is not None and source.peft_config.task_type == TaskType.SEQ_CLS:
        raise InputError(f"--model_name_or_path {source.name}: is a reward adapter; a language model is needed here.")
    if trainable:
        _refuse_full_training_of_an_adapter(source, model_args)
    model = _load_base(source, model_args, AutoModelForCausalLM, trust_remote_code)
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, *stops})
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    # with a frozen head, torch multiplies a slice of the hidden states row by row and copies the head for each: a
    # forward of 64 x 50 tokens took 5.3 s on 2 cores, and 1.2 s with this
    model.get_output_embeddings().register_forward_pre_hook(lambda _head, inputs: (inputs[0].contiguous(),))
    if source.adapter is not None:
        dtype = model.dtype
        model = PeftModel.from_pretrained(model, source.adapter, revision=source.revision, is_trainable=trainable)
        if not trainable:  # nothing is learned, so the adapter needs no more precision than its base: 1.5 times as fast
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(dtype)
            model = place(model)
        return model
    if not trainable:
        return place(model)
    if model_args.use_peft:
        return get_peft_model(model, _lora_config(model_args, TaskType.CAUSAL_LM))
    return model


def place(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Move a model that no Trainer will move to this process's accelerator. Quantized ones are there already."""
    if not torch.accelerator.is_available() or getattr(model, "is_quantized", False):
        return model
    kind = torch.accelerator.current_accelerator().type
    return model.to(torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))))


def _refuse_full_training_of_an_adapter(source: Source, model_args: ModelConfig) -> None:
    if source.adapter is not None and not model_args.use_peft:
        raise InputError(
            f"--use_peft false: {source.name} is an adapter, and full fine-tuning needs a full model. Give its base, "
            "or merge it (merge_and_unload), or leave --use_peft true to go on training the adapter."
        )


def _lora_config(model_args: ModelConfig, task_type: TaskType) -> LoraConfig:
    config = get_peft_config(model_args)
    config.task_type = task_type
    return config


def load_reward_model(
    source: Source,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trainable: bool = True,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """A sequence classifier with one output, the score.

    From a language model's adapter a new adapter of task type SEQ_CLS is made with the same LoRA weights, whose score
    head is trained and saved with it: under PEFT's default task type, CAUSAL_LM, the head would be neither. A new head
    is drawn with standard deviation 1/sqrt(d + 1), as in Stiennon et al. (https://arxiv.org/abs/2009.01325) and
    https://github.com/vwxyzjn/summarize_from_feedback_details.
    """
    if trainable:
        _refuse_full_training_of_an_adapter(source, model_args)
    with suppress_seqcls_warning():  # that the head is new: it is drawn, or loaded with the adapter, below
        model = _load_base(source, model_args, AutoModelForSequenceClassification, trust_remote_code, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    already_scores = source.peft_config is not None and source.peft_config.task_type == TaskType.SEQ_CLS
    if (
        source.adapter is None
        and model.config.architectures
        and "SequenceClassification" in model.config.architectures[0]
    ):
        already_scores = True
    if not already_scores:
        head = model.score
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
        head.weight.data.copy_(weight.to(head.weight.device, head.weight.dtype))
    if source.adapter is None:
        if trainable and model_args.use_peft:
            return get_peft_model(model, _lora_config(model_args, TaskType.SEQ_CLS))
        return model
    if already_scores:
        return PeftModel.from_pretrained(model, source.adapter, revision=source.revision, is_trainable=trainable)
    config = PeftConfig.from_pretrained(source.adapter, revision=source.revision)
    config.task_type, config.inference_mode = TaskType.SEQ_CLS, False
    head = model.score.weight.detach().clone()
    model = get_peft_model(model, config)
    weights = load_peft_weights(source.adapter, device="cpu", revision=source.revision)
    weights["base_model.model.score.weight"] = head  # which a language model's adapter doesn't have
    set_peft_model_state_dict(model, weights)
    return model


# Names of the adapters beside the policy's, over one base in memory.
REFERENCE, REWARD, VALUE = "reference", "reward", "value"


def resolve_start(model_name_or_path: str | None, source: Source, revision: str | None = None) -> Source:
    """What PPO's policy starts from: an adapter that differs from the SFT model `source`, or else the SFT model itself.

    Args:
        revision: of `model_name_or_path`.

    Raises:
        InputError: if the adapter's base is not that of the SFT model, or the revision would reach nothing.
    """
    start = resolve(model_name_or_path, revision=revision)
    if start.adapter is None or start.adapter == source.adapter:
        if revision not in (None, "main"):
            raise InputError(
                f"--model_revision {revision}: belongs to --model_name_or_path, and the policy starts from "
                f"--sft_model_path {source.name} instead. Leave --sft_model_path out."
            )
        return source
    if start.base != source.base:
        raise InputError(
            f"--model_name_or_path {start.name}: the policy goes on from this adapter, so --sft_model_path "
            f"{source.name} has to be its base ({start.base}), or another adapter of that."
        )
    return start


def load_policy(
    source: Source,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    start: Source | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """What PPO trains. From an adapter: a trainable copy of it, and the adapter itself, frozen, named `reference`.

    Args:
        start: the adapter that the trainable copy is made of, if not `source`'s.
    """
    policy = load_causal_lm(start or source, model_args, tokenizer, trust_remote_code=trust_remote_code)
    if source.adapter is not None:
        policy.load_adapter(source.adapter, REFERENCE, revision=source.revision, is_trainable=False)
    return policy


@contextmanager
def active_adapter(model: PreTrainedModel | PeftModel, name: str | None) -> Iterator[None]:
    """Inside the block the model runs with adapter `name`, or with none.

    Unlike `PeftModel.set_adapter`, this leaves `requires_grad` alone: there, choosing one adapter freezes the others,
    and a later backward through them silently gives no gradient.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [name] if name else [], name is None
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def recompute_with_same_adapter(model: PeftModel) -> Callable[[], tuple[Any, Any]]:
    """`context_fn` for torch's activation checkpointing: recompute a layer with the adapter that it ran with.

    Recomputation happens in the backward pass, when another adapter may be active.
    """

    def context() -> tuple[Any, Any]:
        layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
        name = layer.active_adapters[0] if layer.active_adapters and not layer.disable_adapters else None
        return nullcontext(), active_adapter(model, name)

    return context


def add_frozen_adapter(policy: PeftModel, source: Source, name: str) -> torch.nn.Linear:
    """Put a reward adapter beside the policy's own, over the same base.

    Returns:
        its score head, float32, frozen, from hidden states (…, d) to a score (…, 1).
    """
    assert source.peft_config is not None
    weights = load_peft_weights(source.adapter, device="cpu", revision=source.revision)
    heads = [key for key in weights if key.endswith("score.weight")]
    head = torch.nn.Linear(weights[heads[0]].shape[1], 1, bias=False, device=policy.device, dtype=torch.float32)
    head.weight.data.copy_(weights.pop(heads[0]))
    config = copy.deepcopy(source.peft_config)
    # its layers are those of the trunk, which both kinds of model share; the head is kept beside it
    config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, True
    _add_adapter(policy, name, config, weights)
    for parameter_name, parameter in policy.named_parameters():
        if f".{name}." in parameter_name:  # never trained, so it needs no more precision than its base
            parameter.data = parameter.data.to(policy.dtype)
    return head.requires_grad_(False)


def add_value_adapter(policy: PeftModel, active: str) -> None:
    """Add a trainable adapter `value`: a copy of the reward adapter if that is there, else of the policy's."""
    origin = REWARD if REWARD in policy.peft_config else active
    config = copy.deepcopy(policy.peft_config[origin])
    config.inference_mode, config.modules_to_save = False, None
    weights = get_peft_model_state_dict(policy, adapter_name=origin)
    _add_adapter(policy, VALUE, config, {key: value.float() for key, value in weights.items()})
    for name, parameter in policy.named_parameters():
        if f".{VALUE}." in name:
            parameter.requires_grad_(True)


def _add_adapter(policy: PeftModel, name: str, config: PeftConfig, weights: dict[str, torch.Tensor]) -> None:
    trainable = {parameter_name for parameter_name, p in policy.named_parameters() if p.requires_grad}
    policy.add_adapter(name, config)
    found = set_peft_model_state_dict(policy, weights, adapter_name=name)
    if found.unexpected_keys:
        raise InputError(f"The {name} adapter has weights that its base lacks: {found.unexpected_keys[:2]}.")
    for parameter_name, parameter in policy.named_parameters():
        parameter.requires_grad_(parameter_name in trainable)


def trunk(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformer without its head; its adapters stay in it."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    return whole.base_model
