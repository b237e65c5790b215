"""The package's CUDA kernels, compiled for sm_80, run on the machine, broken on purpose, and priced."""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perceiver_kernels.spec import empty_outputs
from perceiver_kernels.testing.budget import budget, math_reference, reference64, relative_error
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import Inputs, make_inputs
from ptx.cuda_kernels import (
    CSRC,
    Launch,
    element_type,
    entries,
    harmless,
    poison_unseen,
    price_entry,
    problem_sizes,
    strides,
    view,
)
from ptx.machine import Empty
from ptx.mutate import mutants, score

SOURCE = CSRC / "cuda" / "forward.cu"
BF16, F16 = torch.bfloat16, torch.float16
A100, RTX_4090 = 163 << 10, 99 << 10  # bytes of shared memory that a block may have


@dataclass(frozen=True)
class Kernel:
    """One instantiation of attention_forward, as its mangled name says."""

    name: str
    dtype: torch.dtype
    dim: int
    block_m: int
    block_n: int
    warps: int
    stages: int
    has_score: bool

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        return 2 * self.dim * (self.block_m + 2 * self.stages * self.block_n)


def parse_name(name: str) -> Kernel:
    numbers = map(int, re.findall(r"L[ib](\d+)E", name))
    dim, rows, keys, row_warps, key_warps, stages, _, has_score = numbers
    return Kernel(name, element_type(name), dim, rows, keys, row_warps * key_warps, stages, bool(has_score))


@functools.cache
def forward_kernels() -> list[Kernel]:
    return [parse_name(name) for name in entries(SOURCE) if "attention_forward" in name]


def forward_kernel(
    dtype: torch.dtype, dim: int, rows: int, has_score: bool, shared_limit: int = A100
) -> Kernel:
    """As forward_kernel() in forward.cu chooses."""
    few = rows <= 16
    serving = [
        kernel
        for kernel in forward_kernels()
        if kernel.dtype == dtype
        and kernel.dim >= dim
        and (kernel.block_m == 16) == few
        and kernel.has_score == (few or has_score)
        and kernel.shared_bytes <= shared_limit
    ]
    return min(serving, key=lambda kernel: (kernel.dim, -kernel.block_m))


Choose = Callable[[torch.dtype, int, int, bool], Kernel]  # of dtype, head dim, rows, has_score


def launches(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    splits: int,
    choose: Choose = forward_kernel,
    source: Path = SOURCE,
) -> Iterator[Launch]:
    query, key, value, spec = inputs.query, inputs.key, inputs.value, inputs.spec()
    heads, kv_heads, D, Dv = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
    batch, queries, keys = problem_sizes(inputs)
    group = heads // kv_heads
    kernel = choose(query.dtype, max(D, Dv), queries * group, spec.has_score)
    parts = torch.empty((splits, *lse.shape, Dv), dtype=torch.float32)
    part_lses = torch.empty((splits, *lse.shape))
    into, into_lse = (out, lse) if splits == 1 else (parts, part_lses)
    if splits == 1:
        out_strides = strides(out)
    else:
        out_strides = (0 if spec.is_packed else parts.stride(1), parts.stride(-3), parts.stride(-2))
    natural = spec.softcap > 0
    exponent = max(1.0 if natural else abs(spec.scale), 2.0**-126) * math.log2(math.e)
    key_mask = None if spec.key_mask is None else spec.key_mask.view(torch.uint8)
    q_offset = spec.q_offset if spec.is_causal else 1 << 60
    arguments = (
        *view(query, strides(query)), *view(key, strides(key)), *view(value, strides(value)),
        *view(Empty(into), out_strides),
        *view(Empty(into_lse), (0 if spec.is_packed else lse.stride(0), lse.stride(-2), 1)),
        struct.pack("<2q", 0 if splits == 1 else parts.stride(0), 0 if splits == 1 else part_lses.stride(0)),
        struct.pack("<6i", kv_heads, group, queries, keys, D, Dv),
        struct.pack("<q", q_offset), spec.q_offsets if spec.is_causal else None,
        key_mask, struct.pack("<q", 0 if spec.is_packed or key_mask is None else key_mask.stride(0)),
        spec.cu_seqlens_q, spec.cu_seqlens_k,
        struct.pack("<fI", exponent, 0x80008000 if spec.scale < 0 and not natural else 0),
        struct.pack("<2f", spec.softcap, spec.scale / spec.softcap if natural else 0.0),
        spec.dropout_seed,
        struct.pack("<If", min(int(spec.dropout_p * 2**32), 2**32 - 1), 1 / (1 - spec.dropout_p)),
    )  # fmt: skip
    blocks = -(-queries * group // kernel.block_m) * batch * kv_heads
    yield Launch(
        source,
        kernel.name,
        (blocks, splits),
        kernel.threads,
        kernel.shared_bytes,
        arguments,
        (into, into_lse),
    )
    if splits > 1:
        name = next(name for name in entries(SOURCE) if "combine" in name and element_type(name) == out.dtype)
        merged = (
            parts, part_lses, *view(Empty(out), strides(out)), Empty(lse), struct.pack("<q", lse.numel()),
            struct.pack("<4i", heads, lse.shape[-1], Dv, splits),
        )  # fmt: skip
        yield Launch(SOURCE, name, (-(-lse.numel() // 4), 1), 128, 0, merged, (out, lse))


CASES: list[tuple[torch.dtype, int, Case]] = [  # and into how many splits
    (BF16, 1, Case("ragged", 1, 2, 2, 70, 150)),
    (F16, 1, Case("full", 1, 1, 1, 130, 700)),
    (BF16, 1, Case("rising_maxima", 1, 1, 1, 130, 460, scale=1.0)),
    (F16, 2, Case("decode_rising_maxima", 1, 8, 1, 2, 700, 128, 128, scale=-1.0)),
    (BF16, 3, Case("split", 1, 1, 1, 150, 900)),
    (F16, 1, Case("ragged_128", 1, 1, 1, 70, 350, 128, 128)),
    (BF16, 2, Case("split_128", 1, 1, 1, 150, 530, 128, 128, strides="transposed")),
    (F16, 2, Case("odd_dims", 1, 1, 1, 40, 200, 72, 40, scale=-0.2)),
    (BF16, 1, Case("grouped", 1, 6, 2, 33, 201)),
    (F16, 1, Case("masked", 2, 1, 1, 40, 330, key_mask="random")),
    (BF16, 2, Case("masked_dead", 2, 1, 1, 40, 330, 128, 128, key_mask="dead_example")),
    (BF16, 1, Case("left_padding", 2, 1, 1, 40, 450, key_mask="left_padding")),
    (F16, 1, Case("offsets", 2, 2, 1, 33, 290, q_offset="per_example")),
    (BF16, 2, Case("offset_before_all", 1, 1, 1, 70, 90, q_offset=-30)),
    (BF16, 1, Case("softcap", 1, 1, 1, 40, 330, softcap=2.0)),
    (F16, 1, Case("dropout", 1, 2, 1, 40, 130, 128, 128, dropout_p=0.2)),
    (BF16, 1, Case("not_causal", 1, 1, 1, 130, 270, is_causal=False)),
    (BF16, 1, Case("zero_scale", 1, 1, 1, 20, 70, scale=0.0)),
    (F16, 3, Case("decode", 1, 4, 1, 1, 1530)),
    (BF16, 1, Case("decode_128", 2, 8, 2, 1, 700, 128, 128, key_mask="left_padding")),
    (F16, 2, Case("packed", lengths=((5, 40), (33, 233), (0, 7), (4, 0), (40, 90)), H=2, Hkv=1)),
    (BF16, 2, Case("all_options", 2, 4, 2, 21, 177, 64, 64, True, "per_example", "random", 0.4, 2.0, 0.3,
                   "transposed")),
    (F16, 1, Case("all_options_packed", 0, 4, 2, 0, 0, 64, 40, True, "per_example", "random", 0.4, 2.0, 0.3,
                  lengths=((5, 40), (33, 133), (4, 0)))),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "splits", "case"), CASES, ids=[case.name for *_, case in CASES])
def test_forward(dtype: torch.dtype, splits: int, case: Case) -> None:
    check_forward(dtype, splits, case)


def check_forward(
    dtype: torch.dtype, splits: int, case: Case, choose: Choose = forward_kernel, source: Path = SOURCE
) -> None:
    inputs = make_inputs(case, dtype)
    out, lse = empty_outputs(inputs.query, inputs.value)
    want, plain = reference64(inputs), math_reference(inputs)
    poison_unseen(inputs)
    for each in launches(inputs, out, lse, splits, choose, source):
        each.run()
    for name, got in (("out", out), ("lse", lse)):
        limit = budget(plain[name], want[name], dtype)
        error = relative_error(got, want[name])
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"


TILES = [(dim, rows, has_score, A100) for dim in (32, 64, 96, 128, 192, 256) for rows, has_score in
         ((20, False), (20, True), (3, True))]  # fmt: skip
TILES += [(256, 20, has_score, RTX_4090) for has_score in (False, True)]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize(("dim", "rows", "has_score", "limit"), TILES)
def test_every_instantiation(dim: int, rows: int, has_score: bool, limit: int, dtype: torch.dtype) -> None:
    case = Case("tile", 1, 1, 1, rows, 270, dim, dim, softcap=2.0 if has_score else None)
    check_forward(dtype, 1, case, functools.partial(forward_kernel, shared_limit=limit))


def test_the_instantiations_are_those() -> None:
    """And no other is compiled."""
    wanted = {forward_kernel(dtype, *tile) for dtype in (BF16, F16) for tile in TILES}
    assert wanted == set(forward_kernels())


# With this scale maxima rise again and again by more than the slack.
@pytest.mark.parametrize(
    "case",
    [Case("many_rows", 1, 1, 1, 100, 400, scale=1.0), Case("few_rows", 1, 2, 1, 8, 460, scale=1.0)],
    ids=["many_rows", "few_rows"],
)
def test_every_mutant_is_caught(case: Case) -> None:
    inputs = make_inputs(case, BF16)
    out, lse = empty_outputs(inputs.query, inputs.value)
    forward = next(launches(inputs, out, lse, splits=1))
    report = forward.run()
    want = [tensor.double().clone() for tensor in forward.written]

    def right(changed: str) -> bool:
        forward.run(changed)
        return all(
            relative_error(got.double().nan_to_num(), before) < 1e-6
            for got, before in zip(forward.written, want, strict=True)
        )

    ptx = entries(SOURCE)[forward.name]
    assert right(ptx)
    chosen = [one for one in mutants(ptx, forward.name, 5, report.executed) if not harmless(one, ptx)]
    result = score(chosen, right)
    print(result)
    assert result.total >= 40
    assert not result.survivors, str(result)


# Of the tensor cores' peak, by the model, while no maximum rises.
FLOORS = {32: 0.5, 64: 0.75, 96: 0.78, 128: 0.82, 192: 0.7, 256: 0.65}


@pytest.mark.parametrize("dim", FLOORS)
def test_price(dim: int, tmp_path: Path) -> None:
    """The loop without masks: nothing spilled, the tensor cores as busy as they were."""
    kernel = forward_kernel(BF16, dim, rows=128, has_score=False)
    report = price_entry(SOURCE, kernel.name, kernel.threads, kernel.shared_bytes, tmp_path)
    loop = report.loops[0]
    assert loop.mix.get("spill", 0) == 0
    assert report.warps_per_sm >= 8
    assert loop.simulated is not None
    assert loop.simulated >= FLOORS[dim]
