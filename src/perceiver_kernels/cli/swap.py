"""One training step of the PyPI package perceiver-ar-pytorch: as published, with the op inside, and ours.

Each function takes and returns plain JSON values, so that it can run in a fresh process.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_kernels.cli.measure import clock
from perceiver_kernels.cli.memory import peak_growth
from perceiver_kernels.models import PerceiverAR, PerceiverARConfig

VOCABULARY = 256
MODELS = {  # what is compared, and what it is called
    "published": "perceiver-ar-pytorch as published",
    "swapped": "the same with our attention",
    "ours": "our PerceiverAR",
}
DTYPES = ("float32", "bfloat16")  # of weights and all: theirs doesn't run under autocast
SHAPE = {"positions": 32_768, "latents": 1024, "dim": 512, "depth": 2, "heads": 8}


def build(shape: dict[str, int], model: str) -> nn.Module:
    """One of MODELS with fixed weights. Theirs are the same in both; ours are others, of the same sizes."""
    torch.manual_seed(0)
    if model == "ours":
        config = PerceiverARConfig(
            vocab_size=VOCABULARY,
            dim=shape["dim"],
            depth=shape["depth"],
            num_heads=shape["heads"],
            max_seq_len=shape["positions"],
            num_latents=shape["latents"],
            positions="learned",
            rotary_fraction=0.5,
        )
        return PerceiverAR(config)

    import perceiver_ar_pytorch

    from perceiver_kernels.integrations.perceiver_ar_pytorch import swap

    theirs: nn.Module = perceiver_ar_pytorch.PerceiverAR(
        num_tokens=VOCABULARY,
        dim=shape["dim"],
        depth=shape["depth"],
        heads=shape["heads"],
        dim_head=shape["dim"] // shape["heads"],
        max_seq_len=shape["positions"],
        cross_attn_seq_len=shape["positions"] - shape["latents"],
    )
    return swap(theirs) if model == "swapped" else theirs


def tokens(shape: dict[str, int]) -> Tensor:
    """Random input."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (1, shape["positions"]), generator=draw)


def step(model: nn.Module, x: Tensor) -> None:
    """Forward with loss, and backward."""
    model.zero_grad(set_to_none=True)
    logits = model(x)
    loss = F.cross_entropy(logits.float().flatten(0, 1), x[:, -logits.shape[1] :].flatten())
    loss.backward()  # type: ignore[no-untyped-call]


def measure_step(argument: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of the first step, time of later ones. `argument`: shape, model, dtype, steps, threads."""
    torch.set_num_threads(argument["threads"])
    dtype = getattr(torch, argument["dtype"])
    tiny = {**argument["shape"], "positions": 128, "latents": 64}
    step(build(tiny, argument["model"]).to(dtype), tokens(tiny))
    model, x = build(argument["shape"], argument["model"]).to(dtype), tokens(argument["shape"])
    peak = peak_growth(lambda: step(model, x))
    seconds = [clock(lambda: step(model, x)) for _ in range(argument["steps"])]
    return {"peak_bytes": peak, "seconds": seconds, "median_s": statistics.median(seconds)}


@torch.no_grad()
def compare_logits(argument: dict[str, Any]) -> dict[str, float]:
    """Largest and relative difference of the two models' logits. `argument`: shape, threads."""
    torch.set_num_threads(argument["threads"])
    x = tokens(argument["shape"])
    want, got = (build(argument["shape"], model)(x) for model in ("published", "swapped"))
    return {
        "max_difference": (got - want).abs().max().item(),
        "largest_logit": want.abs().max().item(),
        "relative_error": ((got - want).norm() / want.norm()).item(),
        "same_argmax": (got.argmax(-1) == want.argmax(-1)).float().mean().item(),
    }
