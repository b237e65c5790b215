"""Gradients: against finite differences, against autograd, and across pairs of backends."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import BY_NAME, USABLE, answers, assert_alike, finest, refusal, usual
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.testing.budget import relative_error
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import make_inputs

SMALL = [
    Case("causal", 1, 2, 1, 3, 5, 4, 3),
    Case("dead_rows", 1, 1, 1, 5, 3, 2, 4),
    Case("decode", 1, 2, 2, 1, 6, 3, 3),
    Case("masked", 2, 2, 2, 3, 5, 3, 3, key_mask="random"),
    Case("softcap", 1, 2, 1, 3, 5, 4, 3, softcap=1.5),
    Case("dropout", 1, 2, 1, 3, 5, 4, 3, dropout_p=0.4, softcap=2.0),
    Case("offsets", 2, 2, 1, 3, 5, 4, 3, q_offset="per_example", strides="transposed"),
    Case("packed", 1, 2, 1, 0, 0, 3, 2, lengths=((2, 4), (3, 1), (0, 2))),
]
EVEN = Case("even_dims", 1, 2, 1, 3, 5, 8, 16)  # head dims that every backend takes
PAIRS = list(itertools.permutations(dict.fromkeys([*USABLE, "reference"]), 2))
PAIRED = ("ragged", "more_queries_than_keys", "grouped_heads", "odd_dims", "offset_per_example_masked",
          "softcap", "dropout", "packed", "all_options")  # fmt: skip


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_finite_differences(backend: str, case: Case) -> None:
    if refusal(backend, case, torch.float64):
        pytest.skip(refusal(backend, case, torch.float64))
    inputs = make_inputs(case, torch.float64)
    leaves = tuple(t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = inputs.attend(q, k, v, backend)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("name", [*PAIRED, "scale_negative", "dropout_grouped", "all_options_packed"])
def test_reference_backward_is_the_derivative_of_its_forward(name: str) -> None:
    inputs = make_inputs(BY_NAME[name], torch.float64)
    spec = inputs.spec()
    leaves = tuple(t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
    out, lse = reference.forward(*leaves, spec)
    want = torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse))
    got = reference.backward(inputs.dout, inputs.dlse, *leaves, out.detach(), lse.detach(), spec)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("ahead", "back"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", PAIRED)
def test_any_forward_pairs_with_any_backward(ahead: str, back: str, dtype: torch.dtype, name: str) -> None:
    case = BY_NAME[name]
    why_not = refusal(ahead, case, dtype) or refusal(back, case, dtype)
    if why_not:
        pytest.skip(why_not)
    inputs, allowed = answers(case, dtype)
    spec, tensors = inputs.spec(), (inputs.query, inputs.key, inputs.value)
    ops = torch.ops.perceiver_kernels
    out, lse = ops.attention_forward(*tensors, *spec.options(), ahead)
    got = ops.attention_backward(inputs.dout, inputs.dlse, *tensors, out, lse, *spec.options(), back)
    for tensor, gradient in zip(("dq", "dk", "dv"), got, strict=True):
        want, limit = allowed[tensor]
        assert relative_error(gradient, want) <= limit, tensor


@pytest.mark.parametrize("backend", USABLE)
def test_gradient_through_lse_alone_and_out_alone(backend: str) -> None:
    inputs = make_inputs(EVEN, finest(backend))
    leaves = tuple(t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
    out, lse = inputs.attend(*leaves, backend)
    from_out = torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)
    from_lse = torch.autograd.grad(lse, leaves, inputs.dlse, retain_graph=True)
    both = torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse))
    for a, b, c in zip(from_out, from_lse, both, strict=True):
        assert_alike(a + b, c)
    assert from_lse[0].any()
    assert (from_lse[2] == 0).all()


@pytest.mark.parametrize("backend", USABLE)
def test_double_backward_says_so(backend: str) -> None:
    inputs = make_inputs(EVEN, finest(backend))
    query = inputs.query.requires_grad_()
    out = pk.perceiver_attention(query, inputs.key, inputs.value, backend=backend)
    (dq,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^perceiver_attention: double backward is not supported$"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", USABLE)
def test_only_what_requires_grad_gets_one(backend: str) -> None:
    inputs = make_inputs(EVEN, usual(backend))
    value = inputs.value.requires_grad_()
    pk.perceiver_attention(inputs.query, inputs.key, value, backend=backend).sum().backward()
    assert value.grad is not None
    assert inputs.query.grad is None


@pytest.mark.parametrize("backend", USABLE)
def test_merge_of_parts_is_the_whole(backend: str) -> None:
    inputs = make_inputs(Case("whole", 2, 4, 2, 9, 50, 8, 16, key_mask="random"), finest(backend))
    mask = inputs.kwargs["key_mask"]
    leaves = tuple(t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
    out, lse = inputs.attend(*leaves, backend)
    want = (out, lse, *torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse)))
    query, key, value = leaves
    parts = [
        pk.perceiver_attention(
            query, key[:, :, a:b], value[:, :, a:b], key_mask=mask[:, a:b], q_offset=41 - a,
            return_lse=True, backend=backend,
        )
        for a, b in ((0, 17), (17, 45), (45, 50))
    ]  # fmt: skip
    out, lse = pk.merge_attention(*zip(*parts, strict=True))
    got = (out, lse, *torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse)))
    for a, b in zip(got, want, strict=True):
        assert_alike(a, b)


@pytest.mark.parametrize("dead", [0.0, torch.nan, torch.inf])
def test_merge_of_dead_rows(dead: float) -> None:
    outs = [torch.full((1, 1, 2, 3), dead, requires_grad=True), torch.ones(1, 1, 2, 3, requires_grad=True)]
    lses = [
        torch.tensor([[[-torch.inf, -torch.inf]]], requires_grad=True),
        torch.tensor([[[-torch.inf, 2.0]]], requires_grad=True),
    ]
    out, lse = pk.merge_attention(outs, lses)
    assert out.tolist() == [[[[0.0] * 3, [1.0] * 3]]]
    assert lse.tolist() == [[[-torch.inf, 2.0]]]
    gradients = torch.autograd.grad((out, lse), [*outs, *lses], (torch.ones_like(out), torch.ones_like(lse)))
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[3].tolist() == [[[0.0, 1.0]]]


def test_forward_mode_says_that_it_is_not_supported() -> None:
    query, key = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 5, 8)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation is not supported"):
        torch.func.jvp(lambda q: pk.perceiver_attention(q, key, key), (query,), (torch.ones_like(query),))
