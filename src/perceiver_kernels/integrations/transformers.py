"""The op inside Hugging Face ``transformers``: every model that goes through its attention interface.

    from perceiver_kernels.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="perceiver_kernels")

Grouped-query heads, padding on either side, dynamic and static caches, chunked prefill, assisted decoding,
soft cap, attention sinks, packed documents and attention dropout are served. Nothing of size M x N is built:
in place of a mask the layers get one of four small tensors (see :func:`attention_mask`). What is not served
is refused by name: sliding windows and chunked attention where they hide a key that causality doesn't (never
so when decoding token by token), masks of size M x N, position biases, ``output_attentions``, paged caches.
A query that sees no key gets 0, where ``eager`` gives it the mean of all values: with left padding, the
outputs of the padding differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_kernels.attention import perceiver_attention, perceiver_attention_varlen
from perceiver_kernels.integrations._classes import installed_by

with installed_by("pip install 'perceiver-kernels[transformers]'"):
    from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

NAME = "perceiver_kernels"
_HIDDEN = 1 << 40  # beyond every query
_REFUSED = ("position_bias", "head_mask", "block_table", "read_index")


def register(name: str = NAME) -> None:
    """Make ``attn_implementation=name`` known to transformers: the attention and its mask. Repeatable."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, attention_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What ``AttentionInterface`` calls for each layer.

    Args:
        module: the model's attention layer; its ``is_causal`` counts where neither the mask nor the argument
            says.
        query: (B, H, M, D).
        key, value: (B, Hkv, N, D) and (B, Hkv, N, Dv).
        attention_mask: None, or what :func:`attention_mask` made.
        s_aux: (H,) attention sinks: one more logit per head, which takes its share of the weights.

    Returns:
        (B, M, H, Dv), and None in place of the weights, which are never formed.

    Raises:
        ValueError: for a mask of another kind and for what the op doesn't do.
    """
    for option in _REFUSED:
        if kwargs.get(option) is not None:
            raise ValueError(f"{NAME} takes no {option}: use another attn_implementation")
    if kwargs.get("output_attentions"):
        raise ValueError(
            f'{NAME} never forms the weights: output_attentions needs attn_implementation="eager"'
        )
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "dropout_p": dropout}
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        out, lse = _packed(query, key, value, attention_mask, options)
    else:
        if attention_mask is None:
            options["is_causal"] = getattr(module, "is_causal", True) if is_causal is None else is_causal
        else:
            options |= _visibility(attention_mask, query.shape[0], key.shape[2])
        out, lse = perceiver_attention(query, key, value, **options, return_lse=True)
    if s_aux is not None:  # exp(s_aux) more in the denominator
        share = torch.sigmoid(lse - s_aux.to(lse.dtype).unsqueeze(-1))
        out = out * share.unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What ``AttentionMaskInterface`` calls once for a forward: who sees what.

    In four dimensions, as models expect, but with 1 in place of heads and queries.

    It returns one of

    - None: causal from the bottom right where the layer is causal, and nothing hidden;
    - int64 (B, 1, 1, N): the first query that sees each key, ``_HIDDEN`` more for a hidden key; or, with
      nothing hidden, (1, 1, 1, 1): the first query that sees key 0;
    - bool (B, 1, 1, N) or (1, 1, 1, 1): the keys that all queries see;
    - int32 (B, 1, 1, N): the document of each position, causal within documents.

    Raises:
        ValueError: for a pattern that none of these says, and for a model with an attention of its own, which
            would take them for something else.
    """
    if config is not None and not torch.compiler.is_compiling():
        _check_model(config.__class__)
    padding = _padding(attention_mask, kv_length, kv_offset)
    pattern = _pattern(mask_function)
    if pattern.window is not None and int(q_offset) + q_length - kv_offset <= pattern.window:
        pattern.window = None  # it reaches back to the first key
    if q_length == 1 and not pattern.is_plain:  # a mask of one row is a key mask
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, device=device, **kwargs,
        )  # fmt: skip
    if pattern.unknown or pattern.window is not None:
        what = pattern.unknown or f"a sliding window of {pattern.window}"
        raise ValueError(
            f"{NAME} can't serve {what} with {q_length} queries and {kv_length} keys: "
            f"use another attn_implementation"
        )
    if pattern.documents is not None:  # transformers looks for them only without padding and cache
        return pattern.documents.to(torch.int32)[:, None, None]
    if not pattern.is_causal:
        nothing_hidden = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        return nothing_hidden if padding is None else padding[:, None, None]
    if not allow_is_causal_skip and q_length > 1:
        raise ValueError(
            f"{NAME} makes no M x N mask, which this model works on: use another attn_implementation"
        )
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if padding is None:
        return None if aligned else torch.as_tensor(kv_offset - q_offset, device=device).view(1, 1, 1, 1)
    first = torch.arange(kv_length, device=device) + kv_offset - q_offset
    return torch.where(padding, first, first + _HIDDEN)[:, None, None]


def _check_model(config_type: type[PreTrainedConfig]) -> None:
    """transformers itself asks only when the implementation is changed, not when a model is made."""
    models: Any = MODEL_MAPPING.get(config_type, ())
    for model in models if isinstance(models, tuple) else (models,):
        if not model._can_set_attn_implementation():
            raise ValueError(
                f"{NAME} can't serve {model.__name__}: its attention doesn't go through AttentionInterface"
            )


@dataclass
class _Pattern:
    """A mask function of transformers, taken apart."""

    is_causal: bool = False
    window: int | None = None
    documents: Tensor | None = None  # (B, N) int, rising
    unknown: str = ""

    @property
    def is_plain(self) -> bool:
        return self.window is None and self.documents is None and not self.unknown


def _pattern(mask_function: Callable[..., Any]) -> _Pattern:
    if mask_function in (causal_mask_function, bidirectional_mask_function):  # torch.compile follows this
        return _Pattern(is_causal=mask_function is causal_mask_function)
    pattern = _Pattern()
    for part in _parts(mask_function):
        maker = part.__qualname__.partition(".")[0]  # transformers makes them as closures
        if part is causal_mask_function:
            pattern.is_causal = True
        elif maker == "sliding_window_overlay":
            pattern.window = _closed_over(part, "sliding_window")
        elif maker == "packed_sequence_mask_function":
            pattern.documents = _closed_over(part, "packed_sequence_mask")
        elif part is not bidirectional_mask_function:
            pattern.unknown = f"the mask pattern {maker}"
    return pattern


def _parts(mask_function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The functions of which ``mask_function`` is the intersection."""
    maker = mask_function.__qualname__.partition(".")[0]
    if maker == "and_masks":
        for part in _closed_over(mask_function, "mask_functions"):
            yield from _parts(part)
    elif maker == "remap_positions_for_packed_sequence":  # positions within documents order like those of all
        yield from _parts(_closed_over(mask_function, "mask_function"))
    else:
        yield mask_function


def _closed_over(function: Callable[..., Any], name: str) -> Any:
    return inspect.getclosurevars(function).nonlocals[name]


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """bool (B, N), True = may be attended; None where that is all of them."""
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    padding = F.pad(padding, (0, kv_length - padding.shape[1]))  # slots of a static cache still to come
    return None if not torch.compiler.is_compiling() and bool(padding.all()) else padding


def _visibility(attention_mask: Tensor, batch: int, keys: int) -> dict[str, Any]:
    """The op's options for what :func:`attention_mask` returned."""
    if attention_mask.dtype not in (torch.bool, torch.int64) or attention_mask.shape[1:-1] != (1, 1):
        kind = f"{tuple(attention_mask.shape)} {attention_mask.dtype}".replace("torch.", "")
        raise ValueError(f"{NAME} takes no mask of M x N, which attention_mask {kind} is: give a (B, N) one")
    first = attention_mask[:, 0, 0].expand(batch, -1)
    hides = first.shape[1] > 1 or keys == 1
    if first.dtype == torch.bool:
        return {"is_causal": False, "key_mask": first if hides else None}
    hidden = first >= _HIDDEN // 2
    q_offset = torch.where(hidden[:, 0], _HIDDEN, 0) - first[:, 0]
    return {"is_causal": True, "q_offset": q_offset, "key_mask": ~hidden if hides else None}


def _packed(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents (B, 1, 1, N) over (B, H, N, D): the packed op over all B * N rows."""
    batch, length = query.shape[0], query.shape[2]
    documents = documents[:, 0, 0].expand(batch, -1)
    ids = (documents + torch.arange(batch, device=query.device).unsqueeze(1) * length).flatten()
    counts = torch.unique_consecutive(ids, return_counts=True)[1]
    cu_seqlens = F.pad(counts.cumsum(0), (1, 0))
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    out, lse = perceiver_attention_varlen(
        query, key, value, cu_seqlens, cu_seqlens, **options, return_lse=True
    )
    return (
        torch.unflatten(out, 0, (batch, length)).transpose(1, 2),
        torch.unflatten(lse, 1, (batch, length)).transpose(0, 1),
    )
