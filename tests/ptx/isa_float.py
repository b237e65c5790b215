"""Arithmetic on floats (and the names that floats and integers share)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import floats
from .isa import Body, Build, op
from .isa_int import INTS, carried, divide, int_binary, mad_carry, multiply
from .lanes import Array

FLOATS = ("f32", "f64", "f16", "f16x2", "bf16", "bf16x2")
ROUNDING = ("rn", "rz", "rm", "rp")
Fn = Callable[..., Array]


def flushed(fn: Fn, ftz: bool) -> Fn:
    if not ftz:
        return fn
    return lambda *srcs: floats.ftz(fn(*(floats.ftz(s) for s in srcs)))


def saturated(fn: Fn, sat: bool) -> Fn:
    """.sat: into [0, 1], NaN to +0."""
    if not sat:
        return fn
    return lambda *srcs: _clamp(fn(*srcs))


def _clamp(x: Array) -> Array:
    one, zero = x.dtype.type(1), x.dtype.type(0)
    return np.where(x > zero, np.minimum(x, one), zero)


def through_f64(fn: Fn, kind: str) -> Fn:
    """Sixteen-bit floats: compute exactly enough in float64 and round once."""
    return lambda *srcs: floats.narrow(fn(*(floats.widen(s, kind) for s in srcs)), kind)


def float_op(b: Build, fn: Fn, kind: str, sources: int) -> Body:
    """Modifiers that all float arithmetic has, then the operation itself, given on float64 or f32 arrays."""
    mode, ftz, sat = b.take(*ROUNDING) or "rn", b.flag("ftz"), b.flag("sat")
    b.count(sources + 1)
    dst, srcs = b.dst(0, kind), [b.src(i + 1, kind) for i in range(sources)]
    if kind in ("f32", "f64"):
        if mode != "rn":
            if kind == "f64":
                raise b.unknown(f".{mode}.f64")
            plain = fn
            wide = lambda *srcs: plain(*(s.astype(np.float64) for s in srcs))  # noqa: E731
            fn = lambda *srcs: floats.directed(wide(*srcs), mode)  # noqa: E731
        elif fn is _fma and kind == "f32":
            fn = floats.fma32
    else:
        if mode != "rn" or (sat and "bf16" in kind):
            raise b.unknown("rounding or saturation of a 16-bit float")
        fn = through_f64(fn, kind)
        if ftz:  # f16 only: subnormal inputs and results to zero
            fn, inner = (lambda *srcs: _ftz16(inner(*(_ftz16(s) for s in srcs)))), fn
            ftz = False
    if ftz or sat:
        fn = saturated(flushed(fn, ftz), sat)
    return b.alu(fn, dst, *srcs)


def _ftz16(x: Array) -> Array:
    small = (np.ascontiguousarray(x).view(np.uint16) & np.uint16(0x7C00)) == 0
    return np.where(small, np.copysign(np.float16(0), x), x)


def _fma(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


def _fma_f64(a: Array, b: Array, c: Array) -> Array:
    """Rounded by way of x86's 80-bit floats: 64 bits of mantissa, so twice in rare halfway cases."""
    if np.finfo(np.longdouble).nmant < 63:
        return a * b + c
    # Dekker's product keeps every bit of a*b; the sum is then formed in the wide type.
    wide = np.longdouble
    high = a * b
    split = np.float64(134217729.0)
    ah = (t := split * a) - (t - a)
    bh = (t := split * b) - (t - b)
    al, bl = a - ah, b - bh
    low = ((ah * bh - high) + ah * bl + al * bh) + al * bl
    total = high.astype(wide) + c.astype(wide) + low.astype(wide)
    return np.where(np.isfinite(low), total.astype(np.float64), a * b + c)


@op("add", "sub", "mul")
def _arith(b: Build) -> Body:
    name = b.instr.op
    fn = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    if any(part in b.mods for part in ("lo", "hi", "wide")):
        return multiply(b, b.kind(*INTS), add=False)
    kind = b.kind(*INTS, *FLOATS)
    if kind in FLOATS:
        return float_op(b, fn, kind, 2)
    if "cc" in b.mods:
        return carried(b, kind, name)
    if b.flag("sat"):
        low, high = -(1 << 31), (1 << 31) - 1

        def sat(x: Array, y: Array) -> Array:
            return np.clip(fn(x.astype(np.int64), y.astype(np.int64)), low, high).astype(np.int32)

        if kind != "s32" or name == "mul":
            raise b.unknown(".sat")
        return b.alu(sat, b.dst(0, kind), b.src(1, kind), b.src(2, kind))
    if name == "mul":
        raise b.unknown("mul of integers without .lo, .hi or .wide")
    return int_binary(b, fn, kind)


@op("mad", "fma")
def _mad(b: Build) -> Body:
    if "cc" in b.mods:
        return mad_carry(b, reads=False)
    if any(part in b.mods for part in ("lo", "hi", "wide")):
        return multiply(b, b.kind(*INTS), add=True)
    relu = b.flag("relu")
    kind = b.kind(*FLOATS)
    fn: Fn = _fma_f64 if kind == "f64" else _fma
    if relu:
        if "16" not in kind:
            raise b.unknown(".relu")
        fn = lambda x, y, z: _relu(_fma(x, y, z))  # noqa: E731
    return float_op(b, fn, kind, 3)


def _relu(x: Array) -> Array:
    return np.where(x > 0, x, np.where(np.isnan(x), x, 0.0))


@op("div")
def _div(b: Build) -> Body:
    b.take("full", "approx")  # both within 2 ulp of what is computed here
    kind = b.kind(*INTS, "f32", "f64")
    if kind in INTS:
        return int_binary(b, divide, kind)
    return float_op(b, np.divide, kind, 2)


@op("min", "max")
def _minmax(b: Build) -> Body:
    smaller = b.instr.op == "min"
    relu = b.flag("relu")
    kind = b.kind(*INTS, *FLOATS)
    if kind in INTS:
        pick_int = np.minimum if smaller else np.maximum
        return int_binary(b, (lambda x, y: np.maximum(pick_int(x, y), 0)) if relu else pick_int, kind)
    if relu:
        raise b.unknown("relu of floats")
    nan, ftz = b.flag("NaN"), b.flag("ftz")
    pick = floats.minimum if smaller else floats.maximum
    fn: Fn = lambda x, y: pick(x, y, nan)  # noqa: E731
    if b.flag("xorsign"):
        b.need("abs")
        fn = lambda x, y: np.copysign(pick(np.abs(x), np.abs(y), nan), np.copysign(x, x) * np.copysign(1, y))  # noqa: E731
    if "16" in kind:
        fn = through_f64(fn, kind)
    b.count(3)  # the forms with three sources are of later targets
    fn = flushed(fn, ftz and kind == "f32")
    return b.alu(fn, b.dst(0, kind), b.src(1, kind), b.src(2, kind))


@op("abs", "neg")
def _sign(b: Build) -> Body:
    b.count(2)
    negate, ftz = b.instr.op == "neg", b.flag("ftz")
    kind = b.kind(*INTS, *FLOATS)
    dst, src = b.dst(0, kind), b.src(1, kind)
    if "bf16" in kind:
        bit = np.uint16(0x8000)
        return b.alu((lambda x: x ^ bit) if negate else (lambda x: x & ~bit), dst, src)
    fn: Any = np.negative if negate else np.absolute
    if kind in INTS:
        return b.alu(np.subtract if negate else fn, dst, *([np.zeros_like(src), src] if negate else [src]))
    return b.alu(flushed(fn, True) if ftz and kind == "f32" else fn, dst, src)


@op("copysign")
def _copysign(b: Build) -> Body:
    kind = b.kind("f32", "f64")
    return b.alu(lambda sign, x: np.copysign(x, sign), b.dst(0, kind), b.src(1, kind), b.src(2, kind))


def _rcp(x: Array) -> Array:
    return 1.0 / x


_FUNCTIONS: dict[str, Fn] = {
    "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "rcp": _rcp, "sqrt": np.sqrt, "rsqrt": lambda x: 1.0 / np.sqrt(x),
}  # fmt: skip


@op(*_FUNCTIONS)
def _function(b: Build) -> Body:
    """Approximations included: computed in float64, rounded to the type; so better than the hardware."""
    name = b.instr.op
    exact, mode = b.flag("approx"), b.take(*ROUNDING) or "rn"
    ftz = b.flag("ftz")
    if not exact and name not in ("rcp", "sqrt"):
        raise b.unknown("only .approx exists")
    kind = b.kind(*FLOATS)
    inner = _FUNCTIONS[name]
    if mode != "rn":
        if kind != "f32":
            raise b.unknown(f".{mode}")
        fn: Fn = lambda x: floats.directed(inner(x.astype(np.float64)), mode)  # noqa: E731
    else:
        fn = through_f64(inner, kind)
    if ftz and kind == "f32":
        fn = flushed(fn, True)
    elif ftz and kind != "bf16" and kind != "bf16x2" and kind != "f64":
        raise b.unknown(".ftz")
    return b.alu(fn, b.dst(0, kind), b.src(1, kind))
