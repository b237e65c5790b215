"""Whole kernels, as the compilers emit them, against plain numpy: right values and not one finding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ptx.findings import Finding, Report
from ptx.floats import bf16_to_f32, f32_to_bf16
from ptx.lanes import Array
from ptx.machine import empty, launch
from ptx.nvcc_ptx import NVCC, SAMPLES, compile_cuda

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


def ptx_of(name: str) -> str:
    return compile_cuda(SAMPLES / f"{name}.cu")


@needs_nvcc
def test_weighted_sum() -> None:
    x = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    out = np.zeros(1, np.float32)
    report = launch(ptx_of("reduce"), "weighted_sum", 3, 256, [x, out, len(x)], shared=1024, collect=True)
    assert report.kinds() == {"race"}  # its threads add to one float in any order
    want = (x * np.array([1, 2, 3, 4], np.float32)[np.arange(3000) % 4]).sum(dtype=np.float64)
    assert out[0] == pytest.approx(want, rel=1e-5)


@needs_nvcc
def test_tree_with_warp_barriers() -> None:
    x = np.random.default_rng(1).standard_normal((5, 128)).astype(np.float32)
    out = empty(5, np.float32)
    launch(ptx_of("reduce"), "tree_sum", 5, 128, [x, out])
    np.testing.assert_allclose(out.array, x.sum(1, dtype=np.float64), rtol=1e-4, atol=1e-5)


@needs_nvcc
def test_named_barriers_of_producers_and_consumers() -> None:
    x = np.random.default_rng(2).standard_normal((6, 64)).astype(np.float32)
    out = empty((6, 64), np.float32)
    launch(ptx_of("reduce"), "produce_consume", 1, 128, [x, out, 6])
    np.testing.assert_array_equal(out.array, 2 * x[:, ::-1])


@needs_nvcc
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 11])
def test_maths_library(n: int) -> None:
    """sin of large doubles takes calls, local arrays, carries and 64-bit divisions."""
    d = np.random.default_rng(3).standard_normal(64) * 1000
    d[5] = 1e200
    start, m = d.copy(), 12345678901
    f = empty(64, np.float32)
    launch(ptx_of("reduce"), "maths", 1, 64, [d, f, np.array([3], np.int32), n, m])
    want = np.sin(start) * n / m + m % n + m.bit_count() + (32 - n.bit_length()) + (n & -n).bit_length()
    want += int(f"{n:032b}"[::-1], 2)
    cases = {
        1: np.exp(-np.abs(want)),
        2: want + 3,
        3: want * 7,
        4: np.sqrt(np.abs(want)),
        5: np.log1p(np.abs(want)),
    }
    np.testing.assert_allclose(d, cases.get(n, want), rtol=1e-14)
    small = np.abs(start) < 1e30
    np.testing.assert_allclose(f.array[small], np.sin(start[small].astype(np.float32)) ** 2 + 3, rtol=1e-6)


@needs_nvcc
@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(64, 32, 32), (100, 70, 96)])
def test_matmul(name: str, rows: int, columns: int, depth: int) -> None:
    rng = np.random.default_rng(4)
    a, b = (rng.standard_normal((n, depth)).astype(np.float32) for n in (rows, columns))
    a, b = (encode(x, name) for x in (a, b))
    c = empty((rows, columns), np.float32)
    grid = (-(-rows // 64), -(-columns // 32))
    launch(ptx_of("matmul"), f"matmul_{name}", grid, 128, [a, b, c, rows, columns, depth])
    np.testing.assert_allclose(c.array, decode(a, name) @ decode(b, name).T, rtol=1e-5, atol=1e-5)


@needs_nvcc
def test_packed_halves_of_the_headers() -> None:
    rng = np.random.default_rng(6)
    a, b = (
        rng.standard_normal((2, 32, 2)).astype(np.float16),
        f32_to_bf16(rng.standard_normal((128,)).astype(np.float32)),
    )
    out_a, out_b = empty((5, 32, 2), np.float16), empty((5, 32, 2), np.uint16)
    args = [a, b, out_a, out_b]
    launch(ptx_of("library"), "halves", 1, 32, [*args, 1])
    (x, y), (u, v) = a.astype(np.float64), bf16_to_f32(b).astype(np.float64).reshape(2, 32, 2)
    want_a = [np.maximum(x * y + x, 0), np.maximum(x, y), np.exp2(x), np.clip(x * y, 0, 1), np.tanh(x)]
    np.testing.assert_allclose(out_a.array, want_a, rtol=2e-3, atol=1e-3)
    want_b = [u * v + u, np.minimum(u, v), u - v, np.exp(u), np.abs(u)]
    np.testing.assert_allclose(bf16_to_f32(out_b.array), want_b, rtol=8e-3, atol=1e-6)
    with pytest.raises(Finding, match="trapped"):  # assert(n > 0)
        launch(ptx_of("library"), "halves", 1, 32, [*args, 0])


@needs_nvcc
def test_cooperative_groups() -> None:
    out = empty((6, 64), np.int32)
    launch(ptx_of("library"), "groups", 1, 64, [out])
    t = np.arange(64)
    sums = 8 * (t // 8 * 8) + 28
    ranks = np.where(t % 2, t % 32 // 2 * 100 + 16, -1)
    want = [sums, sums[t ^ 1], np.full(64, 22 + 1000), np.full(64, 16 + 496), t ^ 3, ranks]
    np.testing.assert_array_equal(out.array, want)


@needs_nvcc
def test_pipeline_intrinsics() -> None:
    x = np.random.default_rng(7).standard_normal((4, 64, 4)).astype(np.float32)
    out = empty(x.shape, np.float32)
    launch(ptx_of("library"), "pipeline", 1, 64, [x, out, 4])
    np.testing.assert_array_equal(out.array, x[:, ::-1])


@needs_nvcc
def test_functions_of_the_maths_library() -> None:
    x = (np.random.default_rng(8).standard_normal(64) * 4).astype(np.float32)
    out = empty((64, 12), np.float32)
    launch(ptx_of("library"), "functions", 1, 64, [x, out])
    z, m = x.astype(np.float64), np.abs(x.astype(np.float64))
    erf, lgamma = ([f(v) for v in z] for f in (math.erf, lambda v: math.lgamma(abs(v) + 3)))
    far = np.cos((x * np.float32(1e6)).astype(np.float64))
    want = [np.exp(z), z / 3, np.tanh(z), erf, m**1.5, np.log1p(m), 1 / (z + 50), m**-0.5, np.fmod(z, 0.25)]
    np.testing.assert_allclose(out.array.T, [*want, np.cbrt(z), lgamma, far], rtol=1e-5, atol=1e-6)


def encode(x: Array, name: str) -> Array:
    return {"f16": lambda: x.astype(np.float16), "bf16": lambda: f32_to_bf16(x), "f32": lambda: x}[name]()


def decode(x: Array, name: str) -> Array:
    return (bf16_to_f32(x) if name == "bf16" else x).astype(np.float64)


TYPES = {"f16": "fp16", "bf16": "bf16", "f32": "fp32"}


def compiled_attention(name: str, stages: int, block_q: int = 64, block_k: int = 32) -> Any:
    pytest.importorskip("triton", reason="triton is not installed")
    from ptx.samples.attention import attention_sample
    from ptx.triton_ptx import compile_triton

    signature = dict.fromkeys(("q", "k", "v", "out"), f"*{TYPES[name]}")
    signature |= {"lse": "*fp32", "queries": "i32", "keys": "i32", "scale_log2": "fp32"}
    signature |= {"q_stride": "i64", "k_stride": "i64"}
    sizes = {"DIM": 64, "BLOCK_Q": block_q, "BLOCK_K": block_k, "STAGES": stages}
    aligned = ("q", "k", "v", "out", "lse", "q_stride", "k_stride")
    return compile_triton(attention_sample, signature, sizes, aligned=aligned, num_stages=stages)


class Attention:
    """The Triton sample at one size, with its float64 answer."""

    def __init__(self, name: str, stages: int, queries: int, keys: int) -> None:
        self.name, self.queries, self.keys = name, queries, keys
        self.kernel = compiled_attention(name, stages)
        rng = np.random.default_rng(5)
        rows = (queries, keys, keys)
        self.q, self.k, self.v = (
            encode(rng.standard_normal((2, n, 64)).astype(np.float32), name) for n in rows
        )
        score = decode(self.q, name) @ decode(self.k, name).transpose(0, 2, 1) / 8
        score[:, np.arange(keys) > np.arange(queries)[:, None] + keys - queries] = -np.inf
        p = np.exp(score - score.max(-1, keepdims=True))
        self.want = p @ decode(self.v, name) / p.sum(-1, keepdims=True)
        self.want_lse = (np.log(p.sum(-1)) + score.max(-1)) / np.log(2)
        self.tolerance = {"f16": 2e-3, "bf16": 1.5e-2, "f32": 4e-3}[name]

    def run(self, ptx: str | None = None) -> Report:
        from ptx.triton_ptx import launch_triton

        self.out, self.lse = empty(self.q.shape, self.q.dtype), empty((2, self.queries), np.float32)
        sizes = [self.queries, self.keys, 0.125 / np.log(2), self.queries * 64, self.keys * 64]
        args = [self.q, self.k, self.v, self.out, self.lse, *sizes]
        return launch_triton(self.kernel, (-(-self.queries // 64), 2), args, ptx=ptx)

    def right(self) -> bool:
        got = ((decode(self.out.array, self.name), self.want), (self.lse.array, self.want_lse))
        return all(np.allclose(have, want, rtol=1e-5, atol=self.tolerance) for have, want in got)


@pytest.mark.parametrize(("name", "stages"), [("f16", 3), ("bf16", 2), ("bf16", 3), ("f32", 2)])
@pytest.mark.parametrize(("queries", "keys"), [(100, 150), (1, 40), (64, 64)])
def test_triton_attention(name: str, stages: int, queries: int, keys: int) -> None:
    case = Attention(name, stages, queries, keys)
    case.run()
    assert case.right()
    case.v[:, keys // 2] += 1 if name == "f32" else case.v.dtype.type(1000)  # the comparison can fail
    case.run()
    assert not case.right()
