"""Integer and bit instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .isa import Body, Build, op
from .lanes import BYTES, CARRY, DTYPES, Array, Mask
from .syntax import Imm, Reg

INTS = ("u16", "s16", "u32", "s32", "u64", "s64")
_DOUBLE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def mul_hi(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        product = a.astype(wide) * b.astype(wide)
        return (product >> wide(bits)).astype(a.dtype)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def divide(a: Array, b: Array) -> Array:
    """Truncating; a division by zero gives all ones, as the hardware does."""
    if a.dtype.kind == "u":
        safe = np.where(b == 0, a.dtype.type(1), b)
        return np.where(b == 0, ~a.dtype.type(0), a // safe)
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    quotient = divide(magnitude(a, unsigned), magnitude(b, unsigned))
    negative = ((a < 0) != (b < 0)) & (b != 0)
    return np.where(negative, ~quotient + unsigned.type(1), quotient).view(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    return a - np.where(b == 0, a.dtype.type(0), divide(a, b)) * b


def magnitude(a: Array, unsigned: Any) -> Array:
    bits = a.view(unsigned)
    return np.where(a < 0, ~bits + unsigned.type(1), bits)


def int_binary(b: Build, fn: Callable[..., Any], kind: str) -> Body:
    b.count(3)
    return b.alu(fn, b.dst(0, kind), b.src(1, kind), b.src(2, kind))


def multiply(b: Build, kind: str, add: bool) -> Body:
    """mul and mad: .lo, .hi, .wide."""
    b.count(4 if add else 3)
    part = b.need("lo", "hi", "wide")
    x, y = b.src(1, kind), b.src(2, kind)
    if part == "wide":
        wide = _DOUBLE[kind]
        dtype = DTYPES[wide]
        dst = b.dst(0, wide)
        if add:
            return b.alu(lambda x, y, z: np.multiply(x, y, dtype=dtype) + z, dst, x, y, b.src(3, wide))
        return b.alu(lambda x, y: np.multiply(x, y, dtype=dtype), dst, x, y)
    dst = b.dst(0, kind)
    fn: Callable[..., Any] = np.multiply if part == "lo" else mul_hi
    if b.flag("sat"):
        raise b.unknown(".sat")
    if add:
        return b.alu(lambda x, y, z: fn(x, y) + z, dst, x, y, b.src(3, kind))
    return b.alu(fn, dst, x, y)


def carried(b: Build, kind: str, op_name: str) -> Body:
    """add.cc, addc, sub.cc, subc: the carry (borrow) lives in a register of its own."""
    writes = b.flag("cc")
    reads = op_name in ("addc", "subc")
    minus = op_name.startswith("sub")
    dst, x, y = b.dst(0, kind), b.src(1, kind), b.src(2, kind)
    return carry_chain(b, dst, lambda: (x, y), minus, reads, writes)


def carry_chain(
    b: Build, dst: Array, operands: Callable[[], tuple[Array, Array]], minus: bool, reads: bool, writes: bool
) -> Body:
    flag = b.src(Reg(CARRY), "u32") if reads else None
    out = b.dst(Reg(CARRY), "u32") if writes else None
    unsigned = np.dtype(f"u{dst.dtype.itemsize}")

    def body(mask: Mask) -> None:
        x, y = (v.view(unsigned) for v in operands())
        extra = flag.astype(unsigned) if flag is not None else unsigned.type(0)
        if minus:
            first = x - y
            total = first - extra
            carry = (x < y) | (first < extra)
        else:
            first = x + y
            total = first + extra
            carry = (first < x) | (total < first)
        where = True if mask is None else mask
        np.copyto(dst.view(unsigned), total, where=where)
        if out is not None:
            np.copyto(out, carry.astype(np.uint32), where=where)

    return body


@op("addc", "subc")
def _addc(b: Build) -> Body:
    return carried(b, b.kind("u32", "s32", "u64", "s64"), b.instr.op)


@op("madc")
def _madc(b: Build) -> Body:
    return mad_carry(b, reads=True)


def mad_carry(b: Build, reads: bool) -> Body:
    part, writes, kind = b.need("lo", "hi"), b.flag("cc"), b.kind("u32", "s32", "u64", "s64")
    fn = np.multiply if part == "lo" else mul_hi
    dst, x, y, z = b.dst(0, kind), b.src(1, kind), b.src(2, kind), b.src(3, kind)
    return carry_chain(b, dst, lambda: (fn(x, y), z), False, reads, writes)


@op("mul24", "mad24")
def _mul24(b: Build) -> Body:
    b.need("lo")
    kind = b.kind("u32", "s32")
    shift = DTYPES[kind](8)
    srcs = [b.src(i, kind) for i in range(1, b.count(3, 4))]

    def fn(x: Array, y: Array, *z: Array) -> Array:
        product = (x << shift >> shift) * (y << shift >> shift)
        return product + z[0] if z else product

    return b.alu(fn, b.dst(0, kind), *srcs)


@op("rem")
def _rem(b: Build) -> Body:
    return int_binary(b, remainder, b.kind(*INTS))


@op("sad")
def _sad(b: Build) -> Body:
    kind = b.kind(*INTS)
    fn = lambda x, y, z: np.maximum(x, y) - np.minimum(x, y) + z  # noqa: E731
    return b.alu(fn, b.dst(0, kind), b.src(1, kind), b.src(2, kind), b.src(3, kind))


@op("and", "or", "xor")
def _logic(b: Build) -> Body:
    kind = b.kind("pred", "b16", "b32", "b64")
    table = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    fn = table[b.instr.op]
    if kind == "pred":
        (x, not_x), (y, not_y) = b.pred(1), b.pred(2)
        if not_x or not_y:
            return b.alu(lambda x, y: fn(x ^ not_x, y ^ not_y), b.dst(0, kind), x, y)
        return b.alu(fn, b.dst(0, kind), x, y)
    return int_binary(b, fn, kind)


@op("not")
def _not(b: Build) -> Body:
    kind = b.kind("pred", "b16", "b32", "b64")
    return b.alu(np.invert, b.dst(0, kind), b.src(1, kind))


@op("cnot")
def _cnot(b: Build) -> Body:
    kind = b.kind("b16", "b32", "b64")
    return b.alu(lambda x: (x == 0).astype(x.dtype), b.dst(0, kind), b.src(1, kind))


@op("shl", "shr")
def _shift(b: Build) -> Body:
    b.count(3)
    kind = b.kind("b16", "b32", "b64", *INTS)
    dst, x, amount = b.dst(0, kind), b.src(1, kind), b.src(2, "u32")
    fn = np.left_shift if b.instr.op == "shl" else np.right_shift
    # An amount past the width shifts everything out (or leaves the sign); numpy does the same.
    if isinstance(b.operand(2), Imm):
        return b.alu(fn, dst, x, np.minimum(amount, 255).astype(x.dtype))
    return b.alu(lambda x, n: fn(x, np.minimum(n, np.uint32(255)).astype(x.dtype)), dst, x, amount)


@op("shf")
def _funnel(b: Build) -> Body:
    left, clamp = b.need("l", "r") == "l", b.need("wrap", "clamp") == "clamp"
    b.kind("b32")
    bits = np.uint64(32)

    def fn(low: Array, high: Array, n: Array) -> Array:
        n = np.minimum(n, np.uint32(32)) if clamp else n & np.uint32(31)
        both = high.astype(np.uint64) << bits | low
        amount = n.astype(np.uint64)
        return ((both << amount) >> bits if left else both >> amount).astype(np.uint32)

    return b.alu(fn, b.dst(0, "b32"), b.src(1, "b32"), b.src(2, "b32"), b.src(3, "u32"))


@op("lop3")
def _lop3(b: Build) -> Body:
    b.kind("b32")
    table = b.operand(4)
    assert isinstance(table, Imm)
    lut = int(table.value)

    def fn(x: Array, y: Array, z: Array) -> Array:
        out = np.zeros_like(x)
        for case in range(8):
            if lut >> case & 1:
                out |= (x if case & 4 else ~x) & (y if case & 2 else ~y) & (z if case & 1 else ~z)
        return out

    return b.alu(fn, b.dst(0, "b32"), b.src(1, "b32"), b.src(2, "b32"), b.src(3, "b32"))


def permute(a: Array, b: Array, selector: Array) -> Array:
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (nibble & np.uint32(7)))).astype(np.uint32) & np.uint32(0xFF)
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        out |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return out


@op("prmt")
def _prmt(b: Build) -> Body:
    b.kind("b32")
    return b.alu(permute, b.dst(0, "b32"), b.src(1, "b32"), b.src(2, "b32"), b.src(3, "b32"))


def extract(x: Array, position: Array, length: Array) -> Array:
    position, length = position & np.uint32(0xFF), length & np.uint32(0xFF)
    signed = x.dtype.kind == "i"
    wide = np.int64 if signed else np.uint64
    shifted = x.astype(wide) >> np.minimum(position, np.uint32(64)).astype(wide)
    unused = np.where(length > 64, 0, 64 - length.astype(np.int64)).astype(wide)
    return (shifted << unused >> unused).astype(x.dtype)


@op("bfe")
def _bfe(b: Build) -> Body:
    kind = b.kind("u32", "s32", "u64", "s64")
    return b.alu(extract, b.dst(0, kind), b.src(1, kind), b.src(2, "u32"), b.src(3, "u32"))


@op("bfi")
def _bfi(b: Build) -> Body:
    kind = b.kind("b32", "b64")
    bits, one = 8 * BYTES[kind], np.uint64(1)

    def fn(x: Array, y: Array, position: Array, length: Array) -> Array:
        position, length = position & np.uint32(0xFF), (length & np.uint32(0xFF)).astype(np.uint64)
        ones = np.where(length >= 64, ~np.uint64(0), (one << length) - one)
        mask = (ones << position.astype(np.uint64)).astype(x.dtype)
        moved = (x.astype(np.uint64) << position.astype(np.uint64)).astype(x.dtype)
        return np.where(position < bits, (moved & mask) | (y & ~mask), y)

    return b.alu(fn, b.dst(0, kind), b.src(1, kind), b.src(2, kind), b.src(3, "u32"), b.src(4, "u32"))


@op("popc", "clz", "brev", "bfind")
def _count(b: Build) -> Body:
    name, shift = b.instr.op, b.flag("shiftamt")
    kind = b.kind("b32", "b64", "u32", "s32", "u64", "s64")
    bits = 8 * BYTES[kind]
    x = b.src(1, kind)
    dst = b.dst(0, kind if name == "brev" else "u32")

    def reverse(x: Array) -> Array:
        out = np.zeros_like(x)
        for i in range(bits):
            out |= (x >> x.dtype.type(i) & x.dtype.type(1)) << x.dtype.type(bits - 1 - i)
        return out

    def highest(x: Array) -> Array:
        """The highest set bit (of a negative number: the highest clear one), or -1."""
        value = (np.where(x < 0, ~x, x) if x.dtype.kind == "i" else x).astype(np.uint64)
        found = np.full(x.shape, -1, np.int64)
        for i in range(bits):
            found = np.where(value >> np.uint64(i) & np.uint64(1), i, found)
        return found

    def find(x: Array) -> Array:
        at = highest(x)
        return (np.where(at < 0, -1, bits - 1 - at) if shift else at).astype(np.uint32)

    table: dict[str, Callable[[Array], Array]] = {
        "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
        "clz": lambda x: (bits - 1 - highest(x)).astype(np.uint32),
        "brev": reverse,
        "bfind": find,
    }
    return b.alu(table[name], dst, x)


@op("dp4a")
def _dp4a(b: Build) -> Body:
    kinds = b.kind("u32", "s32"), b.kind("u32", "s32")
    out = "s32" if "s32" in kinds else "u32"

    def split(x: Array, kind: str) -> Array:
        return x.view(np.uint8 if kind == "u32" else np.int8).reshape(-1, 4).astype(np.int64)

    def fn(x: Array, y: Array, z: Array) -> Array:
        return ((split(x, kinds[0]) * split(y, kinds[1])).sum(1) + z).astype(DTYPES[out])

    return b.alu(fn, b.dst(0, out), b.src(1, kinds[0]), b.src(2, kinds[1]), b.src(3, out))
