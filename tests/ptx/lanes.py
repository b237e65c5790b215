"""The register file: one numpy row per register, all threads of a wave of blocks side by side."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .findings import Unsupported
from .syntax import Imm, Instr, Operand, Reg

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None  # None: every lane

WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# bf16 has no numpy type: its lanes are uint16 bits, and packed pairs are (lanes, 2).
DTYPES: dict[str, Any] = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16, "b16": np.uint16,
    "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64,
    "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64, "tf32": np.uint32,
    "f16x2": np.float16, "bf16x2": np.uint16, "pred": np.bool_,
}  # fmt: skip
BYTES = {"pred": 1, "f16x2": 4, "bf16x2": 4, "tf32": 4, "bf16": 2} | {
    name: np.dtype(dtype).itemsize
    for name, dtype in DTYPES.items()
    if name[-1] in "0123456789" and "x2" not in name
}
CARRY = "%(carry)"


class Lanes:
    """Registers of `blocks` blocks of `threads` threads. Rows stay in place: handlers hold views of them."""

    def __init__(self, regs: dict[str, str], blocks: int, block: tuple[int, int, int]) -> None:
        self.block_shape = block
        self.threads = block[0] * block[1] * block[2]
        self.blocks = blocks
        self.n = n = blocks * self.threads
        self.kinds = {**regs, CARRY: "u32"}
        self.slots = {name: i for i, name in enumerate(self.kinds)}
        self.rows: dict[str, Array] = {}
        for name, kind in self.kinds.items():
            if kind not in DTYPES and kind != "b128":
                raise Unsupported(f".reg .{kind}")
            size = 1 if kind == "pred" else max(2, BYTES.get(kind, 16))
            self.rows[name] = np.zeros(n, np.bool_ if kind == "pred" else WIDTHS[size])
        self.init = np.zeros((len(self.slots), n), np.bool_)
        self.full = [False] * len(self.slots)
        self.constants: dict[tuple[str, bytes, bool], Array] = {}
        thread = np.arange(n, dtype=np.uint32) % np.uint32(self.threads)
        self.thread = thread.astype(np.int64)
        self.block_of = np.arange(n, dtype=np.int64) // self.threads
        self.lane = self.thread % 32
        x, y, _ = block
        self.special: dict[str, Array] = {
            "%tid.x": thread % np.uint32(x),
            "%tid.y": thread // np.uint32(x) % np.uint32(y),
            "%tid.z": thread // np.uint32(x * y),
            "%laneid": thread % np.uint32(32),
            "%warpid": thread // np.uint32(32),
            "%nwarpid": np.full(n, (self.threads + 31) // 32, np.uint32),
            "%smid": np.zeros(n, np.uint32),
            "%nsmid": np.ones(n, np.uint32),
            "%gridid": np.zeros(n, np.uint64),
            "%clock": np.zeros(n, np.uint32),
            "%clock64": np.zeros(n, np.uint64),
            "%globaltimer": np.zeros(n, np.uint64),
            "WARP_SZ": np.full(n, 32, np.uint32),
        }
        for axis, extent in zip("xyz", block, strict=True):
            self.special[f"%ntid.{axis}"] = np.full(n, extent, np.uint32)
            self.special[f"%ctaid.{axis}"] = np.zeros(n, np.uint32)
            self.special[f"%nctaid.{axis}"] = np.zeros(n, np.uint32)
        lane = self.special["%laneid"].astype(np.uint64)
        one = np.uint64(1)
        below = (one << lane) - one
        masks = {"lt": below, "le": below | one << lane, "eq": one << lane}
        masks |= {"gt": ~masks["le"], "ge": ~below}
        for name, bits in masks.items():
            self.special[f"%lanemask_{name}"] = (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    def forget(self) -> None:
        """A new wave of blocks: no register has a value yet."""
        self.init[:] = False
        self.full = [False] * len(self.slots)

    # Operands as arrays

    def constant(self, dtype: Any, data: bytes, pair: bool = False) -> Array:
        key = (np.dtype(dtype).str, data, pair)
        if key not in self.constants:
            value = np.frombuffer(data, dtype)
            self.constants[key] = np.tile(value, (self.n, 1)) if pair else np.repeat(value, self.n)
        return self.constants[key]

    def immediate(self, imm: Imm, kind: str) -> Array:
        if kind == "pred":
            return self.constant(np.bool_, bytes([bool(imm.value)]))
        size = BYTES[kind]
        data = immediate_bits(imm, kind).to_bytes(size, "little")
        return self.constant(DTYPES[kind], data, kind.endswith("x2"))

    def source(self, operand: Operand, kind: str, instr: Instr, loose: bool = False) -> Array:
        """The lanes' values as `kind`. `loose`: the register may be wider (cvt, st), its low part counts."""
        if isinstance(operand, Imm):
            return self.immediate(operand, kind)
        if not isinstance(operand, Reg):
            raise Unsupported(f"PTX line {instr.line}: operand {operand} of {instr.text}")
        row = self.special.get(operand.name)
        if row is None:
            row = self.row(operand, instr)
        return self.view(row, kind, instr, loose)

    def row(self, operand: Operand, instr: Instr) -> Array:
        if not isinstance(operand, Reg) or operand.name not in self.rows:
            raise Unsupported(f"PTX line {instr.line}: unknown register {operand} in {instr.text}")
        return self.rows[operand.name]

    def view(self, row: Array, kind: str, instr: Instr, loose: bool = False) -> Array:
        if kind == "pred" or row.dtype == np.bool_:
            if row.dtype != np.bool_ or kind != "pred":
                raise Unsupported(f"PTX line {instr.line}: predicate and value mixed in {instr.text}")
            return row
        size, have = BYTES[kind], row.dtype.itemsize
        if kind.endswith("x2"):
            if have != 4:
                raise Unsupported(
                    f"PTX line {instr.line}: .{kind} in a {8 * have}-bit register: {instr.text}"
                )
            return row.view(DTYPES[kind]).reshape(self.n, 2)
        if size == have:
            return row.view(DTYPES[kind])
        if size < have and (loose or size == 1):
            return row.view(DTYPES[kind])[:: have // size]
        raise Unsupported(f"PTX line {instr.line}: .{kind} in a {8 * have}-bit register: {instr.text}")


def immediate_bits(imm: Imm, kind: str) -> int:
    size = BYTES[kind]
    if imm.float_bits < 0 and kind in ("f32", "f64", "f16"):
        imm = Imm(float(imm.value), 0)
    if imm.float_bits < 0:
        return int(imm.value) & ((1 << 8 * size) - 1)
    if kind == "f16":
        return int(np.float16(imm.value).view(np.uint16))
    wide = imm.float_bits == 64 if imm.float_bits else size == 8
    code = struct.pack("<d" if wide and size == 8 else "<f", imm.value)
    return int.from_bytes(code, "little")
