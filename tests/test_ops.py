"""What torch expects of an operator: opcheck, compile, export, autocast, checkpointing, autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BY_NAME, DEVICE, USABLE, finest, refusal, usual
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.testing.inputs import Inputs, make_inputs

CHECKED = ("transposed_grouped", "expanded", "softcap", "dropout", "offset_per_example_masked", "packed",
           "no_queries")  # fmt: skip


def inputs_of(name: str, backend: str, dtype: torch.dtype | None = None) -> Inputs:
    dtype = usual(backend) if dtype is None else dtype
    why_not = refusal(backend, BY_NAME[name], dtype)
    if why_not:
        pytest.skip(why_not)
    return make_inputs(BY_NAME[name], dtype)


def leaves_of(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))


def gradients(out: Tensor, lse: Tensor, leaves: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, ...]:
    return out, lse, *torch.autograd.grad((out, lse), leaves, (inputs.dout.to(out.dtype), inputs.dlse))


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(backend: str, name: str) -> None:
    inputs = inputs_of(name, backend)
    ops, options = torch.ops.perceiver_kernels, (*inputs.spec().options(), backend)
    torch.library.opcheck(ops.attention_forward.default, (*leaves_of(inputs), *options))
    tensors = (inputs.query, inputs.key, inputs.value)
    out, lse = ops.attention_forward(*tensors, *options)
    backward = (inputs.dout, inputs.dlse, *tensors, out, lse, *options)
    torch.library.opcheck(ops.attention_backward.default, backward)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("name", ["transposed", "all_options", "packed_offset_per_example"])
def test_compile_full_graph(backend: str, name: str) -> None:
    inputs = inputs_of(name, backend)
    torch.compiler.reset()
    compiled = torch.compile(inputs.attend, fullgraph=True, backend="aot_eager")
    leaves = leaves_of(inputs)
    got = gradients(*compiled(*leaves, backend), leaves, inputs)
    assert_equal(got, gradients(*inputs.attend(*leaves, backend), leaves, inputs))


@pytest.mark.parametrize("backend", USABLE)
def test_compile_with_dynamic_shapes_does_not_recompile(backend: str) -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        return pk.perceiver_attention(query, key, value, key_mask=mask, return_lse=True, backend=backend)

    def arguments(queries: int, keys: int) -> tuple[Tensor, ...]:
        shapes = (2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 16)
        return *(torch.randn(shape, dtype=usual(backend)) for shape in shapes), torch.rand(2, keys) < 0.5

    attend(*arguments(3, 7))
    with torch.compiler.set_stance("fail_on_recompile"):
        for queries, keys in ((4, 9), (16, 33), (50, 20)):
            tensors = arguments(queries, keys)
            want = pk.perceiver_attention(*tensors[:3], key_mask=tensors[3], return_lse=True, backend=backend)
            assert_equal(attend(*tensors), want)


def test_inductor_and_the_default_backend() -> None:
    torch.compiler.reset()
    inputs = make_inputs(BY_NAME["transposed"], torch.float32)
    compiled = torch.compile(lambda q, k, v: inputs.attend(q * 2, k, v, None)[0] + 1, fullgraph=True)
    want = inputs.attend(inputs.query * 2, inputs.key, inputs.value, None)[0] + 1
    torch.testing.assert_close(compiled(inputs.query, inputs.key, inputs.value), want)


def test_compiled_dropout_draws_anew_and_backward_agrees() -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return pk.perceiver_attention(query, key, value, dropout_p=0.5, backend="reference")

    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 30, 4)
    value = torch.randn(1, 2, 30, 4, requires_grad=True)
    first, second = attend(query, key, value), attend(query, key, value)
    assert not torch.equal(first, second)
    (dv,) = torch.autograd.grad(first, value, first.detach())
    torch.testing.assert_close((dv * value).sum(), first.square().sum())  # out is linear in value


def test_checks_of_contents_hold_under_compile() -> None:
    torch.compiler.reset()
    attend = torch.compile(pk.perceiver_attention_varlen, fullgraph=True, backend="aot_eager")
    rows = torch.randn(6, 2, 4)
    good, bad = torch.tensor([0, 2, 6]), torch.tensor([0, 2, 5])
    attend(rows, rows, rows, good, good)
    with pytest.raises(ValueError, match=r"^cu_seqlens_k must end at key's 6 rows, got 5$"):
        attend(rows, rows, rows, good, bad)


def test_compile_asks_gpu_backends_first_where_they_are_first(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    order = ["triton", "cuda", *(name for name in dispatch.BACKENDS if name not in ("triton", "cuda"))]
    monkeypatch.setattr(dispatch, "order", lambda device: order)
    rows = torch.randn(1, 2, 6, 8)
    attend = torch.compile(pk.perceiver_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(attend(rows, rows, rows), pk.perceiver_attention(rows, rows, rows))


class Attend(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return pk.perceiver_attention(query, key, value, return_lse=True)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    length = torch.export.Dim("length", min=2, max=4096)
    example = tuple(torch.randn(2, 2, n, 8) for n in (3, 9, 9))
    program = torch.export.export(
        Attend(), example, dynamic_shapes=({}, {2: length}, {2: length}), strict=strict
    )
    other = tuple(torch.randn(2, 2, n, 8) for n in (3, 40, 40))
    assert_equal(program.module()(*other), Attend()(*other))


@pytest.mark.parametrize("backend", USABLE)
def test_autocast(backend: str) -> None:
    inputs = inputs_of("ragged", backend)
    query, key, value = leaves_of(inputs)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        mixed = pk.perceiver_attention(query, key.bfloat16(), value, backend=backend, return_lse=True)
        got = gradients(*mixed, (query, key, value), inputs)  # backward, too, inside the region
    narrow = tuple(t.detach().bfloat16().requires_grad_() for t in (query, key, value))
    want = gradients(*inputs.attend(*narrow, backend), narrow, inputs)
    assert (got[0].dtype, got[1].dtype, got[2].dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert_equal(tuple(t.float() for t in got), tuple(t.float() for t in want))
    if finest(backend) == torch.float64:  # which autocast leaves alone
        wide = tuple(t.double() for t in (query, key, value))
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            double = pk.perceiver_attention(*wide, backend=backend, return_lse=True)
        assert double[0].dtype == double[1].dtype == torch.float64
        assert_equal(double, pk.perceiver_attention(*wide, backend=backend, return_lse=True))


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_repeats_its_dropout(backend: str, reentrant: bool) -> None:
    inputs = inputs_of("ragged", backend)
    leaves = leaves_of(inputs)
    dropout = 0.0 if refusal(backend, BY_NAME["dropout"]) else 0.5

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return pk.perceiver_attention(query, key, value, dropout_p=dropout, return_lse=True, backend=backend)

    results = []
    for run in (attend, lambda *tensors: checkpoint(attend, *tensors, use_reentrant=reentrant)):
        torch.manual_seed(3)
        out, lse = run(*leaves)
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward((out, lse), (inputs.dout, inputs.dlse))
        results.append((out, lse, *(leaf.grad for leaf in leaves)))
    assert_equal(*results)


@pytest.mark.parametrize("backend", USABLE)
def test_inference_mode_and_no_grad(backend: str) -> None:
    inputs = inputs_of("ragged", backend)
    leaves = leaves_of(inputs)
    want = inputs.attend(*leaves, backend)
    with torch.inference_mode():
        assert_equal(inputs.attend(*leaves, backend), want)
    with torch.no_grad():
        out, _ = inputs.attend(*leaves, backend)
    assert not out.requires_grad


@pytest.mark.parametrize("backend", USABLE)
def test_changing_an_input_between_forward_and_backward_is_noticed(backend: str) -> None:
    query, key, value = leaves_of(inputs_of("ragged", backend))
    work = key * 1
    out = pk.perceiver_attention(query, work, value, backend=backend)
    work.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
