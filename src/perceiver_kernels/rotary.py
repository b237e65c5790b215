"""Rotary position embedding (RoFormer, Su et al. 2021, arXiv 2104.09864, section 3.4).

A pair of channels (a, b) at position p is turned by the angle ``p * base ** (-2 i / dim)``; the product of a
turned query and a turned key then depends on their distance alone. Two layouts say which channels pair up:

- ``"half"``: channel i with channel i + dim/2 (GPT-NeoX, perceiver-ar-pytorch, Hugging Face Llama);
- ``"interleaved"``: channel 2 i with channel 2 i + 1 (the paper, GPT-J, perceiver-io).

Angles are worked out in float64 and cast once they lie within half a turn: a bfloat16 position is wrong from
257 on, and a float32 angle at position 1,000,000 by up to 0.03.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from perceiver_kernels.autograd import rotate
from perceiver_kernels.backends import cpu
from perceiver_kernels.spec import DTYPES, accumulator_dtype, has_tangent, needs_gradient

RotaryLayout = Literal["half", "interleaved"]
LAYOUTS: tuple[str, ...] = get_args(RotaryLayout)


def right_aligned_positions(length: int, total: int, *, device: torch.device | str | None = None) -> Tensor:
    """Positions of the last ``length`` of ``total`` inputs: int64 (length,), the last is ``total - 1``."""
    if not 0 <= length <= total:
        raise ValueError(f"length must lie between 0 and total, got length {length} and total {total}")
    return torch.arange(total - length, total, device=device)


def positions_from_padding(pad_mask: Tensor) -> Tensor:
    """Positions that count real inputs only: bool (B, N), True = padding, to int64 (B, N).

    The first real input of each example is at 0, however much padding stands on its left. Padding takes the
    position of the real input before it (0 where there is none).
    """
    return ((~pad_mask).cumsum(dim=-1) - 1).clamp(min=0)


def rotary_cos_sin(
    positions: Tensor,
    dim: int,
    *,
    base: float = 10_000.0,
    endpoint: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles.

    Args:
        positions: any shape ``(...)``, usually (N,) or one row per example (B, N).
        dim: number of rotated channels, even.
        base: wavelengths run from 2 pi to 2 pi base.
        endpoint: whether the longest wavelength is 2 pi base itself, as in Google's Perceiver AR. Otherwise,
            as in RoFormer and everywhere else, one step of the geometric progression below it.
        dtype: float32, or float64 for float64 data.

    Returns:
        cos and sin, each ``(..., dim / 2)`` of ``dtype``: one angle for each pair of channels.
    """
    if dim < 0 or dim % 2:
        raise ValueError(f"dim must be even and not negative, got {dim}")
    wide = torch.float32 if positions.device.type == "mps" else torch.float64  # mps has none
    pairs = dim // 2
    steps = max(pairs - 1 if endpoint else pairs, 1)
    exponents = torch.arange(pairs, device=positions.device, dtype=wide) / -steps
    turns = positions.to(wide).unsqueeze(-1) * (base**exponents / (2 * math.pi))
    angles = ((turns - turns.round()) * (2 * math.pi)).to(dtype)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, layout: RotaryLayout = "half") -> Tensor:
    """Turn the first ``2 R`` channels of every head; the others pass through.

    Args:
        x: (B, L, H, D), any strides, any floating dtype; computed in the wider of its dtype and cos's.
        cos, sin: (L, R) or (B, L, R), one value for each pair of channels, 2 R <= D, from any formula.
        layout: how channels pair up, see the module.

    Returns:
        (B, L, H, D), contiguous (``x`` itself where R is 0), dtype of ``x``. Differentiable in all three;
        keeps no copy of ``x`` for the backward unless ``cos`` or ``sin`` needs a gradient.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    pairs, dim = cos.shape[-1], x.shape[-1]
    if cos.shape != sin.shape:
        raise ValueError(f"cos and sin must have one shape, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if 2 * pairs > dim:
        raise ValueError(f"cos has {pairs} pairs of channels, which is more than the head dim {dim} holds")
    if cos.shape[:-1] not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(
            f"cos must be ({x.shape[1]}, R) or ({x.shape[0]}, {x.shape[1]}, R) for x {tuple(x.shape)}, "
            f"got {tuple(cos.shape)}"
        )
    if pairs == 0:
        return x
    if _in_one_pass(x, cos, sin):
        return rotate(x, cos, sin, interleaved=layout == "interleaved")
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    # split and unbind, not slices: one concatenation in the backward, not a zero-filled copy for each slice.
    if layout == "half":
        a, b, rest = torch.split(x, [pairs, pairs, dim - 2 * pairs], dim=-1)
    else:
        turned, rest = torch.split(x, [2 * pairs, dim - 2 * pairs], dim=-1)
        a, b = torch.unflatten(turned, -1, (pairs, 2)).unbind(-1)
    a, b = (a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)
    if layout == "half":
        return torch.cat((a, b, rest), dim=-1)
    return torch.cat((torch.stack((a, b), dim=-1).flatten(-2), rest), dim=-1)


def _in_one_pass(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the C++ kernel serves the call. A compiler fuses torch's operations itself."""
    return (
        cpu.unavailable(x.device) is None
        and cos.device == sin.device == x.device
        and x.dtype in DTYPES
        and cos.dtype == sin.dtype == accumulator_dtype(x)
        and not needs_gradient((cos, sin))
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not has_tangent((x, cos, sin))
    )
