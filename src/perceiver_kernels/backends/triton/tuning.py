"""Measuring a few configurations on the user's GPU, once per kind of problem, and remembering the fastest.

Off unless ``PERCEIVER_KERNELS_TRITON_TUNE=1``: then the first call of a kind takes seconds, and results may
differ in their last bits from one machine to another, because configurations differ.
``PERCEIVER_KERNELS_CACHE`` names the folder of the results, by default ``perceiver_kernels`` in the user's
cache folder.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
import triton

from perceiver_kernels.backends.triton.configs import Config, Device
from perceiver_kernels.backends.triton.launch import Problem

TUNE = "PERCEIVER_KERNELS_TRITON_TUNE"
CACHE = "PERCEIVER_KERNELS_CACHE"


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

    While a CUDA graph is captured nothing can be measured: then the default serves.
    """
    cache = _load(_cache_file(device))
    key = _key(kind, problem)
    if key in cache:
        return Config(*cache[key])
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return default
    times = {config: _time(functools.partial(run, config)) for config in _candidates(default)}
    best = min(times, key=lambda config: times[config])
    _store(_cache_file(device), key, best)
    return best


def _candidates(default: Config) -> Iterable[Config]:
    """The default and its neighbours: half and twice of each size, one stage more or less."""
    neighbours = [default]
    for name, values in {
        "num_stages": (default.num_stages + 1, default.num_stages - 1),
        "block_n": (default.block_n // 2, default.block_n * 2),
        "block_m": (default.block_m // 2,),
        "num_warps": (12 - default.num_warps,),
    }.items():
        neighbours += [replace(default, **{name: value}) for value in values]
    return [
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
    return f"{kind} {problem.dtype} {rounded}x{problem.D}x{problem.DV}{flags}"


def _cache_file(device: Device) -> Path:
    folder = os.environ.get(CACHE) or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "perceiver_kernels"
    )
    return Path(folder, f"triton-{triton.__version__}-{device.arch}-{device.processors}.json")


def _load(path: Path) -> dict[str, list[int]]:
    try:
        content = json.loads(path.read_text())
        return {str(key): [int(x) for x in sizes] for key, sizes in content.items() if len(sizes) == 4}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} can't be read ({error}); configurations are measured again", stacklevel=2)
        return {}


def _store(path: Path, key: str, config: Config) -> None:
    """Into the file, whole or not at all: other processes may read and write it at the same time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(_load(path) | {key: list(astuple(config))}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"the fastest configuration can't be remembered in {path} ({error})", stacklevel=2)
