"""The compiled libraries: ``_C``, ``_C_cuda`` (operators), ``_native`` (build facts, probes, internals)."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch

_REINSTALL = "reinstall with `pip install --no-build-isolation .`"


def _load(name: str, kernels: str, needs: str) -> str | None:
    """None when the operators of a library are there, else why not and what to do about it."""
    path, how = Path(__file__).with_name(name), f"install {needs} and {_REINSTALL}"
    if not path.exists():
        return f"the package was installed without its compiled {kernels}; {how}"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{path.name} does not load with torch {torch.__version__} ({error}); {how}"
    return None


missing = _load("_C.so", "kernels", "a C++17 compiler")
cuda_missing = _load("_C_cuda.so", "CUDA kernels", "the CUDA toolkit (nvcc)")


def _import_native() -> ModuleType | None:
    try:
        return importlib.import_module("._native", __package__)
    except ImportError:
        return None


native = _import_native()
"""The ``_native`` module, or None when the package was built without it."""
