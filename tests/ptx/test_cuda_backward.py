"""The package's CUDA backward kernels, run on the machine, broken on purpose, and priced."""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perceiver_kernels.spec import empty_gradients
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

SOURCE = CSRC / "cuda" / "backward.cu"
BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Kernel:
    """One instantiation of attention_backward, as its mangled name says."""

    name: str
    tile: str  # of the name, shared with the kernels that go with it
    dtype: torch.dtype
    dim: int
    block_m: int
    block_n: int
    threads: int
    shared_bytes: int
    has_score: bool
    row_threads: int
    source: Path = SOURCE

    @property
    def tile_bytes(self) -> int:
        return (4 * self.dim + 8) * self.block_m

    def companion(self, verb: str) -> str:
        return next(name for name in entries(self.source) if verb in name and self.tile in name)


def parse_name(name: str) -> Kernel:
    tile = re.findall(r"BackwardTileI\w+?Lb[01]EEE", name)[0]
    dim, rows, key_tiles, key_warps, roles, step, _, held, has_score = map(
        int, re.findall(r"L[ib](\d+)E", name)
    )
    keys = 16 * key_tiles * key_warps
    key_bytes = 2 * keys * dim
    late = keys * (2 * rows + (2 * step if roles == 2 else 0)) + (0 if held else key_bytes)
    shared = key_bytes + 2 * (4 * dim + 8) * rows + max(late, key_bytes)
    threads = 32 * key_warps * roles
    return Kernel(name, tile, element_type(name), dim, rows, keys, threads, shared, bool(has_score), threads)


@functools.cache
def backward_kernels() -> list[Kernel]:
    return [parse_name(name) for name in entries(SOURCE) if "attention_backward" in name]


def backward_kernel(dtype: torch.dtype, dim: int, has_score: bool) -> Kernel:
    """As backward_kernel() in backward.cu chooses."""
    serving = [
        kernel
        for kernel in backward_kernels()
        if kernel.dtype == dtype and kernel.dim >= dim and kernel.has_score == has_score
    ]
    return min(serving, key=lambda kernel: kernel.dim)


Choose = Callable[[torch.dtype, int, bool], Kernel]  # of dtype, head dim, has_score


def launches(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    runs: int,
    choose: Choose = backward_kernel,
) -> list[Launch]:
    query, key, value, spec = inputs.query, inputs.key, inputs.value, inputs.spec()
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    D, Dv = query.shape[-1], value.shape[-1]
    batch, queries, keys = problem_sizes(inputs)
    kernel = choose(query.dtype, max(D, Dv), spec.has_score)
    if spec.is_packed:
        row_tiles = group * len(query) // kernel.block_m + batch
        all_tiles = row_tiles * kv_heads
    else:
        row_tiles = -(-group * queries // kernel.block_m)
        all_tiles = row_tiles * kv_heads * batch
    tiles = torch.empty(all_tiles * kernel.tile_bytes, dtype=torch.uint8)
    slabs = torch.empty(runs * all_tiles * kernel.block_m * kernel.dim)
    natural = spec.softcap > 0
    row = (0 if spec.is_packed else lse.stride(0), lse.stride(-2), 1)
    key_mask = None if spec.key_mask is None else spec.key_mask.view(torch.uint8)

    def arguments(written: tuple[Tensor, ...]) -> tuple[object, ...]:
        def fresh(tensor: Tensor) -> object:
            return Empty(tensor) if any(tensor is each for each in written) else tensor

        return (
            *(field for tensor in (query, key, value, out, inputs.dout)
              for field in view(tensor, strides(tensor))),
            *view(lse, row), *view(inputs.dlse, row),
            *(field for tensor in gradients for field in view(fresh(tensor), strides(tensor))),
            struct.pack("<6i", kv_heads, group, queries, keys, D, Dv),
            struct.pack("<q", spec.q_offset if spec.is_causal else 1 << 60),
            spec.q_offsets if spec.is_causal else None,
            key_mask, struct.pack("<q", 0 if spec.is_packed or key_mask is None else key_mask.stride(0)),
            spec.cu_seqlens_q, spec.cu_seqlens_k,
            struct.pack("<2f", (1.0 if natural else spec.scale) * math.log2(math.e), spec.scale),
            struct.pack("<2f", spec.softcap, spec.scale / spec.softcap if natural else 0.0),
            spec.dropout_seed,
            struct.pack("<If", min(int(spec.dropout_p * 2**32), 2**32 - 1), 1 / (1 - spec.dropout_p)),
            struct.pack("<2i", row_tiles, runs), fresh(tiles), fresh(slabs),
        )  # fmt: skip

    dq, dk, dv = gradients
    tile_blocks = -(-group * queries // kernel.block_m) * batch * kv_heads
    order = (
        (kernel.companion("pack_rows"), tile_blocks, kernel.row_threads, 0, (tiles,)),
        (kernel.name, runs * batch * kv_heads, kernel.threads, kernel.shared_bytes, (slabs, dk, dv)),
        (kernel.companion("reduce_slabs"), tile_blocks, kernel.row_threads, 0, (dq,)),
    )
    return [
        Launch(kernel.source, name, (blocks, 1), threads, shared, arguments(written), written)
        for name, blocks, threads, shared, written in order
    ]


CASES: list[tuple[torch.dtype, int, Case]] = [  # and into how many runs of keys
    (BF16, 1, Case("ragged", 1, 2, 2, 70, 150)),
    (F16, 1, Case("several_tiles", 1, 1, 1, 130, 400)),
    (BF16, 3, Case("runs", 1, 1, 1, 100, 700)),
    (F16, 9, Case("more_runs_than_keys", 1, 1, 1, 70, 200)),
    (BF16, 1, Case("ragged_128", 1, 1, 1, 70, 300, 128, 128)),
    (F16, 2, Case("runs_128", 1, 1, 1, 130, 530, 128, 128, strides="transposed")),
    (F16, 2, Case("odd_dims", 1, 1, 1, 40, 200, 72, 40, scale=-0.2)),
    (BF16, 1, Case("grouped", 1, 6, 2, 33, 201)),
    (F16, 2, Case("masked", 2, 1, 1, 40, 330, key_mask="random")),
    (BF16, 2, Case("masked_dead", 2, 1, 1, 40, 330, 128, 128, key_mask="dead_example")),
    (BF16, 1, Case("left_padding", 2, 1, 1, 40, 300, key_mask="left_padding")),
    (F16, 1, Case("offsets", 2, 2, 1, 33, 290, q_offset="per_example")),
    (BF16, 2, Case("offset_before_all", 1, 1, 1, 100, 190, q_offset=-30)),
    (BF16, 1, Case("softcap", 1, 1, 1, 40, 200, softcap=2.0)),
    (F16, 1, Case("softcap_128", 1, 1, 1, 40, 200, 128, 128, softcap=2.0)),
    (F16, 1, Case("dropout", 1, 2, 1, 20, 130, dropout_p=0.2)),
    (BF16, 1, Case("dropout_128", 1, 2, 1, 20, 130, 128, 128, dropout_p=0.2)),
    (BF16, 2, Case("not_causal", 1, 1, 1, 70, 270, is_causal=False)),
    (BF16, 1, Case("zero_scale", 1, 1, 1, 20, 70, scale=0.0)),
    (F16, 3, Case("one_query", 1, 4, 1, 1, 530)),
    (F16, 2, Case("packed", lengths=((5, 40), (33, 233), (0, 7), (4, 0), (40, 90)), H=2, Hkv=1)),
    (BF16, 2, Case("all_options", 2, 4, 2, 21, 177, 64, 64, True, "per_example", "random", 0.4, 2.0, 0.3,
                   "transposed")),
    (F16, 1, Case("all_options_packed", 0, 4, 2, 0, 0, 96, 40, True, "per_example", "random", 0.4, 2.0, 0.3,
                  lengths=((5, 40), (33, 133), (4, 0)))),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "runs", "case"), CASES, ids=[case.name for *_, case in CASES])
def test_backward(dtype: torch.dtype, runs: int, case: Case) -> None:
    check_backward(dtype, runs, case)


def check_backward(dtype: torch.dtype, runs: int, case: Case, choose: Choose = backward_kernel) -> None:
    inputs = make_inputs(case, dtype)
    want, plain = reference64(inputs), math_reference(inputs)
    out, lse = want["out"].to(dtype), want["lse"].float()
    gradients = empty_gradients(inputs.query, inputs.key, inputs.value)
    poison_unseen(inputs)
    poison_dead(inputs, lse)
    for each in launches(inputs, out, lse, gradients, runs, choose):
        each.run()
    for name, got in zip(("dq", "dk", "dv"), gradients, strict=True):
        limit = budget(plain[name], want[name], dtype)
        error = relative_error(got, want[name])
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"


def poison_dead(inputs: Inputs, lse: Tensor) -> None:
    """NaN in what belongs to rows that see no key."""
    dead = (lse.T if inputs.spec().is_packed else lse) == -torch.inf
    assert inputs.dlse is not None
    inputs.dlse[lse == -torch.inf] = torch.nan
    for tensor in (inputs.query, inputs.dout):
        tensor[dead] = torch.nan


TILES = [(dim, has_score) for dim in (32, 64, 96, 128, 192, 256) for has_score in (False, True)]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize(("dim", "has_score"), TILES)
def test_every_instantiation(dim: int, has_score: bool, dtype: torch.dtype) -> None:
    test_backward(dtype, 1, Case("tile", 1, 1, 1, 70, 150, dim, dim, softcap=2.0 if has_score else None))


def test_the_instantiations_are_those() -> None:
    """And no other is compiled."""
    wanted = {backward_kernel(dtype, *tile) for dtype in (BF16, F16) for tile in TILES}
    assert wanted == set(backward_kernels())


# One role and two; a run's first tile of keys, which counts as masked, one that some tiles of rows see whole,
# one with masks, and two that no row sees.
@pytest.mark.parametrize("dim", [64, 128])
def test_every_mutant_is_caught(dim: int) -> None:
    inputs = make_inputs(Case("mutants", 1, 1, 1, 130, 530, dim, dim, q_offset=230), BF16)
    exact = reference64(inputs)
    gradients = empty_gradients(inputs.query, inputs.key, inputs.value)
    total = 0
    for each in launches(inputs, exact["out"].to(BF16), exact["lse"].float(), gradients, 1):
        report = each.run()
        want = [as_bytes(tensor).clone() for tensor in each.written]

        def right(mutant: str | None, each: Launch = each, want: list[Tensor] = want) -> bool:
            each.run(mutant)
            return all(map(torch.equal, map(as_bytes, each.written), want))

        ptx = entries(SOURCE)[each.name]
        chosen = [one for one in mutants(ptx, each.name, 1, report.executed) if not harmless(one, ptx)]
        result = score(chosen, right)
        print(each.name, result)
        assert right(None)  # and so the next kernel reads what it should
        assert not result.survivors, str(result)
        total += result.total
    assert total >= 20


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


# Of the tensor cores' peak, by the model.
FLOORS = {32: 0.75, 64: 0.7, 96: 0.68, 128: 0.74, 192: 0.66, 256: 0.57}


@pytest.mark.parametrize("dim", FLOORS)
def test_price(dim: int, tmp_path: Path) -> None:
    """The loop without masks: nothing spilled, the tensor cores as busy as they were."""
    kernel = backward_kernel(BF16, dim, has_score=False)
    report = price_entry(SOURCE, kernel.name, kernel.threads, kernel.shared_bytes, tmp_path)
    loop = report.loops[-1]
    assert loop.mix.get("spill", 0) == 0
    assert report.warps_per_sm >= 8
    assert loop.simulated is not None
    assert loop.simulated >= FLOORS[dim]
