"""The compiled libraries: ``_C`` (torch operators) and ``_native`` (build facts, probes, internals)."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch

_HOW_TO_BUILD = "install a C++17 compiler and reinstall with `pip install --no-build-isolation .`"


def _load() -> str | None:
    path = Path(__file__).with_name("_C.so")
    if not path.exists():
        return f"the package was installed without its compiled kernels; {_HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{path.name} does not load with torch {torch.__version__} ({error}); {_HOW_TO_BUILD}"
    return None


missing = _load()
"""None when the operators of ``_C`` are there, else why not and what to do about it."""


def _import_native() -> ModuleType | None:
    try:
        return importlib.import_module("._native", __package__)
    except ImportError:
        return None


native = _import_native()
"""The ``_native`` module, or None when the package was built without it."""
