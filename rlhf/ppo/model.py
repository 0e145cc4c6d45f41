"""Policy and value function as one module, and the reference."""

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rlhf.models.adapters import active_adapter, trunk
from rlhf.models.prefix import forward_sharing_prefix


class TokenOutputs(NamedTuple):
    """What the policy and the value function say about completion tokens. (B, T) float32."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor


def token_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    entropy: Literal["none", "value", "graph"] = "value",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token and entropy of each distribution, (N,) float32.

    Args:
        logits: (N, V) at the positions before the tokens, raw; they are divided by `temperature` in float32.
        tokens: (N,) int64.
        entropy: `none` leaves it at 0 and saves its computation; `graph` lets gradients through it.
    """
    logprobs, entropies = [], []
    # in pieces: (64, V) fits the caches, (N, V) doesn't
    for some_logits, some_tokens in zip(logits.split(64), tokens.split(64), strict=True):
        scaled = some_logits if temperature == 1 else some_logits.float() / temperature
        every = torch.log_softmax(scaled, dim=-1, dtype=torch.float32)
        logprobs.append(every.gather(-1, some_tokens.unsqueeze(-1)).squeeze(-1))
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "graph"):
            entropies.append(torch.zeros_like(logprobs[-1]) if entropy == "none" else -(every.exp() * every).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


class PolicyAndValue(nn.Module):
    """What PPO trains: the policy, and the value function in one of three shapes.

    Args:
        policy: a causal language model or a PeftModel of one.
        value_model: a sequence classifier with one output, trained beside the policy.
        value_adapter: without a `value_model`, the name of an adapter of the policy that the value function runs with;
            None puts its head on the policy's own trunk.
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
        self.warming_up = False  # then the value function learns from the trunk without changing it
        if value_model is None:
            embeddings = policy.get_output_embeddings() or policy.get_input_embeddings()
            width = policy.config.get_text_config().hidden_size
            self.value_head = nn.Linear(width, 1, device=embeddings.weight.device, dtype=torch.float32)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        lengths: torch.Tensor,
        temperature: float,
        with_values: bool = True,
        entropy_gradient: bool = False,
    ) -> TokenOutputs:
        """Log-probabilities, values and (in training mode) entropy of completion tokens, T of the longest completion.

        Args:
            input_ids, attention_mask: (B, L), left-padded: prompts and completions without a gap.
            lengths: (B,) completion tokens of each row.
            with_values: False leaves the values at 0 and saves their computation.
            entropy_gradient: let gradients through the entropy, for an entropy bonus.
        """
        rows = (input_ids, attention_mask, lengths)
        found, hidden = _policy_outputs(
            self.policy,
            *rows,
            temperature,
            entropy="graph" if entropy_gradient else "value" if self.training else "none",
        )
        values = left_align(self._values(hidden, *rows), lengths) if with_values else torch.zeros_like(found[0])
        return TokenOutputs(*found, values)

    def _values(
        self, hidden: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Values (B, T) float32; `hidden` (B, T, d) are the policy's hidden states before each completion token."""
        if self.value_model is not None:
            classifier = self.value_model
            classifier = classifier.get_base_model() if isinstance(classifier, PeftModel) else classifier
            hidden = _trunk_hidden(self.value_model, input_ids, attention_mask, lengths)
            return classifier.score(hidden).squeeze(-1).float()
        if self.value_adapter is not None:
            with active_adapter(self.policy, self.value_adapter):
                hidden = _trunk_hidden(self.policy, input_ids, attention_mask, lengths)
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
    model: PreTrainedModel | PeftModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    lengths: torch.Tensor,
    temperature: float,
    entropy: Literal["none", "value", "graph"],
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Log-probabilities and entropy (B, T) of the completion tokens, and last hidden states (B, T, d) before them.

    The hidden states are caught on their way to the language model's head (asking for `output_hidden_states` would keep
    those of every layer), and only those before a completion token go through it: no logits of prompts or padding.
    """
    length = int(lengths.max())
    columns = torch.arange(length, device=lengths.device)
    is_token = columns >= (length - lengths)[:, None]  # (B, T), right-aligned
    before = torch.cat([is_token, torch.zeros_like(is_token[:, :1])], 1)
    caught = []

    def select(_head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        caught.append(inputs[0][:, -length - 1 :])
        shares_prefix = len(inputs[0]) < len(before)  # what rows begin with, computed once: no logits needed
        return (inputs[0][:, -1:] if shares_prefix else caught[-1][before][None],)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits = _run(
            model, trunk(model), input_ids, attention_mask, lengths, logits_to_keep=length + 1
        ).logits  # fmt: skip
    finally:
        hook.remove()
    found = token_logprobs(logits[0], input_ids[:, -length:][is_token], temperature, entropy)
    rows = columns < lengths[:, None]  # the same tokens in the same order, left-aligned
    spread = tuple(torch.zeros(rows.shape, device=rows.device).masked_scatter(rows, values) for values in found)
    return (spread[0], spread[1]), caught[-1][:, :-1]


def _trunk_hidden(
    model: PreTrainedModel | PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Last hidden states (B, T, d) at the positions before the last T tokens."""
    hidden = _run(trunk(model), trunk(model), input_ids, attention_mask, lengths)[0]
    return hidden[:, -int(lengths.max()) - 1 : -1]


def _run(
    model: nn.Module,
    body: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    lengths: torch.Tensor,
    **settings: Any,
) -> Any:
    """The model's output for rows that share what they begin with, unless its activations are checkpointed."""
    checkpointed = body.training and body.is_gradient_checkpointing
    prompts = attention_mask.sum(1) - lengths
    return forward_sharing_prefix(
        model, body.config, input_ids, attention_mask, prompts, share=not checkpointed, **settings
    ).output


@torch.no_grad()
def reference_logprobs(
    policy: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | None,
    ref_adapter_name: str | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    lengths: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Log-probabilities (B, T) of the completion tokens under the reference.

    The reference is `ref_model`, or the policy with adapter `ref_adapter_name`, or with its adapters off.
    """
    model = policy if ref_model is None else ref_model
    with nullcontext() if ref_model is not None else active_adapter(policy, ref_adapter_name):
        (logprobs, _), _ = _policy_outputs(model, input_ids, attention_mask, lengths, temperature, entropy="none")
    return logprobs
