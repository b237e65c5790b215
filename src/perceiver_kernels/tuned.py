"""Which backend was fastest for which calls, as ``perceiver-kernels tune`` measured it on this machine.

``backend=None`` follows. Read once, when the package is imported, from the folder of :mod:`cache`.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from perceiver_kernels import cache
from perceiver_kernels._compile import constant_result
from perceiver_kernels._version import __version__
from perceiver_kernels.spec import AttentionSpec, dtype_name

FILE = f"{__version__}-backends.json"
_LENGTHS = ("examples", "heads", "queries", "keys")


@dataclass(frozen=True)
class Choice:
    """The fastest backend of one kind of call: the same dtype, head dims and pass, and lengths between the
    same powers of two. ``heads`` of keys; ``group`` query heads share one."""

    backend: str
    dtype: str
    backward: bool
    examples: int
    heads: int
    group: int
    queries: int
    keys: int
    dim: int
    value_dim: int

    def covers(self, other: Choice) -> bool:
        """Whether it is about such calls. Comparisons alone: sizes may be symbols of ``torch.compile``."""
        same = ("dtype", "backward", "group", "dim", "value_dim")
        if any(getattr(self, name) != getattr(other, name) for name in same):
            return False
        for name in _LENGTHS:
            highest = 1 << (getattr(self, name) - 1).bit_length()
            if not highest // 2 < getattr(other, name) <= highest:
                return False
        return True


def kind(query: Tensor, key: Tensor, value: Tensor, backward: bool, backend: str = "") -> Choice:
    """The kind of a call that isn't packed."""
    return Choice(
        backend,
        dtype_name(query.dtype),
        backward,
        query.shape[0],
        key.shape[1],
        query.shape[1] // key.shape[1],
        query.shape[2],
        key.shape[2],
        query.shape[3],
        value.shape[3],
    )


def chosen(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, needs_gradient: bool
) -> str | None:
    """The backend that was fastest for such a call here, None where none was measured."""
    if not CHOICES or spec.is_packed:
        return None
    call = kind(query, key, value, needs_gradient)
    for choice in CHOICES.get(processor(query.device), ()):
        if choice.covers(call):
            return choice.backend
    return None


@constant_result
def processor(device: torch.device) -> str:
    """What timings depend on: the name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


@functools.cache
def cpu_model() -> str:
    """The processor's name, or its architecture where the system gives none (many aarch64 machines)."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load() -> dict[str, tuple[Choice, ...]]:
    """What is remembered, by processor."""

    def parse(content: Any) -> dict[str, tuple[Choice, ...]]:
        return {name: tuple(_checked(Choice(**each)) for each in found) for name, found in content.items()}

    return cache.load(FILE, parse, "backends are chosen in the default order")


def _checked(choice: Choice) -> Choice:
    """The choice, of which every field has its type. Raises TypeError."""
    for name, expected in get_type_hints(Choice).items():
        if type(found := getattr(choice, name)) is not expected:
            raise TypeError(f"{name} is {found!r}, not {expected.__name__}")
    return choice


def remember(name: str, choices: list[Choice]) -> Path:
    """Add a processor's choices to the file, in place of those of the same kinds. Raises OSError."""
    with cache.locked(FILE):
        found = load()
        kept = [old for old in found.get(name, ()) if not any(new.covers(old) for new in choices)]
        found[name] = (*choices, *kept)
        cache.store(FILE, {name: [asdict(each) for each in entry] for name, entry in found.items()})
    CHOICES.clear()
    CHOICES.update(found)
    return cache.path(FILE)


CHOICES = load()
