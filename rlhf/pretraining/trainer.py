"""Pretraining from nothing: a model of any architecture from its config, packed text, and the four objectives.

| objective  | what is learned                                             | source                                    |
|------------|-------------------------------------------------------------|-------------------------------------------|
| `causal`   | the next token                                              | GPT-1; GPT-2                              |
| `masked`   | hidden tokens, and whether a second text follows the first  | BERT, https://arxiv.org/abs/1810.04805    |
| `replaced` | which tokens a small generator put in the original's place  | ELECTRA, https://arxiv.org/abs/2003.10555 |
| `span`     | missing spans, written out one behind the other             | T5, https://arxiv.org/abs/1910.10683      |
"""

import ctypes
import difflib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from rlhf.errors import InputError
from rlhf.models.lstm import LSTMConfig  # noqa: F401 (importing it makes --model_type lstm known)
from rlhf.models.sources import first_position
from rlhf.pretraining.collators import (
    DataCollatorForMaskedTokens,
    DataCollatorForSpanCorruption,
    SeededCollator,
    count_spans,
)
from rlhf.pretraining.electra import DETECTORS, ReplacedTokenModel
from rlhf.pretraining.optimizers import MuonWithAdamW, layer_matrices
from rlhf.pretraining.tokenization import AT_ONCE, boundary, encode_texts, sentinel

OBJECTIVES = ("causal", "masked", "replaced", "span")
PAIR_SEED = 20  # of the sentence pairs: which ones follow each other never changes
# what families of configs call the width of the feed-forward layer, and their dropouts
WIDTHS = ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim")
DROPOUTS = (
    "dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "embd_pdrop", "resid_pdrop", "attn_pdrop", "dropout_rate",
)  # fmt: skip
# causal heads whose bodies look ahead: they were trained by permutations or translation
LOOK_AHEAD = ("xlm", "xlnet", "flaubert")


@dataclass
class NewModelConfig:
    """The model to make. Names are those of transformers' run_clm.py and of its configs."""

    model_type: str = field(
        default="llama", metadata={"help": "Architecture: gpt2, llama, bert, roformer, electra, t5, ..."}
    )
    tokenizer_name: str = field(
        default="starter", metadata={"help": "Folder of recipes/tokenizer.py, a Hub id, or 'starter'."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Width of the hidden states."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers (of encoder and decoder each)."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads; must divide hidden_size."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the feed-forward layers. Default: 4 times hidden_size."}
    )
    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "Longest context in tokens. Default: block_size."}
    )
    tie_word_embeddings: bool = field(default=True, metadata={"help": "Input embeddings are the output's, too."})
    dropout: float = field(default=0.0, metadata={"help": "Probability of all the architecture's dropouts."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, ...: eager is faster on a CPU. Default: transformers' choice."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Other settings of the config: rope_theta=20000,hidden_act=gelu"}
    )


@dataclass
class PretrainingConfig(TrainingArguments):
    """TrainingArguments and the objective."""

    objective: str = field(default="causal", metadata={"help": "causal, masked, replaced or span."})
    block_size: int = field(default=256, metadata={"help": "Tokens in a row of packed text."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens that is masked or left out."})
    next_sentence_prediction: bool = field(
        default=False, metadata={"help": "masked: also learn whether the second of two texts follows the first."}
    )
    mean_noise_span_length: float = field(default=3.0, metadata={"help": "span: mean length of a missing span."})
    generator_hidden_size: float = field(
        default=0.25, metadata={"help": "replaced: width of the generator, as a share of the discriminator's."}
    )
    disc_weight: float = field(default=50.0, metadata={"help": "replaced: weight of the discriminator's loss."})
    use_muon: bool = field(
        default=False, metadata={"help": "Train the layers' matrices with Muon, the rest with AdamW."}
    )
    include_num_input_tokens_seen: bool = field(default=True, metadata={"help": "Count the tokens of the input."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep False: the collators need columns that the model doesn't."}
    )


# ---------------------------------------------------------------------------------------------- what can't work


def check_objective(args: PretrainingConfig, model_args: NewModelConfig) -> PreTrainedConfig:
    """The architecture's default config, once it is clear that it can learn the objective.

    Raises:
        InputError: if there is no such objective or architecture, or the one can't do the other.
    """
    kind, objective = model_args.model_type, args.objective
    if objective not in OBJECTIVES:
        raise InputError(f"--objective {objective}: unknown. Give one of {', '.join(OBJECTIVES)}.")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, CONFIG_MAPPING, n=1)
        raise InputError(f"--model_type {kind}: unknown." + (f" Did you mean {near[0]}?" if near else ""))
    if args.next_sentence_prediction and objective != "masked":
        raise InputError(f"--next_sentence_prediction: goes with --objective masked, not with {objective}.")
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


def check_settings(args: PretrainingConfig, model_args: NewModelConfig) -> None:
    """Refuse numbers that can't work, and objectives that the architecture can't do.

    Raises:
        InputError: naming the flag.
    """
    check_objective(args, model_args)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(model_args, name) < 1:
            raise InputError(f"--{name} {getattr(model_args, name)}: must be at least 1.")
    if model_args.hidden_size % model_args.num_attention_heads:
        raise InputError(
            f"--num_attention_heads {model_args.num_attention_heads}: must divide --hidden_size "
            f"{model_args.hidden_size}."
        )
    if args.block_size < 8:
        raise InputError(f"--block_size {args.block_size}: must be at least 8.")
    positions = model_args.max_position_embeddings
    if positions is not None and positions < args.block_size:
        raise InputError(f"--max_position_embeddings {positions}: less than --block_size {args.block_size}.")
    for name, value, low, high in (
        ("mlm_probability", args.mlm_probability, 0.0, 1.0),
        ("generator_hidden_size", args.generator_hidden_size, 0.0, 1.0 + 1e-9),
        ("dropout", model_args.dropout, -1e-9, 1.0),
    ):
        if not low < value < high:
            raise InputError(f"--{name} {value}: must be a share between 0 and 1.")
    sharded = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
    if args.use_muon and (args.fsdp or args.deepspeed or sharded):
        raise InputError("--use_muon: needs whole matrices, which FSDP and DeepSpeed cut up. Give --use_muon false.")
    if args.mean_noise_span_length < 1:
        raise InputError(f"--mean_noise_span_length {args.mean_noise_span_length}: must be at least 1.")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str, args: PretrainingConfig) -> None:
    """Refuse a tokenizer without the special tokens that the objective needs.

    Raises:
        InputError: naming the tokens.
    """
    if not tokenizer.is_fast:
        raise InputError(f"--tokenizer_name {name}: has no fast version (tokenizer.json), which is needed here.")
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


# ---------------------------------------------------------------------------------------------- rows


def packed_rows(texts: list[str], tokenizer: PreTrainedTokenizerBase, args: PretrainingConfig, split: str) -> Dataset:
    """Rows of exactly `block_size` token ids: texts one behind the other, the end of each marked, cut into blocks.

    A text ends with the tokenizer's token between texts (`boundary`); in blocks for `masked` and `replaced` with sep,
    and those begin with cls and end with sep.
    What does not fill a last block is left out.

    Returns:
        rows of `input_ids`, and for masking `special_tokens_mask`.

    Raises:
        InputError: if there are too few tokens for one block.
    """
    framed = args.objective in ("masked", "replaced")
    end = tokenizer.sep_token_id if framed else boundary(tokenizer)
    parts = (texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE))
    lists = (ids for part in parts for ids in encode_texts(tokenizer, part))
    stream = np.fromiter((id_ for ids in lists for id_ in (*ids, end)), dtype=np.int64)
    size = args.block_size - 2 * framed
    blocks = stream[: len(stream) // size * size].reshape(-1, size)
    if not len(blocks):
        raise InputError(
            f"--block_size {args.block_size}: the {split} split has only {len(stream)} tokens. Give more text or a "
            "smaller block."
        )
    if not framed:
        return Dataset.from_dict({"input_ids": list(blocks)})
    edge = np.ones((len(blocks), 1), dtype=np.int64)
    blocks = np.hstack([edge * tokenizer.cls_token_id, blocks, edge * tokenizer.sep_token_id])
    special = np.isin(blocks, tokenizer.all_special_ids).astype(np.int64)
    return Dataset.from_dict({"input_ids": list(blocks), "special_tokens_mask": list(special)})


def sentence_pair_rows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, args: PretrainingConfig, split: str
) -> Dataset:
    """Rows [CLS] first [SEP] second [SEP]; in half of them the second text comes from elsewhere (BERT, section 3.1).

    A text is taken line by line: lines that fill half a row are the first part; the second are those that follow, or
    lines of another text.

    Returns:
        rows of `input_ids`, `token_type_ids`, `special_tokens_mask`, `next_sentence_label` (0: follows, 1: does not).

    Raises:
        InputError: if fewer than two texts have two lines.
    """
    draw, cls, sep = np.random.default_rng(PAIR_SEED), tokenizer.cls_token_id, tokenizer.sep_token_id
    in_lines = [[line for line in text.split("\n") if line.strip()] for text in texts]
    documents = [encode_texts(tokenizer, lines) for lines in in_lines if len(lines) > 1]
    if len(documents) < 2:
        raise InputError(
            f"--next_sentence_prediction: needs texts of two lines or more; the {split} split has {len(documents)}."
        )
    room = args.block_size - 3
    rows: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "token_type_ids", "special_tokens_mask", "next_sentence_label")
    }
    for number, lines in enumerate(documents):
        start = 0
        while start < len(lines) - 1:
            first, middle = _fill(lines, start, room // 2, len(lines) - 1)
            second, end = _fill(lines, middle, room - len(first), len(lines))
            label = int(draw.random() < 0.5)
            if label:
                other = documents[(number + int(draw.integers(1, len(documents)))) % len(documents)]
                second, _ = _fill(other, int(draw.integers(len(other))), room - len(first), len(other))
                end = middle  # the lines that were not used are the next first part, as in BERT
            rows["input_ids"].append([cls, *first, sep, *second, sep])
            rows["token_type_ids"].append([0] * (len(first) + 2) + [1] * (len(second) + 1))
            rows["special_tokens_mask"].append([1, *[0] * len(first), 1, *[0] * len(second), 1])
            rows["next_sentence_label"].append(label)
            start = end
    return Dataset.from_dict(rows)


def _fill(lines: list[list[int]], start: int, room: int, stop: int) -> tuple[list[int], int]:
    """Tokens of the lines from `start` on, as many as fit into `room` and at least one line, cut; and the next line."""
    ids, end = list(lines[start]), start + 1
    while end < stop and len(ids) + len(lines[end]) <= room:
        ids += lines[end]
        end += 1
    return ids[:room], end


def pretraining_rows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, args: PretrainingConfig, split: str
) -> Dataset:
    """Rows for the objective: packed blocks, or sentence pairs for next-sentence prediction."""
    make = sentence_pair_rows if args.next_sentence_prediction else packed_rows
    return make(texts, tokenizer, args, split)


# ---------------------------------------------------------------------------------------------- model


def new_config(
    model_args: NewModelConfig, args: PretrainingConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """The config of the new model. Sizes go by their common names, whatever the architecture calls them.

    Raises:
        InputError: if the architecture has no such setting.
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
    settings |= {name: value for name, value in more.items() if name in vars(default)}  # some have it as a property
    if hasattr(default, "embedding_size"):
        settings["embedding_size"] = model_args.hidden_size
    if args.objective == "causal" and hasattr(default, "is_decoder"):
        settings["is_decoder"] = True  # else BERT and its relatives see the token that they are to predict
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
        raise InputError(f"--model_type {model_args.model_type}: can't be made of these sizes ({error}).") from error
    if model_args.config_overrides:
        try:
            config.update_from_string(model_args.config_overrides)
        except (ValueError, TypeError) as error:
            raise InputError(f"--config_overrides {model_args.config_overrides}: {error}.") from error
    return config


def new_model(config: PreTrainedConfig, args: PretrainingConfig) -> PreTrainedModel:
    """A model with random float32 weights and the head of the objective.

    Raises:
        InputError: if the architecture has demands of its own on its sizes, and these don't meet them.
    """
    torch.manual_seed(args.seed)
    masked = AutoModelForPreTraining if args.next_sentence_prediction else AutoModelForMaskedLM
    kinds = {"causal": AutoModelForCausalLM, "span": AutoModelForSeq2SeqLM, "masked": masked}
    try:
        if args.objective == "replaced":
            return ReplacedTokenModel(config, args.generator_hidden_size, args.disc_weight)
        return kinds[args.objective].from_config(config)
    except ValueError as error:
        raise InputError(
            f"--model_type {config.model_type}: can't be made of these sizes ({error}). Change them, or set what it "
            "asks for with --config_overrides."
        ) from error


# ---------------------------------------------------------------------------------------------- trainer


def pretraining_collator(tokenizer: PreTrainedTokenizerBase, args: PretrainingConfig) -> Any:
    """The collator that makes the objective's inputs and labels out of rows."""
    if args.objective == "causal":
        return DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if args.objective == "span":
        spans = DataCollatorForSpanCorruption(tokenizer, args.mlm_probability, args.mean_noise_span_length)
        return SeededCollator(spans, args.seed)
    # BERT: 80% [MASK], 10% another token (section 3.1). ELECTRA: 85% [MASK], the rest left (replace_with_mask_positions
    # in the reference's pretrain_helpers.py); with 100% neither half of a small pair learned anything in ten minutes
    shares = (0.85, 0.0) if args.objective == "replaced" else (0.8, 0.1)
    masks = DataCollatorForMaskedTokens(
        tokenizer, mlm_probability=args.mlm_probability, mask_replace_prob=shares[0], random_replace_prob=shares[1]
    )
    return SeededCollator(masks, args.seed)


def keep_freed_memory() -> None:
    """Tell glibc's malloc to use memory again instead of giving it back to the system; elsewhere do nothing.

    A batch's logits are tens of MB, which malloc by default maps and unmaps each time: a step of 16 x 256 tokens
    through 7M parameters in bfloat16 took 1.6 s on one core, and 0.9 s with this.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets a mapping of its own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


class PretrainingTrainer(Trainer):
    """Trainer that knows Muon, and saves the part of the model that is meant to be used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # the other objectives' heads take the number of items but ignore it, and the Trainer would add their means up
        # over accumulated batches and processes
        self.model_accepts_loss_kwargs &= self.args.objective == "causal"

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.args.device.type == "cpu":
            keep_freed_memory()
        return super().train(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.use_muon:  # type: ignore[has-type]
            args, (matrices, others) = self.args, layer_matrices(model or self.model)
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = MuonWithAdamW(
                matrices, others, args.learning_rate, args.weight_decay, betas, args.adam_epsilon
            )
        return super().create_optimizer(model)

    def save_pretrained(self) -> None:
        """Save the finished model and tokenizer: of ELECTRA's pair the discriminator, as the paper does."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, ReplacedTokenModel):
            return self.save_model()
        if self.args.should_save:
            model.discriminator.save_pretrained(self.args.output_dir)
            self.processing_class.save_pretrained(self.args.output_dir)


def choices_of(args: PretrainingConfig) -> Callable[[Any, torch.Tensor], Any] | None:
    """The trainer's `preprocess_logits_for_metrics`: keeps choices, (batch, length) int64, in place of all logits.

    None for `replaced`, whose output has one score for each token, not one for each word of the vocabulary.
    """

    def choose(logits: Any, _labels: torch.Tensor) -> Any:
        if not isinstance(logits, tuple):
            return logits.argmax(dim=-1)
        return tuple(part.argmax(dim=-1) if part.dim() > 1 and part.is_floating_point() else part for part in logits)

    return None if args.objective == "replaced" else choose


def pretraining_metrics(trainer: PretrainingTrainer, trained: TrainOutput) -> dict[str, Any]:
    """Sizes and speed of a finished run.

    Args:
        trained: what `trainer.train()` returned.

    Returns:
        `num_parameters`, `num_non_embedding_parameters`, `train_tokens`, `tokens_per_second` (of this session).
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "discriminator", model)
    tokens = int(trainer.state.num_input_tokens_seen)
    session = tokens - trainer._initial_num_input_tokens_seen
    return {
        "num_parameters": model.num_parameters(),
        "num_non_embedding_parameters": model.num_parameters(exclude_embeddings=True),
        "train_tokens": tokens,
        "tokens_per_second": round(session / max(trained.metrics["train_runtime"], 1e-9), 1),
    }


def perplexity_of(loss: float) -> float:
    """exp(loss): of a causal model the perplexity per token, of the others that of the masked or missing tokens."""
    return math.exp(min(loss, 700.0))
