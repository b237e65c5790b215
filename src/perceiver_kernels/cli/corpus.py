"""Real text that every machine has: the sources of Python's own standard library, as bytes.

Files are split by a hash of their path, never within a file, so that nothing held out is seen in training and
the split is the same on every run of one Python version.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# Not everywhere installed (test), not the library (site-packages), or tables of numbers rather than programs.
LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "ensurepip",
}
HELD_OUT_SHARE = 10  # one file in ten


def sources() -> Iterator[Path]:
    """The standard library's .py files, in order of their path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            yield path


def load_corpus() -> tuple[Tensor, Tensor]:
    """Training and held-out bytes, each one uint8 tensor of whole files, each file ended by a zero byte."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, bytearray] = {False: bytearray(), True: bytearray()}
    for path in sources():
        name = path.relative_to(root).as_posix().encode()
        parts[zlib.crc32(name) % HELD_OUT_SHARE == 0] += path.read_bytes() + b"\0"
    train, held_out = (torch.frombuffer(parts[key], dtype=torch.uint8) for key in (False, True))
    return train, held_out


def deflate_bits(scored: bytes, context: bytes) -> float:
    """Bits per byte of `scored` by raw deflate at level 9, with `context` before it as its dictionary."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, context)
    return 8 * len(packer.compress(scored) + packer.flush()) / len(scored)
