"""What PTX consists of, once read: operands, instructions, variables, functions, modules."""

from __future__ import annotations

from dataclasses import dataclass, field

SIZES = {"b128": 16} | {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Reg:
    """A register by its unique name, special ones (%tid.x) included; `negated` is the ! of a predicate."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    """A literal: an int, or a float with the width its bits were written in (0: decimal)."""

    value: int | float
    float_bits: int = -1  # -1: an integer


@dataclass(frozen=True)
class Sym:
    """A variable, label or function name, with a constant offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Mem:
    base: Reg | Sym | Imm
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """The two destinations of `d|p`."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Args:
    """A parenthesised list, as `call` has them."""

    names: tuple[Operand, ...]


Operand = Reg | Imm | Sym | Mem | Vec | Pair | Args


@dataclass
class Instr:
    op: str
    mods: tuple[str, ...]
    operands: tuple[Operand, ...]
    pred: Reg | None
    line: int
    text: str


@dataclass
class Variable:
    name: str
    space: str
    size: int  # bytes; 0: an extern array, sized at launch
    align: int
    init: bytes | None = None
    links: list[tuple[int, str, int]] = field(default_factory=list)  # (offset, symbol, addend) to patch in
    kind: str = ""  # its scalar type


@dataclass
class Function:
    name: str
    entry: bool
    params: list[Variable] = field(default_factory=list)
    results: list[Variable] = field(default_factory=list)
    regs: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    code: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets
    threads: int | None = None  # .reqntid, all dimensions


@dataclass
class Module:
    variables: dict[str, Variable] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    target: str = ""
