"""The same attention without this package: torch and flash-attn at their best, to compare with.

Each peer returns one or more ways to compute it; the benchmark times them all briefly and keeps the fastest.
Masks are built here, once, outside what is timed: a model would share them between its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.reference import visible
from perceiver_kernels.spec import AttentionSpec

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
SDPA_KERNELS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


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
    """`scaled_dot_product_attention`: bool and float mask, grouped heads passed as such and repeated.

    On a GPU also torch's own lower-right causal bias, and each of torch's kernels by name.
    """
    if spec.is_packed or spec.dropout_p or spec.softcap:
        raise Unsupported("torch's SDPA has no packed sequences, no softcap and other dropout bits")
    mask, group = _mask(query, key, spec), query.shape[1] // key.shape[1]
    masks: dict[str, Any] = {"no mask": None}
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        masks = {"bool mask": mask, "float mask": bias}
        if mask.all():  # one query sees all the keys before it
            masks |= {"no mask": None}

    def attention(mask: Any, is_causal: bool, repeat: bool) -> Attend:
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
    if not _has_several_kernels(query.device):
        return ways
    by_kernel = {
        f"{w}, {kernel.lower()}": _with_kernel(kernel, ways[w]) for kernel in SDPA_KERNELS for w in ways
    }
    if _is_lower_right(query, key, spec):  # no mask in memory; torch's other kernels would write one out
        from torch.nn.attention.bias import causal_lower_right  # loads torch's compiler: a second

        bias = causal_lower_right(query.shape[2], key.shape[2])
        by_kernel |= {
            f"lower-right bias{h}, {kernel.lower()}": _with_kernel(kernel, attention(bias, False, repeat))
            for h, repeat in heads.items()
            for kernel in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION")
        }
    return by_kernel


def _has_several_kernels(device: torch.device) -> bool:
    return device.type != "cpu"


def _with_kernel(kernel: str, attend: Attend) -> Attend:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by_one_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.__members__[kernel]):
            return attend(q, k, v)

    return by_one_kernel


def _is_lower_right(query: Tensor, key: Tensor, spec: AttentionSpec) -> bool:
    """Whether the visibility is plainly causal from the bottom right, with a key for every query."""
    offset = key.shape[2] - query.shape[2]
    return (
        spec.is_causal and spec.q_offset == offset >= 0 and spec.q_offsets is None and spec.key_mask is None
    )


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
    torch.compiler.reset()  # or the eighth problem of a process would run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = query.shape[1] != key.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=blocks, scale=spec.scale, enable_gqa=grouped)

    return {"compiled": attend}


def flash_attn(
    module: str, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, backward: bool
) -> dict[str, Attend]:
    """Dao's flash-attn: `module` is "flash_attn" (FlashAttention-2), "flash_attn_interface" (3) or
    "flash_attn.cute" (4)."""
    if spec.is_packed or spec.dropout_p or spec.softcap:
        raise Unsupported("the flash-attn peer covers a plain causal or full mask only")
    if (spec.is_causal and not _is_lower_right(query, key, spec)) or spec.key_mask is not None:
        raise Unsupported("flash-attn is causal from the bottom right alone, and has no key mask")
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise Unsupported("flash-attn takes float16 and bfloat16 alone")
    try:
        attention = import_module(module).flash_attn_func
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise Unsupported(f"the Python module {module} is not installed: {error}") from error

    def with_options(**options: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = (x.transpose(1, 2) for x in (q, k, v))  # it has heads after positions
            result = attention(*rows, causal=spec.is_causal, softmax_scale=spec.scale, **options)
            out: Tensor = result[0] if isinstance(result, tuple) else result  # some versions add the lse
            return out.transpose(1, 2)

        return attend

    if module == "flash_attn":  # splits the keys by a rule of its own
        return {"": with_options()}
    return {"one split": with_options(), "its own splits": with_options(num_splits=0)}


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor, AttentionSpec, bool], dict[str, Attend]]] = {
    "torch-eager": torch_eager,
    "torch-sdpa": torch_sdpa,
    "torch-flex": torch_flex,
    "flash-attn": partial(flash_attn, "flash_attn"),
    "flash-attn-3": partial(flash_attn, "flash_attn_interface"),
    "flash-attn-4": partial(flash_attn, "flash_attn.cute"),
}
GPU_PEERS = ("flash-attn", "flash-attn-3", "flash-attn-4")
