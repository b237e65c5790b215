"""Accuracy over a very long input, where errors that grow with N show."""

from __future__ import annotations

import pytest
import torch
from conftest import OURS, USABLE, answers

from perceiver_kernels.testing.budget import relative_error
from perceiver_kernels.testing.cases import TORCH_SHORTFALLS, Case

LONG = Case("quarter_million", 1, 1, 1, 64, 262_144, 64, 64)
LONGEST = Case("million", 1, 1, 1, 16, 1_048_576, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("case", [LONG, LONGEST], ids=lambda case: case.name)
@pytest.mark.parametrize("backend", OURS)
def test_budgets_over_a_long_input(backend: str, case: Case, dtype: torch.dtype) -> None:
    inputs, allowed = answers(case, dtype)
    got = inputs.run(backend)
    for name, (want, limit) in allowed.items():
        error = relative_error(got[name], want)
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"


@pytest.mark.slow
@pytest.mark.cpu_only("elsewhere the sdpa backend has the reference's backward")
@pytest.mark.skipif("sdpa" not in USABLE, reason="needs torch's kernels")
def test_torch_misses_the_budget_there() -> None:
    assert "bfloat16_gradients_of_long_inputs" in TORCH_SHORTFALLS
    inputs, allowed = answers(LONG, torch.bfloat16)
    got = inputs.run("sdpa")
    missed = {name for name, (want, limit) in allowed.items() if relative_error(got[name], want) > limit}
    assert missed == {"dq"}
