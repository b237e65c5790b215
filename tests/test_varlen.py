"""The packed form: every sequence as if it were alone."""

from __future__ import annotations

import pytest
import torch
from conftest import BY_NAME, USABLE, assert_alike, refusal, usual

import perceiver_kernels as pk
from perceiver_kernels.testing.inputs import make_inputs


def assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize(
    "name", ["packed", "packed_not_causal", "packed_offset", "packed_offset_per_example"]
)
def test_packed_is_each_sequence_alone(backend: str, name: str) -> None:
    inputs = make_inputs(BY_NAME[name], usual(backend))
    packed = inputs.run(backend)
    options = dict(inputs.kwargs)
    q_ends, k_ends = options.pop("cu_seqlens_q").tolist(), options.pop("cu_seqlens_k").tolist()
    offsets, mask = options.pop("q_offset", None), options.pop("key_mask", None)
    for b in range(len(q_ends) - 1):
        rows, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        leaves = tuple(
            tensor[part].transpose(0, 1).unsqueeze(0).detach().requires_grad_()
            for tensor, part in ((inputs.query, rows), (inputs.key, keys), (inputs.value, keys))
        )
        out, lse = pk.perceiver_attention(
            *leaves, return_lse=True, backend=backend, **options,
            q_offset=int(offsets[b]) if isinstance(offsets, torch.Tensor) else offsets,
            key_mask=None if mask is None else mask[keys].unsqueeze(0),
        )  # fmt: skip
        dout = inputs.dout[rows].transpose(0, 1).unsqueeze(0)
        gradients = torch.autograd.grad((out, lse), leaves, (dout, inputs.dlse[:, rows].unsqueeze(0)))
        # A GPU's tiles and splits are chosen for the call, not for each sequence.
        check = assert_alike if backend in ("cuda", "triton") else assert_equal
        check(packed["lse"][:, rows], lse[0])
        parts = (
            (rows, "out", out),
            (rows, "dq", gradients[0]),
            (keys, "dk", gradients[1]),
            (keys, "dv", gradients[2]),
        )
        for part, tensor, alone in parts:
            check(packed[tensor][part], alone[0].transpose(0, 1))


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("lengths", [[0], [0, 0], [0, 0, 0]])
def test_nothing_packed(backend: str, lengths: list[int]) -> None:
    rows = torch.zeros(0, 2, 8, dtype=usual(backend), requires_grad=True)
    ends = torch.tensor(lengths, dtype=torch.int32)
    out, lse = pk.perceiver_attention_varlen(rows, rows, rows, ends, ends, return_lse=True, backend=backend)
    assert (out.shape, lse.shape) == ((0, 2, 8), (2, 0))
    (gradient,) = torch.autograd.grad(out.sum() + lse.sum(), rows)
    assert gradient.shape == rows.shape


@pytest.mark.parametrize("backend", USABLE)
def test_one_offset_for_all_is_that_offset_for_each(backend: str) -> None:
    inputs = make_inputs(BY_NAME["packed_offset"], usual(backend))
    each = torch.full(
        (inputs.kwargs["cu_seqlens_q"].numel() - 1,), inputs.kwargs["q_offset"], dtype=torch.int32
    )
    want = inputs.attend(inputs.query, inputs.key, inputs.value, backend)
    got = pk.perceiver_attention_varlen(
        inputs.query,
        inputs.key,
        inputs.value,
        return_lse=True,
        backend=backend,
        **inputs.kwargs | {"q_offset": each},
    )
    assert refusal(backend, BY_NAME["packed_offset"], usual(backend)) is None
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
