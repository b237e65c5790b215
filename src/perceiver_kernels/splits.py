"""Into how many runs a GPU's programs cut their keys, so that a few rows over many keys fill it.

One rule for every GPU backend, a pure function of shape, tile and device. ``PERCEIVER_KERNELS_SPLITS`` fixes
the number instead: then an example's bits don't depend on the size of its batch.
"""

from __future__ import annotations

import functools
import os

VARIABLE = "PERCEIVER_KERNELS_SPLITS"
MAX_SPLITS = 65535  # of a grid's second dimension
SLAB_BYTES = 1 << 28  # of the backward's workspace, where more than one slab fits


def fixed() -> int:
    """The user's own number of runs, the same for every call; 0 lets :func:`parts` choose."""
    text = os.environ.get(VARIABLE) or "0"
    if not text.isdecimal():
        raise ValueError(f"{VARIABLE} must be a number of splits, or 0 for the default rule, got {text!r}")
    return int(text)


@functools.lru_cache(maxsize=1024)
def parts(programs: int, key_blocks: int, slots: int, merge: int, most: int | None = None) -> int:
    """Into how many runs of key blocks, ``most`` at most, the work of each program is cut, to fill ``slots``
    programs at a time.

    Takes the number that minimises the time of the waves, counted in key blocks: each program pays two for
    its start and end, and ``merge`` for what it leaves to be merged where there are several. Of equals the
    fewest.
    """

    def cost(count: int) -> int:
        waves = -(-programs * count // slots)
        return waves * (-(-key_blocks // count) + 2 + (merge if count > 1 else 0))

    most = min(key_blocks, 4 * slots) if most is None else min(key_blocks, 4 * slots, most)
    return min(range(1, max(1, most) + 1), key=cost)


def forward_splits(programs: int, key_blocks: int, slots: int, merge: int) -> int:
    """The user's number or the rule's, as far as there are blocks to share out."""
    return min(fixed() or parts(programs, key_blocks, slots, merge), max(key_blocks, 1), MAX_SPLITS)


def backward_runs(programs: int, key_blocks: int, slots: int, slab_bytes: int) -> int:
    """The same for the backward, where every run leaves its part of dq in a slab of so many bytes."""
    fitting = max(1, SLAB_BYTES // max(slab_bytes, 1))
    return min(fixed() or parts(programs, key_blocks, slots, 1, fitting), max(key_blocks, 1))
