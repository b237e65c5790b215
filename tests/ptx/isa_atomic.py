"""atom and red: lanes that meet at one address take turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import floats
from .isa import Body, Build, op
from .isa_int import INTS
from .isa_memory import Address, hints, ordering, space_of
from .lanes import BYTES, Array, Mask
from .syntax import Sym

_ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y, "min": np.minimum, "max": np.maximum, "and": lambda x, y: x & y,
    "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y, "exch": lambda x, y: y,
    "inc": lambda x, y: np.where(x >= y, x.dtype.type(0), x + x.dtype.type(1)),
    "dec": lambda x, y: np.where((x == 0) | (x > y), y, x - x.dtype.type(1)),
}  # fmt: skip


@op("atom", "red")
def _atom(b: Build) -> Body:
    returns = b.instr.op == "atom"
    ordering(b)
    space, policy = space_of(b), hints(b)
    what = b.need(*_ATOMIC, "cas")
    noftz = b.flag("noftz")
    kind = b.kind("b32", "b64", "b16", *INTS, "f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
    if ("16" in kind and kind[0] in "fb" and kind != "b16") != noftz:
        raise b.unknown(".noftz belongs to 16-bit float atomics")
    first = 1 if returns else 0
    b.count(first + (3 if what == "cas" else 2) + policy)
    out = None if not returns or b.operand(0) == Sym("_") else b.dst(0, kind)
    address, wave, instr = Address(b, b.operand(first), space), b.wave, b.instr
    values = b.src(first + 1, kind)
    other = b.src(first + 2, kind) if what == "cas" else None
    size, combine = BYTES[kind], _ATOMIC.get(what)
    if combine and "16" in kind and kind != "b16":
        plain = combine
        combine = lambda x, y: floats.narrow(plain(floats.widen(x, kind), floats.widen(y, kind)), kind)  # noqa: E731

    def apply(old: Array, lanes: Array) -> Array:
        if other is not None:
            return np.where(old == values[lanes], other[lanes], old)
        assert combine is not None
        return np.asarray(combine(old, values[lanes])).astype(old.dtype)

    def body(mask: Mask) -> None:
        for where, lanes, at, _ in address.resolve(mask, size):
            report = wave.reporter(instr, where)
            if where.shadow is not None:  # a read and a write of one thread, strong
                who, granule = where.granules(lanes, at, size)
                base = where.granule
                tell = lambda kind, text, lane, g: report(kind, text, lane, g * base)  # noqa: E731, B023
                where.shadow.write(who, granule, True, tell)
            where.check_state(lanes, at, size, 3, report)
            cells = where.data.view(np.uint8)
            # Lanes that meet at one address take turns; each round has distinct addresses.
            left = np.arange(len(lanes))
            while len(left):
                _, once = np.unique(at[left], return_index=True)
                turn = left[once]
                index = at[turn][:, None] + np.arange(size)
                old = cells[index].view(values.dtype)
                old = old if values.ndim == 2 else old[:, 0]
                fresh = apply(old, lanes[turn])
                if out is not None:
                    out[lanes[turn]] = old
                cells[index] = np.ascontiguousarray(fresh).reshape(len(turn), -1).view(np.uint8)
                left = np.delete(left, once)

    return body
