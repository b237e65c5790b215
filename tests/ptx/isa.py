"""How an instruction becomes a Python callable: the table of builders and what they are handed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .findings import Unsupported
from .lanes import DTYPES, Array, Lanes, Mask
from .syntax import Instr, Operand, Pair, Reg, Vec

if TYPE_CHECKING:
    from .wave import Wave

Body = Callable[[Mask], Any]  # None: go on to the next instruction; int: jump there; -1: schedule again
Builder = Callable[["Build"], Body]
BUILDERS: dict[str, Builder] = {}


def op(*names: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        for name in names:
            assert name not in BUILDERS, name
            BUILDERS[name] = builder
        return builder

    return register


class Build:
    """One instruction being bound. It notes which registers it reads and writes, and the modifiers used."""

    def __init__(self, wave: Wave, instr: Instr, pc: int) -> None:
        self.wave = wave
        self.lanes: Lanes = wave.lanes
        self.instr = instr
        self.pc = pc
        self.mods = list(instr.mods)
        self.reads: set[int] = set()
        self.writes: set[int] = set()
        self.control = False  # branches and barriers take their predicate themselves

    # Modifiers

    def take(self, *names: str) -> str | None:
        for name in self.mods:
            if name in names:
                self.mods.remove(name)
                return name
        return None

    def flag(self, name: str) -> bool:
        return self.take(name) is not None

    def need(self, *names: str) -> str:
        found = self.take(*names)
        if found is None:
            raise self.unknown(f"one of {names} expected")
        return found

    def kind(self, *allowed: str) -> str:
        """The (first remaining) type modifier."""
        for name in self.mods:
            if name in DTYPES:
                if allowed and name not in allowed:
                    raise self.unknown(f"type .{name}")
                self.mods.remove(name)
                return name
        raise self.unknown("no type")

    def unknown(self, why: str) -> Unsupported:
        return Unsupported(f"PTX line {self.instr.line}: {why}: {self.instr.text}")

    def finish(self) -> None:
        if self.mods:
            raise self.unknown(f"unknown modifier .{'.'.join(self.mods)}")

    # Operands

    def operand(self, at: int) -> Operand:
        if at >= len(self.instr.operands):
            raise self.unknown(f"operand {at} is missing")
        return self.instr.operands[at]

    def count(self, *allowed: int) -> int:
        if len(self.instr.operands) not in allowed:
            raise self.unknown(f"{len(self.instr.operands)} operands")
        return len(self.instr.operands)

    def src(self, at: int | Operand, kind: str, loose: bool = False) -> Array:
        operand = self.operand(at) if isinstance(at, int) else at
        if isinstance(operand, Reg) and operand.name in self.lanes.slots:
            self.reads.add(self.lanes.slots[operand.name])
        row = self.lanes.source(operand, kind, self.instr, loose)
        if isinstance(operand, Reg) and operand.negated:
            raise self.unknown("! on an operand")
        return row

    def pred(self, at: int | Operand) -> tuple[Array, bool]:
        """A predicate source and whether it is negated."""
        operand = self.operand(at) if isinstance(at, int) else at
        if isinstance(operand, Reg) and operand.negated:
            return self.src(Reg(operand.name), "pred"), True
        return self.src(operand, "pred"), False

    def dst(self, at: int | Operand, kind: str) -> Array:
        operand = self.operand(at) if isinstance(at, int) else at
        row = self.lanes.row(operand, self.instr)
        assert isinstance(operand, Reg)
        self.writes.add(self.lanes.slots[operand.name])
        return self.lanes.view(row, kind, self.instr)

    def dst_row(self, at: int | Operand) -> Array:
        """The register at its own width, as bits."""
        operand = self.operand(at) if isinstance(at, int) else at
        row = self.lanes.row(operand, self.instr)
        assert isinstance(operand, Reg)
        self.writes.add(self.lanes.slots[operand.name])
        return row

    def items(self, at: int) -> tuple[Operand, ...]:
        operand = self.operand(at)
        return operand.items if isinstance(operand, Vec) else (operand,)

    def pair(self, at: int) -> tuple[Operand, Operand | None]:
        operand = self.operand(at)
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)

    # Bodies

    def alu(self, fn: Callable[..., Any], dst: Array, *srcs: Array) -> Body:
        """dst = fn(*srcs) in the active lanes."""
        if isinstance(fn, np.ufunc) and all(s.ndim == dst.ndim for s in srcs):
            return _ufunc(fn, dst, srcs)
        wide = dst.ndim == 2

        def body(mask: Mask) -> None:
            result = fn(*srcs)
            if mask is None:
                dst[...] = result
            else:
                np.copyto(dst, result, where=mask[:, None] if wide else mask)

        return body


def _ufunc(fn: np.ufunc, dst: Array, srcs: tuple[Array, ...]) -> Body:
    wide = dst.ndim == 2
    if len(srcs) == 2:
        a, b = srcs

        def body(mask: Mask) -> None:
            if mask is None:
                fn(a, b, out=dst)
            else:
                fn(a, b, out=dst, where=mask[:, None] if wide else mask)
    else:

        def body(mask: Mask) -> None:
            if mask is None:
                fn(*srcs, out=dst)
            else:
                fn(*srcs, out=dst, where=mask[:, None] if wide else mask)

    return body
