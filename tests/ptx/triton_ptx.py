"""Triton kernels: compiled for sm_80 without a GPU, launched on the machine."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .findings import Report
from .machine import Dim, launch, parsed


def compile_triton(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    aligned: Sequence[str] = (),
    num_warps: int = 4,
    num_stages: int = 2,
    **options: Any,
) -> Any:
    """Compile an @triton.jit function for sm_80. `signature` gives the types of the arguments that are not
    constexprs; `aligned` names those that are multiples of 16, as Triton's launcher would find by itself."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = list(kernel.arg_names)
    types = {name: signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature=types, constexprs=dict(constexprs), attrs=attrs)
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), "ptx-machine-triton"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compile(
            source,
            target=GPUTarget("cuda", 80, 32),
            options={"num_warps": num_warps, "num_stages": num_stages, **options},
        )


def launch_triton(compiled: Any, grid: Dim, args: Sequence[Any], **options: Any) -> Report:
    """Launch with the kernel's own arguments, without the constexprs; Triton's scratch pointers are null."""
    ptx = options.pop("ptx", None) or compiled.asm["ptx"]
    name = compiled.metadata.name
    hidden = len(parsed(ptx).functions[name].params) - len(args)
    if hidden not in (0, 1, 2):
        raise ValueError(f"{name} takes {hidden + len(args)} parameters, given {len(args)}")
    block = 32 * compiled.metadata.num_warps
    return launch(
        ptx, name, grid, block, [*args, *[None] * hidden], shared=compiled.metadata.shared, **options
    )
