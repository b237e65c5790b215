"""Integer and bit instructions, each against what the PTX manual says, on corner cases and random bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ptx.lanes import Array
from ptx.snippets import evaluate

CORNERS = [0, 1, 2, 31, 32, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
SPECS = {
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
}


def bits(kind: str, seed: int, n: int = 256) -> Array:
    """Random bits and corner cases as unsigned words, to be seen as `kind`."""
    unsigned = np.dtype(SPECS[kind]).str.replace("i", "u")
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1 << 63, n, dtype=np.uint64) * np.uint64(2) + rng.integers(
        0, 2, n, dtype=np.uint64
    )
    corners = np.array(CORNERS, np.uint64)
    values[: len(corners)] = rng.permutation(corners)
    values[len(corners) : 2 * len(corners)] = rng.permutation(~corners)
    return values.astype(unsigned)


def python(array: Array, kind: str) -> list[int]:
    return [int(x) for x in array.view(SPECS[kind])]


def check(
    code: str, kind: str, fn: Callable[..., int], sources: int, out: str | None = None, **more: Array
) -> None:
    """Compare an instruction with a function of Python integers, cut to the width of the result."""
    out = out or kind
    arrays = [more.get(f"a{i}", bits(kind, i)) for i in range(sources)]
    got = evaluate(code, arrays, SPECS[out])
    columns = [python(a, kind) if f"a{i}" not in more else [int(x) for x in a] for i, a in enumerate(arrays)]
    width = 8 * np.dtype(SPECS[out]).itemsize
    want = [fn(*row) & ((1 << width) - 1) for row in zip(*columns, strict=True)]
    have = [int(x) & ((1 << width) - 1) for x in got]
    for row, w, h in zip(zip(*columns, strict=True), want, have, strict=True):
        assert w == h, f"{code} of {row}: {h:#x}, should be {w:#x}"


def width(kind: str) -> int:
    return int(kind[1:])


KINDS = list(SPECS)
WORDS = ["u32", "s32", "u64", "s64"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("op", "fn"),
    [
        ("add.{}", lambda x, y: x + y),
        ("sub.{}", lambda x, y: x - y),
        ("mul.lo.{}", lambda x, y: x * y),
        ("min.{}", min),
        ("max.{}", max),
    ],
)
def test_arithmetic(op: str, fn: Any, kind: str) -> None:
    check(op.format(kind) + " %d, %a0, %a1;", kind, fn, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_mul_hi_wide_and_mad(kind: str) -> None:
    n = width(kind)
    check(f"mul.hi.{kind} %d, %a0, %a1;", kind, lambda x, y: x * y >> n, 2)
    check(f"mad.lo.{kind} %d, %a0, %a1, %a2;", kind, lambda x, y, z: x * y + z, 3)
    check(f"mad.hi.{kind} %d, %a0, %a1, %a2;", kind, lambda x, y, z: (x * y >> n) + z, 3)
    if n < 64:
        wide = f"{kind[0]}{2 * n}"
        check(f"mul.wide.{kind} %d, %a0, %a1;", kind, lambda x, y: x * y, 2, wide)
        c = bits(wide, 7)
        check(f"mad.wide.{kind} %d, %a0, %a1, %a2;", kind, lambda x, y, z: x * y + z, 3, wide, a2=c)


def truncated(x: int, y: int) -> int:
    if y == 0:
        return -1
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


@pytest.mark.parametrize("kind", KINDS)
def test_division_truncates(kind: str) -> None:
    check(f"div.{kind} %d, %a0, %a1;", kind, truncated, 2)
    a1 = np.maximum(bits(kind, 1), 1).view(bits(kind, 1).dtype)
    got = evaluate(f"rem.{kind} %d, %a0, %a1;", [bits(kind, 0), a1], SPECS[kind])
    rows = zip(python(bits(kind, 0), kind), python(a1, kind), python(got, kind), strict=True)
    assert all(r == x - truncated(x, y) * y for x, y, r in rows)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_sign(kind: str) -> None:
    check(f"abs.{kind} %d, %a0;", kind, abs, 1)
    check(f"neg.{kind} %d, %a0;", kind, lambda x: -x, 1)


def test_saturating_add() -> None:
    clip = lambda x: max(-(1 << 31), min((1 << 31) - 1, x))  # noqa: E731
    check("add.sat.s32 %d, %a0, %a1;", "s32", lambda x, y: clip(x + y), 2)
    check("sub.sat.s32 %d, %a0, %a1;", "s32", lambda x, y: clip(x - y), 2)


@pytest.mark.parametrize("n", [16, 32, 64])
def test_logic(n: int) -> None:
    kind = f"u{n}"
    check(f"and.b{n} %d, %a0, %a1;", kind, lambda x, y: x & y, 2)
    check(f"or.b{n} %d, %a0, %a1;", kind, lambda x, y: x | y, 2)
    check(f"xor.b{n} %d, %a0, %a1;", kind, lambda x, y: x ^ y, 2)
    check(f"not.b{n} %d, %a0;", kind, lambda x: ~x, 1)
    check(f"cnot.b{n} %d, %a0;", kind, lambda x: int(x == 0), 1)


@pytest.mark.parametrize("n", [16, 32, 64])
def test_shifts_clamp_their_amount(n: int) -> None:
    amount = bits("u32", 5)
    amount[20:] %= np.uint32(n + 8)
    unsigned, signed = f"u{n}", f"s{n}"
    check(f"shl.b{n} %d, %a0, %a1;", unsigned, lambda x, s: x << min(s, n), 2, a1=amount)
    check(f"shr.u{n} %d, %a0, %a1;", unsigned, lambda x, s: x >> min(s, n), 2, a1=amount)
    check(f"shr.b{n} %d, %a0, %a1;", unsigned, lambda x, s: x >> min(s, n), 2, a1=amount)
    check(f"shr.s{n} %d, %a0, %a1;", signed, lambda x, s: x >> min(s, n), 2, a1=amount)
    for constant in (0, 3, n - 1, n, 200):
        check(f"shr.s{n} %d, %a0, {constant};", signed, lambda x: x >> min(constant, n), 1)  # noqa: B023
        check(f"shl.b{n} %d, %a0, {constant};", unsigned, lambda x: x << min(constant, n), 1)  # noqa: B023


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(mode: str) -> None:
    amount = lambda n: min(n, 32) if mode == "clamp" else n & 31  # noqa: E731
    c = bits("u32", 2)
    c[14:] %= np.uint32(70)
    left = lambda lo, hi, n: ((hi << 32 | lo) << amount(n)) >> 32  # noqa: E731
    check(f"shf.l.{mode}.b32 %d, %a0, %a1, %a2;", "u32", left, 3, a2=c)
    check(
        f"shf.r.{mode}.b32 %d, %a0, %a1, %a2;", "u32", lambda lo, hi, n: (hi << 32 | lo) >> amount(n), 3, a2=c
    )


@pytest.mark.parametrize("kind", WORDS)
def test_bit_field_extract(kind: str) -> None:
    msb = width(kind) - 1

    def extract(x: int, position: int, length: int) -> int:
        """The manual's loop: bits past the top, and those past the length, are copies of the sign."""
        position, length = position & 255, length & 255
        if kind[0] == "u" or length == 0:
            sign = 0
        else:
            sign = x >> min(position + length - 1, msb) & 1
        out = 0
        for i in range(msb + 1):
            inside = i < length and position + i <= msb
            out |= (x >> position + i & 1 if inside else sign) << i
        return out

    position, length = bits("u32", 3), bits("u32", 4)
    position[30:] %= np.uint32(msb + 4)
    length[30:] %= np.uint32(msb + 4)
    check(f"bfe.{kind} %d, %a0, %a1, %a2;", kind, extract, 3, a1=position, a2=length)


@pytest.mark.parametrize("n", [32, 64])
def test_bit_field_insert(n: int) -> None:
    def insert(x: int, y: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        for i in range(length):
            if position + i < n:
                y = y & ~(1 << position + i) | (x >> i & 1) << position + i
        return y

    position, length = bits("u32", 3), bits("u32", 4)
    position[30:] %= np.uint32(n + 4)
    length[30:] %= np.uint32(n + 4)
    check(f"bfi.b{n} %d, %a0, %a1, %a2, %a3;", f"u{n}", insert, 4, a2=position, a3=length)


@pytest.mark.parametrize("table", [0x00, 0x80, 0xFE, 0x96, 0xE8, 0xCA, 0x1B])
def test_lop3(table: int) -> None:
    def logic(x: int, y: int, z: int) -> int:
        return sum(
            (table >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1) << i for i in range(32)
        )

    check(f"lop3.b32 %d, %a0, %a1, %a2, {table};", "u32", logic, 3)


def test_prmt() -> None:
    def permute(x: int, y: int, selector: int) -> int:
        both, out = y << 32 | x, 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = both >> 8 * (nibble & 7) & 255
            if nibble & 8:
                byte = 255 if byte & 128 else 0
            out |= byte << 8 * i
        return out

    check("prmt.b32 %d, %a0, %a1, %a2;", "u32", permute, 3)


@pytest.mark.parametrize("n", [32, 64])
def test_counting(n: int) -> None:
    kind = f"u{n}"
    check(f"popc.b{n} %d, %a0;", kind, lambda x: x.bit_count(), 1, "u32")
    check(f"clz.b{n} %d, %a0;", kind, lambda x: n - x.bit_length(), 1, "u32")
    check(f"bfind.u{n} %d, %a0;", kind, lambda x: x.bit_length() - 1, 1, "u32")
    check(f"bfind.s{n} %d, %a0;", f"s{n}", lambda x: (x if x >= 0 else ~x).bit_length() - 1, 1, "u32")
    shift = lambda x: n - x.bit_length() if x else -1  # noqa: E731
    check(f"bfind.shiftamt.u{n} %d, %a0;", kind, shift, 1, "u32")
    check(f"brev.b{n} %d, %a0;", kind, lambda x: int(f"{x:0{n}b}"[::-1], 2), 1)


@pytest.mark.parametrize("n", [32, 64])
def test_carry_chains(n: int) -> None:
    """128-bit (64-bit) sums of two words, the high one compared: it holds the carry of the low one."""
    kind, half = f"u{n}", 1 << n
    low = f".reg .b{n} %low;"
    add = f"{low} add.cc.{kind} %low, %a0, %a1; addc.{kind} %d, %a2, %a3;"
    check(add, kind, lambda a, b, c, d: c + d + (a + b >= half), 4)
    sub = f"{low} sub.cc.{kind} %low, %a0, %a1; subc.{kind} %d, %a2, %a3;"
    check(sub, kind, lambda a, b, c, d: c - d - (a < b), 4)
    mad = f"{low} mad.lo.cc.{kind} %low, %a0, %a1, %a2; madc.hi.{kind} %d, %a0, %a1, %a3;"
    check(mad, kind, lambda a, b, c, d: (a * b + c + (d << n)) >> n, 4)
    long = f"{low} add.cc.{kind} %low, %a0, %a1; addc.cc.{kind} %low, %a2, %a3; addc.{kind} %d, 0, 0;"
    check(long, kind, lambda a, b, c, d: (a + b + (c + d << n)) >> 2 * n, 4)


def test_the_rest() -> None:
    check("sad.u32 %d, %a0, %a1, %a2;", "u32", lambda x, y, z: abs(x - y) + z, 3)
    check("mul24.lo.u32 %d, %a0, %a1;", "u32", lambda x, y: (x & 0xFFFFFF) * (y & 0xFFFFFF), 2)
    signed = lambda x: (x & 0xFFFFFF ^ 0x800000) - 0x800000  # noqa: E731
    check("mad24.lo.s32 %d, %a0, %a1, %a2;", "s32", lambda x, y, z: signed(x) * signed(y) + z, 3)

    def dot(x: int, y: int, z: int) -> int:
        parts = zip(x.to_bytes(4, "little"), y.to_bytes(4, "little"), strict=True)
        return z + sum(a * b for a, b in parts)

    check("dp4a.u32.u32 %d, %a0, %a1, %a2;", "u32", dot, 3)


def test_predicate_logic() -> None:
    x, y = (np.arange(8, dtype=np.uint32) >> i & 1 for i in (0, 1))
    start = "setp.ne.u32 %P0, %a0, 0; setp.ne.u32 %P1, %a1, 0;"
    end = "selp.u32 %d, 1, 0, %P2;"
    for op, want in (("and", x & y), ("or", x | y), ("xor", x ^ y)):
        np.testing.assert_array_equal(evaluate(f"{start} {op}.pred %P2, %P0, %P1; {end}", [x, y]), want)
    np.testing.assert_array_equal(evaluate(f"{start} and.pred %P2, %P0, !%P1; {end}", [x, y]), x & (1 - y))
    np.testing.assert_array_equal(evaluate(f"{start} not.pred %P2, %P0; {end}", [x, y]), 1 - x)
    np.testing.assert_array_equal(evaluate(f"{start} mov.pred %P2, %P1; {end}", [x, y]), y)
