"""Policy and value function as one module, and the reference."""

from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rlhf.models.adapters import REWARD, active_adapter, trunk
from rlhf.models.logprobs import Entropy, ends_with, frozen_head, logprobs_behind, token_logprobs
from rlhf.models.prefix import Computed, Rows, before_head, forward_sharing_prefix, take
from rlhf.models.seq2seq import decoder_outputs
from rlhf.ppo.zero import Zero

T = TypeVar("T")


class TokenOutputs(NamedTuple):
    """Outputs of the policy and the value function at completion tokens. (B, T) float32."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor


class Shardable(nn.Module):
    """A module that holds models whose weights may be spread over processes (rlhf/ppo/sharding.py).

    Args:
        models: those that it holds.
    """

    in_step = False  # True: every process has to make the same passes
    reshards = True  # under FSDP2: whether a layer is given up after its pass
    layer_by_layer = False  # under FSDP2: whether that is so while sampling and scoring too
    timeout = timedelta(minutes=30)  # how long processes then wait for each other
    zero: Zero | None = None  # DeepSpeed's engine, if there is one

    def __init__(self, models: list[PreTrainedModel | PeftModel]) -> None:
        super().__init__()
        # the classes of layers that are gathered one at a time
        self._no_split_modules = [name for model in models for name in getattr(model, "_no_split_modules", None) or []]

    def run(self, function: Callable[[], T]) -> T:
        """What `function` returns. Under FSDP2 this counts as a forward pass, within which parts may be called."""
        return function()


class Reference(Shardable):
    """A frozen reference that is a model of its own."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__([model])
        self.model = model


class PolicyAndValue(Shardable):
    """What PPO trains: the policy, and the value function in one of three forms.

    Args:
        policy: a causal or an encoder-decoder language model, or a PeftModel of one.
        value_model: a sequence classifier with one output, trained beside the policy.
        value_adapter: without a `value_model`, the policy's adapter that becomes the value function, with a head. None
            puts the head on the policy's own trunk. A frozen adapter, the reward model's, is read once per rollout.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        value_model: PreTrainedModel | None = None,
        value_adapter: str | None = None,
    ) -> None:
        super().__init__([policy] if value_model is None else [policy, value_model])
        self.policy = policy
        self.config = policy.config
        self.value_model, self.value_adapter = value_model, value_adapter
        self.warming_up = False  # True: the value function learns from the trunk without changing it
        if value_model is None:
            embeddings = policy.get_output_embeddings() or policy.get_input_embeddings()
            width = embeddings.weight.shape[1]
            self.value_head = nn.Linear(width, 1, device=embeddings.weight.device, dtype=torch.float32)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def train(self, mode: bool = True) -> "PolicyAndValue":
        """Whether to prepare for an update. The models themselves stay in evaluation mode.

        So nothing random happens in them (dropout, dropped layers, noise on routers), however a family writes it, and
        the ratio of new to old probabilities starts at 1. Activation checkpointing and torch's recurrent layers on a
        GPU do look at the mode.
        """
        super().train(False)
        self.training = mode
        for module in self.modules():
            if getattr(module, "gradient_checkpointing", False) or isinstance(module, nn.RNNBase):
                module.training = mode
        return self

    def forward(
        self,
        rows: Rows,
        temperature: float,
        with_values: bool = True,
        entropy_gradient: bool = False,
        value_states: torch.Tensor | None = None,
    ) -> TokenOutputs:
        """Log-probabilities, values and (in training mode) entropy of completion tokens, T of the longest completion.

        Args:
            rows: prompts and completions without a gap between them.
            with_values: False returns 0 for the values and saves their computation.
            entropy_gradient: let gradients through the entropy, for an entropy bonus.
            value_states: (B, T, d) what `frozen_states` gave for these rows.
        """
        entropy: Entropy = "graph" if entropy_gradient else "value" if self.training else "none"
        found, hidden = _policy_outputs(self.policy, rows, temperature, entropy, share=not self.in_step)
        if value_states is not None:
            values = self._head(value_states)
        else:
            values = self._values(hidden, rows) if with_values else torch.zeros_like(found[0])
        return TokenOutputs(*found, values)

    @torch.no_grad()
    def frozen_states(self, rows: Rows) -> torch.Tensor | None:
        """The hidden states (B, T, d) that the value function's head reads, if training doesn't change them."""
        if self.value_adapter != REWARD:
            return None
        with active_adapter(self.policy, REWARD):
            return _trunk_hidden(self.policy, rows, share=not self.in_step)

    def _values(self, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Values (B, T) float32; `hidden` (B, T, d) are the policy's hidden states before each completion token."""
        if self.value_model is not None:
            classifier = self.value_model
            classifier = classifier.get_base_model() if isinstance(classifier, PeftModel) else classifier
            hidden = _trunk_hidden(self.value_model, rows, share=not self.in_step)
            return classifier.score(hidden).squeeze(-1).float()
        if self.value_adapter is not None:
            with active_adapter(self.policy, self.value_adapter):
                hidden = _trunk_hidden(self.policy, rows, share=not self.in_step)
        elif self.warming_up:
            hidden = hidden.detach()
        return self._head(hidden)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float()).squeeze(-1)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """The policy's, for transformers' Trainer, which asks this of a run that trains an adapter."""
        self.policy.create_or_update_model_card(output_dir)

    def value_parameters(self) -> set[str]:
        """Names of the trainable parameters that only the value function uses."""
        own = ("value_head.", "value_model.")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
            and (name.startswith(own) or (self.value_adapter is not None and f".{self.value_adapter}." in name))
        }


def _before_completions(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (B, T) before each completion token, and which of them exist (B, T) bool."""
    columns = torch.arange(int(rows.lengths.max()), device=rows.lengths.device)
    first = rows.attention_mask.sum(1) - rows.lengths - 1
    exists = columns < rows.lengths[:, None]
    return torch.where(exists, first[:, None] + columns, first[:, None]), exists


def _policy_outputs(
    model: PreTrainedModel | PeftModel, rows: Rows, temperature: float, entropy: Entropy, share: bool = True
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Log-probabilities and entropy (B, T) of the completion tokens, and last hidden states (B, T, d) before them.

    A hook catches the hidden states in front of the language model's head (`output_hidden_states` would keep those of
    every layer). Only states before a completion token go through the head, so prompts and padding get no logits. A
    frozen head gets none of them: its logits are used piece by piece.
    """
    positions, exists = _before_completions(rows)
    caught: list[torch.Tensor] = []
    head = frozen_head(model) if share and entropy != "graph" and not model.config.is_encoder_decoder else None
    if head is not None and not ends_with(model, head, rows.input_ids[0, :8]):
        head = None

    def select(hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) < len(exists):  # the pass over the shared prefix needs no logits
            return hidden[:, :0]
        caught.append(take(hidden, positions - (rows.input_ids.shape[1] - hidden.shape[1])))
        return caught[-1][exists][None] if head is None else hidden[:, :0]

    tokens = rows.input_ids.gather(1, (positions + 1).clamp(max=rows.input_ids.shape[1] - 1))
    if model.config.is_encoder_decoder:
        logits, hidden = decoder_outputs(model, rows)
    else:
        with before_head(model, select):
            logits = _run(model, trunk(model), rows, share).output.logits[0]
        hidden = caught[-1]
    if head is None:
        found = token_logprobs(logits, tokens[exists], temperature, entropy)
    else:
        found = logprobs_behind(head, hidden[exists], tokens[exists], temperature, entropy)
    spread = tuple(torch.zeros(exists.shape, device=exists.device).masked_scatter(exists, values) for values in found)
    return (spread[0], spread[1]), hidden


def _trunk_hidden(model: PreTrainedModel | PeftModel, rows: Rows, share: bool) -> torch.Tensor:
    """Last hidden states (B, T, d) at the positions before the completion tokens."""
    if model.config.is_encoder_decoder:
        return decoder_outputs(model, rows).hidden
    computed = _run(trunk(model), trunk(model), rows, share)
    return computed.at(computed.output[0], _before_completions(rows)[0])


def _run(model: nn.Module, body: PreTrainedModel, rows: Rows, share: bool) -> Computed:
    """The model's output. With `share`, the rows share their common prefix, unless activations are checkpointed."""
    checkpointed = body.is_activation_checkpointing and torch.is_grad_enabled()
    config = body.config.get_text_config(decoder=True)
    return forward_sharing_prefix(model, config, rows, share=share and not checkpointed, body=body)


@torch.no_grad()
def reference_logprobs(
    policy: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | None,
    ref_adapter_name: str | None,
    rows: Rows,
    temperature: float,
) -> torch.Tensor:
    """Log-probabilities (B, T) of the completion tokens under the reference.

    The reference is `ref_model`; if that is None, the policy with adapter `ref_adapter_name`, or with adapters off.
    """
    if ref_model is not None:
        return completion_logprobs(ref_model, rows, temperature)
    with active_adapter(policy, ref_adapter_name):
        return completion_logprobs(policy, rows, temperature)


def completion_logprobs(model: PreTrainedModel | PeftModel, rows: Rows, temperature: float) -> torch.Tensor:
    """Log-probabilities (B, T) of the completion tokens under a model with the adapters that are active."""
    (logprobs, _), _ = _policy_outputs(model, rows, temperature, entropy="none")
    return logprobs
