"""Log-probabilities of tokens."""

from typing import Literal

import torch

Entropy = Literal["none", "value", "graph"]


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
