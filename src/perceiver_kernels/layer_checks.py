"""What is no call of a layer: refused before anything runs, and before ranks wait for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from perceiver_kernels.attention import autocast_dtype
from perceiver_kernels.checks import check_device, check_tensor
from perceiver_kernels.spec import check_dtype, dtype_name
from perceiver_kernels.streaming import Recomputed

if TYPE_CHECKING:
    from perceiver_kernels.layers import CrossAttention


def check_call(
    layer: CrossAttention, latents: Any, prefix: Any, key_mask: Any, positions: Any, rotary: Any
) -> int:
    """Refuse what :meth:`CrossAttention.forward` can't serve; returns the prefix's length."""
    check_tensor("latents", latents)
    check_dtype("latents", latents)
    if latents.dim() != 3 or latents.shape[-1] != layer.dim:
        raise ValueError(f"latents must be (B, M, {layer.dim}), got {tuple(latents.shape)}")
    length = 0 if prefix is None else _check_prefix(layer, latents, prefix)
    batch, total = latents.shape[0], length + latents.shape[1]
    if key_mask is not None:
        check_tensor("key_mask", key_mask)
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be bool, got {dtype_name(key_mask.dtype)}")
        if key_mask.shape != (batch, total):
            raise ValueError(
                f"key_mask must be ({batch}, {total}), prefix and latents, got {tuple(key_mask.shape)}"
            )
        check_device("key_mask", key_mask, "latents", latents)
    if rotary is not None and positions is not None:
        raise ValueError("give either positions or rotary, not both")
    given = [] if positions is None else [("positions", positions, 0)]
    if rotary is not None:
        if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
            raise TypeError(f"rotary must be cos and sin, a pair of tensors, got {type(rotary).__name__}")
        given = [(name, t, 1) for name, t in zip(("cos", "sin"), rotary, strict=True)]
    for name, tensor, channels in given:
        check_tensor(name, tensor)
        shape = tensor.shape[: tensor.dim() - channels]
        if shape not in ((total,), (batch, total)):
            raise ValueError(
                f"rotary positions must be ({total},) or ({batch}, {total}), prefix and latents; "
                f"{name} is {tuple(shape)}"
            )
        check_device(name, tensor, "latents", latents)
    if rotary is not None:
        _check_pairs(layer, *rotary)
    return length


def _check_pairs(layer: CrossAttention, cos: Tensor, sin: Tensor) -> None:
    if cos.shape != sin.shape:
        raise ValueError(f"cos and sin must have one shape, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if 2 * cos.shape[-1] > layer.head_dim:
        raise ValueError(
            f"cos has {cos.shape[-1]} pairs of channels, "
            f"which is more than the head dim {layer.head_dim} holds"
        )


def _check_prefix(layer: CrossAttention, latents: Tensor, prefix: Any) -> int:
    kind = type(prefix).__name__
    if not layer.streamed and not isinstance(prefix, Tensor):
        raise TypeError(f"prefix must be a torch.Tensor where the layer is not streamed, got {kind}")
    if isinstance(prefix, Recomputed):
        if layer.training and layer.prefix_dropout > 0.0:
            prefix.keep(latents.new_empty(0, 0))  # refuses where there is no way to
        return prefix.length
    if not isinstance(prefix, (Tensor, np.ndarray)):
        raise TypeError(f"prefix must be a tensor, a numpy array or Recomputed, got {kind}")
    batch = latents.shape[0]
    if prefix.ndim != 3 or prefix.shape[0] != batch or prefix.shape[-1] != layer.dim:
        raise ValueError(f"prefix must be ({batch}, N - M, {layer.dim}), got {tuple(prefix.shape)}")
    dtype = prefix.dtype
    if isinstance(prefix, np.ndarray):
        try:
            dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        except (TypeError, ValueError) as error:  # objects, another byte order
            raise TypeError(f"prefix must be of a dtype that torch has, too, got {dtype!r}") from error
    elif not layer.streamed:
        check_device("prefix", prefix, "latents", latents)
        both = torch.promote_types(dtype, latents.dtype)
        if autocast_dtype(both, latents.device) != autocast_dtype(latents.dtype, latents.device):
            raise TypeError(f"prefix is {dtype_name(dtype)}, but latents is {dtype_name(latents.dtype)}")
    if dtype.is_complex:
        raise TypeError(f"prefix must hold real numbers, got {dtype_name(dtype)}")
    return int(prefix.shape[1])
