"""Tensor core instructions: mma.sync, ldmatrix and stmatrix, with the fragment layouts of the PTX manual.

Products are exact and sums are formed in float64, then rounded once to the accumulator's type. The hardware
keeps fewer bits and sums in an order of its own, so its result differs in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import floats
from .isa import Body, Build, op
from .isa_memory import Address
from .lanes import Array, Mask

_SHAPES = {"m16n8k4": 4, "m16n8k8": 8, "m16n8k16": 16}


def decode(words: Array, kind: str) -> Array:
    """32-bit words (..., ) to float64 elements (..., elements per word)."""
    if kind == "f16":
        return words.view(np.float16).reshape(*words.shape, 2).astype(np.float64)
    if kind == "bf16":
        return floats.bf16_to_f32(words.view(np.uint16).reshape(*words.shape, 2)).astype(np.float64)
    # tf32: the hardware ignores the low 13 bits.
    return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]


def fragment_a(words: Array, kind: str) -> Array:
    """(registers, warps, 32) words to (warps, 16, k): register r holds row half r%2 and column half r//2."""
    values = decode(words, kind)
    registers, warps, _, per = values.shape
    values = values.reshape(
        registers // 2, 2, warps, 8, 4, per
    )  # column half, row half, warp, group, place, element
    return values.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, registers // 2 * 4 * per)


def fragment_b(words: Array, kind: str) -> Array:
    """(registers, warps, 32) words to (warps, k, 8)."""
    values = decode(words, kind)
    registers, warps, _, per = values.shape
    values = values.reshape(registers, warps, 8, 4, per)
    return values.transpose(1, 0, 3, 4, 2).reshape(warps, registers * 4 * per, 8)


def fragment_c(values: Array) -> Array:
    """(4, warps, 32) accumulators to (warps, 16, 8): c0 c1 in the group's row, c2 c3 eight rows below."""
    warps = values.shape[1]
    return values.reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)


def scatter_c(matrix: Array) -> Array:
    """The inverse of fragment_c."""
    warps = matrix.shape[0]
    return matrix.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, warps * 32)


@op("mma")
def _mma(b: Build) -> Body:
    b.need("sync")
    b.need("aligned")
    shape = b.need(*_SHAPES)
    b.need("row")
    b.need("col")
    out_kind, kind, kind_b, in_kind = (b.kind("f32", "f16", "bf16", "tf32") for _ in range(4))
    k = _SHAPES[shape]
    per = 1 if kind == "tf32" else 2
    if kind != kind_b or kind == "f32" or k * (3 - per) > 16 or (per == 2 and k < 8):
        raise b.unknown("combination of shape and types")
    if out_kind not in (("f32", "f16") if kind == "f16" else ("f32",)) or in_kind not in ("f32", "f16"):
        raise b.unknown("accumulator type")
    if b.lanes.threads % 32:
        raise b.unknown("mma in a block that is not of whole warps")
    rows_a = [b.src(item, "b32") for item in b.items(1)]
    rows_b = [b.src(item, "b32") for item in b.items(2)]
    if len(rows_a) * per * 2 != k or len(rows_b) * per * 4 != k:
        raise b.unknown("fragment sizes")
    rows_c = [b.src(item, "f32" if in_kind == "f32" else "f16x2") for item in b.items(3)]
    outs = [b.dst(item, "f32" if out_kind == "f32" else "f16x2") for item in b.items(0)]
    if len(rows_c) != (4 if in_kind == "f32" else 2) or len(outs) != (4 if out_kind == "f32" else 2):
        raise b.unknown("accumulator sizes")
    wave, instr, n = b.wave, b.instr, b.lanes.n

    def body(mask: Mask) -> None:
        wave.whole_warps(mask, instr, "warp")
        left = fragment_a(np.stack(rows_a).reshape(len(rows_a), -1, 32), kind)
        right = fragment_b(np.stack(rows_b).reshape(len(rows_b), -1, 32), kind)
        total = scatter_c(np.matmul(left, right))
        if in_kind == "f32":
            total = total + np.stack(rows_c)
        else:
            total = total + np.stack([row[:, h] for row in rows_c for h in (0, 1)])
        where: Any = True if mask is None else mask
        if out_kind == "f32":
            result = total.astype(np.float32)
            for i, out in enumerate(outs):
                np.copyto(out, result[i], where=where)
        else:
            halves = total.astype(np.float16).reshape(2, 2, n)
            for i, out in enumerate(outs):
                for h in (0, 1):
                    np.copyto(out[:, h], halves[i, h], where=where)

    return body


def _matrices(b: Build) -> tuple[int, bool, Callable[[Mask], Mask]]:
    """Modifiers of ldmatrix and stmatrix: how many matrices, transposed or not, whose addresses count."""
    b.need("sync")
    b.need("aligned")
    b.need("m8n8")
    count = int(b.need("x1", "x2", "x4")[1:])
    transpose = b.flag("trans")
    if b.take("shared", "shared::cta") is None:
        raise b.unknown(f"generic {b.instr.op}")
    b.kind("b16")
    first = b.lanes.lane < 8 * count

    def giving(mask: Mask) -> Mask:
        return mask if count == 4 else first if mask is None else first & mask

    return count, transpose, giving


@op("ldmatrix")
def _ldmatrix(b: Build) -> Body:
    count, transpose, giving = _matrices(b)
    outs = [b.dst(item, "b32") for item in b.items(0)]
    if len(outs) != count:
        raise b.unknown("number of registers")
    if b.lanes.threads % 32:
        raise b.unknown("ldmatrix in a block that is not of whole warps")
    address, wave, instr = Address(b, b.operand(1), "shared"), b.wave, b.instr

    def body(mask: Mask) -> None:
        wave.whole_warps(mask, instr, "warp")
        ((space, who, at, _),) = address.resolve(giving(mask), 16)
        rows = space.load(who, at, 16, wave.reporter(instr, space), whole_warp=True)
        halves = rows.view(np.uint16).reshape(-1, count, 8, 8)  # warp, matrix, row, column
        if transpose:
            halves = halves.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, count, 32)
        for i, out in enumerate(outs):
            if mask is None:
                out[...] = words[:, i].reshape(-1)
            else:
                out[mask] = words[:, i].reshape(-1)

    return body


@op("stmatrix")
def _stmatrix(b: Build) -> Body:
    count, transpose, giving = _matrices(b)
    words = [b.src(item, "b32") for item in b.items(1)]
    if len(words) != count or b.lanes.threads % 32:
        raise b.unknown("number of registers, or a block that is not of whole warps")
    address, wave, instr = Address(b, b.operand(0), "shared"), b.wave, b.instr

    def body(mask: Mask) -> None:
        wave.whole_warps(mask, instr, "warp")
        ((space, who, at, _),) = address.resolve(giving(mask), 16)
        # matrix, warp, row, column
        halves = np.stack(words).reshape(count, -1, 32).view(np.uint16).reshape(count, -1, 8, 8)
        if transpose:
            halves = halves.transpose(0, 1, 3, 2)
        rows = np.ascontiguousarray(halves.transpose(1, 0, 2, 3)).view(np.uint8).reshape(-1, count * 8, 16)
        warps = who.reshape(-1, count * 8)[:, 0] // 32
        space.store(who, at, rows[warps].reshape(-1, 16), wave.reporter(instr, space))

    return body
