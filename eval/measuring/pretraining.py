"""A pretrained model's results on held-out text."""

from collections.abc import Callable

import numpy as np
from sklearn.metrics import roc_auc_score
from transformers import EvalPrediction, PreTrainedTokenizerBase

from eval.measuring.bits import bits_per_byte
from rlhf.pretraining.config import PretrainingConfig
from rlhf.pretraining.trainer import PretrainingTrainer, perplexity_of


def metrics_of_choices(args: PretrainingConfig) -> Callable[[EvalPrediction], dict[str, float]] | None:
    """The trainer's `compute_metrics` for an objective: how often the model chose right. None for `causal`."""
    if args.objective == "causal":
        return None

    def of_tokens(choices: np.ndarray, labels: np.ndarray) -> float:
        return float((choices == labels)[labels != -100].mean())

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        given = prediction.predictions
        if args.objective == "span":  # predictions also hold the encoder's output
            return {"token_accuracy": of_tokens(given[0], prediction.label_ids)}
        if args.objective == "masked" and args.next_sentence_prediction:
            labels, follows = prediction.label_ids
            return {
                "masked_accuracy": of_tokens(given[0], labels),
                "next_sentence_accuracy": float((given[1] == follows).mean()),
            }
        if args.objective == "masked":
            return {"masked_accuracy": of_tokens(given, prediction.label_ids)}
        scores, replaced, generator_loss, discriminator_loss = given
        detected = scores > 0
        return {
            "replaced_share": float(replaced.mean()),
            # how often a replaced token scores higher than an original one: 0.5 is guessing, whatever their share
            "detection_auc": float(roc_auc_score(replaced.ravel(), scores.ravel())) if 0 < replaced.mean() < 1 else 0.5,
            "detection_accuracy": float((detected == replaced).mean()),
            "detection_precision": float(replaced[detected].mean()) if detected.any() else 0.0,
            "detection_recall": float(detected[replaced == 1].mean()) if replaced.any() else 0.0,
            "generator_loss": float(generator_loss.mean()),
            "discriminator_loss": float(discriminator_loss.mean()),
        }

    return compute


def held_out_metrics(
    trainer: PretrainingTrainer, tokenizer: PreTrainedTokenizerBase, texts: list[str], loss: float
) -> dict[str, float]:
    """Perplexity, and for a causal model bits per byte, independent of the tokenizer. Every process computes all.

    Args:
        loss: held-out loss in nats per token. `span`: per token of the missing spans and their sentinels; `masked`: per
            masked token (with next-sentence prediction plus its own loss, and then there is no perplexity).

    Returns:
        `perplexity` where it is defined; `bits_per_byte` with the ends of its interval, `_low` and `_high`.
    """
    args = trainer.args
    if args.objective == "replaced" or args.next_sentence_prediction:
        return {}
    if args.objective != "causal":
        return {"perplexity": perplexity_of(loss)}
    with trainer.autocast_smart_context_manager():
        cell = bits_per_byte(trainer.model_wrapped, tokenizer, texts, args.block_size, args.per_device_eval_batch_size)
    ends = {"bits_per_byte_low": cell.low, "bits_per_byte_high": cell.high}
    return {"perplexity": perplexity_of(loss), "bits_per_byte": cell.mean, **ends}
