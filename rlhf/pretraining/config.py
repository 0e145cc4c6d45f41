"""The settings of pretraining, and the checks that refuse impossible ones.

| objective  | the model predicts                                         | source                                    |
|------------|------------------------------------------------------------|-------------------------------------------|
| `causal`   | the next token                                             | GPT-1; GPT-2                              |
| `masked`   | masked tokens, and whether a second text follows the first | BERT, https://arxiv.org/abs/1810.04805    |
| `replaced` | which tokens a small generator replaced                    | ELECTRA, https://arxiv.org/abs/2003.10555 |
| `span`     | missing spans, one after the other                         | T5, https://arxiv.org/abs/1910.10683      |
"""

import difflib
import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from rlhf.errors import InputError
from rlhf.models.lstm import LSTMConfig  # noqa: F401 (importing it makes --model_type lstm known)
from rlhf.pretraining.collators import count_spans
from rlhf.pretraining.electra import DETECTORS
from rlhf.pretraining.tokenization import sentinel
from rlhf.run.ranges import NonNegativeFloat, PositiveInt, Range, check_ranges

OBJECTIVES = ("causal", "masked", "replaced", "span")
# causal heads whose bodies attend to later tokens: they were trained by permutation or translation
LOOK_AHEAD = ("xlm", "xlnet", "flaubert")


@dataclass
class NewModelConfig:
    """The new model. Flags have the names of transformers' run_clm.py and configs."""

    model_type: str = field(
        default="llama", metadata={"help": "Architecture: gpt2, llama, bert, roformer, electra, t5, ..."}
    )
    tokenizer_name: str = field(
        default="starter", metadata={"help": "Folder of recipes/tokenizer.py, a Hub id, or 'starter'."}
    )
    hidden_size: PositiveInt = field(default=256, metadata={"help": "Width of the hidden states."})
    num_hidden_layers: PositiveInt = field(default=6, metadata={"help": "Layers (of encoder and decoder each)."})
    num_attention_heads: PositiveInt = field(default=4, metadata={"help": "Attention heads; must divide hidden_size."})
    intermediate_size: PositiveInt | None = field(
        default=None, metadata={"help": "Width of the feed-forward layers. Default: 4 times hidden_size."}
    )
    max_position_embeddings: PositiveInt | None = field(
        default=None, metadata={"help": "Longest context in tokens. Default: block_size."}
    )
    tie_word_embeddings: bool = field(default=True, metadata={"help": "Share the input and output embeddings."})
    dropout: Annotated[float, Range(low=0, below=1)] = field(
        default=0.0, metadata={"help": "Probability of every dropout of the architecture."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, ...; eager is faster on a CPU. Default: transformers' choice."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Other settings of the config: rope_theta=20000,hidden_act=gelu"}
    )


@dataclass
class PretrainingConfig(TrainingArguments):
    """TrainingArguments and the objective."""

    objective: Literal["causal", "masked", "replaced", "span"] = field(
        default="causal", metadata={"help": "What the model learns."}
    )
    block_size: Annotated[int, Range(low=8)] = field(default=256, metadata={"help": "Tokens in a row of packed text."})
    mlm_probability: Annotated[float, Range(above=0, below=1)] = field(
        default=0.15, metadata={"help": "Share of tokens that are masked or removed."}
    )
    next_sentence_prediction: bool = field(
        default=False, metadata={"help": "masked: also learn whether the second of two texts follows the first."}
    )
    mean_noise_span_length: Annotated[float, Range(low=1)] = field(
        default=3.0, metadata={"help": "span: mean length of a missing span."}
    )
    generator_hidden_size: Annotated[float, Range(above=0, high=1)] = field(
        default=0.25, metadata={"help": "replaced: width of the generator, as a share of the discriminator's."}
    )
    disc_weight: NonNegativeFloat = field(
        default=50.0, metadata={"help": "replaced: weight of the discriminator's loss."}
    )
    use_muon: bool = field(
        default=False, metadata={"help": "Train the layers' matrices with Muon, the rest with AdamW."}
    )
    include_num_input_tokens_seen: bool = field(default=True, metadata={"help": "Count the tokens of the input."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep False: the collators need columns that the model doesn't."}
    )


def check_objective(args: PretrainingConfig, model_args: NewModelConfig) -> PreTrainedConfig:
    """The architecture's default config, if the architecture can learn the objective.

    Raises:
        InputError: if objective or architecture are unknown or do not fit each other.
    """
    kind, objective = model_args.model_type, args.objective
    if objective not in OBJECTIVES:
        raise InputError(f"--objective {objective}: unknown. Give one of {', '.join(OBJECTIVES)}.")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, CONFIG_MAPPING, n=1)
        raise InputError(f"--model_type {kind}: unknown." + (f" Did you mean {near[0]}?" if near else ""))
    if args.next_sentence_prediction and objective != "masked":
        raise InputError(f"--next_sentence_prediction: needs --objective masked; found {objective}.")
    config = AutoConfig.for_model(kind)
    able, example = {
        "causal": (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in LOOK_AHEAD, "gpt2 or llama"),
        "masked": (type(config) in MODEL_FOR_MASKED_LM_MAPPING, "bert"),
        "replaced": (kind in DETECTORS, "electra or roformer"),
        "span": (type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, "t5"),
    }[objective]
    if not able:
        raise InputError(f"--objective {objective}: {kind} has no head for it. Give --model_type {example}.")
    both = (MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING, MODEL_FOR_PRETRAINING_MAPPING)
    if args.next_sentence_prediction and not all(type(config) in mapping for mapping in both):
        raise InputError(f"--next_sentence_prediction: {kind} has no head for it. Give --model_type bert.")
    return config


def check_pretraining(args: PretrainingConfig, model_args: NewModelConfig) -> None:
    """Refuse impossible numbers, and objectives that the architecture can't learn.

    Raises:
        InputError: naming the flag.
    """
    check_ranges(args, model_args)
    check_objective(args, model_args)
    if model_args.hidden_size % model_args.num_attention_heads:
        raise InputError(
            f"--num_attention_heads {model_args.num_attention_heads}: must divide --hidden_size "
            f"{model_args.hidden_size}."
        )
    positions = model_args.max_position_embeddings
    if positions is not None and positions < args.block_size:
        raise InputError(f"--max_position_embeddings {positions}: less than --block_size {args.block_size}.")
    sharded = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
    if args.use_muon and (args.fsdp or args.deepspeed or sharded):
        raise InputError("--use_muon: needs whole matrices, which FSDP and DeepSpeed shard. Give --use_muon false.")


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, name: str, args: PretrainingConfig) -> None:
    """Refuse a tokenizer without the special tokens that the objective needs.

    Raises:
        InputError: naming the tokens.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"--tokenizer_name {name}: has no fast version (tokenizer.json), which pretraining needs. Give another."
        )
    vocabulary = tokenizer.get_vocab()
    kinds = ("mask", "cls", "sep", "pad") if args.objective in ("masked", "replaced") else ("eos", "pad")
    needed = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") is not None for kind in kinds}
    if args.objective == "span":
        _, spans = count_spans(args.block_size, args.mlm_probability, args.mean_noise_span_length)
        needed[sentinel(spans - 1)] = sentinel(spans - 1) in vocabulary
    missing = [token for token, there in needed.items() if not there]
    if missing:
        raise InputError(
            f"--tokenizer_name {name}: has no {', '.join(missing)}, which --objective {args.objective} needs. Give a "
            "tokenizer made by recipes/tokenizer.py (--extra_ids sets the number of sentinels)."
        )
