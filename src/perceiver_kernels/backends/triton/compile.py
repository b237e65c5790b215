"""Ahead-of-time compilation of a launch for any GPU, without one, to be priced or executed elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from triton import compile as triton_compile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from perceiver_kernels.backends.triton.launch import Launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
_ALIGNED = [["tt.divisibility", 16]]


def make_target(arch: str) -> GPUTarget:
    """``sm_80`` or ``gfx942`` as Triton names it."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def compile_launch(launch: Launch, arch: str) -> Any:
    """Triton's compiled kernel for ``arch``, as a GPU would get it: ``asm`` holds ptx and cubin, or amdgcn.

    Tensors may be on the meta device: they count as aligned to 16 bytes. Raises ``RuntimeError`` under
    Triton's interpreter, whose kernels have no compiled form.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("kernels can't be compiled under TRITON_INTERPRET=1")
    values = launch.arguments | launch.constants
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        specialised = not parameter.do_not_specialize
        kind = (
            "constexpr"
            if parameter.is_constexpr or (specialised and isinstance(value, int) and value == 1)
            else _type_of(value)
        )
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif specialised and kind != "fp32" and _is_aligned(value):
            attributes[(place,)] = _ALIGNED
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton_compile(source, target=make_target(arch), options=launch.options)


def _type_of(value: Any) -> str:
    if value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_aligned(value: Any) -> bool:
    address = (0 if value.is_meta else value.data_ptr()) if isinstance(value, torch.Tensor) else value
    return bool(address % 16 == 0)
