"""atom and red: lanes that meet at one address take turns.

Float sums depend on their order, so here threads race whose additions to one address nothing orders, although
they lose none.
"""

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
    count = int((b.take("v2", "v4") or "v1")[1:])
    kind = b.kind("b32", "b64", "b16", *INTS, "f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
    if ("16" in kind and kind[0] in "fb" and kind != "b16") != noftz:
        raise b.unknown(".noftz belongs to 16-bit float atomics")
    if count > 1 and (returns or (what, kind) != ("add", "f32")):
        raise b.unknown("vectors are for red.add.f32")
    ordered = what != "add" or kind[0] not in "fb"
    first = 1 if returns else 0
    b.count(first + (3 if what == "cas" else 2) + policy)
    out = None if not returns or b.operand(0) == Sym("_") else b.dst(0, kind)
    address, wave, instr = Address(b, b.operand(first), space), b.wave, b.instr
    columns = [b.src(item, kind) for item in b.items(first + 1)] if count > 1 else [b.src(first + 1, kind)]
    other = b.src(first + 2, kind) if what == "cas" else None
    size, combine = BYTES[kind], _ATOMIC.get(what)
    if combine and "16" in kind and kind != "b16":
        plain = combine
        combine = lambda x, y: floats.narrow(plain(floats.widen(x, kind), floats.widen(y, kind)), kind)  # noqa: E731

    def apply(values: Array, old: Array, lanes: Array) -> Array:
        if other is not None:
            return np.where(old == values[lanes], other[lanes], old)
        assert combine is not None
        return np.asarray(combine(old, values[lanes])).astype(old.dtype)

    def body(mask: Mask) -> None:
        for where, lanes, at, _ in address.resolve(mask, size * count):
            report = wave.reporter(instr, where)
            if where.shadow is not None:  # a read and a write of one thread
                who, granule = where.granules(lanes, at, size * count)
                base = where.granule
                tell = lambda kind, text, lane, g: report(kind, text, lane, g * base)  # noqa: E731, B023
                twice = where.shadow.write(who, granule, ordered, tell)
                if twice is not None:
                    i = int(np.flatnonzero(twice)[0])
                    tell(
                        "race", "several threads add floats here, in any order", int(who[i]), int(granule[i])
                    )
            where.check_state(lanes, at, size * count, 3, report)
            cells = where.data.view(np.uint8)
            for i, values in enumerate(columns):
                take_turns(cells, values, lanes, at + i * size)

    def take_turns(cells: Array, values: Array, lanes: Array, at: Array) -> None:
        """Lanes that meet at one address, one after the other; each round has distinct addresses."""
        left = np.arange(len(lanes))
        while len(left):
            _, once = np.unique(at[left], return_index=True)
            turn = left[once]
            index = at[turn][:, None] + np.arange(size)
            old = cells[index].view(values.dtype)
            old = old if values.ndim == 2 else old[:, 0]
            fresh = apply(values, old, lanes[turn])
            if out is not None:
                out[lanes[turn]] = old
            cells[index] = np.ascontiguousarray(fresh).reshape(len(turn), -1).view(np.uint8)
            left = np.delete(left, once)

    return body
