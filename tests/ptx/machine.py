"""launch(): a kernel's arguments into machine memory, its blocks in waves, the results back again."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from .collector import no_collection
from .findings import Finding, Report
from .lanes import Array, Lanes
from .memory import POISON, UNWRITTEN, WRITTEN, Space
from .parser import parse
from .program import Program, flatten
from .races import Shadow
from .syntax import SIZES, Instr, Module, Variable
from .wave import Wave

GLOBAL_BASE = 0x0010_0000_0000
_GAP = 1 << 20  # invalid bytes around every allocation
_ALIGN = 512
MAX_LANES = 2048

Dim = int | tuple[int, ...]


class Empty:
    """An array that the host has not filled: reading it before the kernel writes it is a finding."""

    def __init__(self, array: Any) -> None:
        self.array = array


def empty(shape: int | tuple[int, ...], dtype: Any) -> Empty:
    """Fresh memory for results, all bits set (NaN in any float type)."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).reshape(-1)[:] = POISON
    return Empty(array)


def launch(
    ptx: str,
    kernel: str,
    grid: Dim,
    block: Dim,
    args: Sequence[Any],
    *,
    shared: int = 0,
    collect: bool = False,
    max_lanes: int = MAX_LANES,
    limit: int = 5_000_000,
) -> Report:
    """Run `kernel` of the PTX text.

    Arrays (numpy, or torch on the CPU) are passed as pointers and changed in place;
    `Empty(array)` counts as unwritten; numbers follow the parameter's type; None is a null pointer.

    The first finding is raised; with `collect`, all are in the report, up to one that ends the kernel.
    `shared` is the size of the extern shared array, `limit` the longest run of one wave in instructions.
    """
    machine = Machine(ptx, kernel, _dim(grid), _dim(block), args, shared, collect, max_lanes, limit)
    try:
        return machine.run()
    finally:
        machine.release()


@lru_cache(maxsize=32)
def parsed(ptx: str) -> Module:
    with no_collection():
        return parse(ptx)


@lru_cache(maxsize=64)
def _program(ptx: str, kernel: str) -> Program:
    module = parsed(ptx)
    with no_collection():
        return flatten(module, kernel)


def _dim(value: Dim) -> tuple[int, int, int]:
    given = (value,) if isinstance(value, int) else tuple(value)
    x, y, z = (*given, 1, 1, 1)[:3]
    return int(x), int(y), int(z)


class Machine:
    def __init__(
        self,
        ptx: str,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Any],
        shared: int,
        collect: bool,
        max_lanes: int,
        limit: int,
    ) -> None:
        self.program = program = _program(ptx, kernel)
        self.grid, self.collect, self.limit = grid, collect, limit
        self.report = Report()
        self.seen: set[tuple[str, int]] = set()
        threads = block[0] * block[1] * block[2]
        if program.threads is not None and program.threads != threads:
            raise ValueError(
                f"{kernel} requires {program.threads} threads per block, launched with {threads}"
            )
        self.threads = threads
        self.total = grid[0] * grid[1] * grid[2]
        waves = -(-self.total // max(1, max_lanes // threads))
        self.blocks = -(-self.total // max(1, waves))
        self.spaces: dict[str, Space] = {}
        self.addresses: dict[str, int] = {}
        self.regions: list[tuple[int, Array]] = []  # (offset in global data, host bytes)
        granules = _granules(program)
        self._private(shared)
        self._constants()
        self._global(args)
        lanes = Lanes(program.regs, self.blocks, block)
        for axis, extent in zip("xyz", grid, strict=True):
            lanes.special[f"%nctaid.{axis}"][:] = extent
        self.executed = np.zeros(len(program.code) + 1, np.uint8)
        self.wave = Wave(program, self, lanes, self.spaces)
        for name in ("shared", "global"):
            space = self.spaces[name]
            space.granule = granules[name]
            space.shadow = Shadow(len(space.data) // granules[name] + 1, self.wave.order, name == "global")
            if name == "shared" and any(instr.op == "wgmma" for instr in program.code):
                space.unpublished = np.zeros(len(space.data) // granules[name] + 1, np.bool_)
                space.shadow.track_warps()

    # Memory

    def _private(self, dynamic: int) -> None:
        ends = {"shared": 0, "local": 0}
        variables = [v for v in self.program.variables.values() if v.space in ends]
        for variable in sorted(
            variables, key=lambda v: v.size == 0
        ):  # extern arrays begin after the static ones
            start = -(-ends[variable.space] // variable.align) * variable.align
            self.addresses[variable.name] = start
            if variable.size:
                ends[variable.space] = start + variable.size
        externs = [self.addresses[v.name] for v in variables if v.size == 0]
        extents = {"shared": max(externs, default=ends["shared"]) + dynamic, "local": ends["local"]}
        copies = {"shared": self.blocks, "local": self.blocks * self.threads}
        for name in ends:
            self.spaces[name] = Space(name, 0, extents[name], copies[name])
        for variable in variables:
            size = variable.size or dynamic
            self.spaces[variable.space].validate(self.addresses[variable.name], size, UNWRITTEN)

    def _constants(self) -> None:
        placed, end = [], 0
        for variable in self.program.variables.values():
            if variable.space == "const":
                end = -(-end // variable.align) * variable.align
                placed.append((end, variable))
                self.addresses[variable.name] = end
                end += variable.size
        space = self.spaces["const"] = Space("const", 0, end)
        space.writable = False
        for at, variable in placed:
            _fill(space, at, variable.init or bytes(variable.size))

    def _global(self, args: Sequence[Any]) -> None:
        params = self.program.params
        if len(args) != len(params):
            raise ValueError(f"{self.program.name} has {len(params)} parameters, given {len(args)}")
        arrays = [_Host(each) for arg in args for each in _fields(arg) if _is_array(each)]
        # Views of one array share its memory: overlapping spans become one allocation.
        spans: list[list[int]] = []
        for low, high in sorted(host.span for host in arrays):
            if spans and low < spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], high)
            else:
                spans.append([low, high])
        end, places = _GAP, []
        for low, high in spans:
            places.append((low, high, end))
            end += -(-(high - low) // _ALIGN) * _ALIGN + _GAP
        variables: list[tuple[int, Variable]] = []
        for variable in self.program.variables.values():
            if variable.space == "global":
                variables.append((end, variable))
                self.addresses[variable.name] = GLOBAL_BASE + end
                end += -(-variable.size // _ALIGN) * _ALIGN + 4096
        space = self.spaces["global"] = Space("global", GLOBAL_BASE, end)
        for at, variable in variables:
            data = bytearray(variable.init or bytes(variable.size))
            for offset, symbol, addend in variable.links:
                struct.pack_into("<Q", data, offset, self.addresses[symbol] + addend)
            _fill(space, at, bytes(data))
        for low, high, start in places:
            memory = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
            space.data[start : start + high - low] = memory
            self.regions.append((start, memory))
        pointers = {}
        self.kept = [host.array for host in arrays]  # alive while their addresses are in use
        for host in arrays:
            start = next(at + host.address - low for low, high, at in places if low <= host.address <= high)
            pointers[id(host.arg)] = GLOBAL_BASE + start
            cells = space.state[start : start + host.extent] if host.extent else space.state[:0]
            view = np.lib.stride_tricks.as_strided(cells, host.shape, host.strides)
            np.maximum(view, np.uint8(UNWRITTEN if host.unwritten else WRITTEN), out=view)
        self._params(args, params, pointers)

    def _params(self, args: Sequence[Any], params: list[Variable], pointers: dict[int, int]) -> None:
        end, values = 0, []
        for arg, param in zip(args, params, strict=True):
            end = -(-end // param.align) * param.align
            self.addresses[param.name] = end
            if id(arg) in pointers:
                data = struct.pack("<Q", pointers[id(arg)])
            elif isinstance(arg, tuple):
                data = b"".join(_field(each, pointers) for each in arg)
            else:
                data = _scalar(arg, param)
            if len(data) != param.size:
                raise ValueError(f"parameter {param.name} has {param.size} bytes, the argument {len(data)}")
            values.append((end, data))
            end += param.size
        space = self.spaces["param"] = Space("param", 0, end)
        space.writable = False
        for at, data in values:
            _fill(space, at, data)

    # Running

    def block_index(self, block: int) -> tuple[int, int, int]:
        x, y, _ = self.grid
        return block % x, block // x % y, block // (x * y)

    def found(self, finding: Finding) -> None:
        if not self.collect:
            raise finding
        key = (finding.kind, finding.line)
        if key not in self.seen:
            self.seen.add(key)
            self.report.findings.append(finding)

    def run(self) -> Report:
        wave, lanes = self.wave, self.wave.lanes
        try:
            with np.errstate(all="ignore"):
                for first in range(0, self.total, self.blocks):
                    count = min(self.blocks, self.total - first)
                    index = np.minimum(first + lanes.block_of, self.total - 1)
                    x, y, _ = self.grid
                    for axis, row in zip("xyz", (index % x, index // x % y, index // (x * y)), strict=True):
                        lanes.special[f"%ctaid.{axis}"][:] = row
                    wave.run(first, count)
                    self.report.waves += 1
        except Finding as finding:
            if not self.collect:
                raise
            self.report.findings.append(finding)
        finally:
            data = self.spaces["global"].data
            for start, host in self.regions:
                host[:] = data[start : start + len(host)]
        self.report.instructions = wave.steps
        lines = [instr.line for instr in wave.code]
        self.report.executed = {lines[pc] for pc in np.flatnonzero(self.executed)}
        return self.report

    def release(self) -> None:
        """Closures and the wave refer to one another: free the memory now, not at the next collection."""
        self.wave.bound.clear()
        self.wave.fast.clear()
        self.wave.code_steps.clear()
        self.spaces.clear()


class _Host:
    """An array argument: where it lies, what it covers, and the allocation it is a view of."""

    def __init__(self, arg: Any) -> None:
        self.arg = arg
        self.unwritten = isinstance(arg, Empty)
        array = arg.array if isinstance(arg, Empty) else arg
        self.array = array
        if hasattr(array, "untyped_storage"):  # a torch tensor
            size = array.element_size()
            storage = array.untyped_storage()
            self.address = array.data_ptr() or storage.data_ptr()
            low, high = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
            shape, strides = tuple(array.shape), tuple(stride * size for stride in array.stride())
        else:
            size = array.itemsize
            self.address = array.__array_interface__["data"][0]
            root = array
            while isinstance(root.base, np.ndarray):
                root = root.base
            low, high = np.lib.array_utils.byte_bounds(root) if root.size else (self.address, self.address)
            shape, strides = array.shape, array.strides
        if any(stride < 0 for stride in strides):
            raise ValueError("arrays with negative strides have no address to pass")
        self.span = (low, max(high, low + 1))
        self.shape, self.strides = (*shape, size), (*strides, 1)
        empty_array = 0 in shape
        self.extent = (
            0 if empty_array else 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        )
        if empty_array:
            self.shape, self.strides = (0,), (1,)


def _fields(arg: Any) -> tuple[Any, ...]:
    """A struct's fields; of anything else itself."""
    return arg if isinstance(arg, tuple) else (arg,)


def _field(field: Any, pointers: dict[int, int]) -> bytes:
    """A pointer, or bytes as they are."""
    if isinstance(field, bytes):
        return field
    return struct.pack("<Q", 0 if field is None else pointers[id(field)])


def _is_array(arg: Any) -> bool:
    return isinstance(arg, np.ndarray | Empty) or hasattr(arg, "untyped_storage")


def _fill(space: Space, at: int, data: bytes) -> None:
    space.data[at : at + len(data)] = np.frombuffer(data, np.uint8)
    space.state[at : at + len(data)] = WRITTEN


def _scalar(arg: Any, param: Variable) -> bytes:
    if arg is None:
        return bytes(param.size)
    if isinstance(arg, bytes):
        return arg
    if param.kind.startswith("f") or isinstance(arg, float | np.floating):
        if param.kind.startswith(("u", "s")):
            raise ValueError(f"parameter {param.name} is .{param.kind}, the argument {arg!r}")
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[param.size], float(arg))
    return (int(arg) & ((1 << 8 * param.size) - 1)).to_bytes(param.size, "little")


def _granules(program: Program) -> dict[str, int]:
    """The finest access to each space: races are tracked at that grain."""
    found = {"shared": 16, "global": 16}
    for instr in program.code:
        if instr.op == "cp" and len(instr.operands) > 2:
            # A src-size may be any; what it cuts off still counts as read with its word.
            found["shared"] = min(found["shared"], 4)
            found["global"] = min(found["global"], 4)
        elif instr.op in ("ld", "st", "atom", "red", "ldu"):
            spaces = {mod.split("::")[0] for mod in instr.mods} & {
                "shared",
                "global",
                "local",
                "const",
                "param",
            }
            for space in found:
                if not spaces or space in spaces:
                    found[space] = min(found[space], _access_size(instr))
    return found


def _access_size(instr: Instr) -> int:
    return next((SIZES.get(mod, 4) for mod in reversed(instr.mods) if mod in SIZES or mod.endswith("x2")), 1)
