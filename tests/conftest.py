"""What the tests share: which backends can run here, cached references, and poisoned memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.testing.budget import budget, math_reference, reference64
from perceiver_kernels.testing.cases import CASES, Case
from perceiver_kernels.testing.inputs import Inputs, make_inputs

USABLE = [name for name, reason in pk.available_backends("cpu").items() if reason is None]
OURS = [name for name in USABLE if name not in ("sdpa", "reference")]  # not made of torch's own matmuls
BY_NAME = {case.name: case for case in CASES}
DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh memory holds NaN (floats) and the largest integers, so that nothing passes by reading it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@functools.lru_cache(maxsize=64)
def answers(case: Case, dtype: torch.dtype) -> tuple[Inputs, dict[str, tuple[Tensor, float]]]:
    """A case's inputs, and for each result its float64 value and the error it may have."""
    inputs = make_inputs(case, dtype)
    want, plain = reference64(inputs), math_reference(inputs)
    return inputs, {name: (want[name], budget(plain[name], want[name], dtype)) for name in want}


def refusal(backend: str, case: Case) -> str | None:
    """A part of the message with which ``backend`` refuses ``case``; None if it must serve it."""
    if backend == "sdpa" and case.softcap:
        return "has no soft cap"
    if backend == "sdpa" and case.dropout_p:
        return "other bits than the contract's Philox"
    return None
