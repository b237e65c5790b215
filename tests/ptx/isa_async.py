"""cp.async: copies from global to shared memory that arrive when their group is waited for."""

from __future__ import annotations

from typing import Any

import numpy as np

from .isa import Body, Build, op
from .isa_memory import Address, hints
from .lanes import Array, Mask
from .syntax import Imm, Reg


@op("cp")
def _cp(b: Build) -> Body:
    b.need("async")
    wave, instr = b.wave, b.instr
    if b.flag("commit_group"):

        def commit(mask: Mask) -> None:
            wave.group[slice(None) if mask is None else mask] += 1

        return commit
    if b.flag("wait_all"):
        return lambda mask: wait(wave, mask, None)
    if b.flag("wait_group"):
        allowed = b.operand(0)
        assert isinstance(allowed, Imm)
        keep = int(allowed.value)
        return lambda mask: wait(wave, mask, keep)
    if b.mods and b.mods[0] in ("bulk", "mbarrier", "reduce"):
        raise b.unknown("not an sm_80 cp.async")
    cache = b.need("ca", "cg")
    if b.take("shared", "shared::cta") is None or not b.flag("global"):
        raise b.unknown("cp.async goes from .global to .shared")
    policy = hints(b)
    operands = list(b.instr.operands)
    if policy:
        operands.pop()
    size_operand = operands[2]
    assert isinstance(size_operand, Imm)
    size = int(size_operand.value)
    if size not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise b.unknown(f"cp.async.{cache} of {size} bytes")
    target, source = Address(b, operands[0], "shared"), Address(b, operands[1], "global")
    given: Array | None = None
    ignore: tuple[Array, bool] | None = None
    if len(operands) > 3:
        extra = operands[3]
        if isinstance(extra, Reg) and b.lanes.rows[extra.name].dtype == np.bool_:
            ignore = b.pred(extra)
        else:
            given = b.src(extra, "u32")
    shared, source_space = wave.spaces["shared"], wave.spaces["global"]

    def body(mask: Mask) -> None:
        lanes, to = target.values(mask)
        into = shared.locate(lanes, to, size, wave.copy_of["shared"])
        _, origin = source.values(mask)
        values = np.zeros((len(lanes), size), np.uint8)
        amount = np.full(len(lanes), size, np.int64) if given is None else given[lanes].astype(np.int64)
        if ignore is not None:
            amount = np.where(ignore[0][lanes] ^ ignore[1], 0, amount)
        if amount.max() > size:
            raise wave.finding(
                instr, "out-of-bounds", f"src-size {amount.max()} of a {size}-byte cp.async", 0
            )
        report = wave.reporter(instr, source_space)
        for each in np.unique(amount):
            if each == 0:
                continue
            some = slice(None) if (amount == each).all() else np.flatnonzero(amount == each)
            who = lanes[some]
            at = source_space.locate(who, origin[some], size if each == size else 1, None)
            if each == size:
                values[some] = source_space.load(who, at, size, report)
            else:
                for byte in range(int(each)):
                    values[some, byte] = source_space.load(who, at + byte, 1, report)[:, 0]
        shared.begin_async(lanes, into, size, wave.reporter(instr, shared))
        wave.copies.append(wave.make_copy(lanes, into, values, wave.group[lanes]))

    return body


def wait(wave: Any, mask: Mask, keep: int | None) -> None:
    """Deliver the copies of all but the last `keep` groups of each lane (None: also those not committed)."""
    order, shared = wave.order, wave.spaces["shared"]
    left = []
    for copy in wave.copies:
        due = (
            np.ones(len(copy.lanes), np.bool_) if keep is None else copy.group < wave.group[copy.lanes] - keep
        )
        if mask is not None:
            due &= mask[copy.lanes]
        if due.all():
            shared.land(copy.lanes, copy.at, copy.values)
            continue
        if due.any():
            shared.land(copy.lanes[due], copy.at[due], copy.values[due])
            rest = ~due
            copy = wave.make_copy(copy.lanes[rest], copy.at[rest], copy.values[rest], copy.group[rest])
        left.append(copy)
    wave.copies[:] = left
    order.now += 1
