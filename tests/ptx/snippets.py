"""Small kernels for tests: a few lines of PTX put into a module, run on rows of inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from .findings import Report
from .lanes import Array
from .machine import Dim, empty, launch

HEADER = ".version 8.8\n.target sm_80\n.address_size 64\n"
REGS = """
    .reg .pred %p<16>;
    .reg .b16 %h<16>;
    .reg .b32 %r<64>;
    .reg .f32 %f<32>;
    .reg .b64 %rd<32>;
    .reg .f64 %fd<16>;
"""
_WIDTH = {"b16": 2, "b32": 4, "b64": 8}


def module(body: str, params: int = 2, shared: int = 0, outside: str = "") -> str:
    """A kernel `k` with pointer parameters in %rd1, %rd2, ...; %r1 is the thread; `smem` the shared array."""
    names = [f"k_param_{i}" for i in range(params)]
    declared = ",\n".join(f"    .param .u64 {name}" for name in names)
    loads = "\n".join(f"    ld.param.u64 %rd{i + 1}, [{name}];" for i, name in enumerate(names))
    array = f"    .shared .align 16 .b8 smem[{shared}];\n" if shared else ""
    start = f"{REGS}{array}{loads}\n    mov.u32 %r1, %tid.x;\n"
    return f"{HEADER}{outside}\n.visible .entry k(\n{declared}\n)\n{{\n{start}{body}\n    ret;\n}}\n"


def run(
    body: str, *args: Any, block: Dim = 32, grid: Dim = 1, shared: int = 0, outside: str = "", **options: Any
) -> Report:
    return launch(module(body, len(args), shared, outside), "k", grid, block, args, **options)


def evaluate(code: str, inputs: list[Array], out: Any = np.uint32, threads: int | None = None) -> Array:
    """Run `code` on each element: inputs arrive in %a0, %a1, ..., the result is taken from %d.

    Registers are as wide as the arrays' items; %P0.. are predicates.
    """
    count = len(inputs[0]) if inputs else threads or 32
    result = empty(count, out)
    lines = []
    for i, array in enumerate(inputs):
        size = array.itemsize
        lines.append(f".reg .b{8 * max(size, 2)} %a{i};")
        lines.append(f"mul.wide.u32 %rd20, %r1, {size}; add.u64 %rd20, %rd20, %rd{i + 1};")
        lines.append(f"ld.global.b{8 * size} %a{i}, [%rd20];")
    size = np.dtype(out).itemsize
    lines.append(f".reg .b{8 * size} %d; .reg .pred %P<8>;")
    lines.append(code)
    lines.append(f"mul.wide.u32 %rd20, %r1, {size}; add.u64 %rd20, %rd20, %rd{len(inputs) + 1};")
    lines.append(f"st.global.b{8 * size} [%rd20], %d;")
    run("\n".join(lines), *inputs, result, block=count)
    values: Array = result.array
    return values
