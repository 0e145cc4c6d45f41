"""The passes of supervised training: SFT and the reward model."""

import torch
from peft import PeftModel
from torch.nn.functional import log_softmax, logsigmoid, nll_loss
from torch.utils.checkpoint import checkpoint
from trl import RewardConfig, SFTConfig
from trl.trainer.utils import entropy_from_logits

from rlhf.models.adapters import trunk
from rlhf.models.losses import FUSED
from rlhf.planning.fused_head import fused_loss
from rlhf.planning.models import Model
from rlhf.planning.stage import Stage

CHUNK = 256  # tokens whose logits TRL's chunked_nll computes at once


def rows_of_ones(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Input of the model: `rows` full rows."""
    return {
        "input_ids": torch.ones(rows, tokens, dtype=torch.long),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
    }


def checkpoint_layers(model: Model, args: SFTConfig | RewardConfig) -> None:
    """Activation checkpointing as transformers' and TRL's trainers switch it on."""
    if args.activation_checkpointing:
        model.enable_input_require_grads()
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base.activation_checkpointing_enable(args.activation_checkpointing_kwargs)


def sft_loss(model: Model, rows: int, tokens: int, learned: int, loss_type: str, on_cpu: bool) -> torch.Tensor:
    """The loss of a batch as TRL computes it.

    Args:
        learned: tokens of the batch that have a label.
    """
    inputs = rows_of_ones(rows, tokens)
    if FUSED:
        return fused_loss(model, inputs, learned, on_cpu)
    if loss_type != "chunked_nll":
        output = model(**inputs, labels=inputs["input_ids"], use_cache=False)
        with torch.no_grad():
            entropy_from_logits(output.logits[:, :-1])
        return output.loss
    hidden = trunk(model)(**inputs, use_cache=False)[0][:, :-1].reshape(-1, model.config.get_text_config().hidden_size)
    hidden = hidden[torch.ones(len(hidden), dtype=torch.int8).argsort(descending=True, stable=True)]
    labels = torch.ones(len(hidden), dtype=torch.long)
    head = model.get_output_embeddings()
    loss = torch.zeros(())
    for start in range(0, max(1, min(learned, len(hidden))), CHUNK):
        part = slice(start, start + CHUNK)
        loss = loss + checkpoint(_chunk_loss, hidden[part], head.weight, labels[part], use_reentrant=False)
    return loss


def _chunk_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = hidden.float() @ weight.float().t()
    logprobs = log_softmax(logits, dim=-1)
    with torch.no_grad():
        -(logprobs.exp() * logprobs).sum(-1)
    return nll_loss(logprobs, labels, reduction="sum")


def reward_loss(model: Model, pairs: int, tokens: int) -> torch.Tensor:
    """The loss of a batch of pairs, chosen and rejected replies below each other."""
    chosen, rejected = model(**rows_of_ones(2 * pairs, tokens), use_cache=False).logits.squeeze(-1).chunk(2)
    return -logsigmoid(chosen - rejected).mean()


class Training:
    """The optimizer steps of SFT or reward training on a stage."""

    def __init__(self, stage: Stage, model: Model, args: SFTConfig | RewardConfig) -> None:
        self.stage, self.model, self.args = stage, model, args

    def backward(self, rows: int, tokens: int, learned: int) -> None:
        """Forward and backward pass of a batch."""
        self.model.train()
        with self.stage.autocast():
            loss = (
                sft_loss(self.model, rows, tokens, learned, self.args.loss_type, self.stage.launch.on_cpu)
                if isinstance(self.args, SFTConfig)
                else reward_loss(self.model, rows, tokens)
            )
        loss.backward()

    def step(self, rows: int, tokens: int, learned: int) -> None:
        """An optimizer step on two batches, if gradients are accumulated, or one."""
        for _ in range(min(2, self.args.gradient_accumulation_steps)):
            self.backward(rows, tokens, learned)
        finish_step(self.stage, self.args.max_grad_norm)


def finish_step(stage: Stage, max_grad_norm: float | None) -> None:
    """Clip gradients and step, if the gradients of the whole model are here."""
    trained = [parameter for parameter in stage.trained.parameters() if parameter.requires_grad]
    if not stage.launch.sharded:
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        stage.optimizer.step()
    for parameter in trained:
        parameter.grad = None
