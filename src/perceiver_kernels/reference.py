"""The specification: perceiver attention in eager PyTorch, every option, nothing clever.

Every other backend answers to this file. It builds the whole (B, H, M, N) score matrix and works in float32,
or in float64 for float64 inputs.

Sources: Hawthorne et al. 2022 (Perceiver AR, arXiv 2202.07765) for the attention; Dao et al. 2022
(FlashAttention, arXiv 2205.14135, appendix B) for the gradient from ``(out, lse)``; Salmon et al. 2011
("Parallel random numbers: as easy as 1, 2, 3") for Philox4x32-10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.spec import (
    AttentionSpec,
    DenseProblem,
    accumulator_dtype,
    dense_problems,
    empty_gradients,
    empty_outputs,
)

_WORD = 0xFFFFFFFF


def visible(spec: AttentionSpec, queries: int, keys: int, device: torch.device) -> Tensor:
    """Which key each query sees: bool (B, M, N), or (1, M, N) where all examples agree.

    The one visibility rule of the contract, for the dense form.
    """
    seen = torch.ones(1, queries, keys, dtype=torch.bool, device=device)
    if spec.is_causal:
        i = torch.arange(queries, device=device).view(1, queries, 1)
        j = torch.arange(keys, device=device).view(1, 1, keys)
        offset = spec.q_offset if spec.q_offsets is None else spec.q_offsets.view(-1, 1, 1)
        seen = seen & (j <= i + offset)
    if spec.key_mask is not None:
        seen = seen & spec.key_mask.unsqueeze(1)
    return seen


def score(logits: Tensor, spec: AttentionSpec) -> Tensor:
    """The option that changes a scaled logit: the soft cap."""
    return spec.softcap * torch.tanh(logits / spec.softcap) if spec.softcap else logits


def score_grad(scores: Tensor, spec: AttentionSpec) -> Tensor | float:
    """The derivative of :func:`score`, as a function of its result."""
    return 1.0 - (scores / spec.softcap) ** 2 if spec.softcap else 1.0


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> Tensor:
    """The first output word of Philox4x32-10, as int64 in [0, 2**32).

    Args:
        counter: four int64 tensors of 32-bit words, of shapes that broadcast together.
        seed: () int64; its low and high halves are the two key words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The product of two 32-bit words wraps in int64; its 64 bits are still the right ones.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (p0 >> 32) & _WORD, (p1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _WORD, high0 ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0


def dropout_factor(spec: AttentionSpec, shape: torch.Size, first_example: int = 0) -> Tensor | float:
    """What dropout multiplies a probability by: 0 or 1 / (1 - p), for each (b, h, i, j) of ``shape``."""
    if spec.dropout_seed is None:
        return 1.0
    seed, first_key = spec.dropout_seed.unbind()
    b, h, i, j = (
        torch.arange(size, device=seed.device).view([-1 if axis == position else 1 for axis in range(4)])
        for position, size in enumerate(shape)
    )
    threshold = min(int(spec.dropout_p * 2**32), _WORD)
    kept = philox((b + first_example, h, i, j + first_key), seed) >= threshold
    return kept.to(torch.float64) / (1.0 - spec.dropout_p)


def forward(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, laid out as :func:`perceiver_kernels.spec.empty_outputs` says. Differentiable."""
    out, lse = empty_outputs(query, value)
    for problem in dense_problems(spec):
        q, k, v, seen = _operands(problem, query, key, value)
        logits = score(_dot(q, k) * spec.scale, spec).masked_fill(~seen, -torch.inf)
        peak = logits.detach().amax(-1, keepdim=True) if k.shape[-2] else logits.new_zeros(())
        peak = peak.masked_fill(peak == -torch.inf, 0.0)
        weights = torch.exp(logits - peak)
        total = weights.sum(-1, keepdim=True)
        dead = total == 0.0
        total = total.masked_fill(dead, 1.0)
        probabilities = weights / total * _dropout(problem, weights)
        problem.q(out).copy_(_weigh(probabilities, v).flatten(1, 2))
        row_lse = (peak + torch.log(total)).masked_fill(dead, -torch.inf)
        problem.rows(lse).copy_(row_lse.squeeze(-1).flatten(1, 2))
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
    """``(dq, dk, dv)`` from the residuals, written out.

    With P = exp(score - lse), Z the dropout factor and delta = rowsum(dout * out) - dlse::

        dV = (P * Z)^T dout    dP = Z * (dout V^T)    dS = P * (dP - delta) * score_grad * scale
        dQ = dS K              dK = dS^T Q
    """
    dq, dk, dv = empty_gradients(query, key, value)
    for problem in dense_problems(spec):
        q, k, v, seen = _operands(problem, query, key, value)
        kv_heads = q.shape[1]
        row_lse = _grouped(problem.rows(lse).to(q.dtype).unsqueeze(-1), kv_heads)
        dead = row_lse == -torch.inf
        q = q.masked_fill(dead, 0.0)
        grad = _grouped(problem.q(dout).to(q.dtype), kv_heads).masked_fill(dead, 0.0)
        delta = (grad * _grouped(problem.q(out).to(q.dtype), kv_heads)).sum(-1, keepdim=True)
        if dlse is not None:
            row_dlse = _grouped(problem.rows(dlse).to(q.dtype).unsqueeze(-1), kv_heads)
            delta = delta - row_dlse.masked_fill(dead, 0.0)

        scores = score(_dot(q, k) * spec.scale, spec)
        p = torch.exp(scores.masked_fill(~seen, -torch.inf) - row_lse.masked_fill(dead, 0.0))
        z = _dropout(problem, p)
        ds = p * (_dot(grad, v) * z - delta) * score_grad(scores, spec) * spec.scale

        unseen_keys = ~seen.any(-2).squeeze(1).unsqueeze(-1)  # (B, 1, N, 1)
        problem.q(dq).copy_(_weigh(ds, k).flatten(1, 2))
        problem.k(dk).copy_(_gather(ds, q).masked_fill(unseen_keys, 0.0))
        problem.k(dv).copy_(_gather(p * z, grad).masked_fill(unseen_keys, 0.0))
    return dq, dk, dv


# Heads are grouped by the key head they share: query-like tensors are (B, Hkv, G, M, D), scores
# (B, Hkv, G, M, N).


def _operands(
    problem: DenseProblem, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, Hkv, G, M, D), k, v (B, Hkv, N, D) in the working precision, and visibility (B, 1, 1, M, N).

    Keys that no query of their example sees count as zero: caches may hold anything there.
    """
    dtype = accumulator_dtype(query)
    q, k, v = problem.q(query).to(dtype), problem.k(key).to(dtype), problem.k(value).to(dtype)
    seen = visible(problem.spec, q.shape[2], k.shape[2], q.device)
    unseen_keys = ~seen.any(1)[:, None, :, None]
    k, v = k.masked_fill(unseen_keys, 0.0), v.masked_fill(unseen_keys, 0.0)
    return _grouped(q, k.shape[1]), k, v, seen[:, None, None]


def _grouped(tensor: Tensor, kv_heads: int) -> Tensor:
    batch, heads, rows, dim = tensor.shape
    return tensor.reshape(batch, kv_heads, heads // kv_heads, rows, dim)


def _dropout(problem: DenseProblem, scores: Tensor) -> Tensor | float:
    factor = dropout_factor(problem.spec, scores.flatten(1, 2).shape, problem.first_example)
    return factor.to(scores.dtype).view_as(scores) if isinstance(factor, Tensor) else factor


def _dot(rows: Tensor, keys: Tensor) -> Tensor:
    return torch.einsum("bhgmd,bhnd->bhgmn", rows, keys)


def _weigh(weights: Tensor, keys: Tensor) -> Tensor:
    return torch.einsum("bhgmn,bhnd->bhgmd", weights, keys)


def _gather(weights: Tensor, rows: Tensor) -> Tensor:
    return torch.einsum("bhgmn,bhgmd->bhnd", weights, rows)
