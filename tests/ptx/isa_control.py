"""Branches, exits and barriers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .isa import Body, Build, op
from .isa_warp import members
from .isa_wgmma import publish
from .lanes import Array, Mask
from .syntax import Imm, Reg, Sym

if TYPE_CHECKING:
    from .wave import Wave


@dataclass
class Barrier:
    """One barrier of one block, while some of its threads are there."""

    lanes: list[Array] = field(default_factory=list)  # waiting
    places: list[int] = field(default_factory=list)  # and from which instruction
    warps: dict[int, int] = field(default_factory=dict)  # arrived, when
    arrived: int = 0
    expected: int | None = None


@op("bra")
def _bra(b: Build) -> Body:
    uniform = b.flag("uni")
    b.control = True
    target = b.operand(0)
    if not isinstance(target, Sym) or target.name not in b.wave.program.labels:
        raise b.unknown("unknown label")
    at, wave, following, instr = b.wave.program.labels[target.name], b.wave, b.pc + 1, b.instr
    if b.instr.pred is None:
        return lambda mask: at
    row, negated = b.src(Reg(b.instr.pred.name), "pred"), b.instr.pred.negated

    def body(mask: Mask) -> Any:
        taken = ~row if negated else row.copy()
        if mask is not None:
            taken &= mask
        result = wave.branch(at, following, taken, mask)
        if uniform and result == -1:
            wave.report(instr, "divergence", "bra.uni, but the lanes disagree", int(np.flatnonzero(taken)[0]))
        return result

    return body


@op("brx")
def _brx(b: Build) -> Body:
    b.need("idx")
    b.flag("uni")
    b.control = True
    if b.instr.pred is not None:
        raise b.unknown("predicated brx")
    index, table, wave, instr = b.src(0, "u32"), b.operand(1), b.wave, b.instr
    assert isinstance(table, Sym)
    targets = [wave.program.labels[label] for label in wave.program.tables[table.name]]

    def body(mask: Mask) -> Any:
        values = index if mask is None else index[mask]
        found = np.unique(values)
        if found[-1] >= len(targets):
            raise wave.finding(instr, "out-of-bounds", f"brx index {found[-1]} of {len(targets)} targets")
        if len(found) == 1:
            return targets[int(found[0])]
        for value in found:
            chosen = index == value
            wave.park(targets[int(value)], chosen if mask is None else chosen & mask)
        return -1

    return body


@op("ret", "exit")
def _exit(b: Build) -> Body:
    b.flag("uni")
    b.control = True
    wave, following = b.wave, b.pc + 1
    if b.instr.pred is None:
        return lambda mask: wave.exit(mask)
    row, negated = b.src(Reg(b.instr.pred.name), "pred"), b.instr.pred.negated

    def body(mask: Mask) -> Any:
        taken = ~row if negated else row.copy()
        if mask is not None:
            taken &= mask
        count = np.count_nonzero(taken)
        if not count:
            return None
        rest = ~taken if mask is None else mask & ~taken
        if rest.any():
            wave.park(following, rest)
        return wave.exit(taken)

    return body


@op("trap", "brkpt")
def _trap(b: Build) -> Body:
    wave, instr = b.wave, b.instr

    def body(mask: Mask) -> Any:
        lane = 0 if mask is None else int(np.flatnonzero(mask)[0])
        raise wave.finding(instr, "trap", "the kernel trapped", lane)

    return body


@op("nanosleep", "pmevent", "griddepcontrol")
def _nothing(b: Build) -> Body:
    if b.instr.op == "nanosleep":
        b.kind("u32")
    elif b.instr.op == "griddepcontrol":
        b.need("wait", "launch_dependents")
    return lambda mask: None


# Barriers


@op("bar", "barrier")
def _bar(b: Build) -> Body:
    aligned = b.flag("aligned") or b.instr.op == "bar"
    if b.flag("warp"):
        b.need("sync")
        return _warp_sync(b)
    b.take("cta")
    what = b.need("sync", "arrive", "red")
    if what == "red":
        return _bar_red(b)
    b.control = b.instr.pred is None
    ident, wave, instr, pc = _numbers(b, 0), b.wave, b.instr, b.pc
    count = _uniform(b, 1) if len(b.instr.operands) > 1 else None
    if what == "arrive" and count is None:
        raise b.unknown("bar.arrive without a thread count")

    def body(mask: Mask) -> Any:
        if aligned:
            wave.whole_warps(mask, instr, "barrier")
        names = ident(mask)
        expected = count(mask) if count else None
        whole = what == "sync" and expected in (None, wave.lanes.threads) and len(np.unique(names)) == 1
        if whole and complete(wave, mask, int(names[0])):
            wave.order.block_barrier(slice(None) if mask is None else np.flatnonzero(mask))
            return None
        lanes = wave.all if mask is None else np.flatnonzero(mask)
        blocks = wave.lanes.block_of[lanes]
        for block, name in np.unique(np.stack((blocks, names)), axis=1).T:
            mine = lanes[(blocks == block) & (names == name)]
            arrive(wave, int(block), int(name), mine, expected, pc, what == "sync", aligned)
        return -1 if what == "sync" else None

    if b.instr.pred is not None and what == "sync":
        return _predicated_barrier(b, body)
    return body


def _predicated_barrier(b: Build, body: Body) -> Body:
    """Lanes without the predicate go on; the others may have to wait."""
    b.control = True
    assert b.instr.pred is not None
    row, negated, wave, following = (
        b.src(Reg(b.instr.pred.name), "pred"),
        b.instr.pred.negated,
        b.wave,
        b.pc + 1,
    )

    def step(mask: Mask) -> Any:
        chosen = ~row if negated else row.copy()
        if mask is not None:
            chosen &= mask
        if not chosen.any():
            return None
        rest = ~chosen if mask is None else mask & ~chosen
        if not rest.any():
            return body(mask)
        wave.park(following, rest)
        if body(chosen) is None:
            wave.park(following, chosen)
        return -1

    return step


def _numbers(b: Build, at: int) -> Any:
    """A barrier's number in each lane that is here: warps that run together may meet at different ones."""
    row = b.src(at, "u32")
    return lambda mask: (row if mask is None else row[mask]).astype(np.int64)


def _uniform(b: Build, at: int) -> Any:
    """A barrier's number or count: a constant, or a register that must agree among the lanes."""
    operand = b.operand(at)
    if isinstance(operand, Imm):
        value = int(operand.value)
        return lambda mask: value
    row = b.src(at, "u32")
    return lambda mask: _only(b, row, mask)


def _only(b: Build, row: Array, mask: Mask) -> int:
    values = np.unique(row if mask is None else row[mask])
    if len(values) != 1:
        raise b.unknown("a barrier number that differs among warps that run together")
    return int(values[0])


def complete(wave: Wave, mask: Mask, ident: int) -> bool:
    """Are all living threads of each block concerned here, at once?"""
    if wave.barriers and any(name == ident for _, name in wave.barriers):
        return False
    if mask is None:
        return True
    here = mask.reshape(wave.lanes.blocks, -1)
    missing = (wave.alive & ~mask).reshape(wave.lanes.blocks, -1)
    return not (here.any(1) & missing.any(1)).any()


def arrive(
    wave: Wave,
    block: int,
    ident: int,
    lanes: Array,
    expected: int | None,
    pc: int,
    waits: bool,
    aligned: bool,
) -> None:
    barrier = wave.barriers.setdefault((block, ident), Barrier())
    if barrier.expected != expected and barrier.arrived:
        wave.report(wave.code[pc], "barrier", f"barrier {ident} with different thread counts", int(lanes[0]))
    if expected is None and barrier.places and barrier.places[0] != pc and aligned:
        other = wave.code[barrier.places[0]].line
        message = f"threads of one block meet at different barriers (the others at line {other})"
        wave.report(wave.code[pc], "barrier", message, int(lanes[0]))
    barrier.expected = expected
    warps = np.unique(wave.lanes.thread[lanes] // 32)
    barrier.warps.update({int(warp): wave.order.now for warp in warps})
    barrier.arrived += 32 * len(warps) if aligned else len(lanes)
    wave.order.now += 1
    if waits:
        barrier.lanes.append(lanes)
        barrier.places.append(pc)
    settle(wave, block)


def settle(wave: Wave, block: int) -> None:
    """Release the barriers of a block that have all the threads they wait for."""
    for key in [key for key in wave.barriers if key[0] == block]:
        barrier = wave.barriers[key]
        threads = wave.lanes.threads
        alive = wave.alive[block * threads : (block + 1) * threads]
        waiting = np.concatenate(barrier.lanes) if barrier.lanes else np.zeros(0, np.int64)
        if barrier.expected is None:
            if len(waiting) < np.count_nonzero(alive):
                continue
            wave.order.block_barrier(waiting)
        else:
            if barrier.arrived < barrier.expected:
                continue
            if len(waiting):
                wave.order.some_warps(waiting, barrier.warps)
        del wave.barriers[key]
        for lanes, pc in zip(barrier.lanes, barrier.places, strict=True):
            mask = np.zeros(wave.lanes.n, np.bool_)
            mask[lanes] = True
            wave.park(pc + 1, mask)


def _bar_red(b: Build) -> Body:
    how = b.need("popc", "and", "or")
    kind = b.kind("u32", "pred")
    if b.instr.pred is not None or b.count(3, 4) == 4:
        raise b.unknown("bar.red with a predicate or a count")
    dst, name, wave, instr = b.dst(0, kind), _uniform(b, 1), b.wave, b.instr
    row, negated = b.pred(2)

    def body(mask: Mask) -> Any:
        wave.whole_warps(mask, instr, "barrier")
        if not complete(wave, mask, name(mask)):
            raise wave.finding(
                instr, "barrier", "bar.red that not all threads of the block reach together", 0
            )
        wave.order.block_barrier(slice(None) if mask is None else np.flatnonzero(mask))
        votes = (row ^ negated) if mask is None else (row ^ negated) & mask
        votes = votes.reshape(wave.lanes.blocks, -1)
        if how == "popc":
            result: Array = votes.sum(1).astype(np.uint32)
        elif how == "or":
            result = np.asarray(votes.any(1))
        else:
            here = wave.alive.reshape(votes.shape)
            result = np.asarray((votes | ~here).all(1))
        np.copyto(dst, np.repeat(result, wave.lanes.threads), where=True if mask is None else mask)

    return body


def _warp_sync(b: Build) -> Body:
    check, wave = members(b, 0), b.wave

    def body(mask: Mask) -> Any:
        check(mask)
        wave.order.warp_barrier(wave.all if mask is None else np.flatnonzero(mask))

    return body


@op("membar", "fence")
def _fence(b: Build) -> Body:
    """Orders one thread's own accesses, as they are here anyway; it makes no other thread wait."""
    if b.flag("proxy"):
        b.need("async")
        b.need("shared::cta")
        wave = b.wave
        return lambda mask: publish(wave, mask)
    while b.take("gl", "cta", "sys", "gpu", "sc", "acq_rel", "level"):
        pass
    return lambda mask: None
