"""A new model of any architecture, with random weights."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.errors import InputError
from rlhf.models.checks import made_whole
from rlhf.models.sources import first_position
from rlhf.pretraining.config import NewModelConfig, PretrainingConfig, check_objective
from rlhf.pretraining.electra import ReplacedTokenModel
from rlhf.pretraining.tokenization import boundary

# names of the width of the feed-forward layer and of the dropouts in configs of different architectures
WIDTHS = ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim")
DROPOUTS = (
    "dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "embd_pdrop", "resid_pdrop", "attn_pdrop", "dropout_rate",
)  # fmt: skip


def new_config(
    model_args: NewModelConfig, args: PretrainingConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """The config of the new model. Sizes have their common names, which the architecture's config maps to its own.

    Raises:
        InputError: if the architecture refuses a size or a setting of --config_overrides.
    """
    default = check_objective(args, model_args)
    width = model_args.intermediate_size or 4 * model_args.hidden_size
    heads, positions = model_args.num_attention_heads, model_args.max_position_embeddings or args.block_size
    positions += args.objective == "span"  # sentinels in place of single tokens, and eos
    positions += first_position(model_args.model_type, tokenizer.pad_token_id)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": model_args.hidden_size,
        "num_hidden_layers": model_args.num_hidden_layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": model_args.tie_word_embeddings,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": boundary(tokenizer) if args.objective == "causal" else tokenizer.eos_token_id,
        **{name: width for name in WIDTHS if hasattr(default, name)},
        **{name: model_args.dropout for name in DROPOUTS if hasattr(default, name)},
    }
    more = {"num_key_value_heads": heads, "decoder_attention_heads": heads, "head_dim": model_args.hidden_size // heads,
            "decoder_layers": model_args.num_hidden_layers}  # fmt: skip
    settings |= {
        name: value for name, value in more.items() if name in vars(default)
    }  # in some configs they are properties
    if hasattr(default, "embedding_size"):
        settings["embedding_size"] = model_args.hidden_size
    if args.objective == "causal" and hasattr(default, "is_decoder"):
        settings["is_decoder"] = True  # else BERT and its relatives attend to the token that they predict
    if args.objective == "span":
        settings["decoder_start_token_id"] = tokenizer.pad_token_id
        settings["num_decoder_layers"] = model_args.num_hidden_layers
        if hasattr(default, "d_kv"):
            settings["d_kv"] = model_args.hidden_size // heads
    if model_args.attn_implementation:
        settings["attn_implementation"] = model_args.attn_implementation
    try:
        config = AutoConfig.for_model(model_args.model_type, **settings)
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"--model_type {model_args.model_type}: can't be made with these sizes ({error}). Change them."
        ) from error
    if model_args.config_overrides:
        try:
            config.update_from_string(model_args.config_overrides)
        except (ValueError, TypeError) as error:
            raise InputError(f"--config_overrides {model_args.config_overrides}: {error}.") from error
    return config


@made_whole()
def new_model(config: PreTrainedConfig, args: PretrainingConfig) -> PreTrainedModel:
    """A model with random float32 weights and the head of the objective.

    Raises:
        InputError: if the architecture refuses these sizes.
    """
    torch.manual_seed(args.seed)
    masked = AutoModelForPreTraining if args.next_sentence_prediction else AutoModelForMaskedLM
    kinds = {"causal": AutoModelForCausalLM, "span": AutoModelForSeq2SeqLM, "masked": masked}
    try:
        if args.objective == "replaced":
            return ReplacedTokenModel(config, args.generator_hidden_size, args.disc_weight)
        return kinds[args.objective].from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise InputError(
            f"--model_type {config.model_type}: can't be made with these sizes ({error}). Change them, or set what "
            "it asks for with --config_overrides."
        ) from error
