"""Comparisons, selections and moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import floats
from .isa import Body, Build, op
from .isa_float import FLOATS
from .isa_int import INTS
from .lanes import BYTES, DTYPES, Array, Mask
from .syntax import Imm, Operand, Reg, Sym, Vec

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
