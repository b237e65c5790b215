"""Keys and values in several tensors: the same as concatenated, forward, backward, and in every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BY_NAME, DEVICE, OURS, USABLE, answers, finest, refusal, usual
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import perceiver_kernels as pk
from perceiver_kernels.merge import RunningMerge
from perceiver_kernels.testing.budget import relative_error
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import Inputs, make_inputs

CASES = [
    *(BY_NAME[name] for name in ("ragged", "transposed", "grouped_heads", "odd_dims", "softcap",
      "more_queries_than_keys", "offset_per_example_masked", "scale_negative", "dropout_grouped",
      "all_options")),
    Case("dead_example", key_mask="dead_example"),
    Case("decode", 2, 4, 2, 1, 257),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = (0, 30, 1, 47)  # and the rest: an empty segment, one key, all before and within the causal edge


def split(tensor: Tensor) -> list[Tensor]:
    """Segments along the keys, the last whatever is left (N < 78 leaves fewer and shorter ones)."""
    keys, parts, begin = tensor.shape[2], [], 0
    for length in (*LENGTHS, keys):
        parts.append(tensor[:, :, begin : begin + length])
        begin = min(begin + length, keys)
    return parts


def run(inputs: Inputs, backend: str | None) -> dict[str, Tensor]:
    """``out, lse, dq, dk, dv`` by segments, the gradients put together again."""
    query = inputs.query.detach().requires_grad_()
    keys, values = ([t.detach().requires_grad_() for t in split(x)] for x in (inputs.key, inputs.value))
    kwargs = inputs.kwargs
    out, lse = pk.perceiver_attention(query, keys, values, return_lse=True, backend=backend, **kwargs)
    leaves = (query, *keys, *values)
    dq, *rest = torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse))
    dk, dv = torch.cat(rest[: len(keys)], 2), torch.cat(rest[len(keys) :], 2)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_segments_keep_the_budget(backend: str, dtype: torch.dtype, case: Case) -> None:
    why_not = refusal(backend, case, dtype)
    if why_not:
        pytest.skip(why_not)
    inputs, allowed = answers(case, dtype)
    got = run(inputs, backend)
    for name, (want, limit) in allowed.items():
        error = relative_error(got[name], want)
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"


@pytest.mark.parametrize("backend", USABLE)
def test_one_segment_is_the_plain_call_bit_by_bit(backend: str) -> None:
    inputs = make_inputs(BY_NAME["ragged"], torch.bfloat16)
    want = inputs.run(backend)
    leaves = tuple(t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
    out, lse = pk.perceiver_attention(
        leaves[0], [leaves[1]], [leaves[2]], return_lse=True, backend=backend, **inputs.kwargs
    )
    got = (out, lse, *torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse)))
    for a, b in zip(got, want.values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [name for name in USABLE if name != "sdpa"])
def test_segments_drop_what_the_whole_drops(backend: str) -> None:
    """With an identity for value, out is the matrix of kept probabilities."""
    dtype = usual(backend)
    query, key = torch.zeros(2, 4, 9, 8, dtype=dtype), torch.zeros(2, 2, 64, 8, dtype=dtype)
    value = torch.eye(64, dtype=dtype).expand(2, 2, 64, 64)
    options: dict[str, Any] = {"dropout_p": 0.4, "dropout_seed": 5, "is_causal": False, "backend": backend}
    whole = pk.perceiver_attention(query, key, value, **options)
    parts = pk.perceiver_attention(query, key.split([17, 1, 46], 2), value.split([17, 1, 46], 2), **options)
    assert torch.equal(whole != 0, parts != 0)


def test_gradients_by_finite_differences() -> None:
    case = Case("small", 2, 2, 1, 3, 6, 4, 3, key_mask="random", softcap=2.0)
    inputs = make_inputs(case, torch.float64)

    def attend(query: Tensor, *pieces: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = pk.perceiver_attention(
            query, pieces[:3], pieces[3:], return_lse=True, backend="reference", **inputs.kwargs
        )
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    pieces = [t for x in (inputs.key, inputs.value) for t in x.split([2, 3, 1], 2)]
    assert torch.autograd.gradcheck(
        attend, tuple(t.clone().requires_grad_() for t in (inputs.query, *pieces))
    )


@pytest.mark.parametrize("backend", OURS)
def test_hidden_keys_may_hold_anything(backend: str) -> None:
    inputs = make_inputs(BY_NAME["ragged"], usual(backend))
    spare = torch.full_like(inputs.key[:, :, :50], torch.nan)
    mask = torch.ones(2, 151, dtype=torch.bool)
    mask[:, :50] = False
    query = inputs.query.requires_grad_()
    want = pk.perceiver_attention(query, inputs.key, inputs.value, backend=backend)
    got = pk.perceiver_attention(
        query, (spare, inputs.key), (spare, inputs.value), key_mask=mask, backend=backend
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, query, inputs.dout)[0] for x in (got, want)))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_opcheck() -> None:
    inputs = make_inputs(BY_NAME["softcap"], torch.float32)
    ops, options = torch.ops.perceiver_kernels, (*inputs.spec().options(), "reference")
    query = inputs.query.requires_grad_()
    keys, values = ([t.detach().requires_grad_() for t in split(x)[1:]] for x in (inputs.key, inputs.value))
    torch.library.opcheck(ops.segments_forward.default, (query, keys, values, *options))
    plain = [[t.detach() for t in x] for x in (keys, values)]
    out, lse = ops.segments_forward(query.detach(), *plain, *options)
    backward = (inputs.dout, inputs.dlse, query.detach(), *plain, out, lse, *options)
    torch.library.opcheck(ops.segments_backward.default, backward)


def test_compile_autocast_and_checkpoint() -> None:
    inputs = make_inputs(BY_NAME["ragged"], torch.float32)
    leaves = [t.detach().requires_grad_() for t in (inputs.query, *split(inputs.key), *split(inputs.value))]
    count = len(LENGTHS) + 1

    def attend(query: Tensor, *pieces: Tensor) -> Tensor:
        out: Tensor = pk.perceiver_attention(query, pieces[:count], pieces[count:])
        return out

    want = torch.autograd.grad(attend(*leaves), leaves, inputs.dout)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for run_it in (compiled, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        got = torch.autograd.grad(run_it(*leaves), leaves, inputs.dout)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert attend(*leaves).dtype == torch.bfloat16


def test_double_backward_says_so() -> None:
    inputs = make_inputs(BY_NAME["ragged"], finest("reference"))
    query = inputs.query.requires_grad_()
    out = pk.perceiver_attention(query, split(inputs.key), split(inputs.value), backend="reference")
    (dq,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        dq.sum().backward()


def test_running_merge_is_the_merge() -> None:
    """Rising and falling maxima, rows dead in some parts or in all, many parts."""
    outs, lses = torch.randn(200, 2, 3, 5, 7), torch.randn(200, 2, 3, 5) * 30
    lses[torch.rand(lses.shape) < 0.3] = -torch.inf
    lses[:, 0, 0, 0], outs[:, 0, 0, 0] = -torch.inf, 0.0
    merge = RunningMerge()
    for out, lse in zip(outs, lses, strict=True):
        merge.add(out, lse)
    got, want = merge.result(), pk.merge_attention(list(outs.double()), list(lses.double()))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 3e-7


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


K, V = t(2, 2, 5, 8), t(2, 2, 5, 6)


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ([K], V, TypeError, "value must be a sequence of tensors as key is, got Tensor"),
        (K, (V,), TypeError, "key must be a sequence of tensors as value is, got Tensor"),
        ([], [], ValueError, "key and value must be equally many segments, at least 1, got 0 and 0"),
        ([K, K], [V], ValueError, "key and value must be equally many segments, at least 1, got 2 and 1"),
        ([K, None], [V, V], TypeError, r"key\[1\] must be a torch.Tensor, got NoneType"),
        ([K, K.double()], [V, V], TypeError, r"key\[1\] is float64, but query is float32"),
        ([K, K[:, :, :3]], [V, V], ValueError, r"value\[1\] has 5 positions, but key\[1\] has 3"),
        ([K, K[:, :1]], [V, V[:, :1]], ValueError, r"key\[1\] has 1 heads, but key\[0\] has 2"),
        ([K, K], [V, K], ValueError, r"value\[1\] has head dim 8, but value\[0\] has 6"),
    ],
)  # fmt: skip
def test_bad_segments(key: Any, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        pk.perceiver_attention(t(2, 4, 3, 8), key, value)


def test_a_mask_covers_all_segments() -> None:
    with pytest.raises(ValueError, match=r"^key_mask must have shape \(2, 10\), got \(2, 5\)"):
        pk.perceiver_attention(t(2, 4, 3, 8), [K, K], [V, V], key_mask=t(2, 5, dtype=torch.bool))
