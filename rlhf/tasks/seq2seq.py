"""Supervised fine-tuning of encoder-decoder models by transformers' Trainer. TRL's SFTTrainer is for decoders."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import SFTConfig

from rlhf.errors import InputError
from rlhf.models.seq2seq import decoder_prefix


def check_seq2seq_arguments(args: SFTConfig) -> None:
    """Refuse flags of SFTTrainer that this trainer has not.

    Raises:
        InputError: naming the flag.
    """
    asked = ("packing", "padding_free", "eval_packing", "activation_offloading", "assistant_only_loss")
    named = [flag for flag in asked if getattr(args, flag)] + (["loss_type"] if args.loss_type == "dft" else [])
    named += ["completion_only_loss"] if args.completion_only_loss is False else []
    if named:
        raise InputError(
            f"--{named[0]} {str(getattr(args, named[0])).lower()}: is not for encoder-decoders, which always learn "
            "the reply alone, one row at a time. Leave it off."
        )


@dataclass
class ReplyCollator(DataCollatorForSeq2Seq):
    """transformers' collator; the decoder's inputs begin as they do in sampling (`decoder_prefix`)."""

    prefix: tuple[int, ...] = ()

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        """`input_ids` and `attention_mask` (B, P), `decoder_input_ids` and `labels` (B, T), padded on the right."""
        side, self.tokenizer.padding_side = self.tokenizer.padding_side, "right"
        batch = super().__call__(features, return_tensors)
        self.tokenizer.padding_side = side
        labels = batch["labels"]
        starts = torch.tensor(self.prefix).expand(len(labels), -1)
        seen = labels[:, :-1].masked_fill(labels[:, :-1] == -100, self.tokenizer.pad_token_id)
        batch["decoder_input_ids"] = torch.cat([starts, seen], 1)
        unlearned = torch.full((len(labels), len(self.prefix) - 1), -100)
        batch["labels"] = torch.cat([unlearned, labels], 1)
        return batch


class Seq2SeqSFTTrainer(Trainer):
    """transformers' Trainer with the collator of replies.

    Args:
        train_dataset, eval_dataset: rows of rlhf.data.rows.seq2seq_rows.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SFTConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
    ) -> None:
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()  # activation checkpointing needs it
        prefix = tuple(decoder_prefix(model))
        collator = ReplyCollator(processing_class, prefix=prefix, pad_to_multiple_of=args.pad_to_multiple_of)
        super().__init__(
            model=model, args=args, data_collator=collator, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=processing_class,
        )  # fmt: skip
        # these models take the mean per batch themselves; Trainer then has to divide it by the accumulated batches
        self.model_accepts_loss_kwargs = False
