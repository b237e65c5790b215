"""From a call to kernel launches, as data: whoever runs, compiles or executes them takes the same list."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.triton import backward_kernels, forward_kernels
from perceiver_kernels.backends.triton.configs import Config, Device, head_parts, padded
from perceiver_kernels.spec import AttentionSpec
from perceiver_kernels.splits import backward_runs, forward_splits

_FORWARD_PART, _BACKWARD_PART = (
    64,
    256,
)  # longest part of a head dim: shorter ones spill less, longer ones feed 8 warps


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what to run, on which grid, with which arguments."""

    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    fuses: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Of the compiler.

        Multiplications and additions fuse where the exponent's argument counts on it; elsewhere two threads
        that hold the same sum might fuse different products into it.
        """
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fuses}

    def run(self) -> None:
        if math.prod(self.grid):
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


@dataclass(frozen=True, eq=False)
class Problem:
    """The sizes of a call; packed, B is the number of sequences, M and N the lengths of the longest."""

    B: int
    H: int
    Hkv: int
    M: int
    N: int
    D: int
    DV: int
    dtype: torch.dtype
    spec: AttentionSpec

    @property
    def group(self) -> int:
        return self.H // self.Hkv

    @property
    def rows(self) -> int:
        """Rows that share each load of a key: the packed rows of one key head."""
        return self.M * self.group


def make_problem(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Problem:
    if spec.cu_seqlens_q is None or spec.cu_seqlens_k is None:
        batch, heads, queries, _ = query.shape
        kv_heads, keys = key.shape[1:3]
    else:
        batch, heads, kv_heads = len(spec.cu_seqlens_q) - 1, query.shape[1], key.shape[1]
        queries, keys = (
            int(lengths.diff().max()) if batch else 0 for lengths in (spec.cu_seqlens_q, spec.cu_seqlens_k)
        )
    dims = (query.shape[-1], value.shape[-1])
    return Problem(batch, heads, kv_heads, queries, keys, *dims, query.dtype, spec)


def row_strides(name: str, tensor: Tensor) -> dict[str, int]:
    """Strides of example, head and row; packed rows belong to no example's slice."""
    b, h, m = (0, tensor.stride(1), tensor.stride(0)) if tensor.dim() == 3 else tensor.stride()[:3]
    return {f"stride_{name[:-1]}b": b, f"stride_{name[:-1]}h": h, f"stride_{name}": m}


def lse_strides(lse: Tensor) -> dict[str, int]:
    return {"stride_lb": 0 if lse.dim() == 2 else lse.stride(0), "stride_lh": lse.stride(-2)}


def _score_arguments(problem: Problem) -> dict[str, Any]:
    spec = problem.spec
    threshold = min(int(spec.dropout_p * 2**32), 2**32 - 1)
    return {
        "p_offsets": spec.q_offsets,
        # wide: next to loads of single bytes Triton spreads the products' operands as if for int8
        "p_key_mask": None if spec.key_mask is None else spec.key_mask.to(torch.int32),
        "p_cu_q": spec.cu_seqlens_q,
        "p_cu_k": spec.cu_seqlens_k,
        "p_seed": spec.dropout_seed,
        "kv_heads": problem.Hkv,
        "queries": problem.M,
        "keys": problem.N,
        "q_offset": max(-problem.M, min(spec.q_offset, problem.N)),
        "softcap": float(spec.softcap),
        "threshold": threshold - (threshold >> 31 << 32),  # as int32, whatever its size
        "keep_factor": 1.0 / (1.0 - spec.dropout_p),
    }


def _score_constants(problem: Problem, config: Config, device: Device, longest: int) -> dict[str, Any]:
    spec = problem.spec
    return {
        "GROUP": problem.group,
        "D": problem.D,
        "DV": problem.DV,
        **_head_parts("D", problem.D, longest),
        **_head_parts("DV", problem.DV, longest),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "IS_CAUSAL": spec.is_causal,
        "IS_PACKED": spec.is_packed,
        "HAS_OFFSETS": spec.q_offsets is not None,
        "HAS_KEY_MASK": spec.key_mask is not None,
        "HAS_SOFTCAP": spec.softcap > 0.0,
        "HAS_DROPOUT": spec.dropout_seed is not None,
        "PRECISION": _precision(problem, device),
    }


def _head_parts(name: str, dim: int, longest: int) -> dict[str, int]:
    return dict(zip((f"{name}0", f"{name}1"), head_parts(dim, longest), strict=True))


def _precision(problem: Problem, device: Device) -> str:
    """float32 products are float32's own unless the user has asked torch for faster ones.

    Even then where the GPU has none, or where their operands would not fit into shared memory.
    """
    asked = problem.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    able = device.arch.startswith("sm_") or device.arch == "gfx942"
    return "tf32" if asked and able and max(problem.D, problem.DV) <= 128 else "ieee"


def _natural_score(problem: Problem) -> bool:
    """Whether the kernels form the scaled score itself (see ``primitives.score``)."""
    return problem.spec.softcap > 0.0 or problem.dtype == torch.float32


def forward_launches(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, device: Device,
    config: Config,
) -> Iterator[Launch]:  # fmt: skip
    """The kernels that fill ``out`` and ``lse``; partial results live until the iterator is exhausted."""
    spec = problem.spec
    row_blocks, key_blocks = -(-problem.rows // config.block_m), -(-problem.N // config.block_n)
    programs = row_blocks * problem.B * problem.Hkv
    merge = 1 + 2 * min(problem.rows, config.block_m) // config.block_n
    splits = forward_splits(programs, key_blocks, device.processors * config.programs, merge)
    if splits == 1:
        part, part_lse = out, lse
    else:
        part = out.new_empty((splits, *lse.shape, problem.DV), dtype=torch.float32)
        part_lse = lse.new_empty((splits, *lse.shape))
    natural = _natural_score(problem)
    scale = spec.scale if natural else abs(spec.scale)
    arguments = {
        "p_q": query, "p_k": key, "p_v": value, "p_out": part, "p_lse": part_lse,
        **row_strides("qm", query), **row_strides("kn", key), **row_strides("vn", value),
        **(row_strides("om", out) if splits == 1 else _part_strides(part)),
        "stride_os": 0 if splits == 1 else part.stride(0),
        "stride_ls": 0 if splits == 1 else part_lse.stride(0),
        **lse_strides(lse),
        "row_blocks": row_blocks, "scale": scale,
        # a scale of 0 becomes the smallest normal number: -inf * 0 is NaN
        "exponent": max(1.0 if natural else scale, 2.0**-126) * math.log2(math.e),
        **_score_arguments(problem),
    }  # fmt: skip
    constants = _score_constants(problem, config, device, _FORWARD_PART) | {
        "IS_NEGATIVE": not natural and spec.scale < 0
    }
    yield Launch(
        forward_kernels.attention_forward,
        (programs, splits),
        arguments,
        constants,
        config.num_warps,
        config.num_stages,
        fuses=True,
    )
    if splits > 1:
        yield Launch(
            forward_kernels.combine_splits,
            (lse.numel(), 1),
            {
                "p_parts": part, "p_part_lses": part_lse, "p_out": out, "p_lse": lse,
                **row_strides("om", out), "heads": problem.H, "queries": lse.shape[-1], "splits": splits,
            },
            {"DV": problem.DV, **_head_parts("DV", problem.DV, _FORWARD_PART), "BLOCK_S": padded(splits)},
            num_warps=1,
        )  # fmt: skip


def _part_strides(part: Tensor) -> dict[str, int]:
    b = 0 if part.dim() == 4 else part.stride(1)
    return {"stride_ob": b, "stride_oh": part.stride(-3), "stride_om": part.stride(-2)}


def backward_launches(
    problem: Problem, dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor, gradients: tuple[Tensor, Tensor, Tensor], device: Device, config: Config,
) -> Iterator[Launch]:  # fmt: skip
    """The kernels that fill ``(dq, dk, dv)``; delta and the slabs live until the iterator is exhausted."""
    spec = problem.spec
    dq, dk, dv = gradients
    tile = config.block_m
    row_blocks = -(-problem.M // tile)
    tiles = query.shape[0] // tile + problem.B if spec.is_packed else row_blocks  # of a head
    tile_strides = {"stride_tb": 0 if spec.is_packed else tiles * problem.H, "stride_th": tiles}
    tiles *= problem.H if spec.is_packed else problem.H * problem.B
    shift, delta = lse.new_empty((2, tiles * tile), dtype=torch.float32)
    scores = _score_arguments(problem)
    yield Launch(
        backward_kernels.attention_delta,
        (row_blocks * problem.B * problem.H, 1),
        {
            "p_dout": dout, "p_out": out, "p_lse": lse, "p_dlse": dlse, "p_shift": shift, "p_delta": delta,
            **row_strides("gm", dout), **row_strides("om", out), **lse_strides(lse), **_dlse_strides(dlse),
            **tile_strides, "row_blocks": row_blocks, "heads": problem.H,
            **{name: scores[name] for name in ("p_cu_q", "queries")},
        },
        {"DV": problem.DV, **_head_parts("DV", problem.DV, _BACKWARD_PART), "BLOCK_M": tile,
         "IS_WIDE": problem.dtype == torch.float32,
         "IS_PACKED": spec.is_packed, "HAS_DLSE": dlse is not None},
    )  # fmt: skip

    key_blocks = -(-problem.N // config.block_n)
    dims = sum(head_parts(problem.D, _BACKWARD_PART))
    slots = device.processors * config.programs
    runs = backward_runs(problem.B * problem.Hkv, key_blocks, slots, tiles * tile * dims * 4)
    slabs = lse.new_empty((runs, tiles * tile * dims), dtype=torch.float32)
    may_die = spec.key_mask is not None or spec.q_offsets is not None or spec.is_packed or spec.q_offset < 0
    yield Launch(
        backward_kernels.attention_backward,
        (runs * problem.B * problem.Hkv, 1),
        {
            "p_q": query, "p_k": key, "p_v": value, "p_dout": dout, "p_shift": shift, "p_delta": delta,
            "p_slabs": slabs, "p_dk": dk, "p_dv": dv,
            **row_strides("qm", query), **row_strides("kn", key), **row_strides("vn", value),
            **row_strides("gm", dout), **row_strides("dkn", dk), **row_strides("dvn", dv), **tile_strides,
            "stride_sr": slabs.stride(0), "runs": runs, "scale": spec.scale,
            "exponent": (1.0 if _natural_score(problem) else spec.scale) * math.log2(math.e),
            **scores,
        },
        {**_score_constants(problem, config, device, _BACKWARD_PART), "HAS_DEAD_ROWS": may_die,
         "WARPS": config.num_warps},
        config.num_warps,
        config.num_stages,
        fuses=True,
    )  # fmt: skip
    shared = ("p_offsets", "p_cu_q", "p_cu_k", "queries", "keys", "q_offset")
    yield Launch(
        backward_kernels.reduce_slabs,
        (row_blocks * problem.B * problem.H, 1),
        {
            "p_slabs": slabs, "p_dq": dq, **row_strides("qm", dq), **tile_strides,
            "stride_sr": slabs.stride(0), "row_blocks": row_blocks, "heads": problem.H, "runs": runs,
            "scale": spec.scale,
            **{name: scores[name] for name in shared},
        },
        {"D": problem.D, **_head_parts("D", problem.D, _BACKWARD_PART), "BLOCK_M": tile,
         "BLOCK_N": config.block_n, "WARPS": config.num_warps, "IS_CAUSAL": spec.is_causal,
         "IS_PACKED": spec.is_packed, "HAS_OFFSETS": spec.q_offsets is not None},
    )  # fmt: skip


def _dlse_strides(dlse: Tensor | None) -> dict[str, int]:
    if dlse is None:
        return {"stride_eb": 0, "stride_eh": 0, "stride_em": 0}
    b = 0 if dlse.dim() == 2 else dlse.stride(0)
    return {"stride_eb": b, "stride_eh": dlse.stride(-2), "stride_em": dlse.stride(-1)}
