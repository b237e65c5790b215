"""The same attention done by torch alone: what a user has without this package, at its best, to compare with.

Each peer returns one or more ways to compute it; the benchmark times them all briefly and keeps the fastest.
Masks are built here, once, outside what is timed: a model would share them between its layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.reference import visible
from perceiver_kernels.spec import AttentionSpec

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unsupported(ValueError):
    """The peer can't compute this problem; the message says why."""


def _mask(query: Tensor, key: Tensor, spec: AttentionSpec) -> Tensor | None:
    """Visibility, bool (B, 1, M, N) or (1, 1, M, N), True = may be attended; None where all is visible."""
    if not spec.is_causal and spec.key_mask is None:
        return None
    return visible(spec, query.shape[2], key.shape[2], query.device).unsqueeze(1)


def torch_eager(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, backward: bool
) -> dict[str, Attend]:
    """matmul, mask, softmax, matmul, as written by hand in most models."""
    if spec.is_packed or spec.dropout_p:
        raise Unsupported("the eager peer covers neither packed sequences nor dropout")
    mask, group = _mask(query, key, spec), query.shape[1] // key.shape[1]
    hidden = None if mask is None else ~mask

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        logits = (q * spec.scale) @ k.transpose(-1, -2)
        if spec.softcap:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        if hidden is not None:
            logits = logits.masked_fill(hidden, float("-inf"))
        return logits.softmax(dim=-1) @ v

    return {"": attend}


def torch_sdpa(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, backward: bool
) -> dict[str, Attend]:
    """`scaled_dot_product_attention`: bool and float mask, grouped heads passed as such and repeated."""
    if spec.is_packed or spec.dropout_p or spec.softcap:
        raise Unsupported("torch's SDPA has no packed sequences, no softcap and other dropout bits")
    mask, group = _mask(query, key, spec), query.shape[1] // key.shape[1]
    masks: dict[str, Tensor | None] = {"no mask": None}
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        masks = {"bool mask": mask, "float mask": bias}

    def attention(mask: Tensor | None, is_causal: bool, repeat: bool) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if repeat:
                k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=is_causal,
                scale=spec.scale,
                enable_gqa=group > 1 and not repeat,
            )

        return attend

    heads = {"": False, ", repeated heads": True} if group > 1 else {"": False}
    ways = {m + h: attention(masks[m], False, repeat) for m in masks for h, repeat in heads.items()}
    square = query.shape[2] == key.shape[2] and spec.q_offset == 0 and spec.q_offsets is None
    if (
        spec.is_causal and square and spec.key_mask is None
    ):  # the one case where torch's top-left flag means the same
        ways |= {"is_causal" + h: attention(None, True, repeat) for h, repeat in heads.items()}
    return ways


def torch_flex(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, backward: bool
) -> dict[str, Attend]:
    """Compiled FlexAttention with a block mask; torch gives it no backward on a CPU."""
    if backward and query.device.type == "cpu":
        raise Unsupported("FlexAttention has no backward on a CPU")
    if (
        spec.is_packed
        or spec.dropout_p
        or spec.softcap
        or spec.key_mask is not None
        or spec.q_offsets is not None
    ):
        raise Unsupported("the FlexAttention peer covers a plain causal or full mask only")
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise Unsupported(f"this torch has no FlexAttention: {error}") from error

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + spec.q_offset

    queries, keys = query.shape[2], key.shape[2]
    blocks = (
        create_block_mask(seen, None, None, queries, keys, device=query.device) if spec.is_causal else None
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = query.shape[1] != key.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=blocks, scale=spec.scale, enable_gqa=grouped)

    return {"compiled": attend}


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor, AttentionSpec, bool], dict[str, Attend]]] = {
    "torch-eager": torch_eager,
    "torch-sdpa": torch_sdpa,
    "torch-flex": torch_flex,
}
