"""Memory spaces: bytes, what is valid and written of them, and checked vector access."""

from __future__ import annotations

import numpy as np

from .lanes import WIDTHS, Array
from .races import PENDING, Report, Shadow

INVALID, UNWRITTEN, WRITTEN = 0, 1, 3
POISON = 0xFF  # NaN in every float type, the value of bytes that nobody wrote


class Space:
    """One state space. Private copies (shared per block, local per lane) lie `stride` bytes apart."""

    def __init__(self, name: str, base: int, extent: int, copies: int = 1) -> None:
        self.name = name
        self.base = base  # machine address of the first byte
        self.extent = extent  # addressable bytes
        self.stride = (extent + 31) // 16 * 16
        self.data = np.zeros(self.stride * copies + 16, np.uint8)
        self.state = np.zeros(self.stride * copies + 16, np.uint8)
        self.copies = copies
        self.granule = 1
        self.shadow: Shadow | None = None
        self.writable = True
        self.unpublished: Array | None = None  # granules written, not yet fenced for the async proxy

    def validate(self, start: int, size: int, state: int) -> None:
        for copy in range(self.copies):
            at = copy * self.stride + start
            self.state[at : at + size] = state

    def forget(self) -> None:
        """Private memory of a new wave: what could be used can be used again, but nobody has written it."""
        np.minimum(self.state, UNWRITTEN, out=self.state)
        self.data[:] = POISON
        if self.shadow is not None:
            self.shadow.forget()
        if self.unpublished is not None:
            self.unpublished[:] = False

    def locate(self, lanes: Array, address: Array, width: int, copy: Array | None) -> Array:
        """Byte offsets into `data` of in-bounds, aligned accesses; anything else is fatal."""
        at = address - self.base
        if width > 1:
            loose = at & (width - 1)
            if loose.any():
                i = int(np.flatnonzero(loose)[0])
                message = f"{width}-byte access to {self.name} memory"
                raise Fault("misaligned", message, int(lanes[i]), int(address[i]))
        outside = at.view(np.uint64) > np.uint64(self.extent - width) if self.extent >= width else at == at
        if outside.any():
            self.out_of_bounds(lanes, address, outside, width)
        return at if copy is None else at + copy.take(lanes) * self.stride

    def out_of_bounds(self, lanes: Array, address: Array, outside: Array, width: int) -> None:
        i = int(np.flatnonzero(outside)[0])
        raise Fault("out-of-bounds", f"{width} bytes of {self.name} memory", int(lanes[i]), int(address[i]))

    def check_state(self, lanes: Array, at: Array, width: int, want: int, report: Report) -> None:
        """Every byte must be valid, and for reads (want = WRITTEN) written."""
        states = self._gather(self.state, at, width)
        full = want * (0x0101010101010101 >> (8 * max(0, 8 - width)))
        good = states == states.dtype.type(full) if want == WRITTEN else states & states.dtype.type(full)
        if good.all() if want == WRITTEN else (good == states.dtype.type(full)).all():
            return
        each = states.view(np.uint8).reshape(len(at), width)
        bad = (each == INVALID).any(1)
        if bad.any():
            self.out_of_bounds(lanes, at - self._copy_base(at) + self.base, bad, width)
        i = int(np.flatnonzero((each != WRITTEN).any(1))[0])
        report(
            "uninitialised", f"reads {self.name} memory that nothing has written", int(lanes[i]), int(at[i])
        )

    def _copy_base(self, at: Array) -> Array:
        return at // self.stride * self.stride if self.copies > 1 else np.zeros_like(at)

    def address(self, at: int) -> int:
        return at % self.stride + self.base if self.copies > 1 else at + self.base

    @staticmethod
    def _gather(data: Array, at: Array, width: int) -> Array:
        if width <= 8:
            return data.view(WIDTHS[width]).take(at // width if width > 1 else at)
        return data.view(np.uint64).reshape(-1, width // 8).take(at // width, axis=0)

    def granules(self, lanes: Array, at: Array, width: int) -> tuple[Array, Array]:
        """Granules touched, with the lane that touches each."""
        first = at // self.granule
        count = max(1, width // self.granule)
        if count == 1:
            return lanes, first
        return np.repeat(lanes, count), (first[:, None] + np.arange(count)).ravel()

    def load(
        self,
        lanes: Array,
        at: Array,
        width: int,
        report: Report,
        strong: bool = False,
        whole_warp: bool = False,
    ) -> Array:
        """Bytes as (lanes, width), already checked by `locate`."""
        self.check_state(lanes, at, width, WRITTEN, report)
        if self.shadow is not None:
            who, where = self.granules(lanes, at, width)
            self.shadow.read(who, where, strong, _byte_report(report, self.granule), whole_warp)
        values = self._gather(self.data, at, width)
        return values.view(np.uint8).reshape(len(at), width)

    def store(self, lanes: Array, at: Array, values: Array, report: Report, strong: bool = False) -> None:
        """Write (lanes, width) bytes."""
        width = values.shape[1]
        self.check_state(lanes, at, width, UNWRITTEN, report)
        twice = None
        if self.shadow is not None:
            who, where = self.granules(lanes, at, width)

            def same() -> Array:
                return self._by_granule(self._bytes(at, width), values)

            twice = self.shadow.write(who, where, strong, _byte_report(report, self.granule), same)
            if self.unpublished is not None:
                self.unpublished[where] = True
        self.put(at, values)
        if twice is not None:
            twice &= ~self._by_granule(self._bytes(at, width), values)
            if twice.any():
                i = int(np.flatnonzero(twice)[0])
                text = "two threads write different values here in one instruction"
                report("race", text, int(who[i]), int(where[i]) * self.granule)

    def _bytes(self, at: Array, width: int) -> Array:
        return self._gather(self.data, at, width).view(np.uint8).reshape(len(at), width)

    def _by_granule(self, have: Array, want: Array) -> Array:
        return (have == want).reshape(-1, min(self.granule, want.shape[1])).all(1)

    def put(self, at: Array, values: Array) -> None:
        width = values.shape[1]
        values = np.ascontiguousarray(values)
        if width <= 8:
            index = at // width
            self.data.view(WIDTHS[width])[index] = values.view(WIDTHS[width])[:, 0]
            self.state.view(WIDTHS[width])[index] = WIDTHS[width](
                WRITTEN * (0x0101010101010101 >> (64 - 8 * width))
            )
        else:
            index = at // width
            self.data.view(np.uint64).reshape(-1, width // 8)[index] = values.view(np.uint64)
            self.state.view(np.uint64).reshape(-1, width // 8)[index] = np.uint64(0x0303030303030303)

    def begin_async(self, lanes: Array, at: Array, width: int, report: Report) -> None:
        """A cp.async is on its way here: until it lands, nobody may count on these bytes."""
        self.check_state(lanes, at, width, UNWRITTEN, report)
        assert self.shadow is not None
        who, where = self.granules(lanes, at, width)
        self.shadow.write(who, where, False, _byte_report(report, self.granule), pending=True)
        self.put(at, np.full((len(at), width), POISON, np.uint8))

    def land(self, lanes: Array, at: Array, values: Array) -> None:
        assert self.shadow is not None
        who, where = self.granules(lanes, at, values.shape[1])
        mine = self.shadow.written.take(where) & np.int64(PENDING) != 0
        if self.unpublished is not None:
            self.unpublished[where] = True
        self.put(at, values)
        self.shadow.landed(who[mine], where[mine])


class Fault(Exception):
    """A memory fault, on its way to become a Finding with its place."""

    def __init__(self, kind: str, message: str, lane: int, address: int) -> None:
        super().__init__(message)
        self.kind, self.message, self.lane, self.address = kind, message, lane, address


def _byte_report(report: Report, granule: int) -> Report:
    return lambda kind, message, lane, at: report(kind, message, lane, at * granule)
