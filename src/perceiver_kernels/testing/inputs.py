"""Tensors for a case: the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.spec import AttentionSpec, accumulator_dtype, make_spec
from perceiver_kernels.testing.cases import Case


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of one call, and the gradients that come back into it."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    dlse: Tensor | None
    kwargs: dict[str, Any]  # options of the public op; those of the packed form include cu_seqlens_q and _k

    def spec(self) -> AttentionSpec:
        """The canonical form of the options."""
        options: dict[str, Any] = dict.fromkeys(("q_offset", "key_mask", "scale", "softcap", "dropout_seed"))
        options |= {"is_causal": True, "dropout_p": 0.0} | self.kwargs
        if "cu_seqlens_q" in options:
            options["cu_seqlens"] = (options.pop("cu_seqlens_q"), options.pop("cu_seqlens_k"))
        return make_spec(self.query, self.key, self.value, **options)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of the public op under these options."""
        op = pk.perceiver_attention_varlen if "cu_seqlens_q" in self.kwargs else pk.perceiver_attention
        out, lse = op(query, key, value, return_lse=True, backend=backend, **self.kwargs)
        return out, lse

    def run(self, backend: str | None) -> dict[str, Tensor]:
        """``out, lse, dq, dk, dv`` of the public op; without ``dlse`` no gradient enters through lse."""
        leaves = tuple(t.detach().requires_grad_() for t in (self.query, self.key, self.value))
        out, lse = self.attend(leaves[0], leaves[1], leaves[2], backend)
        outputs, gradients = (
            ((out,), (self.dout,)) if self.dlse is None else ((out, lse), (self.dout, self.dlse))
        )
        dq, dk, dv = torch.autograd.grad(outputs, leaves, gradients)
        return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def make_inputs(
    case: Case, dtype: torch.dtype, device: str | torch.device | None = None, seed: int = 0
) -> Inputs:
    """Standard normal query, key, value and incoming gradients, and the options that the case names.

    All is drawn on the CPU, so that it is the same on every ``device``; None is torch's default device.
    """
    device = torch.get_default_device() if device is None else device
    with torch.device("cpu"):
        return _make_inputs(case, dtype, device, torch.Generator().manual_seed(seed), seed)


def _make_inputs(
    case: Case, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator, seed: int
) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    kwargs: dict[str, Any] = {"is_causal": case.is_causal}
    if case.lengths is None:
        batch, keys = case.B, case.N
        query = _laid_out(normal, case.strides, case.B, case.H, case.M, case.D)
        key = _laid_out(normal, case.strides, case.B, case.Hkv, case.N, case.D)
        value = _laid_out(normal, case.strides, case.B, case.Hkv, case.N, case.Dv)
        dout = normal(case.B, case.H, case.M, case.Dv)
    else:
        ends = torch.tensor([(0, 0), *case.lengths]).cumsum(0)
        batch, (queries, keys) = len(case.lengths), ends[-1].tolist()
        query, key, value = (
            _laid_out(normal, case.strides, 1, heads, rows, dim).squeeze(0).transpose(0, 1)
            for heads, rows, dim in (
                (case.H, queries, case.D),
                (case.Hkv, keys, case.D),
                (case.Hkv, keys, case.Dv),
            )
        )
        dout = normal(queries, case.H, case.Dv)
        kwargs |= {"cu_seqlens_q": ends[:, 0].to(device), "cu_seqlens_k": ends[:, 1].to(device)}
    lse_shape = (case.H, query.shape[0]) if case.lengths is not None else query.shape[:3]
    dlse = torch.randn(lse_shape, generator=generator).to(device, accumulator_dtype(query))

    if case.q_offset == "per_example":
        offsets = torch.randint(-case.M // 2, max(case.N, 1), (batch,), generator=generator)
        kwargs["q_offset"] = offsets.to(device)
    elif case.q_offset is not None:
        kwargs["q_offset"] = case.q_offset
    if case.key_mask is not None:
        mask = _key_mask(case.key_mask, batch if case.lengths is None else 1, keys, generator).to(device)
        kwargs["key_mask"] = mask if case.lengths is None else mask.squeeze(0)
    for name in ("scale", "softcap"):
        if getattr(case, name) is not None:
            kwargs[name] = getattr(case, name)
    if case.dropout_p:
        kwargs |= {"dropout_p": case.dropout_p, "dropout_seed": 0x0123456789ABCDEF + seed}
    return Inputs(query, key, value, dout, dlse, kwargs)


def _laid_out(
    normal: Callable[..., Tensor], strides: str, batch: int, heads: int, rows: int, dim: int
) -> Tensor:
    """A (B, H, rows, dim) tensor that lies in memory as ``strides`` says."""
    if strides == "transposed":
        tensor = normal(batch, rows, heads, dim).transpose(1, 2)
    elif strides == "sliced":  # out of a wider tensor, from an odd address
        tensor = normal(batch, rows, heads, dim + 5)[..., 3 : 3 + dim].transpose(1, 2)
    elif strides == "expanded":  # one head and one example stand for all
        tensor = normal(1, 1, rows, dim).expand(batch, heads, rows, dim)
    elif strides == "inner":
        tensor = normal(batch, heads, dim, rows).transpose(2, 3)
    else:
        tensor = normal(batch, heads, rows, dim)
    return tensor


def _key_mask(kind: str, batch: int, keys: int, generator: torch.Generator) -> Tensor:
    if kind == "random":
        return torch.rand(batch, keys, generator=generator) < 0.7
    if kind == "dead_example":
        return torch.arange(batch).view(-1, 1).expand(batch, keys) > 0
    lengths = torch.randint(1, max(keys, 1) + 1, (batch, 1), generator=generator)
    right = torch.arange(keys).view(1, -1) < lengths
    return right if kind == "right_padding" else right.flip(1)
