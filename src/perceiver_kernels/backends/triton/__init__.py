"""Triton kernels: forward with a split over keys, backward with keys stationary, for NVIDIA and AMD GPUs.

Without a GPU they run under Triton's interpreter: set ``TRITON_INTERPRET=1`` before the process starts.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels._compile import constant_result
from perceiver_kernels.backends.triton.configs import Config, Device, backward_config, forward_config
from perceiver_kernels.spec import AttentionSpec, dtype_name, empty_gradients, empty_outputs

MAX_HEAD_DIM = 256
_INTERPRETER_PROCESSORS = 6  # so that the interpreter, too, splits


def unavailable(device: torch.device) -> str | None:
    """None where this backend can run on ``device``, else the reason and what to do about it."""
    if not _installed():
        return "triton is not installed; `pip install 'perceiver-kernels[triton]'` brings it (Linux only)"
    if device.type == "cpu":
        if _interpreted():
            return None
        return "runs on cuda tensors; on cpu only under Triton's interpreter (TRITON_INTERPRET=1), slowly"
    if device.type != "cuda":
        return f"runs on cuda tensors, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA or HIP device"
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (A100, RTX 30) or newer"
    return None


@constant_result  # torch 2.11 and older can't trace find_spec
def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:
        return False


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, needs_gradient: bool
) -> list[str]:
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
    if lengths[0] * heads + lengths[1] >= 2**31 - 2**20:
        reasons.append("rows of one key head and keys together are counted in 31 bits")
    return reasons


def forward(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, laid out as :func:`perceiver_kernels.spec.empty_outputs` says."""
    out, lse = empty_outputs(query, value)
    query, key, value = _operands(query, key, value)
    result = out if out.dtype == query.dtype else torch.empty_like(out, dtype=query.dtype)
    launch, device = _launch(), _device(query.device)
    problem = launch.make_problem(query, key, value, spec)

    def run(config: Config) -> None:
        for kernel in launch.forward_launches(problem, query, key, value, result, lse, device, config):
            kernel.run()

    with _on(query.device):
        default = forward_config(problem.rows, max(problem.D, problem.DV), problem.dtype, device.arch)
        run(_tuned("forward", problem, device, default, run))
    _deliver(out, result)
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
    results = tuple(_operands(*gradients))
    dout, query, key, value, out = _operands(dout, query, key, value, out)
    tensors = (dout, dlse, query, key, value, out, lse, results)
    launch, device = _launch(), _device(query.device)
    problem = launch.make_problem(query, key, value, spec)

    def run(config: Config) -> None:
        for kernel in launch.backward_launches(problem, *tensors, device, config):
            kernel.run()

    with _on(query.device):
        default = backward_config(problem.M, max(problem.D, problem.DV), problem.dtype, device.arch)
        run(_tuned("backward", problem, device, default, run))
    for gradient, result in zip(gradients, results, strict=True):
        _deliver(gradient, result)
    return gradients


def _launch() -> Any:
    """The kernels come with the first call: triton is optional, and importing it takes a second."""
    from perceiver_kernels.backends.triton import launch

    return launch


def _tuned(kind: str, problem: Any, device: Device, default: Config, run: Callable[[Config], None]) -> Config:
    from perceiver_kernels.backends.triton import tuning

    return tuning.tuned(kind, problem, device, default, run) if tuning.enabled() else default


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Triton launches on torch's current device; its interpreter warns of every infinity and NaN."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield


@functools.lru_cache(maxsize=64)
def _device(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device("interpreter", _INTERPRETER_PROCESSORS)
    properties = torch.cuda.get_device_properties(device)
    arch = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Device(arch.split(":")[0], properties.multi_processor_count)


def _operands(*tensors: Tensor) -> list[Tensor]:
    """What the kernels take: head dims contiguous; and float32 for bfloat16 under the interpreter, which
    multiplies that type's bit patterns instead of its values (Triton issue 11584)."""
    if tensors[0].dtype == torch.bfloat16 and _interpreted():
        return [tensor.float().contiguous() for tensor in tensors]
    return [t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format) for t in tensors]


def _deliver(tensor: Tensor, result: Tensor) -> None:
    if tensor is not result:
        tensor.copy_(result)
