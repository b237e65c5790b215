"""The public op: bind the arguments, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import autograd, dispatch
from perceiver_kernels.checks import check_bool
from perceiver_kernels.spec import (
    AttentionSpec,
    has_tangent,
    is_segmented,
    make_spec,
    needs_gradient,
    segments,
)

Tensors = Tensor | Sequence[Tensor]


def perceiver_attention(
    query: Tensor,
    key: Tensors,
    value: Tensors,
    *,
    is_causal: bool = True,
    q_offset: int | Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of M queries over N keys, causal from the bottom right (Perceiver AR, arXiv 2202.07765).

    Key j is visible to query i of example b iff ``key_mask[b, j]`` (where given) and, where causal,
    ``j <= q_offset[b] + i``. A query that sees no key gives out 0, lse -inf and zero gradients; a key that no
    query of its example sees may hold anything, NaN included.

    Args:
        query: (B, H, M, D), float32, bfloat16, float16 or float64, any strides.
        key: (B, Hkv, N, D), dtype and device as query; H % Hkv == 0 (grouped-query attention). Or a sequence
            of such tensors: segments, one after the other, attended to as if concatenated, without the copy.
        value: (B, Hkv, N, Dv); segments where key is.
        is_causal: whether the rule above looks at positions at all.
        q_offset: position of query 0 among the keys: None for N - M, an int, or an integer tensor (B,).
        key_mask: bool (B, N), True where the key may be attended. With segments, over all of them.
        scale: factor on query . key; None for D ** -0.5.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        dropout_p: probability in [0, 1) with which a normalised attention weight is dropped.
        dropout_seed: 64-bit seed of the dropout bits, which are a function of the seed and the place
            (b, h, i, j) alone; None draws one from torch's generator.
        return_lse: also return the log-sum-exp.
        backend: a name from :func:`available_backends`, which then runs or raises; None takes the first
            that can serve the call.

    Returns:
        Tensor (B, H, M, Dv) in query's dtype, a transposed (B, M, H, Dv) where query is one; with
        ``return_lse`` also the natural log-sum-exp of the scores, (B, H, M) float32 (float64 for float64).
        Both are differentiable, once.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or no backend, or not the named one,
            can serve the call.
    """
    query, key, value = autocast(query), autocast(key), autocast(value)
    spec = make_spec(
        query,
        key,
        value,
        is_causal=is_causal,
        q_offset=q_offset,
        key_mask=key_mask,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    return _run(query, key, value, spec, backend, return_lse)


def perceiver_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = True,
    q_offset: int | Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """:func:`perceiver_attention` over B sequences of any lengths, packed one after the other.

    Sequence b owns query rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and key rows ``cu_seqlens_k[b]``
    to ``cu_seqlens_k[b + 1]``, and is computed as if it were alone: ``q_offset=None`` is its own key count
    minus its own query count, and dropout's (b, h, i, j) counts within it.

    Args:
        query: (Tq, H, D), float32, bfloat16, float16 or float64.
        key: (Tk, Hkv, D).
        value: (Tk, Hkv, Dv).
        cu_seqlens_q: (B + 1,) int32 or int64 on query's device, from 0 up to Tq, never decreasing.
        cu_seqlens_k: (B + 1,), the same for keys, up to Tk.
        key_mask: bool (Tk,).
        q_offset: None, an int for all sequences, or an integer tensor (B,).

    Returns:
        Tensor (Tq, H, Dv); with ``return_lse`` also (H, Tq). The other options and the errors are those of
        :func:`perceiver_attention`.
    """
    query, key, value = autocast(query), autocast(key), autocast(value)
    spec = make_spec(
        query,
        key,
        value,
        is_causal=is_causal,
        q_offset=q_offset,
        key_mask=key_mask,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        cu_seqlens=(cu_seqlens_q, cu_seqlens_k),
    )
    return _run(query, key, value, spec, backend, return_lse)


def _run(
    query: Tensor, key: Any, value: Any, spec: AttentionSpec, backend: str | None, return_lse: bool
) -> Any:
    check_bool("return_lse", return_lse)
    keys, values = segments(key), segments(value)
    tensors = (query, *keys, *values)
    if has_tangent(tensors):
        raise NotImplementedError("perceiver_attention: forward-mode differentiation is not supported")
    lengths = [t.shape[-2] for t in keys]
    longest = lengths.index(max(lengths))
    name = dispatch.choose(backend, query, keys[longest], values[longest], spec, needs_gradient(tensors))
    query = _channels_together(query)
    keys, values = [_channels_together(t) for t in keys], [_channels_together(t) for t in values]
    if is_segmented(key):
        out, lse = autograd.segmented_attention(query, keys, values, spec, name)
    else:
        out, lse = autograd.attention(query, keys[0], values[0], spec, name)
    return (out, lse) if return_lse else out


def _channels_together(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def autocast(given: Any) -> Any:
    """Under autocast: what is not float64 in autocast's dtype, as torch's own attention has it."""
    if is_segmented(given):
        return [autocast(tensor) for tensor in given]
    if not isinstance(given, Tensor):
        return given  # the checks name the culprit
    return given.to(autocast_dtype(given.dtype, given.device))


def autocast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What :func:`autocast` makes of a dtype."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # `is_autocast_available` breaks old dynamos
        return dtype
    if not dtype.is_floating_point or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(kind)
