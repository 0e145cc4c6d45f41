"""Policy and value function as one module, and the reference."""

from typing import Literal, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rlhf.models import active_adapter, trunk


class TokenOutputs(NamedTuple):
    """What the policy and the value function say about completion tokens. (B, T) float32."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, L) that don't count padding, so that a row means the same however it is padded."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


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
        completion_length: int,
        temperature: float,
        with_values: bool = True,
        entropy_gradient: bool = False,
    ) -> TokenOutputs:
        """Log-probabilities, values and (in training mode) entropy of the last `completion_length` tokens.

        Args:
            input_ids, attention_mask: (B, L).
            with_values: False leaves the values at 0 and saves their computation.
            entropy_gradient: let gradients through the entropy, for an entropy bonus.
        """
        logits, hidden = _logits_and_hidden(self.policy, input_ids, attention_mask, completion_length)
        logprobs, entropy = token_logprobs(
            logits,
            input_ids[:, -completion_length:],
            temperature,
            entropy="graph" if entropy_gradient else "value" if self.training else "none",
        )
        if not with_values:
            return TokenOutputs(logprobs, entropy, torch.zeros_like(logprobs))
        if self.value_model is not None:
            values = _value_model_outputs(self.value_model, input_ids, attention_mask)[:, -completion_length - 1 : -1]
        else:
            if self.value_adapter is not None:
                with active_adapter(self.policy, self.value_adapter):
                    hidden = trunk(self.policy)(
                        input_ids=input_ids,
                        attention_mask=attention_mask,
                        position_ids=positions_of(attention_mask),
                        use_cache=False,
                    )[0][:, -completion_length - 1 : -1]
            elif self.warming_up:
                hidden = hidden.detach()
            with torch.autocast(hidden.device.type, enabled=False):
                values = self.value_head(hidden.float()).squeeze(-1)
        return TokenOutputs(logprobs, entropy, values.float())

    def value_parameters(self) -> set[str]:
        """Names of the trainable parameters that only the value function uses."""
        own = ("value_head.", "value_model.")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
            and (name.startswith(own) or (self.value_adapter is not None and f".{self.value_adapter}." in name))
        }


def _logits_and_hidden(
    model: PreTrainedModel | PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, V) and last hidden states (B, T, d) at the positions before each completion token.

    The hidden states are caught on their way to the language model's head: asking for `output_hidden_states` would keep
    those of every layer, and logits of prompt positions are never computed.
    """
    caught = []
    hook = trunk(model).register_forward_hook(lambda _module, _args, output: caught.append(output[0]))
    try:
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions_of(attention_mask),
            logits_to_keep=completion_length + 1,
            use_cache=False,
        )
    finally:
        hook.remove()
    return output.logits[:, -completion_length - 1 : -1], caught[-1][:, -completion_length - 1 : -1]


def _value_model_outputs(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The score head's output (B, L) at every position of a sequence classifier."""
    classifier = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = classifier.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions_of(attention_mask), use_cache=False
    )[0]
    return classifier.score(hidden).squeeze(-1)


@torch.no_grad()
def reference_logprobs(
    policy: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | None,
    ref_adapter_name: str | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    temperature: float,
) -> torch.Tensor:
    """Log-probabilities (B, T) of the completion tokens under the reference.

    The reference is `ref_model`, or the policy with adapter `ref_adapter_name`, or with its adapters off.
    """

    def logprobs(model: PreTrainedModel | PeftModel) -> torch.Tensor:
        logits, _ = _logits_and_hidden(model, input_ids, attention_mask, completion_length)
        return token_logprobs(logits, input_ids[:, -completion_length:], temperature, entropy="none")[0]

    if ref_model is not None:
        return logprobs(ref_model)
    with active_adapter(policy, ref_adapter_name):
        return logprobs(policy)
