"""Tensor core fragments: placed one element at a time by the manual's formulas, then compared with A @ B."""

from __future__ import annotations

import numpy as np
import pytest

from ptx import test_isa_float as exact
from ptx.lanes import Array
from ptx.machine import empty
from ptx.snippets import run

WARPS = 3
LANE = np.arange(32)
GROUP, PLACE = LANE // 4, LANE % 4


def place_a(i: int, kind: str, k: int) -> tuple[Array, Array]:
    """Row and column of element i of the A fragment in each lane, by the manual."""
    if kind == "tf32":
        return GROUP + 8 * (i % 2), PLACE + 4 * (i // 2)
    if k == 8:
        return GROUP + 8 * (i // 2), PLACE * 2 + i % 2
    row = GROUP + (0 if i in (0, 1, 4, 5) else 8)
    return row, PLACE * 2 + i % 2 + (8 if i >= 4 else 0)


def place_b(i: int, kind: str) -> tuple[Array, Array]:
    if kind == "tf32":
        return PLACE + 4 * i, GROUP
    return PLACE * 2 + i % 2 + (8 if i >= 2 else 0), GROUP


def place_c(i: int) -> tuple[Array, Array]:
    return GROUP + 8 * (i // 2), PLACE * 2 + i % 2


def words(elements: Array, kind: str) -> Array:
    """(elements, lanes) bits to (registers, lanes) words, the first element low."""
    if kind == "tf32":
        return elements.astype(np.uint32)
    pairs = elements.reshape(-1, 2, elements.shape[-1]).astype(np.uint32)
    return pairs[:, 0] | pairs[:, 1] << np.uint32(16)


def matrices(kind: str, shape: tuple[int, ...], seed: int) -> tuple[Array, Array]:
    """Bits of a random matrix and its values."""
    name = "f32" if kind == "tf32" else kind
    bits = exact.encode(np.random.default_rng(seed).standard_normal(shape), name)
    if kind == "tf32":
        return bits, (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return bits, exact.decode(bits, name)


def fragments(bits: Array, places: list[tuple[Array, Array]], kind: str) -> Array:
    """(warps, rows, columns) to (registers, warps * 32)."""
    return np.concatenate([words(np.stack([m[r, c] for r, c in places]), kind) for m in bits], axis=1)


CASES = [
    ("f16", 16, "f32", "f32"), ("f16", 8, "f32", "f32"), ("bf16", 16, "f32", "f32"),
    ("bf16", 8, "f32", "f32"),
    ("tf32", 8, "f32", "f32"), ("tf32", 4, "f32", "f32"), ("f16", 16, "f16", "f16"), ("f16", 8, "f16", "f16"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "k", "out", "into"), CASES)
def test_mma_is_a_matrix_product(kind: str, k: int, out: str, into: str) -> None:
    bits_a, a = matrices(kind, (WARPS, 16, k), 0)
    bits_b, b = matrices(kind, (WARPS, k, 8), 1)
    bits_c, c = matrices(into, (WARPS, 16, 8), 2)
    per_lane = 16 * k // 32
    fa = fragments(bits_a, [place_a(i, kind, k) for i in range(per_lane)], kind)
    fb = fragments(bits_b, [place_b(i, kind) for i in range(per_lane // 2)], kind)
    fc = fragments(bits_c, [place_c(i) for i in range(4)], "tf32" if into == "f32" else "f16")
    given = np.ascontiguousarray(np.concatenate([fa, fb, fc]).T)
    results = 4 if out == "f32" else 2
    result = empty((WARPS * 32, results), np.uint32)
    names = [f"%r{20 + i}" for i in range(given.shape[1])]
    outs = [f"%r{50 + i}" for i in range(results)]
    code = f"mul.wide.u32 %rd10, %r1, {4 * given.shape[1]}; add.u64 %rd10, %rd10, %rd1;"
    code += "".join(f"ld.global.b32 {name}, [%rd10+{4 * i}];" for i, name in enumerate(names))
    na, nb = len(fa), len(fb)
    groups = [outs, names[:na], names[na : na + nb], names[na + nb :]]
    listed = ", ".join("{" + ", ".join(group) + "}" for group in groups)
    code += f"mma.sync.aligned.m16n8k{k}.row.col.{out}.{kind}.{kind}.{into} {listed};"
    code += f"mul.wide.u32 %rd10, %r1, {4 * results}; add.u64 %rd10, %rd10, %rd2;"
    code += "".join(f"st.global.b32 [%rd10+{4 * i}], {name};" for i, name in enumerate(outs))
    run(code, given, result, block=WARPS * 32)
    want = np.matmul(a, b) + c
    wide = want.astype(np.float32 if out == "f32" else np.float16)
    expected = fragments(
        wide.view(exact.UNSIGNED[out]), [place_c(i) for i in range(4)], "tf32" if out == "f32" else "f16"
    )
    np.testing.assert_array_equal(result.array.T, expected)
    assert len(np.unique(result.array)) > 100


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count: int, trans: str) -> None:
    """Matrix i has its rows where lanes 8i to 8i+7 point.

    A lane gets two neighbours of row lane/4, or, transposed, of column lane/4.
    """
    threads, pitch = 64, 80
    memory = np.random.default_rng(0).integers(0, 1 << 16, (32 * pitch // 2,), dtype=np.uint16)
    rows = np.random.default_rng(1).permutation(32)
    addresses = np.tile(rows * pitch, 2).astype(np.uint32)
    addresses[32:] = np.roll(rows, 5) * pitch
    result = empty((threads, count), np.uint32)
    outs = [f"%r{20 + i}" for i in range(count)]
    fill = f"""
        mov.u32 %r2, %r1;
        $fill: setp.ge.u32 %p1, %r2, {memory.nbytes // 4}; @%p1 bra $filled;
        mul.wide.u32 %rd10, %r2, 4; add.u64 %rd10, %rd10, %rd1; ld.global.u32 %r3, [%rd10];
        shl.b32 %r4, %r2, 2; mov.u32 %r5, smem; add.u32 %r4, %r4, %r5; st.shared.u32 [%r4], %r3;
        add.u32 %r2, %r2, {threads}; bra $fill;
        $filled: bar.sync 0;"""
    code = fill + "mul.wide.u32 %rd10, %r1, 4; add.u64 %rd10, %rd10, %rd2; ld.global.u32 %r6, [%rd10];"
    code += "mov.u32 %r5, smem; add.u32 %r6, %r6, %r5;"
    code += f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{', '.join(outs)}}}, [%r6];"
    code += f"mul.wide.u32 %rd10, %r1, {4 * count}; add.u64 %rd10, %rd10, %rd3;"
    code += "".join(f"st.global.b32 [%rd10+{4 * i}], {name};" for i, name in enumerate(outs))
    run(code, memory, addresses, result, block=threads, shared=memory.nbytes)
    for thread in range(threads):
        lane, warp = thread % 32, thread // 32
        for i in range(count):
            start = addresses[32 * warp + 8 * i : 32 * warp + 8 * i + 8] // 2
            matrix = np.stack([memory[s : s + 8] for s in start])
            matrix = matrix.T if trans else matrix
            low, high = (int(x) for x in matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2])
            assert result.array[thread, i] == high << 16 | low
