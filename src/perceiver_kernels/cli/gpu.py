"""One GPU (torch calls AMD's cuda, too): whether there is one, what it is, its clock, memory and limits."""

from __future__ import annotations

import ctypes
import functools
import gc
import shutil
import subprocess
import time
from collections.abc import Callable, Collection
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.cli.report import CommandError

DEVICES = ("cpu", "cuda")
GPU_BACKENDS = ("cuda", "triton")
FLUSH_BYTES = 256 << 20  # several times any L2 cache
PAUSE_CYCLES = 2_000_000  # about a millisecond, in which the CPU launches what is timed next
MATMUL = 8192  # rows, columns and depth of the product that a dtype's rate is measured with
READ_BYTES = 1 << 30


def why_not() -> str | None:
    """None where torch can use a GPU, else what is in the way."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is built without CUDA and ROCm: install a build of torch that has it"
        )
    if driver() is None:
        return "no NVIDIA or AMD driver is loaded on this machine"
    return f"torch {torch.__version__} finds no GPU: check CUDA_VISIBLE_DEVICES and the driver's age"


def checked_device(name: str) -> str:
    """`name` itself. CommandError where it is a GPU and there is none."""
    reason = None if name == "cpu" else why_not()
    if reason is not None:
        raise CommandError(f"--device {name}: {reason}")
    return name


def checked_backends(names: Collection[str], device: str, peers: Collection[str] = ()) -> list[str]:
    """`names`, each once. CommandError for one that is no backend or peer, or that can't run on `device`."""
    backends = pk.available_backends(checked_device(device))
    for name in names:
        if name not in backends and name not in peers:
            raise CommandError(f"unknown backend {name!r}: choose from {', '.join([*backends, *peers])}")
        if backends.get(name) is not None:
            advice = "; use --device cuda" if device == "cpu" and name in GPU_BACKENDS else ""
            raise CommandError(f"backend {name!r} can't run here: {backends[name]}{advice}")
    return list(dict.fromkeys(names))


def driver() -> str | None:
    """The GPU driver's version, "unknown" where it is there but doesn't say, None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0].strip()
    for library in ("libcuda.so.1", "libamdhip64.so"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return "unknown"
    return None


def facts() -> dict[str, Any] | None:
    """What a timing on the first GPU depends on; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "arch": getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "driver": driver(),
        "runtime": f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}",
    }


def triton_version() -> str | None:
    """The installed triton, under any of the names that it is distributed by; None without it."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def clock(call: Callable[[], Any], loops: int = 1) -> float:
    """Seconds of GPU time per call, between events around each, with the L2 cache flushed before each.

    A pause in front gives the CPU the time to launch the call before the GPU gets to it: what Python and the
    driver need for that is not counted, unless it is more than the pause. :func:`launch_time` tells it.
    """
    flush = _flush_buffer(torch.cuda.current_device())
    begins, ends = ([_event() for _ in range(loops)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        flush.zero_()
        torch.cuda._sleep(PAUSE_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    spent: list[float] = [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]
    return sum(spent) / loops / 1e3


def launch_time(call: Callable[[], Any]) -> float:
    """Seconds until `call()` returns, its work on the GPU only queued: the best of three."""
    spent = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return min(spent)


def peak_growth(call: Callable[[], Any]) -> int:
    """Bytes by which torch's allocator rose, at its highest, while `call` ran; its result counts."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return max(0, peak - before)


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of torch's product of two large square matrices: what this GPU does at its best in `dtype`."""
    a, b = _matrices(dtype, torch.cuda.current_device())
    return 2 * MATMUL**3 / clock(lambda: a @ b) / 1e9


def read_bandwidth() -> float:
    """GB/s of a sum over much memory, which only reads."""
    x = _read_buffer(torch.cuda.current_device())
    return READ_BYTES / clock(lambda: x.sum()) / 1e9


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@functools.cache
def _flush_buffer(index: int) -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=f"cuda:{index}")


@functools.cache
def _matrices(dtype: torch.dtype, index: int) -> tuple[Tensor, Tensor]:
    a, b = (torch.randn(MATMUL, MATMUL, device=f"cuda:{index}").to(dtype) for _ in range(2))
    a @ b  # the first product chooses its kernel
    return a, b


@functools.cache
def _read_buffer(index: int) -> Tensor:
    return torch.ones(READ_BYTES // 4, device=f"cuda:{index}")
