"""A wave: as many blocks as run side by side, their registers and private memory, and the scheduler.

Lanes at the lowest instruction run first, together; in structured code that brings diverged lanes together
again where their paths meet. While all lanes agree there are no masks at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import (  # noqa: F401  (they fill the table)
    isa_async,
    isa_atomic,
    isa_control,
    isa_convert,
    isa_float,
    isa_int,
    isa_memory,
    isa_select,
    isa_warp,
    isa_wgmma,
    mma,
)
from .collector import no_collection
from .findings import Finding, Unsupported
from .isa import BUILDERS, Body, Build
from .lanes import Array, Lanes, Mask
from .memory import Fault, Space
from .program import Program
from .races import Order
from .syntax import Instr, Reg, Sym

_NOWHERE = 1 << 60


@dataclass
class Copy:
    """A cp.async under way: its group by lane."""

    lanes: Array
    at: Array
    values: Array
    group: Array


class Wave:
    def __init__(self, program: Program, machine: Any, lanes: Lanes, spaces: dict[str, Space]) -> None:
        self.program = program
        self.machine = machine
        self.lanes = lanes
        self.spaces = spaces
        self.order = Order(lanes)
        self.all = np.arange(lanes.n, dtype=np.int64)
        self.copy_of = {
            "shared": lanes.block_of,
            "local": self.all,
            "global": None,
            "const": None,
            "param": None,
        }
        self.steps = 0
        self.code = [*program.code, Instr("exit", (), (), None, program.code[-1].line, "(end of the kernel)")]
        self.bound: list[Any] = []
        self.fast: list[Any] = []
        with no_collection():  # thousands of live closures: the collector would walk them all, over and over
            for pc, instr in enumerate(self.code):
                self.bound.append(self.bind(pc, instr))
        self.first_block = 0
        self.code_steps: list[Any] = []

    make_copy = staticmethod(Copy)

    # Binding

    def symbol(self, symbol: Sym, build: Build) -> int:
        """The address of a variable in its own space (and of a global one everywhere)."""
        variable = self.program.variables.get(symbol.name)
        if variable is None:
            raise build.unknown(f"unknown symbol {symbol.name}")
        return int(self.machine.addresses[symbol.name]) + symbol.offset

    def bind(self, pc: int, instr: Instr) -> Any:
        if instr.op not in BUILDERS:
            raise Unsupported(f"PTX line {instr.line}: unknown instruction {instr.op}: {instr.text}")
        build = Build(self, instr, pc)
        body = BUILDERS[instr.op](build)
        build.finish()
        pred = build.src(Reg(instr.pred.name), "pred") if instr.pred else None
        negated = instr.pred.negated if instr.pred else False
        fast = body if pred is None or build.control else _predicated(body, pred, negated, self.lanes.n)
        own = build.control or pred is None
        self.fast.append(fast)
        return self.checked(pc, instr, body, fast, build, None if own else pred, negated)

    def checked(
        self, pc: int, instr: Instr, body: Body, fast: Body, build: Build, pred: Array | None, negated: bool
    ) -> Body:
        """Until all registers concerned have values in all lanes, look at which of them do."""
        lanes, reads, writes = self.lanes, sorted(build.reads), sorted(build.writes)
        pred_slot = lanes.slots[instr.pred.name] if instr.pred else -1

        def uninitialised(slot: int, mask: Mask) -> None:
            missing = ~lanes.init[slot] if mask is None else mask & ~lanes.init[slot]
            if missing.any():
                lane = int(np.flatnonzero(missing)[0])
                self.report(instr, "uninitialised", f"register {list(lanes.slots)[slot]} has no value", lane)

        def step(mask: Mask) -> Any:
            full = lanes.full
            if pred is not None:
                if not full[pred_slot]:
                    uninitialised(pred_slot, mask)
                active = ~pred if negated else pred
                mask = active if mask is None else active & mask
                count = np.count_nonzero(mask)
                if not count:
                    return None
                if count == lanes.n:
                    mask = None
            settled = True
            for slot in reads:
                if not full[slot]:
                    settled = False
                    uninitialised(slot, mask)
            if mask is not None and mask is pred:
                mask = np.array(mask)
            result = body(mask)
            for slot in writes:
                if not full[slot]:
                    row = lanes.init[slot]
                    row[True if mask is None else mask] = True
                    full[slot] = mask is None or bool(row.all())
                    settled = settled and full[slot]
            if settled and (pred is None or full[pred_slot]):
                self.code_steps[pc] = fast
            return result

        return step

    # Findings

    def report(
        self, instr: Instr, kind: str, message: str, lane: int | None = None, address: int | None = None
    ) -> None:
        self.machine.found(self.finding(instr, kind, message, lane, address))

    def finding(
        self, instr: Instr, kind: str, message: str, lane: int | None = None, address: int | None = None
    ) -> Finding:
        block = thread = None
        if lane is not None:
            x, y, _ = self.lanes.block_shape
            t = lane % self.lanes.threads
            block = self.machine.block_index(self.first_block + lane // self.lanes.threads)
            thread = (t % x, t // x % y, t // (x * y))
        return Finding(kind, message, self.program.name, instr.line, instr.text, block, thread, address)

    def reporter(self, instr: Instr, space: Space) -> Any:
        return lambda kind, message, lane, at: self.report(instr, kind, message, lane, space.address(at))

    # Running

    def track_products(self) -> None:
        """From the first wgmma on, note which registers are on their way."""
        if len(self.in_flight) == 0:
            self.in_flight = np.zeros((len(self.lanes.slots), self.lanes.n), np.bool_)

    def run(self, first_block: int, blocks: int) -> None:
        self.first_block = first_block
        self.lanes.forget()
        self.order.start(first_block)
        for name in ("shared", "local"):
            self.spaces[name].forget()
        self.code_steps = list(self.bound)
        n = self.lanes.n
        self.alive = np.zeros(n, np.bool_)
        self.alive[: blocks * self.lanes.threads] = True
        self.pending: dict[int, Array] = {}
        self.merge_at = _NOWHERE
        self.barriers: dict[tuple[int, int], isa_control.Barrier] = {}
        self.copies: list[Copy] = []
        self.group = np.zeros(n, np.int64)
        self.products: list[isa_wgmma.Product] = []
        self.products_group = np.zeros(n, np.int64)
        self.in_flight = np.zeros((0, n), np.bool_)
        mask: Mask = None if self.alive.all() else self.alive.copy()
        pc = 0
        steps, executed, limit = self.code_steps, self.machine.executed, self.machine.limit
        count = 0
        try:
            while True:
                executed[pc] = 1
                self.steps += 1
                count += 1
                if count > limit:
                    raise self.finding(self.code[pc], "endless", f"still running after {limit} instructions")
                result = steps[pc](mask)
                if result is None:
                    pc += 1
                elif result >= 0:
                    pc = result
                else:
                    following = self.schedule()
                    if following is None:
                        return
                    pc, mask = following
                    continue
                if pc >= self.merge_at:
                    self.park(pc, mask)
                    following = self.schedule()
                    assert following is not None
                    pc, mask = following
        except Fault as fault:
            raise self.finding(self.code[pc], fault.kind, fault.message, fault.lane, fault.address) from None

    def park(self, pc: int, mask: Mask) -> None:
        mask = self.alive.copy() if mask is None else mask
        self.pending[pc] = self.pending[pc] | mask if pc in self.pending else mask
        self.merge_at = min(self.merge_at, pc)

    def schedule(self) -> tuple[int, Mask] | None:
        if not self.pending:
            if any(len(barrier.lanes) for barrier in self.barriers.values()):
                self.deadlock()
            return None
        pc = min(self.pending)
        mask: Mask = self.pending.pop(pc)
        self.merge_at = min(self.pending, default=_NOWHERE)
        assert mask is not None
        return pc, None if mask.all() else mask

    def branch(self, target: int, fallthrough: int, taken: Array, mask: Mask) -> int | None:
        count = np.count_nonzero(taken)
        if not count:
            return None
        if count == (self.lanes.n if mask is None else np.count_nonzero(mask)):
            return target
        self.park(target, taken)
        self.park(fallthrough, ~taken if mask is None else mask & ~taken)
        return -1

    def exit(self, mask: Mask) -> int:
        if mask is None:
            self.alive[:] = False
        else:
            self.alive &= ~mask
            for block in {block for block, _ in self.barriers}:
                isa_control.settle(self, block)
        return -1

    def deadlock(self) -> None:
        for (block, ident), barrier in self.barriers.items():
            if barrier.lanes:
                pc, lane = barrier.places[0], int(barrier.lanes[0][0])
                message = f"barrier {ident} of block {block} waits for threads that never come"
                raise self.finding(self.code[pc], "barrier", message, lane)

    def whole_warps(self, mask: Mask, instr: Instr, what: str) -> None:
        """`.aligned`: all lanes of a warp that have not exited are here."""
        if mask is None:
            return
        here = self.by_warp(mask)
        partial = here.any(1, keepdims=True) & ~here & self.by_warp(self.alive)
        if partial.any():
            warp = int(np.flatnonzero(partial.any(1))[0])
            per_block = self.order.warps
            lane = warp // per_block * self.lanes.threads + warp % per_block * 32
            self.report(instr, what, "only some lanes of the warp are here", lane)

    def by_warp(self, values: Array) -> Array:
        """A row as (warps, 32); the lanes that a block's last warp lacks are False (zero)."""
        threads = self.lanes.threads
        if threads % 32 == 0:
            return values.reshape(-1, 32)
        padded = np.zeros((self.lanes.blocks, self.order.warps * 32), values.dtype)
        padded[:, :threads] = values.reshape(-1, threads)
        return padded.reshape(-1, 32)

    def from_warps(self, values: Array) -> Array:
        threads = self.lanes.threads
        if threads % 32 == 0:
            return values.reshape(-1)
        return values.reshape(self.lanes.blocks, -1)[:, :threads].reshape(-1)


def _predicated(body: Body, pred: Array, negated: bool, n: int) -> Body:
    def step(mask: Mask) -> Any:
        active = ~pred if negated else pred
        active = active.copy() if mask is None else active & mask
        count = np.count_nonzero(active)
        if count == n:
            return body(None)
        return body(active) if count else None

    return step
