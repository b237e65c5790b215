"""The C++ kernels for CPUs: fused forward, backward and decode, with nothing of size M x N in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels import _library
from perceiver_kernels.spec import AttentionSpec, empty_gradients, empty_outputs

MAX_HEAD_DIM = 512


def unavailable(device: torch.device) -> str | None:
    """None where this backend can run on ``device``, else the reason and what to do about it."""
    if device.type != "cpu":
        return f"runs on cpu tensors, not on {device.type}"
    return _library.missing


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, needs_gradient: bool
) -> list[str]:
    """Every reason why this backend can't serve the call."""
    return [
        f"{name} has head dim {tensor.shape[-1]}; the kernels take up to {MAX_HEAD_DIM}"
        for name, tensor in (("query", query), ("value", value))
        if tensor.shape[-1] > MAX_HEAD_DIM
    ]


def forward(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, laid out as :func:`perceiver_kernels.spec.empty_outputs` says."""
    out, lse = empty_outputs(query, value)
    inputs = [_channels_contiguous(tensor) for tensor in (query, key, value)]
    torch.ops.perceiver_kernels.cpu_forward(*inputs, *spec.options(), out, lse)
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
    gradients = empty_gradients(query, key, value)
    outputs = [_channels_contiguous(tensor) for tensor in gradients]
    dout, query, key, value, out = (_channels_contiguous(tensor) for tensor in (dout, query, key, value, out))
    torch.ops.perceiver_kernels.cpu_backward(
        dout, dlse, query, key, value, out, lse, *spec.options(), *outputs
    )
    for gradient, output in zip(gradients, outputs, strict=True):
        if gradient is not output:
            gradient.copy_(output)
    return gradients


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """:func:`perceiver_kernels.rotary.apply_rotary` in one pass, or back; angles in accumulators' dtype."""
    out = torch.empty(x.shape, dtype=x.dtype)
    angles = cos.contiguous(), sin.contiguous()
    torch.ops.perceiver_kernels.cpu_rotate(_channels_contiguous(x), *angles, interleaved, inverse, out)
    return out


def _channels_contiguous(tensor: Tensor) -> Tensor:
    if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # contiguous() leaves an empty tensor as it is
