"""Loads, stores, atomics, cp.async and address conversions."""

from __future__ import annotations

from typing import Any

import numpy as np

from .isa import Body, Build, op
from .isa_int import INTS
from .lanes import BYTES, DTYPES, Array, Mask
from .memory import Space
from .syntax import Imm, Mem, Operand, Sym

_SPACES = ("global", "shared", "local", "const", "param")
_WINDOWS = (("shared", 0x7000), ("local", 0x7100), ("const", 0x7200), ("param", 0x7300))
_TYPES = ("b8", "u8", "s8", *INTS, "b16", "b32", "b64", "f32", "f64", "b128")
_HINTS = (
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::evict_normal", "L1::evict_unchanged",
    "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::cache_hint", "L2::64B", "L2::128B",
    "L2::256B", "L2::evict_first", "L2::evict_last", "L2::evict_normal", "unified",
)  # fmt: skip


def hints(b: Build) -> bool:
    """Drop cache hints, which change no value; True when a cache policy operand comes with them."""
    policy = "L2::cache_hint" in b.mods
    while b.take(*_HINTS):
        pass
    return policy


def space_of(b: Build) -> str | None:
    name = b.take(*_SPACES, "shared::cta", "param::entry", "param::func")
    return name.split("::")[0] if name else None


class Address:
    """An address operand, bound: lanes to byte offsets in the space they fall in."""

    def __init__(self, b: Build, operand: Operand, space: str | None) -> None:
        if not isinstance(operand, Mem):
            raise b.unknown("an address was expected")
        self.wave = b.wave
        self.fixed: int | None = None
        self.row: Array | None = None
        self.offset = operand.offset
        if isinstance(operand.base, Sym):
            variable = b.wave.program.variables.get(operand.base.name)
            if (
                space == "param" and variable is not None and variable.space == "local"
            ):  # a parameter of an inlined call
                space = "local"
            self.fixed = b.wave.symbol(operand.base, b) + operand.offset
        elif isinstance(operand.base, Imm):
            self.fixed = int(operand.base.value) + operand.offset
        else:
            register = b.lanes.row(operand.base, b.instr)
            kind = f"u{8 * register.dtype.itemsize}"
            self.row = b.src(operand.base, kind)
            if register.dtype.itemsize == 8:
                self.row = self.row.view(np.int64)
        self.space = space
        if self.fixed is not None:
            self.row = b.src(Imm(self.fixed), "s64")
            self.offset = 0

    def values(self, mask: Mask) -> tuple[Array, Array]:
        """Active lanes and their machine addresses."""
        assert self.row is not None
        if mask is None:
            lanes, address = self.wave.all, self.row
        else:
            lanes = np.flatnonzero(mask)
            address = self.row[lanes]
        return lanes, address + np.int64(self.offset) if self.offset else address.astype(np.int64)

    def resolve(self, mask: Mask, width: int) -> list[tuple[Space, Array, Array, Array | None]]:
        """(space, lanes, byte offsets, which of the active lanes) for each space that is touched."""
        lanes, address = self.values(mask)
        if self.space is not None:
            space = self.wave.spaces[self.space]
            return [(space, lanes, space.locate(lanes, address, width, self.wave.copy_of[self.space]), None)]
        pieces: list[tuple[Space, Array, Array, Array | None]] = []
        window = address >> 32
        rest = np.ones(len(lanes), np.bool_)
        for name, high in _WINDOWS:
            here = window >> 8 == high
            if here.any():
                rest &= ~here
                space = self.wave.spaces[name]
                inside = address[here] - (high << 40)
                at = space.locate(lanes[here], inside, width, self.wave.copy_of[name])
                pieces.append((space, lanes[here], at, np.flatnonzero(here)))
        if rest.any():
            space = self.wave.spaces["global"]
            which = None if not pieces else np.flatnonzero(rest)
            at = space.locate(lanes[rest], address[rest], width, None)
            pieces.append((space, lanes[rest], at, which))
        return pieces


def ordering(b: Build) -> bool:
    """Memory order and scope; True for the strong accesses that may meet others' without a data race."""
    strong = b.take("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio") not in (
        None,
        "weak",
    )
    b.take("cta", "gpu", "sys", "cluster")
    return strong


@op("ld", "ldu")
def _ld(b: Build) -> Body:
    strong = ordering(b)
    space, policy = space_of(b), hints(b)
    count = int((b.take("v2", "v4", "v8") or "v1")[1:])
    kind = b.kind(*_TYPES)
    b.count(3 if policy else 2)
    items = b.items(0)
    if len(items) != count:
        raise b.unknown("vector length")
    size, signed = BYTES.get(kind, 16), kind.startswith("s")
    outs = [None if item == Sym("_") else b.dst_row(item) for item in items]
    address, wave, instr = Address(b, b.operand(1), space), b.wave, b.instr
    if any(out is not None and out.dtype.itemsize < size for out in outs):
        raise b.unknown("destination too narrow")
    dtype: Any = DTYPES[kind]

    def body(mask: Mask) -> None:
        for where, lanes, at, _ in address.resolve(mask, size * count):
            values = where.load(lanes, at, size * count, wave.reporter(instr, where), strong).view(dtype)
            full = len(lanes) == wave.lanes.n
            for i, out in enumerate(outs):
                if out is None:
                    continue
                column = values[:, i]
                if out.dtype.itemsize != size:
                    column = column.astype(f"{'i' if signed else 'u'}{out.dtype.itemsize}")
                if full:
                    out[...] = (
                        column.view(out.dtype) if column.flags.c_contiguous else column.copy().view(out.dtype)
                    )
                else:
                    out[lanes] = np.ascontiguousarray(column).view(out.dtype)

    return body


@op("st")
def _st(b: Build) -> Body:
    strong = ordering(b)
    space, policy = space_of(b), hints(b)
    count = int((b.take("v2", "v4", "v8") or "v1")[1:])
    kind = b.kind(*_TYPES)
    b.count(3 if policy else 2)
    items = b.items(1)
    if len(items) != count:
        raise b.unknown("vector length")
    size = BYTES[kind]
    bits = f"b{8 * size}"
    srcs = [
        b.src(item, kind if isinstance(item, Imm) else bits, loose=True).view(DTYPES[bits]) for item in items
    ]
    address, wave, instr = Address(b, b.operand(0), space), b.wave, b.instr
    width = size * count
    scratch = np.empty((b.lanes.n, count), DTYPES[bits])

    def body(mask: Mask) -> None:
        for i, src in enumerate(srcs):
            scratch[:, i] = src
        data = scratch.view(np.uint8)
        for where, lanes, at, _ in address.resolve(mask, width):
            if not where.writable:
                raise wave.finding(instr, "out-of-bounds", f"store to {where.name} memory", int(lanes[0]))
            values = data if len(lanes) == wave.lanes.n else data[lanes]
            where.store(lanes, at, values, wave.reporter(instr, where), strong)

    return body


@op("prefetch", "prefetchu", "applypriority", "discard")
def _prefetch(b: Build) -> Body:
    space_of(b)
    if b.instr.op == "discard":
        raise b.unknown("discard")
    b.take("L1", "L2", "L2::evict_normal", "L2::evict_last")
    return lambda mask: None


@op("createpolicy")
def _createpolicy(b: Build) -> Body:
    """A cache policy changes no value: its register merely becomes initialised."""
    b.need("fractional", "range")
    b.take("global")
    while b.take("L2::evict_first", "L2::evict_last", "L2::evict_normal", "L2::evict_unchanged"):
        pass
    b.kind("b64")
    dst = b.dst(0, "b64")
    return b.alu(lambda: np.zeros_like(dst), dst)


@op("cvta")
def _cvta(b: Build) -> Body:
    to, space = b.flag("to"), space_of(b)
    kind = b.kind("u64", "u32")
    window = np.uint64(dict(_WINDOWS).get(space or "", 0) << 40)
    operand = b.operand(1)
    source = b.src(Imm(b.wave.symbol(operand, b)) if isinstance(operand, Sym) else 1, kind)
    if kind == "u32":
        raise b.unknown("32-bit generic addresses")
    offset = np.uint64(-int(window) % (1 << 64)) if to else window
    return b.alu(lambda x: x + offset, b.dst(0, kind), source)


@op("isspacep")
def _isspacep(b: Build) -> Body:
    space = space_of(b)
    windows = dict(_WINDOWS)

    def fn(x: Array) -> Array:
        high = x >> np.uint64(40)
        if space == "global":
            return ~np.isin(high, list(windows.values()))
        return high == windows[space or ""]

    return b.alu(fn, b.dst(0, "pred"), b.src(1, "u64"))
