"""Comparisons, selections, moves and conversions."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest

from ptx import test_isa_float as exact
from ptx.lanes import Array
from ptx.snippets import evaluate
from ptx.test_isa_int import SPECS, bits

PICK = "selp.u32 %d, 1, 0, %P0;"
COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@pytest.mark.parametrize("kind", list(SPECS))
@pytest.mark.parametrize("name", list(COMPARE))
def test_integer_comparisons(kind: str, name: str) -> None:
    x, y = bits(kind, 0), bits(kind, 1)
    y[::3] = x[::3]
    want = COMPARE[name](x.view(SPECS[kind]), y.view(SPECS[kind]))
    np.testing.assert_array_equal(evaluate(f"setp.{name}.{kind} %P0, %a0, %a1; {PICK}", [x, y]), want)


def test_unsigned_names() -> None:
    x, y = bits("u32", 0), bits("u32", 1)
    for name, fn in {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}.items():
        np.testing.assert_array_equal(evaluate(f"setp.{name}.u32 %P0, %a0, %a1; {PICK}", [x, y]), fn(x, y))


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("name", [*COMPARE, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])
def test_float_comparisons(kind: str, name: str) -> None:
    special = exact.encode(np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1.5, -2.0, 3.0]), kind)
    x, y = (a.ravel() for a in np.meshgrid(special, special))
    fx, fy = exact.decode(x, kind), exact.decode(y, kind)
    nan = np.isnan(fx) | np.isnan(fy)
    if name in ("num", "nan"):
        want = nan if name == "nan" else ~nan
    else:
        want = COMPARE[name[:2]](fx, fy)
        want = want | nan if name.endswith("u") else want & ~nan
    np.testing.assert_array_equal(evaluate(f"setp.{name}.{kind} %P0, %a0, %a1; {PICK}", [x, y]), want)


@pytest.mark.parametrize("combine", ["and", "or", "xor"])
@pytest.mark.parametrize("negate", ["", "!"])
def test_combined_and_double_destinations(combine: str, negate: str) -> None:
    x, y = bits("s32", 0), bits("s32", 1)
    less, c = x.view(np.int32) < y.view(np.int32), (x & 1 == 1) ^ (negate == "!")
    fn: Any = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine]
    start = "and.b32 %r9, %a0, 1; setp.ne.u32 %P2, %r9, 0;"
    code = f"{start} setp.lt.{combine}.s32 %P0|%P1, %a0, %a1, {negate}%P2; selp.u32 %d, 1, 0, "
    np.testing.assert_array_equal(evaluate(code + "%P0;", [x, y]), fn(less, c))
    np.testing.assert_array_equal(evaluate(code + "%P1;", [x, y]), fn(~less, c))
    np.testing.assert_array_equal(
        evaluate("setp.lt.s32 %P0|%P1, %a0, %a1; selp.u32 %d, 1, 0, %P1;", [x, y]), ~less
    )


def test_ftz_in_a_comparison() -> None:
    x = np.array([1, 0x80000001, 0x00800000], np.uint32)
    zero = np.zeros(3, np.uint32)
    np.testing.assert_array_equal(evaluate(f"setp.eq.ftz.f32 %P0, %a0, %a1; {PICK}", [x, zero]), [1, 1, 0])
    np.testing.assert_array_equal(evaluate(f"setp.eq.f32 %P0, %a0, %a1; {PICK}", [x, zero]), [0, 0, 0])


def test_packed_comparison_has_two_results() -> None:
    x = np.array([[1, 5], [2, 2], [np.nan, 3]], np.float16).view(np.uint32).ravel()
    y = np.array([[2, 4], [2, 9], [1, 4]], np.float16).view(np.uint32).ravel()
    code = "setp.lt.f16x2 %P0|%P1, %a0, %a1; selp.u32 %r8, 1, 0, %P0;"
    code += "selp.u32 %r9, 2, 0, %P1; or.b32 %d, %r8, %r9;"
    np.testing.assert_array_equal(evaluate(code, [x, y]), [1, 2, 2])


def test_set_select_slct() -> None:
    x, y = bits("s32", 0), bits("s32", 1)
    less = x.view(np.int32) < y.view(np.int32)
    np.testing.assert_array_equal(
        evaluate("set.lt.u32.s32 %d, %a0, %a1;", [x, y]), np.where(less, 0xFFFFFFFF, 0)
    )
    one = np.float32(1).view(np.uint32)
    np.testing.assert_array_equal(evaluate("set.lt.f32.s32 %d, %a0, %a1;", [x, y]), np.where(less, one, 0))
    np.testing.assert_array_equal(
        evaluate("slct.u32.s32 %d, %a0, %a1, %a0;", [x, y]), np.where(x >> 31 == 0, x, y)
    )
    c = exact.floats("f32", 3)
    want = np.where(c.view(np.float32) >= 0, x, y)
    np.testing.assert_array_equal(evaluate("slct.b32.f32 %d, %a0, %a1, %a2;", [x, y, c]), want)
    code = "setp.lt.s32 %P0, %a0, %a1; selp.b32 %d, %a0, %a1, {}%P0;"
    np.testing.assert_array_equal(evaluate(code.format(""), [x, y]), np.where(less, x, y))
    np.testing.assert_array_equal(evaluate(code.format("!"), [x, y]), np.where(less, y, x))


# Moves


def test_pack_and_unpack() -> None:
    x, y = bits("u32", 0), bits("u32", 1)
    both = evaluate("mov.b64 %d, {%a0, %a1};", [x, y], np.uint64)
    np.testing.assert_array_equal(both, y.astype(np.uint64) << np.uint64(32) | x)
    np.testing.assert_array_equal(evaluate("mov.b64 {%d, %r9}, %a0;", [both]), x)
    np.testing.assert_array_equal(evaluate("mov.b64 {_, %d}, %a0;", [both]), y)
    halves = "mov.b32 {%h1, %h2}, %a0; mov.b32 %d, {%h2, %h1};"
    np.testing.assert_array_equal(evaluate(halves, [x]), x << np.uint32(16) | x >> np.uint32(16))
    quarters = "mov.b64 {%h1, %h2, %h3, %h4}, %a0; mov.b64 %d, {%h4, %h3, %h2, %h1};"
    want = both.view(np.uint16).reshape(-1, 4)[:, ::-1].copy().view(np.uint64).ravel()
    np.testing.assert_array_equal(evaluate(quarters, [both], np.uint64), want)


def test_immediates() -> None:
    cases = {
        "mov.u32 %d, -1;": 0xFFFFFFFF,
        "mov.b32 %d, 0f3F800000;": 0x3F800000,
        "mov.f32 %d, 0d3FF8000000000000;": np.float32(1.5).view(np.uint32),
        "mov.f32 %d, 2.5;": np.float32(2.5).view(np.uint32),
        "mov.u32 %d, 0xFFFFFFFFU;": 0xFFFFFFFF,
        "mov.b32 %d, 0b101;": 5,
        "add.s32 %d, %r1, -2147483648;": None,
    }
    for code, want in cases.items():
        got = evaluate(code, [], threads=4)
        np.testing.assert_array_equal(
            got, np.full(4, want, np.uint32) if want is not None else np.arange(4) + (1 << 31)
        )
    got = evaluate("mov.f64 %d, 0d3FF8000000000000;", [], np.float64, threads=2)
    np.testing.assert_array_equal(got, 1.5)


def test_special_registers() -> None:
    code = "mov.u32 %r2, %{}; mov.u32 %d, %r2;"
    assert list(evaluate(code.format("tid.x"), [], threads=40)) == list(range(40))
    assert list(evaluate(code.format("laneid"), [], threads=40)) == [i % 32 for i in range(40)]
    assert list(evaluate(code.format("warpid"), [], threads=40)) == [i // 32 for i in range(40)]
    assert list(evaluate(code.format("ntid.x"), [], threads=40)) == [40] * 40
    assert list(evaluate(code.format("lanemask_lt"), [], threads=32)) == [(1 << i) - 1 for i in range(32)]
    assert list(evaluate(code.format("lanemask_ge"), [], threads=32)) == [
        0xFFFFFFFF - (1 << i) + 1 for i in range(32)
    ]
    clock = "mov.u32 %r2, %clock; mov.u32 %r3, %clock; sub.u32 %d, %r3, %r2;"
    assert (evaluate(clock, [], threads=2) > 0).all()


# Conversions


@pytest.mark.parametrize("source", list(SPECS))
@pytest.mark.parametrize("to", list(SPECS))
def test_between_integers(to: str, source: str) -> None:
    x = bits(source, 0)
    values = [int(v) for v in x.view(SPECS[source])]
    wide = evaluate(f"cvt.{to}.{source} %d, %a0;", [x], SPECS[to])
    modulus = 1 << int(to[1:])
    assert [int(v) % modulus for v in wide] == [v % modulus for v in values]
    info = np.iinfo(SPECS[to])
    clipped = evaluate(f"cvt.sat.{to}.{source} %d, %a0;", [x], SPECS[to])
    assert [int(v) for v in clipped] == [max(int(info.min), min(int(info.max), v)) for v in values]


def test_bytes_in_wider_registers() -> None:
    x = bits("u32", 0)
    np.testing.assert_array_equal(evaluate("cvt.u32.u8 %d, %a0;", [x]), x & 255)
    np.testing.assert_array_equal(
        evaluate("cvt.s32.s8 %d, %a0;", [x], np.int32), x.astype(np.uint8).view(np.int8)
    )
    want = x.astype(np.uint8).view(np.int8).astype(np.int16).view(np.uint16)
    np.testing.assert_array_equal(evaluate("cvt.s16.s8 %h1, %a0; cvt.u32.u16 %d, %h1;", [x]), want)
    np.testing.assert_array_equal(evaluate("cvt.u8.u32 %d, %a0;", [x]), x & 255)


@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("to", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_integer(source: str, to: str, mode: str) -> None:
    x = exact.floats(source, 0)
    value = exact.decode(x, source)
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](value)
    info = np.iinfo(SPECS[to])
    got = evaluate(f"cvt.{mode}.{to}.{source} %d, %a0;", [x], SPECS[to])
    for have, w in zip(got, whole, strict=True):
        if np.isnan(w):
            assert int(have) == (0 if info.bits < 64 else int(np.uint64(1 << 63).astype(SPECS[to])))
        else:
            assert int(have) == max(int(info.min), min(int(info.max), int(np.clip(w, -1e30, 1e30))))


@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("source", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_to_float(to: str, source: str) -> None:
    if source.endswith("64") and "16" in to:
        pytest.skip("goes through float64 here, and would round twice")
    x = bits(source, 0)
    got = exact.decode(evaluate(f"cvt.rn.{to}.{source} %d, %a0;", [x], exact.UNSIGNED[to]), to)
    want = [exact.rounded(exact.Fraction(int(v)), to) for v in x.view(SPECS[source])]
    exact.same(got, want, x, f"cvt {source} to {to}")


@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
def test_between_floats(to: str, source: str) -> None:
    if to == source:
        pytest.skip("no such conversion")
    x = exact.floats(source, 1)
    value = exact.decode(x, source)
    modes = ["rn"]
    if (source, to) in {("f32", "f16"), ("f32", "bf16"), ("f64", "f32")}:
        modes.append("rz")
    if (source, to) == ("f64", "f32"):
        modes += ["rm", "rp"]
    for mode in modes:
        exactly = (
            exact.FORMATS[to][0] >= exact.FORMATS[source][0]
            and exact.FORMATS[to][2] >= exact.FORMATS[source][2]
        )
        code = f"cvt.{to}.{source} %d, %a0;" if exactly else f"cvt.{mode}.{to}.{source} %d, %a0;"
        got = exact.decode(evaluate(code, [x], exact.UNSIGNED[to]), to)
        want = [exact.rounded(exact.Fraction(v), to, mode) if np.isfinite(v) else v for v in value]
        exact.same(got, want, value, code)


def test_integral_rounding_stays_float() -> None:
    x = exact.floats("f32", 2)
    for mode, fn in {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.items():
        got = evaluate(f"cvt.{mode}.f32.f32 %d, %a0;", [x]).view(np.float32)
        np.testing.assert_array_equal(got, fn(x.view(np.float32)))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rn.relu"])
def test_packed_conversion_puts_the_first_operand_high(kind: str, mode: str) -> None:
    x, y = exact.floats("f32", 3), exact.floats("f32", 4)
    both = evaluate(f"cvt.{mode}.{kind}x2.f32 %d, %a0, %a1;", [x, y])
    for part, source in (((both >> np.uint32(16)), x), (both & np.uint32(0xFFFF), y)):
        value = exact.decode(source, "f32")
        if mode.endswith("relu"):
            value = np.where(value < 0, 0.0, value)
        want = [exact.rounded(exact.Fraction(v), kind, mode[:2]) if np.isfinite(v) else v for v in value]
        exact.same(exact.decode(part.astype(np.uint16), kind), want, value, mode)


def test_tf32_rounds_to_nearest_away() -> None:
    x = np.array([0x3F800FFF, 0x3F801000, 0x3F803000, 0xBF801000, 0x7F800000, 0x7FC00001, 0], np.uint32)
    got = evaluate("cvt.rna.tf32.f32 %d, %a0;", [x])
    want: Array = np.array(
        [0x3F800000, 0x3F802000, 0x3F804000, 0xBF802000, 0x7F800000, 0x7FFFE000, 0], np.uint32
    )
    np.testing.assert_array_equal(got, want)


def test_saturating_float_conversion() -> None:
    x = exact.floats("f32", 5)
    got = evaluate("cvt.sat.f32.f32 %d, %a0;", [x]).view(np.float32)
    value = x.view(np.float32)
    np.testing.assert_array_equal(got, np.where(np.isnan(value), 0, np.clip(value, 0, 1)))
