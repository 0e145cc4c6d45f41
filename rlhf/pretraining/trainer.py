"""The collators, the trainer and its metrics, for each of the four objectives."""

import ctypes
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

from rlhf.pretraining.collators import DataCollatorForMaskedTokens, DataCollatorForSpanCorruption, SeededCollator
from rlhf.pretraining.config import PretrainingConfig
from rlhf.pretraining.electra import ReplacedTokenModel
from rlhf.pretraining.optimizers import MuonWithAdamW, layer_matrices
from rlhf.run.trainers import WholeCheckpoints

Logits: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]  # of a Trainer's evaluation; several outputs are a tuple


def pretraining_collator(
    tokenizer: PreTrainedTokenizerBase, args: PretrainingConfig
) -> DataCollatorForLanguageModeling | SeededCollator:
    """The collator that makes the objective's inputs and labels from rows."""
    if args.objective == "causal":
        return DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if args.objective == "span":
        spans = DataCollatorForSpanCorruption(tokenizer, args.mlm_probability, args.mean_noise_span_length)
        return SeededCollator(spans, args.seed)
    # BERT: 80% [MASK], 10% another token (section 3.1). ELECTRA: 85% [MASK], the rest left (replace_with_mask_positions
    # in the reference's pretrain_helpers.py); with 100% neither model of a small pair learned anything in ten minutes
    shares = (0.85, 0.0) if args.objective == "replaced" else (0.8, 0.1)
    masks = DataCollatorForMaskedTokens(
        tokenizer, mlm_probability=args.mlm_probability, mask_replace_prob=shares[0], random_replace_prob=shares[1]
    )
    return SeededCollator(masks, args.seed)


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep freed memory instead of returning it to the system. Without glibc, do nothing.

    A batch's logits are tens of MB, which malloc maps and unmaps each time by default: a step of 16 x 256 tokens
    through 7M parameters in bfloat16 took 1.6 s on one core, and 0.9 s with this.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets a mapping of its own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


class PretrainingTrainer(WholeCheckpoints):
    """Trainer with Muon that saves the part of the model that is used later."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # the other objectives' heads accept the number of items but ignore it, and the Trainer would sum their means
        # over accumulated batches and processes
        self.model_accepts_loss_kwargs &= self.args.objective == "causal"

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.args.device.type == "cpu":
            keep_freed_memory()
        return super().train(*args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.use_muon:  # type: ignore[has-type]
            args, (matrices, others) = self.args, layer_matrices(model or self.model)
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = MuonWithAdamW(
                matrices, others, args.learning_rate, args.weight_decay, betas, args.adam_epsilon
            )
        return super().create_optimizer(model)

    def save_pretrained(self) -> None:
        """Save the finished model and tokenizer. For ELECTRA that is the discriminator, as in the paper."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, ReplacedTokenModel):
            return self.save_model()
        if self.args.should_save:
            model.discriminator.save_pretrained(self.args.output_dir)
            self.processing_class.save_pretrained(self.args.output_dir)


def choices_of(args: PretrainingConfig) -> Callable[[Logits, torch.Tensor], Logits] | None:
    """The trainer's `preprocess_logits_for_metrics`: replaces logits by choices, (batch, length) int64.

    None for `replaced`, whose output has one score for each token instead of one for each token of the vocabulary.
    """

    def choose(logits: Logits, _labels: torch.Tensor) -> Logits:
        if not isinstance(logits, tuple):
            return logits.argmax(dim=-1)
        return tuple(part.argmax(dim=-1) if part.dim() > 1 and part.is_floating_point() else part for part in logits)

    return None if args.objective == "replaced" else choose


def pretraining_metrics(trainer: PretrainingTrainer, trained: TrainOutput) -> dict[str, float]:
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
    """exp(loss), the perplexity per token; for objectives other than `causal`, of the masked or missing tokens.

    >>> perplexity_of(0.0)
    1.0
    """
    return math.exp(min(loss, 700.0))
