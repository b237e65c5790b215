"""Which tile a kernel takes: pure functions of shape and device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """What the choice of tiles and splits may depend on: ``sm_80``, ``gfx942`` ..., and its processors."""

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


# The defaults, by the longest head dim that they serve, chosen without a GPU: what `make static` finds to fit
# into shared memory, not to spill and, by its model, to keep the tensor cores busiest.
_FORWARD: dict[str, dict[int, Config]] = {
    # 163 KiB. 32 rows per warp feed two products with each fragment of K; two programs share a processor.
    "sm_80": {
        32: Config(128, 32, 4, 3),
        64: Config(128, 64, 4, 3),
        128: Config(128, 32, 4, 3),
        192: Config(64, 16, 4, 3),
        256: Config(128, 16, 8, 3),
    },
    # 99 KiB: two programs have 49 KiB each. Its tensor cores are half as fast: 16 rows per warp will do.
    "sm_86": {
        64: Config(128, 32, 4, 3),
        128: Config(64, 64, 4, 2),
        192: Config(64, 16, 4, 3),
        256: Config(128, 16, 8, 3),
    },
    # 227 KiB. Groups of four warps multiply 64 rows. Up to 128 the fastest on an H100.
    "sm_90": {
        64: Config(128, 64, 4, 3),
        128: Config(128, 128, 8, 3),
        192: Config(128, 64, 8, 3),
        256: Config(128, 32, 8, 3),
    },
    # 227 KiB. The tensor cores reach full speed with 128 rows.
    "sm_100": {
        192: Config(128, 64, 8, 3),
        256: Config(128, 64, 8, 2),
    },
    # 64 KiB (gfx942), 160 KiB (gfx950); up to 256 registers two waves share a SIMD.
    "gfx": {
        64: Config(128, 64, 4, 2),
        256: Config(128, 32, 4, 2),
    },
    # No tensor cores, so registers bind.
    "float32": {
        64: Config(32, 32, 8, 1),
        256: Config(16, 32, 8, 1),
    },
    "gfx float32": {
        64: Config(32, 32, 4, 1),
        256: Config(16, 32, 4, 1),
    },
}
# Registers bind: dk and dv of all the keys of a block live there. Up to a head dim of 128 a warp has 16 keys
# of its own or repeats another's work; beyond, the warps share out the head dim.
_BACKWARD: dict[str, dict[int, Config]] = {
    "sm_80": {
        32: Config(32, 128, 4, 3),
        64: Config(16, 128, 4, 3),
        128: Config(32, 128, 8, 3),
        192: Config(64, 32, 4, 2),
        256: Config(64, 64, 8, 2),
    },
    "sm_86": {
        64: Config(32, 64, 4, 3),
        128: Config(16, 64, 4, 4),
        256: Config(32, 32, 8, 3),
    },
    "sm_90": {
        32: Config(32, 64, 4, 3),
        64: Config(32, 128, 4, 3),  # the fastest on an H100
        128: Config(32, 128, 8, 3),
        256: Config(64, 64, 8, 2),
    },
    "sm_100": {
        32: Config(32, 64, 4, 3),
        64: Config(32, 128, 4, 2),
        128: Config(64, 64, 8, 2),
        192: Config(32, 64, 8, 2),
        256: Config(32, 32, 8, 2),
    },
    "gfx": {
        64: Config(32, 128, 4, 2),
        128: Config(32, 64, 4, 1),
        192: Config(32, 32, 4, 1),
        256: Config(16, 32, 4, 1),
    },
    "float32": {
        32: Config(32, 32, 4, 1),
        64: Config(32, 32, 8, 1),
        128: Config(16, 32, 8, 1),
        256: Config(16, 16, 8, 1),
    },
    "gfx float32": {
        128: Config(16, 32, 4, 1),
        256: Config(16, 16, 4, 1),
    },
}
_FAMILIES = {
    "sm_86": "sm_86", "sm_89": "sm_86", "sm_120": "sm_86", "sm_121": "sm_86",
    "sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100",
}  # fmt: skip
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
    """The default for ``rows`` packed rows."""
    family = _family(dtype, arch)
    config = _serving(_FORWARD[family], head_dim)
    if dtype == torch.float32:
        return replace(config, block_m=16) if rows <= SHORT_ROWS else config
    if rows <= SHORT_ROWS:  # a stream of keys: many bytes under way, several programs on a processor
        return Config(16, 64 if head_dim <= 64 else 32, 4, 2 if family == "gfx" else 3)
    if rows <= 64 < config.block_m:
        block_n = min(config.block_n, 64 if head_dim <= 128 else 32)
        return replace(config, block_m=64, block_n=block_n, num_warps=4)
    return config


def backward_config(rows: int, head_dim: int, dtype: torch.dtype, arch: str) -> Config:
    """The default for ``rows`` queries of a head."""
    config = _serving(_BACKWARD[_family(dtype, arch)], head_dim)
    if dtype == torch.float32 or rows > SHORT_ROWS:
        return config
    return replace(config, block_m=16, block_n=config.block_n if head_dim <= 128 else 32)


def _family(dtype: torch.dtype, arch: str) -> str:
    """Which rows of the tables serve ``arch``; what is unknown is taken for an A100."""
    if dtype == torch.float32:
        return "gfx float32" if arch.startswith("gfx") else "float32"
    return "gfx" if arch.startswith("gfx") else _FAMILIES.get(arch, "sm_80")


def _serving(table: dict[int, Config], head_dim: int) -> Config:
    return next(config for longest, config in table.items() if head_dim <= longest)
