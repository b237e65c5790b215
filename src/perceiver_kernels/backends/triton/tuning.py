"""Measuring a few configurations on the user's GPU, once per kind of problem, and remembering the fastest.

Off unless ``PERCEIVER_KERNELS_TRITON_TUNE=1``: then the first call of a kind takes seconds, and results may
differ in their last bits from one machine to another, because configurations differ.
``PERCEIVER_KERNELS_CACHE`` names the folder of the results, by default ``perceiver_kernels`` in the user's
cache folder.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import torch
import triton

from perceiver_kernels import cache
from perceiver_kernels._version import __version__
from perceiver_kernels.backends.triton.configs import Config, Device
from perceiver_kernels.backends.triton.launch import Problem

TUNE = "PERCEIVER_KERNELS_TRITON_TUNE"


def enabled() -> bool:
    """Whether the user wants configurations measured."""
    text = os.environ.get(TUNE, "0")
    if text not in ("0", "1"):
        raise ValueError(f"{TUNE} must be 0 or 1, got {text!r}")
    return text == "1"


def tuned(
    kind: str, problem: Problem, device: Device, default: Config, run: Callable[[Config], Any]
) -> Config:
    """The fastest configuration for this kind of problem: from the cache, or measured by ``run`` and cached.

    While a CUDA graph is captured nothing can be measured: then the default serves, as under the interpreter.
    """
    file, key, candidates = _cache_file(device), _key(kind, problem), _candidates(default)
    known = _known(file).get(key)
    if known in candidates:
        return known
    if not _measurable():
        return default
    times = {config: _time(functools.partial(run, config)) for config in candidates}
    best = min(times, key=lambda config: times[config])
    _store(file, key, best)
    return best


def _measurable() -> bool:
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def _candidates(default: Config) -> list[Config]:
    """The default and its neighbours: half and twice of each size, one stage more or less."""
    neighbours = []
    for name, values in {
        "num_stages": (default.num_stages + 1, default.num_stages - 1),
        "block_n": (default.block_n // 2, default.block_n * 2),
        "block_m": (default.block_m // 2,),
        "num_warps": (12 - default.num_warps,),
    }.items():
        neighbours += [replace(default, **{name: value}) for value in values]
    return [default] + [
        config
        for config in neighbours
        if config.block_m >= 16
        and 16 <= config.block_n <= 128
        and config.num_warps in (4, 8)
        and config.num_stages >= 1
    ]


def _time(run: Callable[[], Any]) -> float:
    """Median milliseconds; infinite for a configuration that the device can't run."""
    try:
        return float(triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median"))
    except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
        return float("inf")


def _key(kind: str, problem: Problem) -> str:
    """Problems with equal keys share a configuration: lengths count by their powers of two."""
    spec = problem.spec
    options = {
        "causal": spec.is_causal, "packed": spec.is_packed, "mask": spec.key_mask is not None,
        "softcap": spec.softcap > 0, "dropout": spec.dropout_seed is not None,
    }  # fmt: skip
    sizes = (problem.B * problem.Hkv, problem.group, problem.M, problem.N)
    rounded = "x".join(str(1 << (size - 1).bit_length()) if size else "0" for size in sizes)
    flags = "".join(f" {name}" for name, on in options.items() if on)
    precision = torch.get_float32_matmul_precision() if problem.dtype == torch.float32 else ""
    return f"{kind} {problem.dtype} {precision} {rounded}x{problem.D}x{problem.DV}{flags}"


def _cache_file(device: Device) -> str:
    return f"{__version__}-triton-{triton.__version__}-{device.arch}-{device.processors}.json"


_read: dict[str, dict[str, Config]] = {}  # by file, what this process has read or written


def _known(file: str) -> dict[str, Config]:
    if file not in _read:
        _read[file] = _load(file)
    return _read[file]


def _load(file: str) -> dict[str, Config]:
    def parse(content: Any) -> dict[str, Config]:
        return {str(key): Config(*map(int, sizes)) for key, sizes in content.items()}

    return cache.load(file, parse, "configurations are measured again")


def _store(file: str, key: str, config: Config) -> None:
    _known(file)[key] = config
    try:
        with cache.locked(file):
            entries = _load(file) | _known(file)
            cache.store(file, {name: astuple(entry) for name, entry in entries.items()})
    except OSError as error:
        warnings.warn(f"the fastest configuration can't be remembered ({error})", stacklevel=3)
