"""Instructions in which the lanes of a warp see each other: shfl, vote, match, redux, activemask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .isa import Body, Build, op
from .lanes import DTYPES, Array, Mask
from .syntax import Imm, Sym

_ALL = 0xFFFFFFFF


def members(b: Build, at: int) -> Callable[[Mask], None]:
    """A check that the lanes named by a membermask are exactly those that are here and alive."""
    operand, wave, instr = b.operand(at), b.wave, b.instr
    row = b.src(at, "u32")
    everyone = isinstance(operand, Imm) and int(operand.value) & _ALL == _ALL
    bit = np.uint32(1) << b.lanes.special["%laneid"]

    def check(mask: Mask) -> None:
        if mask is None and everyone:
            return
        here = wave.alive if mask is None else mask
        outside = here & (row & bit == 0)
        if outside.any():
            lane = int(np.flatnonzero(outside)[0])
            wave.report(instr, "warp", "a lane that is not in its own membermask", lane)
        here_bits = wave.by_warp(np.where(here, bit, np.uint32(0))).sum(1, dtype=np.uint32)
        alive_bits = wave.by_warp(np.where(wave.alive, bit, np.uint32(0))).sum(1, dtype=np.uint32)
        named = wave.by_warp(row)
        missing = wave.by_warp(here) & ((named & alive_bits[:, None] & ~here_bits[:, None]) != 0)
        if missing.any():
            lane = int(np.flatnonzero(wave.from_warps(missing))[0])
            wave.report(instr, "warp", "the membermask names lanes that are not here", lane)

    return check


@op("shfl")
def _shfl(b: Build) -> Body:
    b.need("sync")
    mode = b.need("up", "down", "bfly", "idx")
    b.kind("b32")
    first, second = b.pair(0)
    dst = None if first == Sym("_") else b.dst(first, "b32")
    found = None if second is None or second == Sym("_") else b.dst(second, "pred")
    value, amount, control = b.src(1, "b32"), b.src(2, "u32"), b.src(3, "u32")
    check, wave, instr, lanes = members(b, 4), b.wave, b.instr, b.lanes
    lane, threads = b.lanes.lane, b.lanes.threads
    base = np.arange(lanes.n) - lane

    def sources() -> tuple[Array, Array]:
        by, clamp = (amount & np.uint32(31)).astype(np.int64), (control & np.uint32(31)).astype(np.int64)
        segment = (control >> np.uint32(8) & np.uint32(31)).astype(np.int64)
        low = lane & segment
        high = low | (clamp & ~segment)
        if mode == "up":
            other = lane - by
            good = other >= high
        else:
            other = {"down": lane + by, "bfly": lane ^ by, "idx": low | (by & ~segment)}[mode]
            good = other <= high
        return base + np.where(good, other, lane), good

    constant = all(isinstance(b.operand(i), Imm) for i in (2, 3))
    fixed = sources() if constant else None

    def body(mask: Mask) -> None:
        check(mask)
        index, good = fixed or sources()
        outside = (lane + index - base - lane) + lanes.thread - lane >= threads
        if mask is not None or outside.any():
            inactive = outside if mask is None else mask & (outside | ~mask[np.minimum(index, lanes.n - 1)])
            if inactive.any():
                at = int(np.flatnonzero(inactive)[0])
                wave.report(instr, "warp", "shuffle from a lane that is not here", at)
            index = np.minimum(index, lanes.n - 1)
        result = value.take(index)
        where: Any = True if mask is None else mask
        if dst is not None:
            np.copyto(dst, result, where=where)
        if found is not None:
            np.copyto(found, good, where=where)

    return body


@op("vote")
def _vote(b: Build) -> Body:
    b.need("sync")
    mode = b.need("all", "any", "uni", "ballot")
    b.kind("pred" if mode != "ballot" else "b32")
    dst = b.dst(0, "b32" if mode == "ballot" else "pred")
    row, negated = b.pred(1)
    check, wave = members(b, 2), b.wave
    bit = np.uint32(1) << b.lanes.special["%laneid"]

    def body(mask: Mask) -> None:
        check(mask)
        here = wave.alive if mask is None else mask
        yes, no = here & (row ^ negated), here & ~(row ^ negated)
        if mode == "ballot":
            bits = wave.by_warp(np.where(yes, bit, np.uint32(0))).sum(1, dtype=np.uint32)
            result = bits
        else:
            some, none = wave.by_warp(yes).any(1), wave.by_warp(no).any(1)
            result = {"all": ~none, "any": some, "uni": ~(some & none)}[mode]
        spread = wave.from_warps(np.repeat(result[:, None], 32, axis=1))
        np.copyto(dst, spread, where=True if mask is None else mask)

    return body


@op("match")
def _match(b: Build) -> Body:
    mode = b.need("any", "all")
    b.need("sync")
    kind = b.kind("b32", "b64")
    first, second = b.pair(0)
    dst, value = b.dst(first, "b32"), b.src(1, kind)
    same_out = b.dst(second, "pred") if second is not None else None
    check, wave = members(b, 2), b.wave
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def body(mask: Mask) -> None:
        check(mask)
        here, values = wave.by_warp(wave.alive if mask is None else mask), wave.by_warp(value)
        equal = (values[:, :, None] == values[:, None, :]) & here[:, None, :]
        result = (equal * bits).sum(2, dtype=np.uint32)
        if mode == "all":
            everyone = (here * bits).sum(1, dtype=np.uint32)[:, None]
            same = result == everyone
            result = np.where(same, result, np.uint32(0))
            if same_out is not None:
                np.copyto(same_out, wave.from_warps(same), where=True if mask is None else mask)
        np.copyto(dst, wave.from_warps(result), where=True if mask is None else mask)

    return body


@op("redux")
def _redux(b: Build) -> Body:
    b.need("sync")
    what = b.need("add", "min", "max", "and", "or", "xor")
    kind = b.kind("u32", "s32", "b32")
    dst, value = b.dst(0, kind), b.src(1, kind)
    check, wave = members(b, 2), b.wave
    info = np.iinfo(DTYPES[kind])
    table: dict[str, tuple[Any, int]] = {
        "add": (np.add, 0),
        "min": (np.minimum, int(info.max)),
        "max": (np.maximum, int(info.min)),
        "and": (np.bitwise_and, int(info.max) if kind != "s32" else -1),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
    }
    fn, neutral = table[what]

    def body(mask: Mask) -> None:
        check(mask)
        here = wave.alive if mask is None else mask
        rows = wave.by_warp(np.where(here, value, value.dtype.type(neutral)))
        if b.lanes.threads % 32:
            rows = np.where(wave.by_warp(here), rows, value.dtype.type(neutral))
        result = fn.reduce(rows, axis=1, dtype=rows.dtype)
        np.copyto(
            dst, wave.from_warps(np.repeat(result[:, None], 32, 1)), where=True if mask is None else mask
        )

    return body


@op("activemask")
def _activemask(b: Build) -> Body:
    b.kind("b32")
    dst, wave = b.dst(0, "b32"), b.wave
    bit = np.uint32(1) << b.lanes.special["%laneid"]

    def body(mask: Mask) -> None:
        here = wave.alive if mask is None else mask
        bits = wave.by_warp(np.where(here, bit, np.uint32(0))).sum(1, dtype=np.uint32)
        np.copyto(dst, wave.from_warps(np.repeat(bits[:, None], 32, 1)), where=True if mask is None else mask)

    return body


@op("elect")
def _elect(b: Build) -> Body:
    raise b.unknown("elect is not of sm_80")
