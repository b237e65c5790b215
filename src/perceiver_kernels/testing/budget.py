"""Error budgets: what the plain computation in the same dtype gets wrong, not tolerances tuned by hand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from perceiver_kernels import reference
from perceiver_kernels.merge import merge_attention
from perceiver_kernels.spec import AttentionSpec, accumulator_dtype, dense_problems, empty_outputs
from perceiver_kernels.testing.inputs import Inputs

FACTOR = 1.5
_SCORES = 2**22  # how many scores the float64 reference takes at a time


def relative_error(got: Tensor, want: Tensor) -> float:
    """The L2 norm of the difference over that of ``want``; of the difference per element if ``want`` is 0.

    Equal infinities (the lse of dead rows) count as no difference; NaN where ``want`` has none gives NaN.
    """
    got, want = got.double(), want.double()
    difference = torch.where(got == want, 0.0, got - want)
    norm = want[want.isfinite()].norm().item()
    return float(difference.norm().item() / (norm or max(want.numel(), 1) ** 0.5))


def budget(plain: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """1.5 times the error of ``plain``, the result of :func:`math_reference` in ``dtype``.

    And never less than rounding the exact result to its own dtype plus a few roundings of the accumulator:
    the plain computation gets some tensors exactly right, and float64 itself is not exact.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    floor = torch.finfo(plain.dtype).eps / 2 + 16 * torch.finfo(accumulator).eps
    return max(FACTOR * relative_error(plain, want), floor)


def math_reference(inputs: Inputs) -> dict[str, Tensor]:
    """``out, lse, dq, dk, dv`` by matmul, float32 softmax, matmul in the inputs' dtype, and autograd."""
    leaves = tuple(t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
    out, lse = _plain(leaves[0], leaves[1], leaves[2], inputs.spec())
    outputs, gradients = (
        ((out,), (inputs.dout,)) if inputs.dlse is None else ((out, lse), (inputs.dout, inputs.dlse))
    )
    dq, dk, dv = torch.autograd.grad(outputs, leaves, gradients)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def _plain(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(query, value)
    for problem in dense_problems(spec):
        q, k, v = problem.q(query), problem.k(key), problem.k(value)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        seen = reference.visible(problem.spec, q.shape[2], k.shape[2], q.device).unsqueeze(1)
        dead = ~seen.any(-1, keepdim=True)
        scores = reference.score(q @ k.mT * problem.spec.scale, problem.spec).to(accumulator_dtype(q))
        scores = scores.masked_fill(~seen, -torch.inf).masked_fill(dead, 0.0)  # a dead row must not make NaN
        weights = scores.softmax(-1).masked_fill(dead, 0.0)
        weights = weights * reference.dropout_factor(problem.spec, weights.shape, problem.first_example)
        problem.q(out).copy_(weights.to(v.dtype) @ v)
        problem.rows(lse).copy_(scores.logsumexp(-1).masked_fill(dead.squeeze(-1), -torch.inf))
    return out, lse


def reference64(inputs: Inputs) -> dict[str, Tensor]:
    """``out, lse, dq, dk, dv`` of the specification in float64; long inputs go by chunks of keys."""
    query, key, value, dout = (
        t.detach().double() for t in (inputs.query, inputs.key, inputs.value, inputs.dout)
    )
    dlse = None if inputs.dlse is None else inputs.dlse.double()
    chunks = list(_key_chunks(query, key, inputs.spec()))
    parts = [reference.forward(query, key[..., keys, :], value[..., keys, :], spec) for keys, spec in chunks]
    out, lse = parts[0] if len(parts) == 1 else merge_attention(*zip(*parts, strict=True))
    gradients = [
        reference.backward(dout, dlse, query, key[..., keys, :], value[..., keys, :], out, lse, spec)
        for keys, spec in chunks
    ]
    dqs, dks, dvs = zip(*gradients, strict=True)
    dq = torch.stack(dqs).sum(0)
    dk, dv = (grads[0] if len(grads) == 1 else torch.cat(grads, -2) for grads in (dks, dvs))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def _key_chunks(query: Tensor, key: Tensor, spec: AttentionSpec) -> Iterator[tuple[slice, AttentionSpec]]:
    """Disjoint runs of keys and the call restricted to each."""
    keys = key.shape[-2]
    chunk = _SCORES // max(query.shape[:-1].numel(), 1)
    if spec.is_packed or keys <= chunk:
        yield slice(None), spec
        return
    for start in range(0, keys, chunk):
        run = slice(start, start + chunk)
        yield run, spec.over_keys(start, start + chunk)
