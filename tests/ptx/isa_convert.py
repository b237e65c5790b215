"""cvt: between integers, between floats, and across, with every rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import floats
from .isa import Body, Build, op
from .isa_float import FLOATS, ROUNDING
from .lanes import BYTES, DTYPES, Array


@op("cvt")
def _cvt(b: Build) -> Body:
    rounding = b.take(*ROUNDING, "rna", "rni", "rzi", "rmi", "rpi")
    ftz, sat, relu = b.flag("ftz"), b.flag("sat"), b.flag("relu")
    to, source = b.kind(), b.kind()
    if to in ("f16x2", "bf16x2"):
        if source != "f32" or rounding not in ("rn", "rz") or sat:
            raise b.unknown("packed conversion")
        return b.alu(_packed(to, rounding, relu), b.dst(0, to), b.src(1, "f32"), b.src(2, "f32"))
    b.count(2)
    src = b.src(1, source, loose=True)
    convert = _conversion(b, to, source, rounding, ftz, sat, relu)
    if to in FLOATS or to == "tf32":
        return b.alu(convert, b.dst(0, to), src)
    # An integer narrower than its register is extended to it, by its own sign.
    row = b.dst_row(0)
    if row.dtype.itemsize < BYTES[to]:
        raise b.unknown("destination too narrow")
    signed = to.startswith("s")
    wide = np.dtype(f"{'i' if signed else 'u'}{row.dtype.itemsize}")
    return b.alu(lambda x: convert(x).astype(wide).view(row.dtype), row, src)


def _packed(to: str, rounding: str, relu: bool) -> Callable[[Array, Array], Array]:
    def one(x: Array) -> Array:
        if relu:
            x = np.where(x > 0, x, np.where(np.isnan(x), x, np.float32(0)))
        if to == "bf16x2":
            return floats.f32_to_bf16(x, rounding)
        return x.astype(np.float16) if rounding == "rn" else _f16_towards_zero(x)

    return lambda high, low: np.stack([one(low), one(high)], axis=1)


def _f16_towards_zero(x: Array) -> Array:
    y = x.astype(np.float16)
    return np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float16(0)), y)


def _conversion(
    b: Build, to: str, source: str, rounding: str | None, ftz: bool, sat: bool, relu: bool
) -> Callable[[Array], Array]:
    """A function from an array of `source` to an array of `to`."""
    from_float, to_float = source in FLOATS or source == "tf32", to in FLOATS or to == "tf32"
    load = floats.bf16_to_f32 if source == "bf16" else (lambda x: x)
    if ftz:
        inner = load
        load = lambda x: floats.ftz(inner(x))  # noqa: E731
    if not from_float and not to_float:
        return _int_to_int(to, sat)
    if from_float and not to_float:
        if rounding not in ("rni", "rzi", "rmi", "rpi"):
            raise b.unknown("float to integer without .rni, .rzi, .rmi or .rpi")
        return _float_to_int(to, rounding, load)
    if not from_float:
        if rounding not in ROUNDING or relu:
            raise b.unknown("integer to float without rounding")
        return _int_to_float(b, to, rounding, sat)
    return _float_to_float(b, to, source, rounding, ftz, sat, relu, load)


def _int_to_int(to: str, sat: bool) -> Callable[[Array], Array]:
    dtype = DTYPES[to]
    if not sat:
        return lambda x: x.astype(dtype)
    info = np.iinfo(dtype)

    def fn(x: Array) -> Array:
        low, high = (
            max(int(info.min), int(np.iinfo(x.dtype).min)),
            min(int(info.max), int(np.iinfo(x.dtype).max)),
        )
        return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)

    return fn


def _float_to_int(to: str, rounding: str, load: Any) -> Callable[[Array], Array]:
    """Out of range is clamped and NaN is 0 (of 64 bits: the top bit), with or without .sat."""
    dtype = DTYPES[to]
    info = np.iinfo(dtype)
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    nan = dtype(0) if info.bits < 64 else (dtype(1 << 63) if to == "u64" else dtype(info.min))

    def fn(x: Array) -> Array:
        value = whole(load(x).astype(np.float64))
        low, high = value <= float(info.min), value >= float(info.max)
        inside = np.where(low | high | np.isnan(value), 0.0, value).astype(dtype)
        out = np.where(low, dtype(info.min), np.where(high, dtype(info.max), inside))
        return np.where(np.isnan(value), nan, out)

    return fn


def _int_to_float(b: Build, to: str, rounding: str, sat: bool) -> Callable[[Array], Array]:
    def fn(x: Array) -> Array:
        if to == "f64":
            if rounding != "rn" and x.dtype.itemsize == 8:
                raise b.unknown(f"64-bit integer to f64 with .{rounding}")
            return x.astype(np.float64)
        if rounding != "rn":
            if to != "f32" or x.dtype.itemsize == 8:
                raise b.unknown(f"integer to .{to} with .{rounding}")
            return floats.directed(x.astype(np.float64), rounding)
        if to == "f32":
            return x.astype(np.float32)
        return floats.narrow(x.astype(np.float64), to)

    if sat:
        raise b.unknown(".sat")
    return fn


def _float_to_float(
    b: Build, to: str, source: str, rounding: str | None, ftz: bool, sat: bool, relu: bool, load: Any
) -> Callable[[Array], Array]:
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(rounding or "")
    if to == "tf32":
        if rounding not in ("rna", "rn", "rz") or sat:
            raise b.unknown("conversion to .tf32")
        return lambda x: floats.round_f32_bits(np.ascontiguousarray(load(x)), 13, rounding)

    def fn(x: Array) -> Array:
        value = load(x)
        if whole is not None:
            value = whole(value)
        if relu:
            value = np.where(value > 0, value, np.where(np.isnan(value), value, value.dtype.type(0)))
        if sat:
            value = np.where(value > 0, np.minimum(value, value.dtype.type(1)), value.dtype.type(0))
        if to == "bf16":
            if rounding == "rz":
                return floats.f32_to_bf16(value.astype(np.float32), "rz")
            return floats.f64_to_bf16(value.astype(np.float64))
        if to == "f16":
            return value.astype(np.float16) if rounding != "rz" else _f16_towards_zero(value)
        if to == "f32":
            if rounding in ("rz", "rm", "rp") and source == "f64":
                value = floats.directed(value, rounding)
            value = value.astype(np.float32)
            return floats.ftz(value) if ftz else value
        return value.astype(np.float64)

    if rounding in ("rm", "rp") and (to, source) != ("f32", "f64"):
        raise b.unknown(f".{rounding} from .{source} to .{to}")
    return fn
