"""CUDA C++ kernels for NVIDIA GPUs: tensor cores, keys split over the whole GPU, nothing of size M x N.

Their rows begin at multiples of 16 bytes; a tensor whose rows don't is copied first.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from perceiver_kernels import _library
from perceiver_kernels._compile import constant_result
from perceiver_kernels.spec import AttentionSpec, dtype_name, empty_gradients, empty_outputs
from perceiver_kernels.splits import backward_runs, forward_splits

MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16)
_SYSTEM_SHARED = 1024  # bytes of shared memory that every block costs beside its own
_ops = torch.ops.perceiver_kernels


@dataclass(frozen=True)
class Device:
    """What kernels, tiles and splits depend on: processors, their shared memory in bytes, architecture."""

    processors: int
    shared_per_block: int
    shared_per_processor: int
    arch: int = 80  # 90 for compute capability 9.0

    @property
    def kind(self) -> tuple[int, int]:
        """What the choice of a kernel depends on."""
        return self.arch, self.shared_per_block


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts a problem up: packed rows and keys of a block, threads, bytes of shared memory."""

    block_m: int
    block_n: int
    threads: int
    shared_bytes: int
    tile_bytes: int = 0  # of the backward's workspace, for each tile of rows
    slab_floats: int = 0

    def per_processor(self, device: Device) -> int:
        """How many blocks a processor holds at a time: registers for 8 warps, and shared memory."""
        by_registers = max(1, 8 * 32 // self.threads)
        return max(1, min(by_registers, device.shared_per_processor // (self.shared_bytes + _SYSTEM_SHARED)))


@dataclass(frozen=True)
class Problem:
    """The sizes of a call; packed, ``batch`` counts sequences, ``queries`` and ``keys`` are the longest's."""

    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    has_score: bool  # the spec's
    packed_queries: int | None = None  # of all sequences

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Rows that share each load of a key: the packed rows of one key head."""
        return self.queries * self.group

    @property
    def head_dim(self) -> int:
        """The longer one, which a kernel must serve."""
        return max(self.dim, self.value_dim)


def make_problem(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Problem:
    """The sizes of a call. Packed, it reads the lengths, which waits for the GPU."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if spec.cu_seqlens_q is None or spec.cu_seqlens_k is None:
        batch, queries, keys, packed = query.shape[0], query.shape[2], key.shape[2], None
    else:
        batch, packed = len(spec.cu_seqlens_q) - 1, query.shape[0]
        queries, keys = (
            int(lengths.diff().max()) if batch else 0 for lengths in (spec.cu_seqlens_q, spec.cu_seqlens_k)
        )
    dims = (query.shape[-1], value.shape[-1])
    return Problem(query.dtype, batch, heads, kv_heads, queries, keys, *dims, spec.has_score, packed)


@functools.lru_cache(maxsize=1024)
def forward_tile(dtype: torch.dtype, head_dim: int, rows: int, has_score: bool, device: Device) -> Tile:
    """The tile of the forward kernel that serves so many rows, whatever the keys: decode asks once."""
    return Tile(*_ops.cuda_forward_tile(dtype, head_dim, rows, has_score, *device.kind))


def plan_forward(problem: Problem, device: Device) -> tuple[Tile, int]:
    """The tile, and into how many splits the keys go: a pure function of shape, device and environment."""
    tile = forward_tile(problem.dtype, problem.head_dim, problem.rows, problem.has_score, device)
    row_blocks, key_blocks = -(-problem.rows // tile.block_m), -(-problem.keys // tile.block_n)
    slots = device.processors * tile.per_processor(device)
    merge = 1 + 2 * min(problem.rows, tile.block_m) // tile.block_n
    return tile, forward_splits(row_blocks * problem.batch * problem.kv_heads, key_blocks, slots, merge)


@functools.lru_cache(maxsize=1024)
def backward_tile(dtype: torch.dtype, head_dim: int, has_score: bool, device: Device) -> Tile:
    """The tile of the backward kernels. Raises RuntimeError where none fits the device."""
    return Tile(*_ops.cuda_backward_tile(dtype, head_dim, has_score, *device.kind))


def plan_backward(problem: Problem, device: Device) -> tuple[Tile, int, int]:
    """The tile, how many tiles of rows there are, and into how many runs the keys go."""
    tile = backward_tile(problem.dtype, problem.head_dim, problem.has_score, device)
    if problem.packed_queries is None:
        row_tiles = -(-problem.rows // tile.block_m) * problem.batch
    else:  # every sequence may waste a part of one
        row_tiles = problem.group * problem.packed_queries // tile.block_m + problem.batch
    row_tiles *= problem.kv_heads
    slots = device.processors * tile.per_processor(device)
    key_blocks, slab_bytes = -(-problem.keys // tile.block_n), 4 * row_tiles * tile.slab_floats
    return tile, row_tiles, backward_runs(problem.batch * problem.kv_heads, key_blocks, slots, slab_bytes)


def unavailable(device: torch.device) -> str | None:
    """None where this backend can run on ``device``, else the reason and what to do about it."""
    if device.type != "cuda":
        return f"runs on cuda tensors, not on {device.type}"
    if torch.version.hip is not None:
        return "runs on NVIDIA GPUs; this torch is built for AMD's"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (A100, RTX 30) or newer"
    return _library.cuda_missing or _obstacle(device)


@constant_result
def _obstacle(device: torch.device) -> str | None:
    """Why the kernels that were built don't run there: an old driver, or code for other GPUs."""
    try:
        _device(device)
    except RuntimeError as error:
        archs, name = _ops.cuda_archs(), torch.cuda.get_device_name(device)
        return f"the kernels, built for {archs}, don't run on {name}: {str(error).splitlines()[0]}"
    return None


@constant_result
def _backward_obstacle(dtype: torch.dtype, head_dim: int, has_score: bool, device: torch.device) -> list[str]:
    """Why gradients can't be had, where a GPU has little shared memory."""
    try:
        backward_tile(dtype, head_dim, has_score, _device(device))
    except RuntimeError as error:
        return [str(error).splitlines()[0].partition("perceiver_kernels: ")[2]]
    return []


@functools.lru_cache(maxsize=64)
def _device(device: torch.device) -> Device:
    return Device(*_ops.cuda_device(-1 if device.index is None else device.index))


def _stream(device: torch.device) -> int:
    """The handle of torch's current stream there."""
    return torch.cuda.current_stream(device).cuda_stream


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, needs_gradient: bool
) -> list[str]:
    """Every reason why this backend can't serve the call."""
    reasons = [
        f"{name} has head dim {tensor.shape[-1]}; the kernels take multiples of 8 up to {MAX_HEAD_DIM}"
        for name, tensor in (("query", query), ("value", value))
        if tensor.shape[-1] % 8 or tensor.shape[-1] > MAX_HEAD_DIM
    ]
    if query.dtype not in DTYPES:
        reasons.append(
            f"query is {dtype_name(query.dtype)}; the kernels take bfloat16 and float16: tensor cores would "
            "round anything wider"
        )
    if needs_gradient and not reasons:
        head_dim = max(query.shape[-1], value.shape[-1])
        reasons += _backward_obstacle(query.dtype, head_dim, spec.has_score, query.device)
    queries, keys = (query.shape[0], key.shape[0]) if spec.is_packed else (query.shape[2], key.shape[2])
    if queries * (query.shape[1] // key.shape[1]) + keys > 2**31 - 2**24:  # as csrc/torch/cuda.cpp
        reasons.append("rows of one key head and keys together are counted in 31 bits")
    return reasons


def forward(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, laid out as :func:`perceiver_kernels.spec.empty_outputs` says."""
    out, lse = empty_outputs(query, value)
    query, key, value = (_aligned(tensor) for tensor in (query, key, value))
    problem, device = make_problem(query, key, value, spec), _device(query.device)
    _, splits = plan_forward(problem, device)
    parts = part_lses = None
    if splits > 1:
        part_lses = lse.new_empty((splits, *lse.shape))
        parts = lse.new_empty((*part_lses.shape, problem.value_dim))
    _ops.cuda_forward(
        query, key, value, *spec.options(), problem.queries, problem.keys, *device.kind,
        _stream(query.device), parts, part_lses, out, lse,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` from the residuals."""
    gradients = empty_gradients(query, key, value)
    outputs = [_aligned(tensor) for tensor in gradients]
    dout, query, key, value, out = (_aligned(tensor) for tensor in (dout, query, key, value, out))
    problem, device = make_problem(query, key, value, spec), _device(query.device)
    tile, row_tiles, runs = plan_backward(problem, device)
    tiles = query.new_empty(row_tiles * tile.tile_bytes, dtype=torch.uint8)
    slabs = lse.new_empty(runs * row_tiles * tile.slab_floats)
    _ops.cuda_backward(
        dout, dlse, query, key, value, out, lse, *spec.options(), problem.queries, problem.keys,
        *device.kind, _stream(query.device), runs, tiles, slabs, *outputs,
    )  # fmt: skip
    for gradient, output in zip(gradients, outputs, strict=True):
        if gradient is not output:
            gradient.copy_(output)
    return gradients


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, with contiguous channels and rows that begin at multiples of 16 bytes."""
    places = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    begins = tensor.data_ptr() % 16 == 0 and all(size == 1 or stride % 8 == 0 for size, stride in places)
    if tensor.stride(-1) == 1 and begins:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
