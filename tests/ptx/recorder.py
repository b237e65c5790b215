"""A GPU made of the PTX machine: the package's own host code, Python and C++, launches kernels on it."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends import cuda

from .cuda_kernels import CSRC, entries
from .machine import launch
from .nvcc_ptx import NVCC

SOURCES = sorted((CSRC / "cuda").rglob("*.cu"))
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


@functools.cache
def _library() -> ctypes.CDLL:
    """recorder.cpp with the kernels, which it never runs, loaded as torch.ops.recorded_kernels."""
    assert NVCC is not None, "nvcc is not installed"
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "recorder.so"
        command = [
            NVCC, "-shared", "-cudart", "none", "-std=c++17", "-O1", "-Xcompiler",
            "-fPIC,-fvisibility=hidden", "-gencode", "arch=compute_80,code=compute_80",
            "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPK_HAS_HOPPER",
            f"-I{CSRC}", f"-I{torch_folder}/include", str(Path(__file__).with_name("recorder.cpp")),
            *map(str, SOURCES), f"-L{torch_folder}/lib", "-ltorch_cpu", "-o", str(target),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed:\n{done.stderr}")
        torch.ops.load_library(str(target))
        return ctypes.CDLL(str(target))


STREAM = 0x57  # recorder.cpp takes launches there and nowhere else


class Recorder:
    """Stands in for ``torch.ops.perceiver_kernels`` in the backend: its ops, on CPU tensors."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[int, int], int, int]] = []  # kernel, grid, threads, shared bytes
        self.error = 0  # what the next launch returns
        self._tensors: dict[int, Tensor] = {}
        self._problem: BaseException | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.recorded_kernels, name)

        def call(*arguments: Any) -> Any:
            tensors = (each for each in arguments if isinstance(each, Tensor))
            self._tensors = {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}
            try:
                return op(*arguments)
            finally:
                if self._problem is not None:
                    raise self._problem

        return call

    def run(self, kernel: bytes, x: int, y: int, threads: int, arguments: int, shared: int) -> int:
        """What the C++ calls; an exception waits until it has returned."""
        try:
            name = kernel.decode()
            self.launches.append((name, (x, y), threads, shared))
            if self.error:
                return self.error
            ptx = next(found[name] for found in map(entries, SOURCES) if name in found)
            (size,) = map(int, re.findall(r"\.param .*\.b8 \w+_param_0\[(\d+)\]", ptx))
            words = [ctypes.string_at(arguments + at, 8) for at in range(0, size, 8)]
            self.execute(name, ptx, (x, y), threads, words, shared)
        except BaseException as problem:
            self._problem = problem
        return 0

    def execute(
        self, name: str, ptx: str, grid: tuple[int, int], threads: int, words: list[bytes], shared: int
    ) -> None:
        """Run a launch on the PTX machine: a struct whose pointers are the tensors that they point to."""
        fields = tuple(self._tensors.get(int.from_bytes(word, "little"), word) for word in words)
        launch(ptx, name, grid, threads, [fields], shared=shared)


@contextmanager
def recorded(
    processors: int, shared_per_block: int = 166912, recorder: Recorder | None = None, arch: int = 80
) -> Iterator[Recorder]:
    """The cuda backend on CPU tensors, on a GPU with so many processors."""
    library, recorder = _library(), recorder or Recorder()
    callback = _CALLBACK(recorder.run)
    library.record(callback)
    library.pretend(processors, shared_per_block, 0, arch)
    before = cuda._ops, cuda._stream
    cuda._ops, cuda._stream = recorder, lambda device: STREAM
    for cached in (cuda._device, cuda.forward_tile, cuda.backward_tile):
        cached.cache_clear()
    try:
        yield recorder
    finally:
        cuda._ops, cuda._stream = before
        for cached in (cuda._device, cuda.forward_tile, cuda.backward_tile):
            cached.cache_clear()
