"""Float instructions against exact rational arithmetic, rounded once by the definition."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from ptx.floats import bf16_to_f32
from ptx.lanes import Array
from ptx.snippets import evaluate

# mantissa bits, smallest exponent of a normal number, largest exponent
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}
UNSIGNED = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}
VIEWS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
KINDS = list(FORMATS)


def floats(kind: str, seed: int, n: int = 256, spread: int = 6) -> Array:
    """Bits of numbers of like size, so that sums cancel and round; some subnormal, huge or special."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(n) * 2.0 ** rng.integers(-spread, spread, n)
    mantissa, smallest, largest = FORMATS[kind]
    values[:8] = rng.permutation([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 2.0**smallest])
    values[8:16] *= 2.0 ** (smallest - mantissa // 2)
    values[16:24] = values[16:24].clip(-1.9, 1.9) * 2.0**largest
    values[24:40] = np.round(values[24:40] * 4) / 4
    return encode(values, kind)


def encode(values: Array, kind: str) -> Array:
    with np.errstate(all="ignore"):
        if kind == "bf16":
            return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return values.astype(VIEWS[kind]).view(UNSIGNED[kind])


def decode(bits: Array, kind: str) -> Array:
    return (bf16_to_f32(bits) if kind == "bf16" else bits.view(VIEWS[kind])).astype(np.float64)


def rounded(x: Fraction, kind: str, mode: str = "rn") -> float:
    """The nearest number of a format (ties to even), or the next one towards zero, down or up."""
    mantissa, smallest, largest = FORMATS[kind]
    if x == 0:
        return 0.0
    exponent = max(smallest, math.floor(math.log2(abs(x.numerator)) - math.log2(x.denominator)) - 2)
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - mantissa + 1)
    whole = {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}[mode](x / unit)
    result = whole * unit
    if abs(result) >= Fraction(2) ** (largest + 1):
        if mode == "rn" or (mode == "rm" and x < 0) or (mode == "rp" and x > 0):
            return math.inf if x > 0 else -math.inf
        return float((2 - Fraction(2) ** (1 - mantissa)) * Fraction(2) ** largest * (1 if x > 0 else -1))
    return float(result)


def same(got: Array, want: list[float], rows: Any, what: str) -> None:
    for have, should, row in zip(got, want, rows, strict=True):
        if math.isnan(should):
            assert math.isnan(have), f"{what} of {row}: {have}, should be NaN"
        else:
            assert have == should, f"{what} of {row}: {have!r}, should be {should!r}"


def compare(code: str, kind: str, fn: Any, sources: int, mode: str = "rn", seed: int = 0) -> None:
    """`fn` on exact fractions where all inputs are finite, and on floats where not."""
    arrays = [floats(kind, seed + i) for i in range(sources)]
    got = decode(evaluate(code, arrays, UNSIGNED[kind]), kind)
    rows = list(zip(*(decode(a, kind) for a in arrays), strict=True))
    want = []
    for row in rows:
        if all(math.isfinite(x) for x in row):
            want.append(rounded(fn(*(Fraction(float(x)) for x in row)), kind, mode))
        else:
            with np.errstate(all="ignore"):
                want.append(float(fn(*(np.float64(x) for x in row))))
    same(got, want, rows, code)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_arithmetic_rounds_once(kind: str, op: str) -> None:
    fn = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y}[op]
    compare(f"{op}.{kind} %d, %a0, %a1;", kind, fn, 2)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_fma_rounds_once(kind: str) -> None:
    for seed in range(5):
        compare(f"fma.rn.{kind} %d, %a0, %a1, %a2;", kind, lambda x, y, z: x * y + z, 3, seed=seed)


def test_fma_f64() -> None:
    """Within the 80-bit format: a sum that is not exact there, and half way here, might round twice."""
    compare("fma.rn.f64 %d, %a0, %a1, %a2;", "f64", lambda x, y, z: x * y + z, 3)


def test_fma_of_an_exact_tie() -> None:
    """2^-24 beside 1 is half way; a part 2^46 times smaller decides, though float64 can't hold the sum."""
    one, step, unit = np.float32(1), np.float32(2.0**-12), np.float32(2.0**-23)
    a = np.array([step, step, step * (1 + unit), -step * (1 + unit)], np.float32)
    b = np.array([step, step, step * (1 - unit), step * (1 - unit)], np.float32)
    c = np.array([one, -one, one + unit, -one - unit], np.float32)
    got = evaluate("fma.rn.f32 %d, %a0, %a1, %a2;", [x.view(np.uint32) for x in (a, b, c)]).view(np.float32)
    want = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), "f32")
        for x, y, z in zip(a, b, c, strict=True)
    ]
    np.testing.assert_array_equal(got, np.array(want, np.float32))


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode: str) -> None:
    compare(f"mul.{mode}.f32 %d, %a0, %a1;", "f32", lambda x, y: x * y, 2, mode)
    near = [floats("f32", i, spread=3)[40:] for i in range(2)]  # sums that float64 holds exactly
    got = decode(evaluate(f"add.{mode}.f32 %d, %a0, %a1;", near), "f32")
    rows = list(zip(*(decode(a, "f32") for a in near), strict=True))
    same(got, [rounded(Fraction(x) + Fraction(y), "f32", mode) for x, y in rows], rows, mode)


def test_division() -> None:
    def divide(x: Any, y: Any) -> Any:
        if y == 0:
            return np.float64(x) / np.float64(y)
        return x / y

    arrays = [floats("f32", i) for i in range(2)]
    arrays[1][decode(arrays[1], "f32") == 0] = 0x40000000
    rows = list(zip(*(decode(a, "f32") for a in arrays), strict=True))
    want = []
    for x, y in rows:
        exact = math.isfinite(x) and math.isfinite(y)
        want.append(
            rounded(Fraction(x) / Fraction(y), "f32") if exact else float(np.float64(x) / np.float64(y))
        )
    for form in ("rn", "full", "approx"):
        same(decode(evaluate(f"div.{form}.f32 %d, %a0, %a1;", arrays), "f32"), want, rows, form)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["min", "max"])
def test_min_max_prefer_numbers(kind: str, op: str) -> None:
    special = encode(np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1.5, -2.0, 3e-7]), kind)
    x, y = (a.ravel() for a in np.meshgrid(special, special))
    fx, fy = decode(x, kind), decode(y, kind)
    pick = np.fmin if op == "min" else np.fmax
    got = decode(evaluate(f"{op}.{kind} %d, %a0, %a1;", [x, y], UNSIGNED[kind]), kind)
    np.testing.assert_array_equal(got, pick(fx, fy))
    zeros = (fx == 0) & (fy == 0)
    sign = np.signbit(fx) | np.signbit(fy) if op == "min" else np.signbit(fx) & np.signbit(fy)
    np.testing.assert_array_equal(np.signbit(got[zeros]), sign[zeros])
    if kind != "f64":
        got = decode(evaluate(f"{op}.NaN.{kind} %d, %a0, %a1;", [x, y], UNSIGNED[kind]), kind)
        np.testing.assert_array_equal(got, (np.minimum if op == "min" else np.maximum)(fx, fy))


@pytest.mark.parametrize("kind", KINDS)
def test_sign_bits(kind: str) -> None:
    x = floats(kind, 1)
    number = ~np.isnan(decode(x, kind))
    got = decode(evaluate(f"neg.{kind} %d, %a0;", [x], UNSIGNED[kind]), kind)
    np.testing.assert_array_equal(got[number], -decode(x, kind)[number])
    np.testing.assert_array_equal(np.signbit(got[number]), ~np.signbit(decode(x, kind)[number]))
    got = decode(evaluate(f"abs.{kind} %d, %a0;", [x], UNSIGNED[kind]), kind)
    np.testing.assert_array_equal(got[number], np.abs(decode(x, kind))[number])


@pytest.mark.parametrize(
    ("op", "fn"),
    [
        ("ex2.approx", np.exp2),
        ("lg2.approx", np.log2),
        ("sin.approx", np.sin),
        ("cos.approx", np.cos),
        ("tanh.approx", np.tanh),
        ("sqrt.approx", np.sqrt),
        ("sqrt.rn", np.sqrt),
        ("rcp.approx", lambda x: 1 / x),
        ("rcp.rn", lambda x: 1 / x),
        ("rsqrt.approx", lambda x: 1 / np.sqrt(x)),
    ],
)
@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_functions(op: str, fn: Any, ftz: str) -> None:
    if op == "tanh.approx" and ftz:
        pytest.skip("tanh.approx.f32 has no .ftz")
    x = floats("f32", 2).view(np.float32)
    got = evaluate(f"{op}{ftz}.f32 %d, %a0;", [x.view(np.uint32)]).view(np.float32)
    tiny = np.float32(2.0**-126)
    given = np.where(np.abs(x) < tiny, np.copysign(np.float32(0), x), x) if ftz else x
    with np.errstate(all="ignore"):
        want = fn(given.astype(np.float64)).astype(np.float32)
        if ftz:
            want = np.where(np.abs(want) < tiny, np.copysign(np.float32(0), want), want)
    np.testing.assert_array_equal(got, want)


def test_functions_of_16_bits() -> None:
    x = floats("f16", 3)
    for op, fn in (("ex2.approx", np.exp2), ("tanh.approx", np.tanh)):
        got = evaluate(f"{op}.f16 %d, %a0;", [x], np.uint16).view(np.float16)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(got, fn(x.view(np.float16).astype(np.float64)).astype(np.float16))


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_flush_to_zero(op: str) -> None:
    """Subnormal inputs count as zero, and subnormal results become zero, with their sign."""
    tiny = np.float32(2.0**-126)
    x = np.array([tiny / 2, -tiny / 2, tiny, tiny * 3, 1.5 * tiny, -tiny], np.float32)
    x, y = (a.ravel().copy() for a in np.meshgrid(x, np.append(x, [0.25, 1.0]).astype(np.float32)))
    flush = lambda v: np.where(np.abs(v) < tiny, np.copysign(np.float32(0), v), v)  # noqa: E731
    fx, fy = flush(x).astype(np.float64), flush(y).astype(np.float64)
    want = {"add": fx + fy, "sub": fx - fy, "mul": fx * fy, "fma": fx * fy + fx}[op]
    code = f"{op}.ftz.f32 %d, %a0, %a1;" if op != "fma" else "fma.rn.ftz.f32 %d, %a0, %a1, %a0;"
    got = evaluate(code, [x.view(np.uint32), y.view(np.uint32)]).view(np.float32)
    np.testing.assert_array_equal(got, flush(want.astype(np.float32)))
    plain = evaluate(code.replace(".ftz", ""), [x.view(np.uint32), y.view(np.uint32)]).view(np.float32)
    assert (plain != got).any()


def test_saturation() -> None:
    x, y = floats("f32", 4), floats("f32", 5)
    got = evaluate("add.sat.f32 %d, %a0, %a1;", [x, y]).view(np.float32)
    with np.errstate(all="ignore"):
        total = x.view(np.float32) + y.view(np.float32)
    want = np.where(np.isnan(total), 0, np.clip(total, 0, 1)).astype(np.float32)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma", "min", "max", "neg", "abs", "fma.relu"])
def test_packed_is_twice_the_scalar(kind: str, op: str) -> None:
    low = [floats(kind, i) for i in range(3)]
    high = [floats(kind, i + 10) for i in range(3)]
    packed = [h.astype(np.uint32) << np.uint32(16) | x for x, h in zip(low, high, strict=True)]
    sources = {"neg": 1, "abs": 1, "fma": 3, "fma.relu": 3}.get(op, 2)
    form = {"fma": "fma.rn", "fma.relu": "fma.rn.relu"}.get(op, op)
    names = ", ".join(f"%a{i}" for i in range(sources))
    both = evaluate(f"{form}.{kind}x2 %d, {names};", packed[:sources])
    for part, arrays in ((both.astype(np.uint16), low), ((both >> np.uint32(16)).astype(np.uint16), high)):
        one = decode(evaluate(f"{form}.{kind} %d, {names};", arrays[:sources], np.uint16), kind)
        np.testing.assert_array_equal(decode(part, kind), one)
        if op == "fma.relu":
            assert not (one < 0).any()


def test_xorsign() -> None:
    x, y = floats("f32", 8)[8:], floats("f32", 9)[8:]
    got = evaluate("max.xorsign.abs.f32 %d, %a0, %a1;", [x, y])
    largest = np.maximum(np.abs(x.view(np.float32)), np.abs(y.view(np.float32))).view(np.uint32)
    np.testing.assert_array_equal(got, largest | (x ^ y) & np.uint32(0x80000000))


def test_copysign_and_testp() -> None:
    x, y = floats("f32", 6), floats("f32", 7)
    got = evaluate("copysign.f32 %d, %a0, %a1;", [x, y])
    np.testing.assert_array_equal(got, x & 0x80000000 | y & 0x7FFFFFFF)
    value = x.view(np.float32)
    subnormal = (np.abs(value) < 2.0**-126) & (value != 0)
    table = {"finite": np.isfinite(value), "infinite": np.isinf(value), "number": ~np.isnan(value)}
    table |= {"notanumber": np.isnan(value), "subnormal": subnormal}
    table["normal"] = np.isfinite(value) & ~subnormal & (value != 0)
    for name, want in table.items():
        got = evaluate(f"testp.{name}.f32 %P0, %a0; selp.u32 %d, 1, 0, %P0;", [x])
        np.testing.assert_array_equal(got, want)
