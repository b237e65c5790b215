"""Hopper's wgmma: products of a warp group, asynchronous, on operands in shared memory.

A product is computed when it is issued. Until it is waited for, its sums count as registers without a value;
when it is, its operands must still be what they were. Shared memory that threads have written themselves must
have been fenced for the async proxy by those threads before a product reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .isa import Body, Build, op
from .lanes import Array, Mask
from .mma import decode, fragment_a
from .races import ID
from .syntax import Imm, Instr, Vec

if TYPE_CHECKING:
    from .wave import Wave

GROUP = 128  # threads
_FIELD = 0x3FFF


@dataclass
class Operand:
    """Where an operand's 16-byte chunks lie in shared memory, (rows or depth, chunks), and what was there."""

    at: Array
    values: Array


@dataclass
class Product:
    """A product on its way."""

    instr: Instr
    lanes: Array
    slots: list[int]  # of the registers of its sums
    group: int
    operands: list[Operand]
    registers: list[tuple[Array, Array]]  # of a left operand: rows, and their values


@op("wgmma")
def _wgmma(b: Build) -> Body:
    what = b.need("fence", "commit_group", "wait_group", "mma_async")
    b.need("sync")
    b.need("aligned")
    wave, instr = b.wave, b.instr
    if what == "mma_async":
        return _product(b)
    if what == "fence":
        return lambda mask: wave.whole_warps(mask, instr, "warp")
    if what == "commit_group":

        def commit(mask: Mask) -> None:
            wave.products_group[slice(None) if mask is None else mask] += 1

        return commit
    allowed = b.operand(0)
    assert isinstance(allowed, Imm)
    keep = int(allowed.value)
    return lambda mask: _wait(wave, mask, keep)


def _product(b: Build) -> Body:
    shape = next((mod for mod in b.mods if re.fullmatch(r"m64n\d+k16", mod)), None)
    if shape is None or b.lanes.threads % GROUP:
        raise b.unknown("shape, or a block that is not of whole warp groups")
    b.mods.remove(shape)
    columns = int(shape[4:-3])
    b.need("f32")
    kind = b.need("bf16", "f16")
    b.need(kind)
    wave, lanes, instr = b.wave, b.lanes, b.instr
    names = [item.name for item in b.items(0)]  # type: ignore[union-attr]
    if len(names) != columns // 2:
        raise b.unknown("number of registers")
    slots = [lanes.slots[name] for name in names]
    sums = [lanes.view(lanes.rows[name], "f32", instr) for name in names]
    in_registers = isinstance(b.operand(1), Vec)
    left = [b.src(item, "b32") for item in b.items(1)] if in_registers else [b.src(1, "u64")]
    right, (adds, negated) = b.src(2, "u64"), b.pred(3)
    numbers = [int(operand.value) for operand in b.instr.operands[4:] if isinstance(operand, Imm)]
    if len(numbers) != (3 if in_registers else 4) or numbers[:2] != [1, 1] or negated:
        raise b.unknown("scales or transpositions")
    left_across, right_across = (False, numbers[2]) if in_registers else (numbers[2], numbers[3])

    def body(mask: Mask) -> None:
        wave.track_products()
        for who in _groups(wave, mask, instr):
            operands: list[Operand] = []
            registers: list[tuple[Array, Array]] = []
            if in_registers:
                registers = [(row, row[who].copy()) for row in left]
                words = np.stack([values for _, values in registers]).reshape(4, 4, 32)
                a = fragment_a(words, kind).reshape(64, 16)
            else:
                operands.append(_fetch(wave, instr, who, left[0], 64, bool(left_across)))
                a = _matrix(operands[-1], kind, bool(left_across), 64)
            operands.append(_fetch(wave, instr, who, right, columns, bool(right_across)))
            b_matrix = _matrix(operands[-1], kind, bool(right_across), columns)
            total = a @ b_matrix.T
            flags = adds[who]
            if flags.any() != flags.all():
                raise wave.finding(instr, "warp", "the group disagrees on whether to add", int(who[0]))
            if flags.any():
                known = lanes.init[slots][:, who] | wave.in_flight[slots][:, who]
                if not known.all():
                    wave.report(instr, "uninitialised", "the sums have no value", int(who[0]))
                total = total + _sums_to_matrix(np.stack([row[who] for row in sums]))
            for row, values in zip(sums, _matrix_to_sums(total.astype(np.float32)), strict=True):
                row[who] = values
            for slot in slots:
                lanes.init[slot, who] = False
                lanes.full[slot] = False
                wave.in_flight[slot, who] = True
            group = int(wave.products_group[who[0]])
            wave.products.append(Product(instr, who, slots, group, operands, registers))

    return body


def _groups(wave: Wave, mask: Mask, instr: Instr) -> list[Array]:
    """The lanes of each warp group that is here, which must be whole."""
    here = (np.ones(wave.lanes.n, np.bool_) if mask is None else mask).reshape(-1, GROUP)
    partial = here.any(1) & ~here.all(1)
    if partial.any():
        lane = int(np.flatnonzero(partial)[0]) * GROUP
        raise wave.finding(instr, "warp", "only some threads of the warp group are here", lane)
    return [group * GROUP + np.arange(GROUP) for group in np.flatnonzero(here.all(1))]


def _fetch(wave: Wave, instr: Instr, who: Array, descriptions: Array, size: int, across: bool) -> Operand:
    """Read an operand of `size` rows (columns) and depth 16, by its description."""
    words = descriptions[who]
    if (words != words[0]).any():
        raise wave.finding(instr, "warp", "the group disagrees on where an operand lies", int(who[0]))
    word = int(words[0])
    start, leading, stride = ((word >> shift & _FIELD) << 4 for shift in (0, 16, 32))
    if word >> 62 == 0 or word >> 49 & 7:
        raise wave.finding(instr, "operand", "an operand that is not swizzled is unknown here", int(who[0]))
    width = 256 >> (word >> 62)  # bytes of a row that are contiguous
    if across:  # the depth is the rows' number
        depth, chunk = np.arange(16)[:, None], np.arange(size // 8)[None, :]
        panel, place = chunk // (width // 16), chunk % (width // 16)
        at = panel * leading + place * 16 + depth // 8 * stride + depth % 8 * width
    else:
        row, chunk = np.arange(size)[:, None], np.arange(2)[None, :]
        at = row // 8 * stride + row % 8 * width + chunk * 16
    at = (start + at).astype(np.int64)
    at ^= (at >> 7 & width // 16 - 1) << 4
    operand = Operand(at.ravel(), np.zeros(0, np.uint8))
    operand.values = _read(wave, instr, who, operand.at)
    return operand


def _read(wave: Wave, instr: Instr, who: Array, at: Array) -> Array:
    """The chunks, (chunks, 16) bytes, read by a lane of each warp."""
    shared = wave.spaces["shared"]
    report = wave.reporter(instr, shared)
    for lane in who[::32]:
        readers = np.full(len(at), lane)
        places = shared.locate(readers, at, 16, wave.copy_of["shared"])
        values = shared.load(readers, places, 16, report, whole_warp=True)
    assert shared.unpublished is not None
    _, granules = shared.granules(readers, places, 16)
    late = shared.unpublished.take(granules)
    if late.any():
        place = int(granules[np.flatnonzero(late)[0]]) * shared.granule
        report("proxy", "reads what its writers have not fenced for the async proxy", int(who[0]), place)
    return values.copy()


def _matrix(operand: Operand, kind: str, across: bool, size: int) -> Array:
    """(size, 16)."""
    numbers = decode(np.ascontiguousarray(operand.values).view(np.uint32), kind)
    if across:
        return numbers.reshape(16, size).T
    return numbers.reshape(size, 16)


def _sums_to_matrix(values: Array) -> Array:
    """(registers, 128) accumulators to (64, columns)."""
    tiles = len(values) // 4
    parts = values.reshape(tiles, 2, 2, 4, 8, 4)  # tile, row half, element, warp, row, place
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(64, tiles * 8).astype(np.float64)


def _matrix_to_sums(matrix: Array) -> Array:
    tiles = matrix.shape[1] // 8
    parts = matrix.reshape(4, 2, 8, tiles, 4, 2)
    return parts.transpose(3, 1, 5, 0, 2, 4).reshape(tiles * 4, GROUP)


def _wait(wave: Wave, mask: Mask, keep: int) -> None:
    """Deliver all but the last `keep` groups of products."""
    wave.track_products()
    lanes, left = wave.lanes, []
    for product in wave.products:
        who = product.lanes
        here = mask is None or bool(mask[who[0]])
        if not here or product.group >= wave.products_group[who[0]] - keep:
            left.append(product)
            continue
        for operand in product.operands:
            if (_read(wave, product.instr, who, operand.at) != operand.values).any():
                wave.report(
                    product.instr, "race", "an operand changed before the product was done", int(who[0])
                )
        for row, values in product.registers:
            if (row[who] != values).any():
                wave.report(
                    product.instr, "race", "a register changed before the product was done", int(who[0])
                )
        for slot in product.slots:
            lanes.init[slot, who] = True
            lanes.full[slot] = bool(lanes.init[slot].all())
            wave.in_flight[slot, who] = False
    wave.products = left


@op("setmaxnreg")
def _setmaxnreg(b: Build) -> Body:
    b.need("inc", "dec")
    b.need("sync")
    b.need("aligned")
    b.kind("u32")
    wave, instr = b.wave, b.instr
    return lambda mask: wave.whole_warps(mask, instr, "warp")


def publish(wave: Wave, mask: Mask) -> None:
    """fence.proxy.async: what these lanes have written to shared memory, products may read."""
    shared = wave.spaces["shared"]
    if shared.unpublished is None:
        return
    assert shared.shadow is not None
    granules = np.flatnonzero(shared.unpublished)
    writers = (shared.shadow.written.take(granules) & ID) - wave.order.id[0]
    mine = np.ones(len(granules), np.bool_) if mask is None else mask[writers.clip(0, wave.lanes.n - 1)]
    shared.unpublished[granules[mine]] = False
