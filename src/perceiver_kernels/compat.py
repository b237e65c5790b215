"""flash-attn's functions over this package's op: same names, arguments and meaning, on every device.

    from perceiver_kernels.compat import flash_attn_func  # was: from flash_attn import flash_attn_func

Tensors are (B, S, H, D), ``causal`` is aligned bottom right, a query that sees no key gives 0, and grouped
heads are allowed, all as flash-attn 2 documents it. What differs: float32 and float64 are taken, too; results
are always deterministic (``deterministic`` and ``num_splits`` change nothing); dropout drops with the same
probability but other entries. Sliding windows, ALiBi slopes and paged caches are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.attention import perceiver_attention, perceiver_attention_varlen
from perceiver_kernels.rotary import apply_rotary


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (B, M, H, D) over k and v (B, N, Hkv, D); differentiable.

    Args:
        softmax_scale: None for D ** -0.5.
        causal: query i sees keys up to ``i + N - M``.
        softcap: 0 for none.
        return_attn_probs: also return lse (B, H, M) float32, and None for the weights, which are never formed
            (flash-attn gives them where it drops some: refused together with dropout).

    Returns:
        (B, M, H, Dv).

    Raises:
        ValueError: for what is not served, naming the argument; otherwise as
            :func:`perceiver_kernels.perceiver_attention`, which calls q, k, v query, key, value.
    """
    _refuse(window_size, alibi_slopes)
    out, lse = perceiver_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), **_options(dropout_p, softmax_scale, causal, softcap)
    )
    return _results(out.transpose(1, 2), lse, dropout_p, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """:func:`flash_attn_func` over packed sequences: q (Tq, H, D), k and v (Tk, Hkv, D); differentiable.

    Args:
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 or int64, where each sequence begins and the last ends.
        max_seqlen_q, max_seqlen_k: not needed here.

    Returns:
        (Tq, H, Dv); with ``return_attn_probs`` also lse (H, Tq) and None.
    """
    _refuse(window_size, alibi_slopes, block_table)
    out, lse = perceiver_attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, **_options(dropout_p, softmax_scale, causal, softcap)
    )
    return _results(out, lse, dropout_p, return_attn_probs)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q (B, M, H, D) over a cache, after new keys and values are written into it. No gradients.

    Args:
        k_cache, v_cache: (Bc, C, Hkv, D), changed in place where k and v are given.
        k, v: (B, n, Hkv, D), written from position ``cache_seqlens[b]`` on.
        rotary_cos, rotary_sin: (L, R), 2 R <= D; only with k and v. Keys are turned by the angles of the
            positions that they are written to, query i by those of ``cache_seqlens + i`` where causal and of
            ``cache_seqlens`` where not.
        cache_seqlens: int or (B,) int, how much the cache holds before the call. None: all of it.
        cache_batch_idx: (B,) int, each example's row of the cache; what is in use is copied. None: b.
        cache_leftpad: (B,) int, the first position of each row that counts. None: 0. Not with rotary_cos.
        causal: aligned so that the last query sees all that the cache then holds.
        rotary_interleaved: channels 2 i and 2 i + 1 pair up; else i and i + R.

    Returns:
        (B, M, H, Dv); with ``return_softmax_lse`` also lse (B, H, M) float32.

    Raises:
        ValueError: where the cache or the rotary tables are too short, or for what is not served.
    """
    _refuse(window_size, alibi_slopes, block_table)
    batch, capacity, device = q.shape[0], k_cache.shape[1], q.device
    held = torch.as_tensor(capacity if cache_seqlens is None else cache_seqlens, device=device)
    held = held.to(torch.int64).expand(batch)
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if rotary_cos is not None and (k is None or rotary_sin is None or cache_leftpad is not None):
        raise ValueError("rotary_cos needs k, v and rotary_sin, and no cache_leftpad")
    if k is not None and v is not None:
        if cache_seqlens is None:
            raise ValueError("cache_seqlens must be given with k and v: where shall they be written?")
        slots = held.unsqueeze(1) + torch.arange(k.shape[1], device=device)
        if rotary_cos is not None and rotary_sin is not None:
            steps = torch.arange(q.shape[1], device=device) * causal
            tables, layout = (rotary_cos, rotary_sin), "interleaved" if rotary_interleaved else "half"
            q = _rotate(q, held.unsqueeze(1) + steps, tables, layout)
            k = _rotate(k, slots, tables, layout)
        held = held + k.shape[1]
        _check_room("k_cache", capacity, held)
        rows = torch.arange(batch, device=device) if cache_batch_idx is None else cache_batch_idx.long()
        k_cache[rows.unsqueeze(1), slots] = k
        v_cache[rows.unsqueeze(1), slots] = v
    _check_room("k_cache", capacity, held)

    used = int(held.max()) if batch else 0
    caches = [cache[:, :used] for cache in (k_cache, v_cache)]
    if cache_batch_idx is None:
        caches = [cache[:batch] for cache in caches]
    else:
        caches = [cache.index_select(0, cache_batch_idx) for cache in caches]
    positions, key_mask = torch.arange(used, device=device), None
    if not causal:
        key_mask = positions < held.unsqueeze(1)
    if cache_leftpad is not None:
        begun = positions >= cache_leftpad.unsqueeze(1)
        key_mask = begun if key_mask is None else key_mask & begun
    out, lse = perceiver_attention(
        *(t.transpose(1, 2) for t in (q, *caches)),
        **_options(0.0, softmax_scale, causal, softcap),
        q_offset=held - q.shape[1],
        key_mask=key_mask,
    )
    return (out.transpose(1, 2), lse) if return_softmax_lse else out.transpose(1, 2)


def _options(dropout_p: float, softmax_scale: float | None, causal: bool, softcap: float) -> dict[str, Any]:
    return {
        "is_causal": causal,
        "scale": softmax_scale,
        "softcap": softcap or None,
        "dropout_p": dropout_p,
        "return_lse": True,
    }


def _results(out: Tensor, lse: Tensor, dropout_p: float, return_attn_probs: bool) -> Any:
    if return_attn_probs and dropout_p > 0.0:
        raise ValueError(
            "return_attn_probs is not served with dropout_p > 0: the M x N weights are never formed"
        )
    return (out, lse, None) if return_attn_probs else out


def _refuse(
    window_size: tuple[int, int], alibi_slopes: Tensor | None, block_table: Tensor | None = None
) -> None:
    if tuple(window_size) != (-1, -1):
        raise ValueError(f"window_size must be (-1, -1), got {window_size}: sliding windows are not served")
    if alibi_slopes is not None:
        raise ValueError("alibi_slopes must be None: biases of the scores are not served")
    if block_table is not None:
        raise ValueError("block_table must be None: paged caches are not served")


def _rotate(x: Tensor, positions: Tensor, tables: tuple[Tensor, Tensor], layout: Any) -> Tensor:
    """(B, L, H, D) turned by the angles of positions (B, L) in float32."""
    _check_room("rotary_cos", tables[0].shape[0], positions + 1)
    cos, sin = (table[positions].float() for table in tables)
    return apply_rotary(x, cos, sin, layout=layout)


def _check_room(name: str, room: int, needed: Tensor) -> None:
    low, high = (int(x) for x in needed.aminmax()) if needed.numel() else (0, 0)
    if low < 0 or high > room:
        raise ValueError(
            f"{name} holds {room} positions, and cache_seqlens asks for {low if low < 0 else high}"
        )
