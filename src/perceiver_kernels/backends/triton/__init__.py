"""Triton kernels: forward with a split over keys, backward with keys stationary, for NVIDIA and AMD GPUs.

Without a GPU they run under Triton's interpreter: set ``TRITON_INTERPRET=1`` before the process starts.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.spec import AttentionSpec, dtype_name, empty_gradients, empty_outputs

MAX_HEAD_DIM = 256
_INTERPRETER_SLOTS = 6  # so that the interpreter, too, splits


def unavailable(device: torch.device) -> str | None:
    """None where this backend can run on ``device``, else the reason and what to do about it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install 'perceiver-kernels[triton]'` brings it (Linux only)"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            return None
        return "runs on cuda tensors; on cpu only under Triton's interpreter (TRITON_INTERPRET=1), slowly"
    if device.type != "cuda":
        return f"runs on cuda tensors, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA or HIP device"
    return None


def unsupported(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> list[str]:
    """Every reason why this backend can't serve the call."""
    reasons = [
        f"{name} has head dim {tensor.shape[-1]}; the kernels take multiples of 8 up to {MAX_HEAD_DIM}"
        for name, tensor in (("query", query), ("value", value))
        if tensor.shape[-1] % 8 or tensor.shape[-1] > MAX_HEAD_DIM
    ]
    if query.dtype == torch.float64:
        reasons.append(f"query is {dtype_name(query.dtype)}; the kernels take float32, bfloat16 and float16")
    lengths = (query.shape[0], key.shape[0]) if spec.is_packed else (query.shape[2], key.shape[2])
    heads = query.shape[1] // key.shape[1]
    if max(lengths[0] * heads, lengths[1]) >= 2**31 - 256:
        reasons.append("rows of one key head and keys are counted in 31 bits")
    return reasons


def forward(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, laid out as :func:`perceiver_kernels.spec.empty_outputs` says."""
    launch, configs = _modules()
    out, lse = empty_outputs(query, value)
    inputs = [_channels_contiguous(tensor) for tensor in (query, key, value)]
    arch, processors = _device(query.device)
    problem = launch.make_problem(query, key, value, spec)
    config = configs.forward_config(problem.rows, max(problem.D, problem.DV), query.element_size(), arch)
    for kernel in launch.forward_launches(*inputs, out, lse, spec, config, processors):
        kernel.run()
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
    launch, configs = _modules()
    gradients = empty_gradients(query, key, value)
    outputs = tuple(_channels_contiguous(tensor) for tensor in gradients)
    dout, query, key, value, out = (_channels_contiguous(tensor) for tensor in (dout, query, key, value, out))
    arch, processors = _device(query.device)
    problem = launch.make_problem(query, key, value, spec)
    config = configs.backward_config(problem.rows, max(problem.D, problem.DV), query.element_size(), arch)
    residuals = (query, key, value, out, lse.contiguous())
    for kernel in launch.backward_launches(dout, dlse, *residuals, outputs, spec, config, processors):
        kernel.run()
    for gradient, output in zip(gradients, outputs, strict=True):
        if gradient is not output:
            gradient.copy_(output)
    return gradients


def _modules() -> tuple[Any, Any]:
    """The kernels are imported with the first call: triton is optional, and importing it takes a second."""
    from perceiver_kernels.backends.triton import configs, launch

    return launch, configs


@functools.lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[str, int]:
    if device.type == "cpu":
        return "interpreter", _INTERPRETER_SLOTS
    properties = torch.cuda.get_device_properties(device)
    arch = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return arch, properties.multi_processor_count


def _channels_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)
