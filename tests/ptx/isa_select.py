"""Comparisons, selections, moves and conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import floats
from .isa import Body, Build, op
from .isa_float import FLOATS, ROUNDING
from .isa_int import INTS
from .lanes import BYTES, DTYPES, Array, Mask
from .parser import Imm, Operand, Reg, Sym, Vec

_ORDERED: dict[str, Any] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_ALWAYS = (*_ORDERED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
_BITS = ("b16", "b32", "b64")


def comparison(name: str, kind: str) -> Callable[[Array, Array], Array]:
    """A comparison of two arrays of `kind`, NaN as PTX has it: plain forms are false, the ..u forms true."""
    if kind not in FLOATS:
        return _ORDERED[name]
    load = floats.bf16_to_f32 if "bf16" in kind else (lambda x: x)

    def fn(x: Array, y: Array) -> Array:
        x, y = load(x), load(y)
        if name in ("num", "nan"):
            nan = np.isnan(x) | np.isnan(y)
            return nan if name == "nan" else ~nan
        if name == "ne":
            return (x < y) | (x > y)
        if name in _ORDERED:
            return _ORDERED[name](x, y)
        if name == "neu":
            return x != y
        return _ORDERED[name[:2]](x, y) | np.isnan(x) | np.isnan(y)

    if "bf16" not in kind and name in ("eq", "lt", "le", "gt", "ge"):
        return _ORDERED[name]
    return np.not_equal if name == "neu" and "bf16" not in kind else fn


def _compare(b: Build) -> tuple[Callable[..., Array], list[Array], str, str]:
    """What setp and set share: comparison, flush to zero, boolean combination, types."""
    name = b.need(*_ALWAYS)
    combine, ftz = b.take("and", "or", "xor"), b.flag("ftz")
    out_kind = b.kind() if b.instr.op == "set" else "pred"
    kind = b.kind(*_BITS, *INTS, *FLOATS)
    if kind not in FLOATS and name not in _ORDERED:
        raise b.unknown(f".{name}.{kind}")
    inner = comparison(name, kind)
    fn: Callable[..., Array] = inner
    if ftz and kind == "f32":
        fn = lambda x, y: inner(floats.ftz(x), floats.ftz(y))  # noqa: E731
    srcs = [b.src(1, kind), b.src(2, kind)]
    if combine:
        logic = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine]
        other, negated = b.pred(3)
        srcs.append(other)
        plain = fn

        def fn(x: Array, y: Array, c: Array) -> Array:
            c = c ^ negated
            return logic(plain(x, y), c[:, None] if kind.endswith("x2") else c)

    return fn, srcs, kind, out_kind


@op("setp")
def _setp(b: Build) -> Body:
    first, second = b.pair(0)
    combine = [m for m in b.mods if m in ("and", "or", "xor")]
    fn, srcs, kind, _ = _compare(b)
    if not kind.endswith("x2") and (second is None or second == Sym("_")):
        return b.alu(fn, b.dst(first, "pred"), *srcs)
    assert second is not None
    outs = [None if o == Sym("_") else b.dst(o, "pred") for o in (first, second)]
    negative = _negated(b, fn, srcs, kind, combine) if not kind.endswith("x2") else None

    def body(mask: Mask) -> None:
        result = fn(*srcs)
        both = (result[:, 0], result[:, 1]) if negative is None else (result, negative())
        for out, value in zip(outs, both, strict=True):
            if out is not None:
                np.copyto(out, value, where=True if mask is None else mask)

    return body


def _negated(b: Build, fn: Any, srcs: list[Array], kind: str, combine: list[str]) -> Callable[[], Array]:
    """The q of p|q: the comparison negated, combined with the same predicate."""
    if not combine:
        return lambda: ~fn(*srcs)
    name = next(m for m in b.instr.mods if m in _ALWAYS)
    plain = comparison(name, kind)
    logic = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine[0]]
    other, negated = b.pred(3)
    return lambda: logic(~plain(srcs[0], srcs[1]), other ^ negated)


@op("set")
def _set(b: Build) -> Body:
    fn, srcs, kind, out = _compare(b)
    if out in ("u32", "s32"):
        true: Any = DTYPES[out](0xFFFFFFFF if out == "u32" else -1)
    elif out == "f32":
        true = np.float32(1)
    elif out in ("f16", "f16x2"):
        true = np.float16(1)
    elif out in ("bf16", "bf16x2"):
        true = np.uint16(0x3F80)
    else:
        raise b.unknown(f"set to .{out}")
    if kind.endswith("x2") and out in ("u32", "s32"):
        raise b.unknown("packed comparison to an integer")
    zero = type(true)(0)
    return b.alu(lambda *s: np.where(fn(*s), true, zero), b.dst(0, out), *srcs)


@op("selp")
def _selp(b: Build) -> Body:
    kind = b.kind("b16", "b32", "b64", *INTS, "f32", "f64")
    chosen, negated = b.pred(3)
    bits = f"b{8 * BYTES[kind]}"  # a selection moves bits
    x, y = (_bits_source(b, i, kind, bits) for i in (1, 2))
    if negated:
        x, y = y, x
    return b.alu(lambda x, y, p: np.where(p, x, y), b.dst(0, bits), x, y, chosen)


def _bits_source(b: Build, at: int, kind: str, bits: str) -> Array:
    return b.src(at, kind).view(DTYPES[bits])


@op("slct")
def _slct(b: Build) -> Body:
    ftz = b.flag("ftz")
    kind, test = b.kind(), b.kind("s32", "f32")
    condition = b.src(3, test)
    fn = lambda x, y, c: np.where((floats.ftz(c) if ftz else c) >= 0, x, y)  # noqa: E731
    return b.alu(fn, b.dst(0, kind), b.src(1, kind), b.src(2, kind), condition)


@op("testp")
def _testp(b: Build) -> Body:
    test, kind = (
        b.need("finite", "infinite", "number", "notanumber", "normal", "subnormal"),
        b.kind("f32", "f64"),
    )
    tiny = np.finfo(DTYPES[kind]).tiny
    table: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }
    return b.alu(table[test], b.dst(0, "pred"), b.src(1, kind))


# Moves


@op("mov")
def _mov(b: Build) -> Body:
    kind = b.kind("pred", *_BITS, *INTS, "f32", "f64")
    b.count(2)
    target, source = b.operand(0), b.operand(1)
    if isinstance(target, Vec):
        return _unpack(b, target.items, kind)
    if isinstance(source, Vec):
        return _pack(b, source.items, kind)
    if kind == "pred":
        return b.alu(_copy, b.dst(0, "pred"), b.src(1, "pred"))
    bits = f"b{8 * BYTES[kind]}"
    dst = b.dst(0, bits)
    if isinstance(source, Sym):
        if source.name == "WARP_SZ":
            return b.alu(_copy, dst, b.lanes.special["WARP_SZ"])
        value = b.wave.symbol(source, b)
        return b.alu(_copy, dst, b.src(Imm(value), bits))
    if isinstance(source, Reg) and source.name.startswith(("%clock", "%globaltimer")):
        wave, dtype = b.wave, dst.dtype.type
        return b.alu(lambda: np.full(dst.shape, dtype(wave.steps & 0xFFFFFFFF)), dst)
    return b.alu(_copy, dst, _bits_source(b, 1, kind, bits))


def _copy(x: Array) -> Array:
    return x


def _pack(b: Build, items: tuple[Operand, ...], kind: str) -> Body:
    size = BYTES[kind] // len(items)
    parts = [b.src(item, f"b{8 * size}") for item in items]
    dst = b.dst(0, f"b{8 * BYTES[kind]}")
    view = dst.view(parts[0].dtype).reshape(len(dst), len(items))

    def body(mask: Mask) -> None:
        where: Any = True if mask is None else mask
        fresh = [part.copy() for part in parts] if len(parts) > 1 else parts
        for i, part in enumerate(fresh):
            np.copyto(view[:, i], part, where=where)

    return body


def _unpack(b: Build, items: tuple[Operand, ...], kind: str) -> Body:
    size = BYTES[kind] // len(items)
    source = b.src(1, f"b{8 * BYTES[kind]}")
    view = source.view(DTYPES[f"b{8 * size}"]).reshape(len(source), len(items))
    outs = [None if item == Sym("_") else b.dst(item, f"b{8 * size}") for item in items]

    def body(mask: Mask) -> None:
        values = view.copy()
        for i, out in enumerate(outs):
            if out is not None:
                np.copyto(out, values[:, i], where=True if mask is None else mask)

    return body


# Conversions


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
