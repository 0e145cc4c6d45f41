"""Replaced-token detection: ELECTRA's generator and discriminator as one model that a Trainer can train.

Source: Clark et al. (https://arxiv.org/abs/2003.10555), sections 2 and 3.2, and the reference implementation,
https://github.com/google-research/electra/blob/master/run_pretraining.py
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, ElectraPreTrainedModel
from transformers.utils import ModelOutput

GENERATOR, DISCRIMINATOR = "generator.electra.embeddings", "discriminator.electra.embeddings"


@dataclass
class ReplacedTokenOutput(ModelOutput):
    """Of a batch (B, L). Losses are means in nats: over masked tokens, over all tokens."""

    loss: torch.Tensor | None = None  # generator_loss + disc_weight · discriminator_loss
    detected: torch.Tensor | None = None  # (B, L) int64: 1 where the discriminator says "replaced"
    replaced: torch.Tensor | None = None  # (B, L) int64: 1 where the token is not the original
    generator_loss: torch.Tensor | None = None
    discriminator_loss: torch.Tensor | None = None


def generator_config(config: ElectraConfig, share: float) -> ElectraConfig:
    """The discriminator's config, narrower: `share` of its width and heads; the embeddings keep their size."""
    small = copy.deepcopy(config)
    small.num_attention_heads = max(1, round(config.num_attention_heads * share))
    head_size = max(1, round(config.hidden_size * share / small.num_attention_heads))
    small.hidden_size = head_size * small.num_attention_heads
    small.intermediate_size = max(1, round(config.intermediate_size * share))
    return small


class ReplacedTokenModel(ElectraPreTrainedModel):
    """A small masked language model fills in masked tokens; the discriminator tells which tokens are not the original.

    The two share their embeddings. No gradient goes through the sampled tokens. A sampled token that happens to be the
    original counts as the original.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        **{
            f"{GENERATOR}.{kind}_embeddings.weight": f"{DISCRIMINATOR}.{kind}_embeddings.weight"
            for kind in ("word", "position", "token_type")
        },
        "generator.generator_lm_head.weight": f"{DISCRIMINATOR}.word_embeddings.weight",
    }

    def __init__(self, config: ElectraConfig, generator_hidden_size: float = 0.25, disc_weight: float = 50.0):
        super().__init__(config)
        self.disc_weight = disc_weight
        self.generator = ElectraForMaskedLM(generator_config(config, generator_hidden_size))
        self.discriminator = ElectraForPreTraining(config)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> ReplacedTokenOutput:
        """Both losses of a masked batch.

        Args:
            input_ids: (B, L) with [MASK] at the chosen places.
            labels: (B, L), the original token at the chosen places and -100 elsewhere.
        """
        filled = self.generator(input_ids=input_ids, labels=labels)
        masked = labels != -100
        # held-out text is filled in with the same random numbers at every evaluation
        draw = None if self.training else torch.Generator(input_ids.device).manual_seed(0)
        with torch.no_grad():
            choices = torch.multinomial(filled.logits[masked].float().softmax(-1), 1, generator=draw).squeeze(-1)
            corrupted = input_ids.masked_scatter(masked, choices)
            replaced = (masked & (corrupted != labels)).long()
        judged = self.discriminator(input_ids=corrupted, labels=replaced)
        return ReplacedTokenOutput(
            loss=filled.loss + self.disc_weight * judged.loss,
            detected=(judged.logits > 0).long(),
            replaced=replaced,
            generator_loss=filled.loss.detach().reshape(1),
            discriminator_loss=judged.loss.detach().reshape(1),
        )
