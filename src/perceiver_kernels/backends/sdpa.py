"""Torch's own ``scaled_dot_product_attention`` under an explicit bottom-right mask: fallback and baseline.

On a CPU this calls the fused kernel that ``scaled_dot_product_attention`` itself chooses there, through the
ATen operators that hand out lse and take ``(out, lse)`` back. Torch has no such pair for every device, so
elsewhere ``out`` comes from the public function, lse from a score matrix, and the gradients from the
specification's own formulas.

Memory grows with M x N (the mask), which torch's interface leaves no way around.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.reference import backward as reference_backward
from perceiver_kernels.reference import visible
from perceiver_kernels.spec import (
    AttentionSpec,
    accumulator_dtype,
    dense_problems,
    empty_gradients,
    empty_outputs,
)

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unavailable(device: torch.device) -> str | None:
    """None where this backend can run on ``device``, else the reason and what to do about it."""
    return "the meta device holds no data" if device.type == "meta" else None


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, needs_gradient: bool
) -> list[str]:
    """Every reason why this backend can't serve the call."""
    reasons = []
    if spec.softcap:
        reasons.append(f"softcap={spec.softcap}: torch's scaled_dot_product_attention has no soft cap")
    if spec.dropout_p:
        reasons.append(
            f"dropout_p={spec.dropout_p}: torch's dropout draws other bits than the contract's Philox"
        )
    return reasons


def forward(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, laid out as :func:`perceiver_kernels.spec.empty_outputs` says."""
    out, lse = empty_outputs(query, value)
    for problem in dense_problems(spec):
        call = _bind(problem.q(query), problem.k(key), problem.k(value), problem.spec)
        part, row_lse = _forward(call)
        problem.q(out).copy_(part.masked_fill(call.dead.unsqueeze(-1), 0.0))
        problem.rows(lse).copy_(row_lse.masked_fill(call.dead, -torch.inf))
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` from the residuals."""
    if not _has_fused(query.device):
        return reference_backward(dout, dlse, query, key, value, out, lse, spec)
    dq, dk, dv = empty_gradients(query, key, value)
    for problem in dense_problems(spec):
        call = _bind(problem.q(query), problem.k(key), problem.k(value), problem.spec)
        row_lse = problem.rows(lse)
        dead = row_lse == -torch.inf
        grad = problem.q(dout).masked_fill(dead.unsqueeze(-1), 0.0)
        row_dlse = None if dlse is None else problem.rows(dlse).masked_fill(dead, 0.0)
        # The kernel takes exp(score - lse): inf makes every weight of a dead row 0.
        parts = _backward(call, grad, row_dlse, problem.q(out), row_lse.masked_fill(dead, torch.inf))
        unseen = call.unseen.unsqueeze(-1)
        problem.q(dq).copy_(parts[0])
        problem.k(dk).copy_(parts[1].masked_fill(unseen, 0.0))
        problem.k(dv).copy_(parts[2].masked_fill(unseen, 0.0))
    return dq, dk, dv


@dataclass(frozen=True, eq=False)
class _Call:
    """A dense problem in the terms of torch's function."""

    q: Tensor  # (B, H, M, D)
    k: Tensor  # (B, Hkv, N, D), zero where unseen
    v: Tensor  # (B, Hkv, N, Dv), zero where unseen
    bias: (
        Tensor | None
    )  # (1 or B, 1, M, N), 0 or -inf; None where every query sees every key or is_causal says it
    is_causal: bool  # torch's, which is top-left
    scale: float
    dead: Tensor  # (1 or B, 1, M): sees no key
    unseen: Tensor  # (1 or B, 1, N): seen by no query


def _bind(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> _Call:
    queries, keys = q.shape[2], k.shape[2]
    seen = visible(spec, queries, keys, q.device).unsqueeze(1)
    unseen, dead = ~seen.any(-2), ~seen.any(-1)
    if unseen.any():  # torch adds -inf to their scores, which does not hide NaN
        k, v = k.masked_fill(unseen.unsqueeze(-1), 0.0), v.masked_fill(unseen.unsqueeze(-1), 0.0)
    top_left = spec.is_causal and queries == keys and spec.q_offset == 0
    top_left = top_left and spec.q_offsets is None and spec.key_mask is None
    bias = None
    if not top_left and not seen.all():
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
    return _Call(q, k, v, bias, top_left, spec.scale, dead, unseen)


def _forward(call: _Call) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), call.dead.new_zeros(
            q.shape[:-1], dtype=accumulator_dtype(q)
        )
    if not _has_fused(q.device):
        return _public_function(call), _row_lse(call)
    width = max(q.shape[-1], v.shape[-1])  # the kernel wants one head dim; zeros add nothing
    out, lse = _fused(
        _widen(q, width), _widen(k, width), _widen(v, width), 0.0, call.is_causal,
        attn_mask=call.bias, scale=call.scale,
    )  # fmt: skip
    return out[..., : v.shape[-1]], lse


def _backward(
    call: _Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    width = max(q.shape[-1], v.shape[-1] + (dlse is not None))
    wide_v, wide_dout = _widen(v, width), _widen(dout, width)
    if dlse is not None:
        # dS = P * (dout V^T - rowsum(dout * out) + dlse): one more column, dlse in dout, 1 in V, 0 in out.
        wide_v[..., v.shape[-1]] = 1.0
        wide_dout[..., v.shape[-1]] = dlse
    dq, dk, dv = _fused_backward(
        wide_dout, _widen(q, width), _widen(k, width), wide_v, _widen(out, width), lse, 0.0, call.is_causal,
        attn_mask=call.bias, scale=call.scale,
    )  # fmt: skip
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _has_fused(device: torch.device) -> bool:
    return device.type == "cpu"


def _widen(tensor: Tensor, width: int) -> Tensor:
    return F.pad(tensor, (0, width - tensor.shape[-1])) if width > tensor.shape[-1] else tensor


# Where there is no fused pair of operators.


def _public_function(call: _Call) -> Tensor:
    # Some of torch's kernels give NaN for a row without keys: such rows see all, and are overwritten. Some do
    # for a negative scale, and some read rows that begin at odd addresses wrongly.
    bias = None if call.bias is None else call.bias.masked_fill(call.dead[:, :, :, None], 0.0)
    q = call.q if call.scale >= 0.0 else -call.q
    out: Tensor = F.scaled_dot_product_attention(
        _at_even_addresses(q), _at_even_addresses(call.k), _at_even_addresses(call.v), bias,
        is_causal=call.is_causal, scale=abs(call.scale),
        enable_gqa=call.q.shape[1] != call.k.shape[1],
    )  # fmt: skip
    return out


def _at_even_addresses(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where its own rows don't begin at multiples of 16 bytes."""
    unit = 16 // tensor.element_size()
    even = tensor.is_contiguous() or all(stride % unit == 0 for stride in tensor.stride()[:-1])
    return (
        tensor
        if even and tensor.data_ptr() % 16 == 0
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def _row_lse(call: _Call) -> Tensor:
    dtype, (batch, kv_heads) = accumulator_dtype(call.q), call.k.shape[:2]
    q = call.q.to(dtype).reshape(batch, kv_heads, -1, *call.q.shape[2:])
    scores = (q @ call.k.to(dtype).unsqueeze(2).mT * call.scale).flatten(1, 2)
    if call.is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    elif call.bias is not None:
        scores = scores + call.bias.masked_fill(call.dead[:, :, :, None], 0.0)
    return scores.logsumexp(-1)
