"""One training step of the PyPI package perceiver-ar-pytorch, as published and with the op inside.

Each function takes and returns plain JSON values, so that it can run in a fresh process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.cli.measure import clock
from perceiver_kernels.cli.memory import peak_growth

VOCABULARY = 256
SHAPE = {"positions": 32_768, "latents": 1024, "dim": 512, "depth": 2, "heads": 8}


def build(shape: dict[str, int], swapped: bool) -> nn.Module:
    """Their model with fixed weights, with or without our attention."""
    from perceiver_ar_pytorch import PerceiverAR

    from perceiver_kernels.integrations.perceiver_ar_pytorch import swap

    torch.manual_seed(0)
    model: nn.Module = PerceiverAR(
        num_tokens=VOCABULARY,
        dim=shape["dim"],
        depth=shape["depth"],
        heads=shape["heads"],
        dim_head=shape["dim"] // shape["heads"],
        max_seq_len=shape["positions"],
        cross_attn_seq_len=shape["positions"] - shape["latents"],
    )
    return swap(model) if swapped else model


def tokens(shape: dict[str, int]) -> Tensor:
    """Random input; token 0 is padding to their loss, so there is none."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (1, shape["positions"]), generator=draw)


def step(model: nn.Module, x: Tensor) -> None:
    """Forward with loss, and backward."""
    model.zero_grad(set_to_none=True)
    model(x, labels=x).backward()


def measure_step(argument: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of the first step, time of later ones. `argument`: shape, swapped, steps, threads."""
    torch.set_num_threads(argument["threads"])
    tiny = {**argument["shape"], "positions": 128, "latents": 64}
    step(build(tiny, argument["swapped"]), tokens(tiny))
    model, x = build(argument["shape"], argument["swapped"]), tokens(argument["shape"])
    peak = peak_growth(lambda: step(model, x))
    return {"peak_bytes": peak, "seconds": [clock(lambda: step(model, x)) for _ in range(argument["steps"])]}


@torch.no_grad()
def compare_logits(argument: dict[str, Any]) -> dict[str, float]:
    """Largest and relative difference of the two models' logits. `argument`: shape, threads."""
    torch.set_num_threads(argument["threads"])
    x = tokens(argument["shape"])
    want, got = (build(argument["shape"], swapped)(x) for swapped in (False, True))
    return {
        "max_difference": (got - want).abs().max().item(),
        "largest_logit": want.abs().max().item(),
        "relative_error": ((got - want).norm() / want.norm()).item(),
        "same_argmax": (got.argmax(-1) == want.argmax(-1)).float().mean().item(),
    }
