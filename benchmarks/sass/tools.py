"""NVIDIA's binary tools: $CUOBJDUMP and the like, else on PATH, else those that Triton's wheel carries."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ToolMissing(RuntimeError):
    """A tool that's needed is in none of the places where it's looked for."""


@functools.cache
def find(name: str) -> str:
    """The path of ``cuobjdump`` or ``nvdisasm``."""
    candidates = [os.environ.get(name.upper()), shutil.which(name)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends/nvidia/bin" / name))
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise ToolMissing(f"{name} is neither ${name.upper()}, nor on PATH, nor in a triton wheel")


def run(name: str, *arguments: str) -> str:
    """What the tool prints; its own words if it fails."""
    done = subprocess.run([find(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@contextmanager
def as_file(binary: bytes) -> Iterator[Path]:
    """The tools read files only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        yield path
