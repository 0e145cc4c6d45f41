"""Replaced-token detection: ELECTRA's generator and discriminator as one model that a Trainer can train.

Source: Clark et al. (https://arxiv.org/abs/2003.10555), sections 2 and 3.2, and the reference implementation,
https://github.com/google-research/electra/blob/master/run_pretraining.py
"""

import copy
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    ElectraConfig,
    ElectraForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

# Embeddings of these have their own size, so that a narrow generator can share the discriminator's. RoFormer is BERT
# with rotary positions, which need far less text than learned ones.
DETECTORS = ("electra", "roformer")


@dataclass
class ReplacedTokenOutput(ModelOutput):
    """Output for a batch (B, L). Mean losses in nats: generator over masked tokens, discriminator over all tokens."""

    loss: torch.Tensor | None = None  # generator_loss + disc_weight · discriminator_loss
    scores: torch.Tensor | None = None  # (B, L) float32: the discriminator's log-odds of "replaced"
    replaced: torch.Tensor | None = None  # (B, L) int64: 1 where the token is not the original
    generator_loss: torch.Tensor | None = None
    discriminator_loss: torch.Tensor | None = None


def generator_config(config: PreTrainedConfig, share: float) -> PreTrainedConfig:
    """The discriminator's config with `share` of its width and heads. The embeddings keep their size."""
    small = copy.deepcopy(config)
    small.num_attention_heads = max(1, round(config.num_attention_heads * share))
    head_size = max(1, round(config.hidden_size * share / small.num_attention_heads))
    small.hidden_size = head_size * small.num_attention_heads
    small.intermediate_size = max(1, round(config.intermediate_size * share))
    return small


class ReplacedTokenModel(PreTrainedModel):
    """A generator, a small masked language model, fills in masked tokens; a discriminator finds the replaced ones.

    The two share their embeddings. No gradient goes through the sampled tokens. A sampled token that happens to be the
    original counts as the original. The discriminator is ELECTRA's own class, or a token classifier with one logit.
    """

    def __init__(self, config: PreTrainedConfig, generator_hidden_size: float = 0.25, disc_weight: float = 50.0):
        half = MODEL_FOR_MASKED_LM_MAPPING[type(config)]  # the pair supports the same kinds of attention
        self._supports_sdpa, self._supports_flash_attn = half._supports_sdpa, half._supports_flash_attn
        super().__init__(config)
        self.disc_weight = disc_weight
        small = generator_config(config, generator_hidden_size)
        self.generator = AutoModelForMaskedLM.from_config(small, trust_remote_code=False)
        if isinstance(config, ElectraConfig):
            self.discriminator = ElectraForPreTraining(config)
        else:
            one_logit = copy.deepcopy(config)
            one_logit.num_labels = 1
            self.discriminator = AutoModelForTokenClassification.from_config(one_logit, trust_remote_code=False)
        self._tied_weights_keys = self._shared_embeddings()
        self.post_init()

    def _shared_embeddings(self) -> dict[str, str]:
        """Names of the generator's embeddings and output matrix → the discriminator's parameters that they share."""
        body = f"{self.generator.base_model_prefix}.embeddings."
        learned = {name: p for name, p in self.discriminator.named_parameters() if "_embeddings.weight" in name}
        shared = {f"generator.{name}": f"discriminator.{name}" for name, p in learned.items() if p.requires_grad}
        head = self.generator.get_output_embeddings().weight
        for name, parameter in self.generator.named_parameters(remove_duplicate=False):
            if parameter is head and not name.startswith(body):
                shared[f"generator.{name}"] = f"discriminator.{body}word_embeddings.weight"
        return shared

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: object) -> ReplacedTokenOutput:
        """Both losses of a masked batch.

        Args:
            input_ids: (B, L) int64, with [MASK] at the masked positions.
            labels: (B, L) int64, the original token at the masked positions and -100 elsewhere.
        """
        filled = self.generator(input_ids=input_ids, labels=labels)
        masked = labels != -100
        # every evaluation fills in held-out text with the same random numbers
        draw = None if self.training else torch.Generator(input_ids.device).manual_seed(0)
        with torch.no_grad():
            choices = torch.multinomial(filled.logits[masked].float().softmax(-1), 1, generator=draw).squeeze(-1)
            corrupted = input_ids.masked_scatter(masked, choices)
            replaced = (masked & (corrupted != labels)).long()
        logits = self.discriminator(input_ids=corrupted).logits.reshape(replaced.shape)
        discriminator_loss = binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype))
        return ReplacedTokenOutput(
            loss=filled.loss + self.disc_weight * discriminator_loss,
            scores=logits.float(),
            replaced=replaced,
            generator_loss=filled.loss.detach().reshape(1),
            discriminator_loss=discriminator_loss.detach().reshape(1),
        )
