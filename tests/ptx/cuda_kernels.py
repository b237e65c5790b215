"""The package's CUDA kernels: compiled, launched on the machine as the host would, and priced."""

from __future__ import annotations

import functools
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perceiver_kernels.testing.inputs import Inputs
from ptx.findings import Report
from ptx.machine import launch
from ptx.mutate import Mutant
from ptx.nvcc_ptx import NVCC, compile_cuda

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.sass import price  # noqa: E402
from benchmarks.sass.price import Report as Price  # noqa: E402

if NVCC is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)

CSRC = ROOT / "csrc"


@functools.cache
def entries(source: Path) -> dict[str, str]:
    """The kernels of a source, each by itself as a module."""
    arch = "compute_90a" if source.parent.name == "hopper" else "compute_80"
    module = compile_cuda(source, f"-I{CSRC}", arch=arch)
    head, *bodies = re.split(r"(?=^\.visible \.entry )", module, flags=re.MULTILINE)
    names = [re.match(r"\.visible \.entry (\w+)", body)[1] for body in bodies]  # type: ignore[index]
    return {name: head + body for name, body in zip(names, bodies, strict=True)}


def element_type(name: str) -> torch.dtype:
    """Of a kernel, by its mangled name."""
    return torch.float16 if "6__half" in name else torch.bfloat16


@dataclass(frozen=True)
class Launch:
    source: Path
    name: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    arguments: tuple[Any, ...]  # the struct's fields
    written: tuple[Tensor, ...]

    def run(self, ptx: str | None = None) -> Report:
        """On the machine; what is to be written counts as unwritten before."""
        for tensor in self.written:
            tensor.untyped_storage().fill_(0xFF)  # NaN
        return launch(
            ptx or entries(self.source)[self.name],
            self.name,
            self.grid,
            self.threads,
            [self.arguments],
            shared=self.shared,
        )


def view(tensor: Any, strides: tuple[int, ...]) -> tuple[Any, bytes]:
    return tensor, struct.pack("<3q", *strides)


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Of example, head and row."""
    return (0, tensor.stride(1), tensor.stride(0)) if tensor.dim() == 3 else tensor.stride()[:3]


def problem_sizes(inputs: Inputs) -> tuple[int, int, int]:
    """Examples, queries and keys; packed, those of the longest sequences."""
    spec = inputs.spec()
    if spec.cu_seqlens_q is None or spec.cu_seqlens_k is None:
        return len(inputs.query), inputs.query.shape[-2], inputs.key.shape[-2]
    queries, keys = (int(lengths.diff().max()) for lengths in (spec.cu_seqlens_q, spec.cu_seqlens_k))
    return len(spec.cu_seqlens_q) - 1, queries, keys


def poison_unseen(inputs: Inputs) -> None:
    """NaN in the keys and values that the mask hides or no query reaches."""
    spec = inputs.spec()
    if spec.is_packed:
        hidden = torch.zeros(1, 0) if spec.key_mask is None else ~spec.key_mask
        for tensor in (inputs.key, inputs.value):
            tensor.transpose(0, 1)[:, hidden.reshape(-1).nonzero().flatten()] = torch.nan
        return
    batch, queries, keys = len(inputs.query), inputs.query.shape[2], inputs.key.shape[2]
    offsets = spec.q_offsets if spec.q_offsets is not None else torch.full((batch,), spec.q_offset)
    hidden = torch.zeros(batch, keys, dtype=torch.bool) if spec.key_mask is None else ~spec.key_mask
    if spec.is_causal:
        hidden = hidden | (torch.arange(keys) > offsets[:, None] + queries - 1)
    for tensor in (inputs.key, inputs.value):
        tensor.masked_fill_(hidden[:, None, :, None], torch.nan)


def harmless(mutant: Mutant, ptx: str) -> bool:
    """Mutants that are correct kernels still, as a look at the code shows."""
    if mutant.kind == "delete a commit":  # its copies join a group that every wait includes anyway
        rest = ptx.split("\n")[mutant.line :]
        control = r"^\s*(cp\.async\.commit|cp\.async\.wait|bar\.sync|bra|@\S+ bra)"
        after = re.search(control, "\n".join(rest), re.MULTILINE)
        return after is not None and after[1] == "cp.async.commit"
    return False


def price_entry(source: Path, name: str, threads: int, shared: int, folder: Path) -> Price:
    """On an A100."""
    ptx, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx.write_text(entries(source)[name])
    subprocess.run(["ptxas", "-arch=sm_80", "-O3", "-o", str(binary), str(ptx)], check=True)
    return price(binary, threads=threads, shared=shared)
