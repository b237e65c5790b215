"""Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") in float32.

For the demo: torch.optim.Muon works in bfloat16, which is slow on processors without bfloat16 instructions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the paper's quintic, steepest at 0
ITERATIONS = 5


def orthogonalise(x: Tensor) -> Tensor:
    """The nearest matrix of orthonormal rows or columns, roughly: (n, rows, columns), by Newton-Schulz."""
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT
    a, b, c = COEFFICIENTS
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised: for the weight matrices inside a model, not its embeddings."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; matrices of one shape are done together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in by_shape.items():
                gradient = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in matrices])
                buffer = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(gradient))
                buffer.mul_(group["momentum"]).add_(gradient)
                update = orthogonalise(gradient + group["momentum"] * buffer)
                size = group["lr"] * max(1.0, rows / columns) ** 0.5
                for p, direction in zip(matrices, update, strict=True):
                    p.sub_(direction, alpha=size)
