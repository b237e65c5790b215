"""CUDA C++ to PTX, with nvcc where there is one."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

NVCC = shutil.which("nvcc")
SAMPLES = Path(__file__).parent / "samples"


@functools.lru_cache(maxsize=32)
def compile_cuda(source: Path, *flags: str, arch: str = "compute_80") -> str:
    """The PTX of a .cu file."""
    assert NVCC is not None, "nvcc is not installed"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.ptx"
        command = [NVCC, "-ptx", f"-arch={arch}", "-O3", "-std=c++17", *flags, "-o", str(target), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source}:\n{done.stderr}")
        return target.read_text()
