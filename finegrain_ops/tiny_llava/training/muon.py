"""The Muon optimizer, with which this training needs far fewer steps than with AdamW (docs/tiny_llava.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Of x -> a x + b x^3 + c x^5, whose iteration brings every singular value near 1 soonest (Jordan et al. 2024, "Muon").
_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Steps whose singular values are all about 1, for weights W that are matrices. Of their gradient G,

        B <- momentum B + (1 - momentum) G
        W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) orthogonal(momentum B + (1 - momentum) G)

    It is torch.optim.Muon, which there is from torch 2.9 on, but for the dtype of the iteration. That one computes it
    in bfloat16, which on a processor without instructions for it takes 35 to 60 times as long, longer than all the
    rest of a training step.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                mean = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                step = orthogonal(weight.grad.lerp(mean, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(step, alpha=group["lr"] * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)
        return loss


def orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of U S V^T, about: singular values from 0.7 to 1.2, but those that are next to nothing."""
    a, b, c = _COEFFICIENTS
    x = matrix / matrix.norm().clamp(min=1e-7)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:  # of the two squares x x^T and x^T x the smaller is computed
        x = x.T
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if is_tall else x
