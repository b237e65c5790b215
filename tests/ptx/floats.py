"""Float arithmetic that numpy lacks: bfloat16, TF32, flush-to-zero, rounding modes, one-rounding fma."""

from __future__ import annotations

from typing import Any

import numpy as np

from .lanes import Array

_SIGN32 = np.uint32(0x80000000)
_EXP32 = np.uint32(0x7F800000)


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_f32_bits(x: Array, drop: int, mode: str = "rn") -> Array:
    """f32 bits with the low `drop` bits rounded away; NaN stays NaN. Modes: rn (even), rna (away), rz."""
    bits = x.view(np.uint32)
    low = np.uint32((1 << drop) - 1)
    half = np.uint32(1 << (drop - 1))
    if mode == "rn":
        out = bits + (half - np.uint32(1)) + (bits >> np.uint32(drop) & np.uint32(1))
    elif mode == "rna":
        out = bits + half
    elif mode == "rz":
        out = bits.copy()
    else:
        raise ValueError(mode)
    out &= ~low
    special = bits & _EXP32 == _EXP32
    if special.any():  # infinities stay; NaN becomes the canonical one
        nan = np.isnan(x)
        out = np.where(special, bits & ~low, out)
        out = np.where(nan, np.uint32(0x7FFFFFFF) & ~low, out)
    return out


def f32_to_bf16(x: Array, mode: str = "rn") -> Array:
    return (round_f32_bits(np.ascontiguousarray(x, np.float32), 16, mode) >> np.uint32(16)).astype(np.uint16)


def f64_to_f32_odd(x: Array) -> Array:
    """Round to odd: a second rounding, to 16 bits, then is as if the first had not happened."""
    y = x.astype(np.float32)
    back = y.astype(np.float64)
    inexact = (back != x) & np.isfinite(x)
    if inexact.any():
        too_big = np.abs(back) > np.abs(x)
        bits = y.view(np.uint32)
        bits = np.where(inexact & too_big, bits - np.uint32(1), bits)
        bits = np.where(inexact, bits | np.uint32(1), bits)
        return bits.view(np.float32)
    return y


def f64_to_bf16(x: Array) -> Array:
    return f32_to_bf16(f64_to_f32_odd(x))


def f64_to_f16(x: Array) -> Array:
    return x.astype(np.float16)  # numpy rounds once


def ftz(x: Array) -> Array:
    """Subnormal f32 to zero of the same sign; other types have no subnormals to flush."""
    if x.dtype != np.float32:
        return x
    bits = np.ascontiguousarray(x).view(np.uint32)
    small = (bits & _EXP32) == 0
    if small.any():
        return np.where(small, bits & _SIGN32, bits).view(np.float32)
    return x


def directed(exact: Array, mode: str) -> Array:
    """f64 values to f32, rounded towards zero (rz), down (rm) or up (rp)."""
    y = exact.astype(np.float32)
    back = y.astype(np.float64)
    if mode == "rz":
        wrong, towards = np.abs(back) > np.abs(exact), np.float32(0)
    elif mode == "rm":
        wrong, towards = back > exact, np.float32(-np.inf)
    elif mode == "rp":
        wrong, towards = back < exact, np.float32(np.inf)
    else:
        raise ValueError(mode)
    return np.where(wrong, np.nextafter(y, towards), y)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a*b+c in f32, rounded once except where the result is subnormal (there it may round twice)."""
    product = np.multiply(a, b, dtype=np.float64)  # exact: 48 bits
    total = product + c
    # f64 to f32 goes wrong only where the f64 sum lies exactly between two f32 without being exact.
    middle = total.view(np.uint64) & np.uint64(0x1FFFFFFF) == np.uint64(0x10000000)
    if middle.any():
        wide = c.astype(np.float64)
        part = total - product
        error = (product - (total - part)) + (wide - part)
        nudge = np.where(error > 0, np.inf, -np.inf)
        total = np.where(middle & (error != 0), np.nextafter(total, nudge), total)
    return total.astype(np.float32)


def minimum(a: Array, b: Array, nan: bool = False) -> Array:
    """PTX min: the number where one is NaN (or NaN with .NaN), and -0 below +0."""
    r = np.minimum(a, b) if nan else np.fmin(a, b)
    return _zeros(r, a, b, np.logical_or)


def maximum(a: Array, b: Array, nan: bool = False) -> Array:
    r = np.maximum(a, b) if nan else np.fmax(a, b)
    return _zeros(r, a, b, np.logical_and)


def _zeros(r: Array, a: Array, b: Array, sign: Any) -> Array:
    zero = r == 0
    if zero.any():
        both = zero & (a == b)
        r = np.where(both, np.where(sign(np.signbit(a), np.signbit(b)), -r.dtype.type(0), r.dtype.type(0)), r)
    return r


def widen(x: Array, kind: str) -> Array:
    """Any float kind to float64, exactly."""
    if kind in ("bf16", "bf16x2"):
        return bf16_to_f32(x).astype(np.float64)
    if kind == "tf32":
        return x.view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def narrow(x: Array, kind: str) -> Array:
    """float64 rounded to nearest even into a float kind."""
    if kind in ("bf16", "bf16x2"):
        return f64_to_bf16(x)
    if kind in ("f16", "f16x2"):
        return f64_to_f16(x)
    return x.astype(np.float32 if kind == "f32" else np.float64)
