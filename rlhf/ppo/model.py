"""Policy and value function as one module, and the reference."""

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rlhf.models import active_adapter, trunk
from rlhf.prefix import forward


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
    """Log-probability of each token and entropy of each distribution, (B, T) float32.

    Args:
        logits: (B, T, V) at the positions before the tokens, raw; they are divided by `temperature` in float32.
        tokens: (B, T) int64.
        entropy: `none` leaves it at 0 and saves its computation; `graph` lets gradients through it.
    """
    logprobs, entropies = [], []
    # row by row: (T, V) fits the caches, (B, T, V) doesn't
    for row_logits, row_tokens in zip(logits, tokens, strict=True):
        every = torch.log_softmax(row_logits.float() / temperature, dim=-1)
        logprobs.append(every.gather(-1, row_tokens.unsqueeze(-1)).squeeze(-1))
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "graph"):
            entropies.append(torch.zeros_like(logprobs[-1]) if entropy == "none" else -(every.exp() * every).sum(-1))
    return torch.stack(logprobs), torch.stack(entropies)


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
        logits, hidden = _logits_and_hidden(self.policy, *rows)
        length = int(lengths.max())
        logprobs, entropy = token_logprobs(
            logits,
            input_ids[:, -length:],
            temperature,
            entropy="graph" if entropy_gradient else "value" if self.training else "none",
        )
        values = self._values(hidden, *rows) if with_values else torch.zeros_like(logprobs)
        return TokenOutputs(*(left_align(tensor, lengths) for tensor in (logprobs, entropy, values)))

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


def _logits_and_hidden(
    model: PreTrainedModel | PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, V) and last hidden states (B, T, d) at the positions before the last T tokens.

    The hidden states are caught on their way to the language model's head: asking for `output_hidden_states` would keep
    those of every layer, and logits of prompt positions are never computed.
    """
    caught = []
    hook = trunk(model).register_forward_hook(lambda _module, _args, output: caught.append(output[0]))
    last = int(lengths.max()) + 1
    try:
        logits = _run(model, trunk(model), input_ids, attention_mask, lengths, logits_to_keep=last).logits
    finally:
        hook.remove()
    return logits[:, -last:-1], caught[-1][:, -last:-1]


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
    return forward(model, body.config, input_ids, attention_mask, prompts, share=not checkpointed, **settings).output


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
        logits, _ = _logits_and_hidden(model, input_ids, attention_mask, lengths)
    logprobs, _ = token_logprobs(logits, input_ids[:, -int(lengths.max()) :], temperature, entropy="none")
    return left_align(logprobs, lengths)
