"""Loads, stores, atomics, cp.async and address conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import floats
from .findings import Unsupported
from .isa import Body, Build, op
from .isa_int import INTS
from .lanes import BYTES, DTYPES, Array, Mask
from .memory import Space
from .parser import Imm, Mem, Operand, Reg, Sym

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
        self.b, self.wave, self.instr = b, b.wave, b.instr
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


# Atomics

_ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y, "min": np.minimum, "max": np.maximum, "and": lambda x, y: x & y,
    "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y, "exch": lambda x, y: y,
    "inc": lambda x, y: np.where(x >= y, x.dtype.type(0), x + x.dtype.type(1)),
    "dec": lambda x, y: np.where((x == 0) | (x > y), y, x - x.dtype.type(1)),
}  # fmt: skip


@op("atom", "red")
def _atom(b: Build) -> Body:
    returns = b.instr.op == "atom"
    ordering(b)
    space, policy = space_of(b), hints(b)
    what = b.need(*_ATOMIC, "cas")
    noftz = b.flag("noftz")
    kind = b.kind("b32", "b64", "b16", *INTS, "f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
    if ("16" in kind and kind[0] in "fb" and kind != "b16") != noftz:
        raise b.unknown(".noftz belongs to 16-bit float atomics")
    first = 1 if returns else 0
    b.count(first + (3 if what == "cas" else 2) + policy)
    out = None if not returns or b.operand(0) == Sym("_") else b.dst(0, kind)
    address, wave, instr = Address(b, b.operand(first), space), b.wave, b.instr
    values = b.src(first + 1, kind)
    other = b.src(first + 2, kind) if what == "cas" else None
    size, combine = BYTES[kind], _ATOMIC.get(what)
    if combine and "16" in kind and kind != "b16":
        plain = combine
        combine = lambda x, y: floats.narrow(plain(floats.widen(x, kind), floats.widen(y, kind)), kind)  # noqa: E731

    def apply(old: Array, lanes: Array) -> Array:
        if other is not None:
            return np.where(old == values[lanes], other[lanes], old)
        assert combine is not None
        return np.asarray(combine(old, values[lanes])).astype(old.dtype)

    def body(mask: Mask) -> None:
        for where, lanes, at, _ in address.resolve(mask, size):
            report = wave.reporter(instr, where)
            if where.shadow is not None:  # a read and a write of one thread, strong
                who, granule = where.granules(lanes, at, size)
                base = where.granule
                tell = lambda kind, text, lane, g: report(kind, text, lane, g * base)  # noqa: E731, B023
                where.shadow.write(who, granule, True, tell)
            where.check_state(lanes, at, size, 3, report)
            cells = where.data.view(np.uint8)
            # Lanes that meet at one address take turns; each round has distinct addresses.
            left = np.arange(len(lanes))
            while len(left):
                _, once = np.unique(at[left], return_index=True)
                turn = left[once]
                index = at[turn][:, None] + np.arange(size)
                old = cells[index].view(values.dtype)
                old = old if values.ndim == 2 else old[:, 0]
                fresh = apply(old, lanes[turn])
                if out is not None:
                    out[lanes[turn]] = old
                cells[index] = np.ascontiguousarray(fresh).reshape(len(turn), -1).view(np.uint8)
                left = np.delete(left, once)

    return body


# cp.async


@op("cp")
def _cp(b: Build) -> Body:
    b.need("async")
    wave, instr = b.wave, b.instr
    if b.flag("commit_group"):

        def commit(mask: Mask) -> None:
            wave.group[slice(None) if mask is None else mask] += 1

        return commit
    if b.flag("wait_all"):
        return lambda mask: wait(wave, mask, None)
    if b.flag("wait_group"):
        allowed = b.operand(0)
        assert isinstance(allowed, Imm)
        keep = int(allowed.value)
        return lambda mask: wait(wave, mask, keep)
    if b.mods and b.mods[0] in ("bulk", "mbarrier", "reduce"):
        raise b.unknown("not an sm_80 cp.async")
    cache = b.need("ca", "cg")
    if b.take("shared", "shared::cta") is None or not b.flag("global"):
        raise b.unknown("cp.async goes from .global to .shared")
    policy = hints(b)
    operands = list(b.instr.operands)
    if policy:
        operands.pop()
    size_operand = operands[2]
    assert isinstance(size_operand, Imm)
    size = int(size_operand.value)
    if size not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise b.unknown(f"cp.async.{cache} of {size} bytes")
    target, source = Address(b, operands[0], "shared"), Address(b, operands[1], "global")
    given: Array | None = None
    ignore: tuple[Array, bool] | None = None
    if len(operands) > 3:
        extra = operands[3]
        if isinstance(extra, Reg) and b.lanes.rows[extra.name].dtype == np.bool_:
            ignore = b.pred(extra)
        else:
            given = b.src(extra, "u32")
    shared, source_space = wave.spaces["shared"], wave.spaces["global"]

    def body(mask: Mask) -> None:
        lanes, to = target.values(mask)
        into = shared.locate(lanes, to, size, wave.copy_of["shared"])
        _, origin = source.values(mask)
        values = np.zeros((len(lanes), size), np.uint8)
        amount = np.full(len(lanes), size, np.int64) if given is None else given[lanes].astype(np.int64)
        if ignore is not None:
            amount = np.where(ignore[0][lanes] ^ ignore[1], 0, amount)
        if amount.max() > size:
            raise wave.finding(
                instr, "out-of-bounds", f"src-size {amount.max()} of a {size}-byte cp.async", 0
            )
        report = wave.reporter(instr, source_space)
        for each in np.unique(amount):
            if each == 0:
                continue
            some = slice(None) if (amount == each).all() else np.flatnonzero(amount == each)
            who = lanes[some]
            at = source_space.locate(who, origin[some], size if each == size else 1, None)
            if each == size:
                values[some] = source_space.load(who, at, size, report)
            else:
                for byte in range(int(each)):
                    values[some, byte] = source_space.load(who, at + byte, 1, report)[:, 0]
        shared.begin_async(lanes, into, size, wave.reporter(instr, shared))
        wave.copies.append(wave.make_copy(lanes, into, values, wave.group[lanes]))

    return body


def wait(wave: Any, mask: Mask, keep: int | None) -> None:
    """Deliver the copies of all but the last `keep` groups of each lane (None: also those not committed)."""
    order, shared = wave.order, wave.spaces["shared"]
    left = []
    for copy in wave.copies:
        due = (
            np.ones(len(copy.lanes), np.bool_) if keep is None else copy.group < wave.group[copy.lanes] - keep
        )
        if mask is not None:
            due &= mask[copy.lanes]
        if due.all():
            shared.land(copy.lanes, copy.at, copy.values)
            continue
        if due.any():
            shared.land(copy.lanes[due], copy.at[due], copy.values[due])
            rest = ~due
            copy = wave.make_copy(copy.lanes[rest], copy.at[rest], copy.values[rest], copy.group[rest])
        left.append(copy)
    wave.copies[:] = left
    order.now += 1


__all__ = ["Unsupported"]
