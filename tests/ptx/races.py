"""Who touched each granule of memory, and when: the race checker.

Every access is stamped with a time (a counter of memory instructions) and a thread. Two accesses of different
threads to one granule, at least one of them a write, need a barrier between them. `Order` knows what barriers
have ordered: per thread the time of the last barrier of its whole block, and, for the rarer barriers of some
warps or of one warp's lanes, vector clocks. A cp.async writes at time `NEVER`, until its thread waits for it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .lanes import Array, Lanes

SHIFT = np.int64(32)
ID = np.int64((1 << 28) - 1)  # a thread's number in the whole grid, or the warp's if WARP
WHO = np.int64((1 << 31) - 1)
WARP, MANY, PENDING, STRONG = (np.int64(1 << bit) for bit in (28, 29, 30, 31))
NEVER = np.int64(1 << 29)

Report = Callable[[str, str, int, int], None]  # kind, message, lane, granule
Same = Callable[[], "Array | np.bool_"]


def _never() -> np.bool_:
    return np.False_


class Order:
    """Which earlier accesses happened before now, for each lane of the wave."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.warps = (lanes.threads + 31) // 32
        self.now = 1
        n = lanes.n
        self.id = np.arange(n, dtype=np.int64)  # set for each wave
        self.since = np.zeros(n, np.int64)  # packed (time, all ones): the last barrier of the whole block
        self.warp_clock = np.zeros((n, self.warps), np.int64)  # [lane, warp of its block]: time
        self.lane_clock = np.zeros((n, 32), np.int64)  # [lane, lane of its warp]: time
        self.partial = False  # any clock was used

    def start(self, first_block: int) -> None:
        self.id[:] = np.arange(self.lanes.n) + first_block * self.lanes.threads
        self.since[:] = 0
        self.warp_clock[:] = 0
        self.lane_clock[:] = 0
        self.partial = False

    def block_barrier(self, lanes: Array | slice) -> None:
        self.since[lanes] = (np.int64(self.now) << SHIFT) | WHO | STRONG
        self.now += 1

    def some_warps(self, waiting: Array, warps: dict[int, int]) -> None:
        """Lanes `waiting` of one block now follow everything its `warps` did up to the times given."""
        self.partial = True
        clock = self.warp_clock[waiting].max(axis=0)
        for warp, time in warps.items():
            clock[warp] = max(clock[warp], time)
        self.warp_clock[waiting] = clock
        self.lane_clock[waiting] = self.now
        self.now += 1

    def warp_barrier(self, lanes: Array) -> None:
        """Lanes (of one or several warps) that synchronised within their warps."""
        self.partial = True
        matrix = np.zeros((self.lanes.n // 32 + 1, 32), np.bool_)
        matrix[lanes // 32, self.lanes.lane[lanes]] = True
        rows = matrix[lanes // 32]
        self.lane_clock[lanes] = np.where(rows, self.now, self.lane_clock[lanes])
        self.now += 1

    def ordered(self, lanes: Array, stamps: Array) -> Array:
        """Do barriers of warps, or within them, put accesses with these stamps before what lanes do now?"""
        if not self.partial:
            return np.zeros(len(lanes), np.bool_)
        threads = self.lanes.threads
        mine, time, other = self.id[lanes], stamps >> SHIFT, stamps & ID
        known = (stamps & (MANY | PENDING) == 0) & (other // threads == mine // threads)
        other_thread = np.where(known, other % threads, 0)
        warp = other_thread // 32
        same_warp = warp == mine % threads // 32
        # Of several readers of one warp only the warp is known: all its lanes must be in order.
        of_lane = self.lane_clock[lanes, other_thread % 32]
        of_lane = np.where(stamps & WARP != 0, self.lane_clock[lanes].min(1), of_lane)
        return known & (time <= np.where(same_warp, of_lane, self.warp_clock[lanes, warp]))


class Shadow:
    """Last write and last read of every granule of one space."""

    def __init__(self, granules: int, order: Order, across_blocks: bool) -> None:
        self.order = order
        self.across = across_blocks  # global memory: other blocks are never ordered within a launch
        self.written = np.zeros(granules, np.int64)
        self.read_by = np.zeros(granules, np.int64)
        self.read_at: Array | None = None  # (granules, warps of the block): when, since the last write

    def track_warps(self) -> None:
        """Know of every warp when it last read a granule: for barriers that not all readers share."""
        self.read_at = np.zeros((len(self.written), self.order.warps), np.int32)

    def forget(self) -> None:
        self.written[:] = 0
        self.read_by[:] = 0
        if self.read_at is not None:
            self.read_at[:] = 0

    def read(self, lanes: Array, at: Array, strong: bool, report: Report, whole_warp: bool = False) -> None:
        """Lanes read granules `at`. `whole_warp`: the data goes to all lanes of the warp (ldmatrix)."""
        order = self.order
        me, since = order.id[lanes], order.since[lanes]
        if self.read_at is not None:
            self.read_at[at, order.lanes.thread[lanes] // 32] = order.now
        last = self.written.take(at)
        late = last > since if not self.across else last != 0
        if late.any():
            self.conflicts(lanes, at, last, late, strong, report, "reads what", "wrote")
        stamp = (np.int64(order.now) << SHIFT) | (me - order.lanes.lane[lanes] | WARP if whole_warp else me)
        if strong:
            stamp |= STRONG
        old = self.read_by.take(at)
        self.read_by[at] = stamp
        recent = self.recent(lanes, old, me, since)
        shared = recent & ((old & WHO) != (stamp & WHO)) | (self.read_by.take(at) != stamp)
        if shared.any():
            self.mark_many(lanes[shared], at[shared], old[shared], recent[shared])
        order.now += 1

    def recent(self, lanes: Array, old: Array, me: Array, since: Array) -> Array:
        """Accesses that nothing has ordered before now; those of other blocks never are."""
        recent = old > since
        if self.order.partial and recent.any():
            recent &= ~self.order.ordered(lanes, old)
        if self.across:
            threads = self.order.lanes.threads
            recent |= (old != 0) & ((old & ID) // threads != me // threads)
        return recent

    def mark_many(self, lanes: Array, at: Array, old: Array, recent: Array) -> None:
        """Several threads read these granules since the last barrier: note their warp, or their number."""
        order = self.order
        time = np.int64(order.now) << SHIFT
        warp = time | WARP | (order.id[lanes] - order.lanes.lane[lanes])
        self.read_by[at] = warp
        threads = order.lanes.threads
        who = old & ID
        first = who - who % threads % 32
        back = self.read_by.take(at)
        mixed = (back != warp) | (recent & ((first != (warp & ID)) | ((old & MANY) != 0)))
        if mixed.any():
            many = time | MANY | (warp & ID)
            if self.across:  # readers of several blocks are nobody's own
                block = (warp & ID) // threads
                foreign = (recent & (who // threads != block)) | ((back & ID) // threads != block)
                many = np.where(foreign, many | ID, many)
            self.read_by[at[mixed]] = many[mixed]

    def write(
        self,
        lanes: Array,
        at: Array,
        strong: bool,
        report: Report,
        same: Same = _never,
        pending: bool = False,
    ) -> Array | None:
        """Lanes write granules `at`. Returns those that several write at once: the caller compares values.

        `same` tells which granules hold already what is written; then two writes don't conflict.
        """
        order = self.order
        me, since = order.id[lanes], order.since[lanes]
        last, reader = self.written.take(at), self.read_by.take(at)
        late = last > since if not self.across else last != 0
        if late.any():
            late &= (last & PENDING != 0) | ~same()
            self.conflicts(lanes, at, last, late, strong, report, "overwrites what", "wrote")
        late = reader > since if not self.across else reader != 0
        if late.any() and self.read_at is not None:
            late &= self.unordered_readers(lanes, at)
            for i in np.flatnonzero(late)[:1]:
                text = "overwrites what other warps read with no barrier between"
                report("race", text, int(lanes[i]), int(at[i]))
        elif late.any():
            self.conflicts(lanes, at, reader, late, strong, report, "overwrites what", "read")
        if self.read_at is not None:
            self.read_at[at] = 0
        if pending:
            self.written[at] = (NEVER << SHIFT) | PENDING | me
            stamp = (NEVER << SHIFT) | PENDING | me
        else:
            stamp = (np.int64(order.now) << SHIFT) | me
            if strong:
                stamp |= STRONG
            self.written[at] = stamp
        twice = self.written.take(at) != stamp
        order.now += 1
        return twice if not strong and twice.any() else None

    def unordered_readers(self, lanes: Array, at: Array) -> Array:
        """Has another warp read the granule since what this lane knows of it?"""
        assert self.read_at is not None
        order, times = self.order, self.read_at[at]
        known = np.maximum(order.warp_clock[lanes], (order.since[lanes] >> SHIFT)[:, None])
        late = times > known
        late[np.arange(len(lanes)), order.lanes.thread[lanes] // 32] = False
        result: Array = late.any(1)
        return result

    def landed(self, lanes: Array, at: Array) -> None:
        """cp.async data has arrived for the thread that waited."""
        self.written[at] = (np.int64(self.order.now) << SHIFT) | self.order.id[lanes]

    def conflicts(
        self,
        lanes: Array,
        at: Array,
        stamps: Array,
        late: Array,
        strong: bool,
        report: Report,
        does: str,
        did: str,
    ) -> None:
        """Of accesses that no block barrier has ordered, report the first that nothing else orders either."""
        order = self.order
        threads = order.lanes.threads
        bad = late & ((stamps & WHO) != order.id[lanes])
        if strong:
            bad &= (stamps & STRONG) == 0
        if self.across:  # within a block, barriers do order global accesses
            same = (stamps & ID) // threads == order.id[lanes] // threads
            bad &= ~same | (stamps > order.since[lanes])
        if order.partial and bad.any():
            bad &= ~order.ordered(lanes, stamps)
        for i in np.flatnonzero(bad)[:1]:
            lane, stamp = int(lanes[i]), int(stamps[i])
            who = stamp & int(ID)
            if stamp & int(PENDING):
                mine = who == int(order.id[lane])
                whose = "its own" if mine else f"thread {who % threads}'s"
                report("cp-async", f"{does} {whose} cp.async has not delivered", lane, int(at[i]))
            elif self.across and who // threads != int(order.id[lane]) // threads:
                report("race", f"{does} block {who // threads} {did} in the same launch", lane, int(at[i]))
            else:
                whose = f"thread {who % threads}" if not stamp & int(WARP | MANY) else "other threads"
                report("race", f"{does} {whose} {did} with no barrier between", lane, int(at[i]))
