"""Absolute positions as vectors of ``dim`` channels, to be added to embeddings.

Positions are indices into an array of some ``shape`` in row-major order: (length,) for a sequence, (height,
width, channels) for the bytes of an image. Each axis has its own share of the channels, so that no two places
look alike; learned positions are one table with a row for each place on each axis, and a position is the sum
of its rows.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_kernels.rotary import rotary_cos_sin


def coordinates(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Positions (...) from 0 to prod(shape) - 1, to their index on each axis: int64 (..., len(shape))."""
    axes = []
    for size in reversed(shape):
        axes.append(positions % size)
        positions = positions // size
    return torch.stack(axes[::-1], dim=-1)


def sinusoids(
    positions: Tensor,
    shape: tuple[int, ...],
    dim: int,
    *,
    base: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sines and cosines (Vaswani et al. 2017) of the index on each axis, one axis after the other.

    Args:
        positions: (...).
        shape: extent of each axis.
        dim: even, at least 2 for each axis.
        base: wavelengths run from 2 pi to 2 pi base. None: the extent of the axis.
        dtype: float32, or float64 for float64 data.

    Returns:
        (..., dim).
    """
    parts = []
    places = coordinates(positions, shape).unbind(-1)
    for place, size, (begin, end) in zip(places, shape, _shares(dim, len(shape)), strict=True):
        axis_base = float(size) if base is None else base
        cos, sin = rotary_cos_sin(place, end - begin, base=axis_base, dtype=dtype)
        parts += [sin, cos]
    return torch.cat(parts, dim=-1)


def fourier_features(positions: Tensor, sizes: tuple[int, ...], bands: int) -> Tensor:
    """Positions as features of the inputs, section 3.2 of the Perceiver paper.

    Args:
        positions: integer (..., len(sizes)), from 0 to size - 1 on each axis.
        sizes: extent of each axis.
        bands: frequencies for each axis, evenly from 1 to the axis' Nyquist frequency ``size / 2``.

    Returns:
        float32 (..., len(sizes) * (2 bands + 1)): p, sin(pi f p) and cos(pi f p) with p in [-1, 1].
    """
    if positions.shape[-1] != len(sizes):
        raise ValueError(f"positions must be (..., {len(sizes)}), got {tuple(positions.shape)}")
    wide = torch.float32 if positions.device.type == "mps" else torch.float64  # mps has none
    features = []
    for axis, size in enumerate(sizes):
        place = (2 * positions[..., axis].to(wide) / max(size - 1, 1) - 1).unsqueeze(-1)
        turns = place * torch.linspace(0.5, size / 4, bands, device=positions.device, dtype=wide)
        angles = ((turns - turns.round()) * (2 * math.pi)).float()
        features += [place.float(), angles.sin(), angles.cos()]
    return torch.cat(features, dim=-1)


def fourier(positions: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """Fourier features of the index on each axis, as many bands as fit, zeros after: float32 (..., dim)."""
    bands = (dim // len(shape) - 1) // 2
    features = fourier_features(coordinates(positions, shape), shape, bands)
    return F.pad(features, (0, dim - features.shape[-1]))


def table_rows(positions: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Rows of the table of learned positions whose sum stands for each position: (...) for each axis."""
    begins = accumulate(shape[:-1], initial=0)
    return tuple(
        place + begin for place, begin in zip(coordinates(positions, shape).unbind(-1), begins, strict=True)
    )


def initial_table(shape: tuple[int, ...], dim: int, *, base: float | None = None) -> Tensor:
    """The table of learned positions (sum(shape), dim) that stands for the :func:`sinusoids`."""
    blocks = []
    for size, (begin, end) in zip(shape, _shares(dim, len(shape)), strict=True):
        features = sinusoids(torch.arange(size), (size,), end - begin, base=base)
        blocks.append(F.pad(features, (begin, dim - end)))
    return torch.cat(blocks)


def _shares(dim: int, axes: int) -> list[tuple[int, int]]:
    """First channel of each axis and the one after its last: even shares, what is left to the last axis."""
    begins = [2 * (dim // (2 * axes)) * axis for axis in range(axes)]
    return list(zip(begins, [*begins[1:], dim], strict=True))
