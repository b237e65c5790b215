"""Peak memory of one call, read from the kernel's own high-water mark of this process (Linux)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any


def status_bytes(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_resident() -> int | None:
    """Bytes of the most memory that this process has had so far; None where the system keeps no such mark."""
    try:
        return status_bytes("VmHWM")
    except (OSError, KeyError):
        return None


def peak_growth(call: Callable[[], Any]) -> int | None:
    """Bytes by which resident memory rose, at its highest, while `call` ran; its result counts.

    Run it in a fresh process after one small warm-up call: memory that an earlier call returned to the
    allocator, not to the system, would be used again unseen. None where the system keeps no such mark.
    """
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present size
        before = status_bytes("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None
    result = call()
    peak = status_bytes("VmHWM")
    del result
    return max(0, peak - before)
