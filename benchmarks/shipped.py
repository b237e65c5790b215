"""The Triton kernels as they ship, in their default configurations, compiled for a GPU that isn't there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.sass import price
from benchmarks.sass.resources import LIMITS, Resources, parse_amdgcn
from perceiver_kernels.backends.triton.compile import compile_launch
from perceiver_kernels.backends.triton.configs import Device, backward_config, forward_config
from perceiver_kernels.backends.triton.launch import Launch, backward_launches, forward_launches, make_problem
from perceiver_kernels.spec import AttentionSpec, empty_gradients, empty_outputs

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
DIMS = (32, 64, 96, 128, 192, 256)
OPTIONS = ("key_mask", "softcap", "dropout", "packed", "offsets", "grouped")
PRICED = ("sm_80", "sm_90")  # those of which benchmarks.sass has a machine table
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_BATCH, _HEADS, _KEYS = 4, 8, 16384


@dataclass(frozen=True)
class Build:
    """One pass of one problem for one architecture; ``rows`` is the number of queries."""

    arch: str
    direction: str
    dim: int
    dtype: str
    rows: int
    option: str = ""

    @property
    def problem(self) -> str:
        return f"D{self.dim} {self.dtype} M{self.rows} {self.option}".rstrip()


def builds(archs: tuple[str, ...] = ARCHS, quick: bool = False) -> Iterator[Build]:
    """What ships; ``quick``: what matters most. float16 compiles like bfloat16: two dims stand for it."""
    for arch in archs:
        for direction in ("forward", "backward"):
            for dim, rows in itertools.product((64, 128) if quick else DIMS, (1, 1024)):
                yield Build(arch, direction, dim, "bf16", rows)
            if quick:
                continue
            for dim in DIMS:
                yield from (Build(arch, direction, dim, "f32", rows) for rows in (1, 1024))
                if direction == "forward":
                    yield Build(arch, direction, dim, "bf16", 64)
            for dim in (64, 128):
                yield Build(arch, direction, dim, "f16", 1024)
                yield from (Build(arch, direction, dim, "bf16", 1024, option) for option in OPTIONS)


def launches(build: Build) -> list[tuple[Launch, str]]:
    """The kernels of ``build`` on tensors without memory, each with its configuration in words."""
    dtype, packed = _DTYPES[build.dtype], build.option == "packed"
    kv_heads = 2 if build.option == "grouped" else _HEADS

    def empty(heads: int, rows: int) -> Tensor:
        shape = (_BATCH * rows, heads, build.dim) if packed else (_BATCH, heads, rows, build.dim)
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value = empty(_HEADS, build.rows), empty(kv_heads, _KEYS), empty(kv_heads, _KEYS)
    offsets = torch.empty(_BATCH, dtype=torch.int64, device="meta")
    spec = AttentionSpec(
        is_causal=True,
        q_offset=_KEYS - build.rows,
        scale=build.dim**-0.5,
        softcap=30.0 if build.option == "softcap" else 0.0,
        dropout_p=0.1 if build.option == "dropout" else 0.0,
        q_offsets=offsets if build.option in ("offsets", "packed") else None,
        key_mask=torch.empty(_BATCH, _KEYS, dtype=torch.bool, device="meta")
        if build.option == "key_mask"
        else None,
        cu_seqlens_q=torch.arange(_BATCH + 1) * build.rows if packed else None,
        cu_seqlens_k=torch.arange(_BATCH + 1) * _KEYS if packed else None,
        dropout_seed=torch.zeros(2, dtype=torch.int64, device="meta") if build.option == "dropout" else None,
    )
    out, lse = empty_outputs(query, value)
    problem = make_problem(query, key, value, spec)
    if build.direction == "forward":
        # few rows split over many processors, many rows on few don't: both ways to write out, and the merge
        device = Device(build.arch, 108 if build.rows == 1 else 1)
        config = forward_config(problem.rows, build.dim, dtype, build.arch)
        found = list(forward_launches(problem, query, key, value, out, lse, device, config))
    else:
        device = Device(build.arch, 108)
        config = backward_config(problem.M, build.dim, dtype, build.arch)
        gradients, dlse = empty_gradients(query, key, value), torch.empty_like(lse)
        tensors = (torch.empty_like(out), dlse, query, key, value, out, lse, gradients)
        found = list(backward_launches(problem, *tensors, device, config))
    words = f"{config.block_m}x{config.block_n} w{config.num_warps} st{config.num_stages}"
    main = ("attention_forward", "attention_backward")
    return [(each, words if each.kernel.__name__ in main else "") for each in found]


def measure(build: Build) -> list[dict[str, Any]]:
    """One row per kernel of ``build``; those that don't compile carry ``error``."""
    rows = []
    for launch, config in launches(build):
        row = {
            "arch": build.arch,
            "kernel": launch.kernel.__name__,
            "problem": build.problem,
            "dim": build.dim,
            "config": config,
            "limit": LIMITS[build.arch].shared_per_block,
        }
        try:
            compiled = compile_launch(launch, build.arch)
            row |= _amd(compiled) if build.arch.startswith("gfx") else _nvidia(compiled, launch, build)
        except Exception as error:  # whatever Triton's compiler and ptxas raise
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
    return rows


def _nvidia(compiled: Any, launch: Launch, build: Build) -> dict[str, Any]:
    report = price(compiled.asm["cubin"], threads=32 * launch.num_warps, shared=compiled.metadata.shared,
                   simulate=build.arch in PRICED)  # fmt: skip
    loops = sorted(report.loops, key=lambda loop: loop.address)
    # The forward's first loop is the one over keys that all rows see, the backward's the one with masks.
    names = ("full", "edge") if build.direction == "forward" else ("edge", "full")
    return {
        "registers": report.registers,
        "spills": report.spill_instructions,
        "shared": report.shared,
        "loops": {
            name: {"instructions": loop.instructions, "tensor": loop.tensor_instructions,
                   "spills": loop.mix.get("spill", 0), "limiter": loop.limiter, "simulated": loop.simulated}
            for name, loop in zip(names, loops, strict=False)
        },
    }  # fmt: skip


def _amd(compiled: Any) -> dict[str, Any]:
    """Vector registers only: scalar ones that spill go into lanes of a vector register, not to memory."""
    resources: Resources = next(iter(parse_amdgcn(compiled.asm["amdgcn"]).values()))
    return {
        "registers": resources.registers,
        "spills": resources.stack // 4,
        "shared": compiled.metadata.shared,
        "loops": {},
    }
