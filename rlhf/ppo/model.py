"""Policy and value function as one module, and the reference."""

from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from rlhf.models.adapters import active_adapter, trunk
from rlhf.models.prefix import Rows, forward_sharing_prefix

Entropy = Literal["none", "value", "graph"]


class TokenOutputs(NamedTuple):
    """Outputs of the policy and the value function at completion tokens. (B, T) float32."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor


def token_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    entropy: Entropy = "value",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token and entropy of each distribution, (N,) float32.

    Args:
        logits: (N, V) at the positions before the tokens, raw; they are divided by `temperature` in float32.
        tokens: (N,) int64.
        entropy: `none` returns 0 and saves the computation; `graph` lets gradients through it.
    """
    logprobs, entropies = [], []
    # in pieces: (64, V) fits the processor's caches, (N, V) doesn't
    for some_logits, some_tokens in zip(logits.split(64), tokens.split(64), strict=True):
        scaled = some_logits if temperature == 1 else some_logits.float() / temperature
        every = torch.log_softmax(scaled, dim=-1, dtype=torch.float32)
        logprobs.append(every.gather(-1, some_tokens.unsqueeze(-1)).squeeze(-1))
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "graph"):
            entropies.append(torch.zeros_like(logprobs[-1]) if entropy == "none" else -(every.exp() * every).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


class PolicyAndValue(nn.Module):
    """What PPO trains: the policy, and the value function in one of three forms.

    Args:
        policy: a causal language model or a PeftModel of one.
        value_model: a sequence classifier with one output, trained beside the policy.
        value_adapter: without a `value_model`, the policy's adapter that becomes the value function, with a head. None
            puts the head on the policy's own trunk.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        value_model: PreTrainedModel | None = None,
        value_adapter: str | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.config = policy.config
        self.value_model, self.value_adapter = value_model, value_adapter
        self.warming_up = False  # True: the value function learns from the trunk without changing it
        if value_model is None:
            embeddings = policy.get_output_embeddings() or policy.get_input_embeddings()
            width = policy.config.get_text_config().hidden_size
            self.value_head = nn.Linear(width, 1, device=embeddings.weight.device, dtype=torch.float32)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        rows: Rows,
        temperature: float,
        with_values: bool = True,
        entropy_gradient: bool = False,
    ) -> TokenOutputs:
        """Log-probabilities, values and (in training mode) entropy of completion tokens, T of the longest completion.

        Args:
            rows: prompts and completions without a gap between them.
            with_values: False returns 0 for the values and saves their computation.
            entropy_gradient: let gradients through the entropy, for an entropy bonus.
        """
        entropy: Entropy = "graph" if entropy_gradient else "value" if self.training else "none"
        found, hidden = _policy_outputs(self.policy, rows, temperature, entropy)
        values = left_align(self._values(hidden, rows), rows.lengths) if with_values else torch.zeros_like(found[0])
        return TokenOutputs(*found, values)

    def _values(self, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Values (B, T) float32; `hidden` (B, T, d) are the policy's hidden states before each completion token."""
        if self.value_model is not None:
            classifier = self.value_model
            classifier = classifier.get_base_model() if isinstance(classifier, PeftModel) else classifier
            hidden = _trunk_hidden(self.value_model, rows)
            return classifier.score(hidden).squeeze(-1).float()
        if self.value_adapter is not None:
            with active_adapter(self.policy, self.value_adapter):
                hidden = _trunk_hidden(self.policy, rows)
        elif self.warming_up:
            hidden = hidden.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float()).squeeze(-1)

    def value_parameters(self) -> set[str]:
        """Names of the trainable parameters that only the value function uses."""
        own = ("value_head.", "value_model.")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
            and (name.startswith(own) or (self.value_adapter is not None and f".{self.value_adapter}." in name))
        }


def left_align(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Move the last `lengths` entries of each row of (B, T) to its beginning."""
    columns = torch.arange(values.shape[1], device=values.device) + (values.shape[1] - lengths)[:, None]
    return values.gather(1, columns.clamp(max=values.shape[1] - 1))


def _policy_outputs(
    model: PreTrainedModel | PeftModel, rows: Rows, temperature: float, entropy: Entropy
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Log-probabilities and entropy (B, T) of the completion tokens, and last hidden states (B, T, d) before them.

    A hook catches the hidden states in front of the language model's head (`output_hidden_states` would keep those of
    every layer). Only states before a completion token go through the head, so prompts and padding get no logits.
    """
    length = int(rows.lengths.max())
    columns = torch.arange(length, device=rows.lengths.device)
    is_token = columns >= (length - rows.lengths)[:, None]  # (B, T), right-aligned
    before = torch.cat([is_token, torch.zeros_like(is_token[:, :1])], 1)
    caught = []

    def select(_head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        caught.append(inputs[0][:, -length - 1 :])
        shares_prefix = len(inputs[0]) < len(before)  # the pass over the shared prefix; its logits are not needed
        return (inputs[0][:, -1:] if shares_prefix else caught[-1][before][None],)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits = _run(model, trunk(model), rows, logits_to_keep=length + 1).logits
    finally:
        hook.remove()
    found = token_logprobs(logits[0], rows.input_ids[:, -length:][is_token], temperature, entropy)
    mask = columns < rows.lengths[:, None]  # the same tokens in the same order, left-aligned
    spread = tuple(torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values) for values in found)
    return (spread[0], spread[1]), caught[-1][:, :-1]


def _trunk_hidden(model: PreTrainedModel | PeftModel, rows: Rows) -> torch.Tensor:
    """Last hidden states (B, T, d) at the positions before the last T tokens."""
    hidden = _run(trunk(model), trunk(model), rows)[0]
    return hidden[:, -int(rows.lengths.max()) - 1 : -1]


def _run(model: nn.Module, body: PreTrainedModel, rows: Rows, **settings: int) -> ModelOutput:
    """The model's output. The common prefix of the rows is shared, unless activations are checkpointed."""
    checkpointed = body.training and body.is_gradient_checkpointing
    return forward_sharing_prefix(model, body.config, rows, share=not checkpointed, **settings).output


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
    model = policy if ref_model is None else ref_model
    with nullcontext() if ref_model is not None else active_adapter(policy, ref_adapter_name):
        (logprobs, _), _ = _policy_outputs(model, rows, temperature, entropy="none")
    return logprobs
