"""Which tile a kernel takes, and into how many parts the keys are split: pure functions of shape and device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """What the choice of tiles and splits may depend on: ``sm_80``, ``gfx942`` ..., and its processor count."""

    arch: str
    processors: int


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def programs(self) -> int:
        """How many of them a processor is expected to hold at a time: registers for 8 warps."""
        return max(1, 8 // self.num_warps)


SHORT_ROWS = 16  # up to so many packed rows a program has nothing but these, and many keys


def padded(dim: int) -> int:
    """The power of two, at least 16, that holds ``dim``."""
    return max(16, 1 << (dim - 1).bit_length())


def head_parts(dim: int, longest: int) -> tuple[int, int]:
    """The one or two powers of two (0 for none) in which a head dim lies on chip: 64 + 0, 64 + 32, 64 + 64.

    One where it is at most ``longest`` and either less than that or wasting less than a quarter.
    """
    whole = padded(dim)
    if whole <= max(16, longest // 2) or (whole <= longest and dim > whole * 3 // 4):
        return whole, 0
    return whole // 2, padded(dim - whole // 2)


def forward_config(rows: int, head_dim: int, dtype: torch.dtype, arch: str) -> Config:
    dim = padded(head_dim)
    if rows <= SHORT_ROWS:
        return Config(16, 32 if dtype == torch.float32 else 64, 4, 2)
    if dtype == torch.float32:
        return Config(32, 32, 4 if dim <= 64 else 8, 1)
    return {256: Config(64, 32, 8, 2), 128: Config(128, 64, 8, 2)}.get(dim, Config(128, 64, 4, 2))


def backward_config(rows: int, head_dim: int, dtype: torch.dtype, arch: str) -> Config:
    dim = padded(head_dim)
    block_m = 16 if rows <= SHORT_ROWS else 32
    if dtype == torch.float32:
        return Config(block_m, 32, 8, 1)
    return Config(block_m, {256: 32, 128: 64}.get(dim, 128), 8, 2)


@functools.lru_cache(maxsize=1024)
def parts(programs: int, key_blocks: int, slots: int) -> int:
    """Into how many runs of key blocks the work of each program is cut, to fill ``slots`` programs at a time.

    Takes the number that minimises the time of the waves, in key blocks: each program pays two blocks for its
    start and end, the merge one for every 16 parts. Of equals the fewest.
    """

    def cost(count: int) -> int:
        waves = -(-programs * count // slots)
        return 16 * waves * (-(-key_blocks // count) + 2) + (count if count > 1 else 0)

    return min(range(1, max(1, min(key_blocks, 4 * slots)) + 1), key=cost)
