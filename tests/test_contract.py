"""Every usable backend over the case list: values and gradients within budget, layout, inputs untouched."""

from __future__ import annotations

import pytest
import torch
from conftest import BY_NAME, DEVICE, DTYPE_NAMES, OURS, USABLE, answers, refusal, usual

from perceiver_kernels.spec import empty_outputs
from perceiver_kernels.testing.budget import relative_error
from perceiver_kernels.testing.cases import CASES, Case

SOME = (
    "ragged",
    "short_queries",
    "more_queries_than_keys",
    "dim_7",
    "sliced_decode",
    "all_options",
    "packed",
)
RUNS = [(case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)]
RUNS += [(BY_NAME[name], dtype) for name in SOME for dtype in (torch.float64, torch.float16)]


@pytest.mark.parametrize(
    ("case", "dtype"), RUNS, ids=lambda x: x.name if isinstance(x, Case) else DTYPE_NAMES[x]
)
def test_every_backend_within_budget(case: Case, dtype: torch.dtype) -> None:
    inputs, allowed = answers(case, dtype)
    before = [t.clone() for t in (inputs.query, inputs.key, inputs.value, inputs.dout, inputs.dlse)]
    served = 0
    for backend in USABLE:
        why_not = refusal(backend, case, dtype)
        if why_not is not None:
            with pytest.raises(ValueError, match=why_not):
                inputs.run(backend)
            continue
        served += 1
        got = inputs.run(backend)
        for name, (want, limit) in allowed.items():
            assert got[name].shape == want.shape, (backend, name)
            error = relative_error(got[name], want)
            assert error <= limit, f"{backend} {name}: error {error:.2e}, budget {limit:.2e}"

        out, lse = empty_outputs(inputs.query, inputs.value)
        assert (got["out"].dtype, got["out"].stride()) == (inputs.query.dtype, out.stride()), backend
        assert (got["lse"].dtype, got["lse"].stride()) == (lse.dtype, lse.stride()), backend
        for name, leaf in (("dq", inputs.query), ("dk", inputs.key), ("dv", inputs.value)):
            assert got[name].dtype == leaf.dtype, (backend, name)
    if not served:
        pytest.skip(f"{', '.join(USABLE)} refuse it, as they should")
    after = (inputs.query, inputs.key, inputs.value, inputs.dout, inputs.dlse)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written to"


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("name", ["more_queries_than_keys", "dead_example", "offset_before_all", "no_keys"])
def test_dead_rows_are_exactly_zero(backend: str, name: str) -> None:
    inputs, allowed = answers(BY_NAME[name], usual(backend))
    got = inputs.run(backend)
    dead = allowed["lse"][0] == -torch.inf
    assert dead.any()
    assert (got["lse"][dead] == -torch.inf).all()
    assert (got["out"][dead] == 0).all()
    assert (got["dq"][dead] == 0).all()


@pytest.mark.parametrize("backend", USABLE)
def test_output_lies_in_memory_as_query_does(backend: str) -> None:
    inputs, _ = answers(BY_NAME["transposed"], usual(backend))
    out, _ = inputs.attend(inputs.query, inputs.key, inputs.value, backend)
    assert not out.is_contiguous()
    assert out.transpose(1, 2).is_contiguous()


def test_transposed_views_and_copies_give_the_same_bits() -> None:
    for backend in USABLE if DEVICE.type == "cpu" else OURS:  # a GPU's matmuls depend on strides
        inputs, _ = answers(BY_NAME["transposed_grouped"], usual(backend))
        tensors = (inputs.query, inputs.key, inputs.value)
        copies = tuple(t.contiguous() for t in tensors)
        views, plain = inputs.attend(*tensors, backend), inputs.attend(*copies, backend)
        assert torch.equal(views[0], plain[0]), backend
        assert torch.equal(views[1], plain[1]), backend
