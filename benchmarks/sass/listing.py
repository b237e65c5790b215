"""From a cubin (or any file with CUDA code in it) to instructions with their control words.

Since Volta an instruction has 128 bits. The upper word holds, from its bit 41 on, what the compiler tells the
issue logic (Jia et al. 2018, arXiv 1804.06826, section 2.1):

    bits 41-44  stall           cycles before this warp's next instruction
    bit  45     yield           scheduling hint, raw
    bits 46-48  write barrier   scoreboard released when the result is written; 7 is none
    bits 49-51  read barrier    scoreboard released when the operands have been read; 7 is none
    bits 52-57  wait mask       scoreboards that must be free before this instruction issues
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from . import tools
from .resources import RESERVED_SHARED_SINCE, SYSTEM_SHARED, Resources

_LOW = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+\{?\s*(.*?)\s*;\s*\}?\s*/\* 0x([0-9a-f]{16}) \*/")
_HIGH = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"(?:^|[\s,])0x([0-9a-f]+)\s*$")
NO_BARRIER = 7


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; ``address`` in bytes from the function's start, ``stall`` in cycles."""

    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int
    yields: bool
    write_barrier: int
    read_barrier: int
    wait_mask: int

    @functools.cached_property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".", 1)[0]

    @property
    def target(self) -> int | None:
        """The address that a branch names."""
        match = _TARGET.search(self.operands)
        return int(match[1], 16) if match else None

    @property
    def waits(self) -> tuple[int, ...]:
        """The scoreboards in the wait mask."""
        return tuple(barrier for barrier in range(6) if self.wait_mask >> barrier & 1)

    def __str__(self) -> str:
        barriers = f"w{self.wait_mask:06b} wb{self.write_barrier} rb{self.read_barrier}"
        text = f"{self.predicate:5}{self.opcode} {self.operands}".rstrip()
        return f"{self.address:05x} st{self.stall:<2} {barriers} {text}"


@dataclass(frozen=True)
class Function:
    """One kernel as compiled for one architecture."""

    name: str
    arch: int
    instructions: tuple[Instruction, ...]
    resources: Resources


def decode(address: int, text: str, high: int) -> Instruction:
    """One instruction from its disassembled text and the upper 64 bits of its encoding."""
    predicate, rest = "", text
    if rest.startswith("@"):
        predicate, rest = rest.split(None, 1)
    opcode, _, operands = rest.partition(" ")
    control = high >> 41
    return Instruction(
        address=address,
        predicate=predicate,
        opcode=opcode,
        operands=operands.strip(),
        stall=control & 15,
        yields=bool(control >> 4 & 1),
        write_barrier=control >> 5 & 7,
        read_barrier=control >> 8 & 7,
        wait_mask=control >> 11 & 63,
    )


def parse_sass(text: str) -> dict[tuple[int, str], list[Instruction]]:
    """``cuobjdump -sass`` output: instructions by (architecture, function)."""
    functions: dict[tuple[int, str], list[Instruction]] = {}
    arch, current = 0, None
    low: re.Match[str] | None = None
    for line in text.splitlines():
        if match := re.match(r"\s*code for sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s*Function : (\S+)", line):
            current = functions.setdefault((arch, match[1]), [])
        elif match := _LOW.match(line):
            low = match
        elif (match := _HIGH.match(line)) and low is not None and current is not None:
            current.append(decode(int(low[1], 16), low[2], int(match[1], 16)))
            low = None
    return functions


def parse_usage(text: str, arch: int = 0) -> dict[tuple[int, str], dict[str, int]]:
    """``cuobjdump -res-usage`` output: REG, STACK, SHARED and so on by (architecture, function).

    A bare cubin's output doesn't name its architecture: it's ``arch`` then.
    """
    usage: dict[tuple[int, str], dict[str, int]] = {}
    name = None
    for line in text.splitlines():
        if match := re.match(r"\s*arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif name is not None and "REG:" in line:
            usage[arch, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            name = None
    return usage


def parse_threads(text: str, arch: int = 0) -> dict[tuple[int, str], int]:
    """``cuobjdump -elf`` output: threads per block where the kernel's launch bounds fix or limit them."""
    threads: dict[tuple[int, str], int] = {}
    name, wanted = None, False
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif line.startswith("."):
            match = re.match(r"\.nv\.info\.(\S+)\s*$", line)
            name = match[1] if match else None
        elif "EIATTR_" in line:
            wanted = "EIATTR_REQNTID" in line or "EIATTR_MAX_THREADS" in line
        elif wanted and name is not None and (match := re.match(r"\s*Value:\s*(.*)", line)):
            x, y, z = (int(part, 16) for part in match[1].split()[:3])
            threads[arch, name] = x * y * z
            wanted = False
    return threads


def disassemble(source: Path | str | bytes) -> list[Function]:
    """Every function with code in a cubin, executable or shared library, in the order of the file."""
    if isinstance(source, bytes):
        with tools.as_file(source) as path:
            return disassemble(path)
    code = parse_sass(tools.run("cuobjdump", "-sass", str(source)))
    code = {key: instructions for key, instructions in code.items() if instructions}
    if not code:
        raise ValueError(f"{source} holds no CUDA machine code")
    only = next(iter(code))[0]
    usage = parse_usage(tools.run("cuobjdump", "-res-usage", str(source)), only)
    threads = parse_threads(tools.run("cuobjdump", "-elf", str(source)), only)
    functions = []
    for key, instructions in code.items():
        resources = _resources(key[0], instructions, usage[key], threads.get(key))
        functions.append(Function(key[1], key[0], tuple(instructions), resources))
    return functions


def _resources(
    arch: int, instructions: list[Instruction], usage: dict[str, int], threads: int | None
) -> Resources:
    reserved = SYSTEM_SHARED if arch >= RESERVED_SHARED_SINCE else 0
    return Resources(
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=max(usage["SHARED"] - reserved, 0),
        spill_loads=sum(each.base == "LDL" for each in instructions),
        spill_stores=sum(each.base == "STL" for each in instructions),
        threads=threads,
    )
