"""Random small problems with odd strides: every backend against the specification in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import USABLE, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from perceiver_kernels.testing.budget import budget, math_reference, reference64, relative_error
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import Inputs, make_inputs

SIZES = st.integers(0, 40)
# Where a backend refuses most head dims and float64, draw what it serves: test_contract.py has the refusals.
DIMS = st.integers(1, 70) if "triton" not in USABLE else st.sampled_from(range(8, 97, 8))
DTYPES = [torch.float32] if "triton" in USABLE else [torch.float32, torch.float64]
OPTIONS = {
    "is_causal": st.booleans(),
    "q_offset": st.one_of(st.none(), st.integers(-50, 50), st.just("per_example")),
    "key_mask": st.sampled_from([None, "random", "left_padding", "right_padding", "dead_example"]),
    "scale": st.one_of(st.none(), st.floats(-1.0, 1.0)),
    "softcap": st.one_of(st.none(), st.floats(0.5, 20.0)),
    "dropout_p": st.one_of(st.just(0.0), st.floats(0.0, 0.9)),
    "strides": st.sampled_from(["contiguous", "transposed", "sliced", "expanded", "inner"]),
}


@st.composite
def cases(draw: Any) -> Case:
    kv_heads = draw(st.integers(1, 3))
    shape = {
        "B": draw(st.integers(0, 3)), "Hkv": kv_heads, "H": kv_heads * draw(st.integers(1, 3)),
        "M": draw(SIZES), "N": draw(st.one_of(SIZES, st.integers(0, 600))), "D": draw(DIMS), "Dv": draw(DIMS),
    }  # fmt: skip
    options = {name: draw(strategy) for name, strategy in OPTIONS.items()}
    if draw(st.booleans()):
        options["lengths"] = tuple(draw(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4)))
        options["key_mask"] = draw(st.sampled_from([None, "random"]))
    return Case("drawn", **shape, **options)


def junk_strides(tensor: Tensor) -> Tensor:
    """The same view, with a stride that nobody may follow in every dimension of size 1."""
    strides = [
        7919 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return tensor.as_strided(tensor.shape, strides)


def roundings(inputs: Inputs, want: Tensor) -> float:
    """What one rounding of the largest term of a gradient is to ``want``, in the measure of relative_error.

    Few elements don't average their errors out, and where terms cancel (N = 1: dq is 0) nothing else is left.
    """
    tensors = (inputs.query, inputs.key, inputs.dout, inputs.value)
    q, k, dout, value = (t.abs().max().item() if t.numel() else 0.0 for t in tensors)
    largest = inputs.value.shape[-1] * dout * value * max(q, k, 1.0) / (1.0 - inputs.spec().dropout_p)
    mean_square = want[want.isfinite()].square().sum().item() / max(want.numel(), 1)
    return torch.finfo(inputs.query.dtype).eps * largest / (mean_square**0.5 or 1.0)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    case=cases(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_drawn_cases(case: Case, dtype: torch.dtype, seed: int) -> None:
    drawn = make_inputs(case, dtype, seed=seed)
    tensors = map(junk_strides, (drawn.query, drawn.key, drawn.value, drawn.dout))
    inputs = Inputs(*tensors, drawn.dlse, drawn.kwargs)
    want, plain = reference64(inputs), math_reference(inputs)
    for backend in USABLE:
        why_not = refusal(backend, case, dtype)
        if why_not is not None:
            with pytest.raises(ValueError, match=why_not):
                inputs.run(backend)
            continue
        got = inputs.run(backend)
        for name in want:
            error = relative_error(got[name], want[name])
            limit = budget(plain[name], want[name], dtype) + roundings(inputs, want[name])
            assert error <= limit, f"{backend} {name}: error {error:.2e}, budget {limit:.2e}"
