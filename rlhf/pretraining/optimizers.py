"""Muon for the matrices of the layers and AdamW for all other parameters, as one optimizer for a Trainer.

Source: Jordan et al., https://kellerjordan.github.io/posts/muon/; both halves are torch's own classes.
"""

from collections.abc import Callable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Orthogonalized momentum for matrices; AdamW for embeddings, head, norms and biases.

    Muon's steps are scaled to the size of AdamW's (https://arxiv.org/abs/2502.16982, section 2.2), so that one
    learning rate serves both.

    Args:
        matrices: the weights (m, n) of the layers.
        others: all other parameters, without weight decay.
        lr: learning rate.
        weight_decay: of the matrices, decoupled.
        betas, eps: AdamW's.
    """

    def __init__(
        self,
        matrices: list[torch.nn.Parameter],
        others: list[torch.nn.Parameter],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ):
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True)
        super().__init__([*matrices, *others], {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        """Share the parameter groups, so that a scheduler sets the learning rates of both halves."""
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both halves. Returns the closure's loss, if there is one."""
        loss = closure() if closure else None
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._share_groups()


def layer_matrices(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """(weights (m, n) of the stacked layers, all other parameters). Embeddings and heads are among the others."""
    inside = {
        id(parameter)
        for stack in model.modules()
        if isinstance(stack, torch.nn.ModuleList | torch.nn.RNNBase)
        for parameter in stack.parameters()
        if parameter.ndim == 2 and parameter.requires_grad
    }
    inside -= {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in trained if id(p) in inside], [p for p in trained if id(p) not in inside]
