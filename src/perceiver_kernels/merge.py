"""Exact merge of attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perceiver_kernels.checks import check_device
from perceiver_kernels.spec import check_dtype, dtype_name


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What one call over all keys gives, from calls over disjoint parts of them.

    With ``lse = logsumexp_p lses[p]``, ``out = sum_p exp(lses[p] - lse) * outs[p]`` (Dao et al. 2023,
    Flash-Decoding).
    Sums are in lse's precision; plain torch operations, so gradients flow to every part.

    Args:
        outs: the parts' outputs, each (B, H, M, Dv).
        lses: the parts' log-sum-exps, each (B, H, M) float32 or float64; -inf where a part saw no key,
            whatever its out holds there. A row that saw none in any part gives out 0 and lse -inf with zero
            gradients.

    Returns:
        ``(out, lse)``: (B, H, M, Dv) in the dtype of ``outs``, (B, H, M) in that of ``lses``.

    Raises:
        TypeError: the arguments are no sequences of floating-point tensors, or of mixed dtypes.
        ValueError: no parts, unequal numbers of them, shapes that don't belong together, or several devices.
    """
    for name, parts_given in (("outs", outs), ("lses", lses)):
        if not isinstance(parts_given, Sequence):
            raise TypeError(f"{name} must be a sequence of tensors, got {type(parts_given).__name__}")
    outs, lses = tuple(outs), tuple(lses)
    _check(outs, lses)
    parts = torch.stack(lses)
    peak = parts.detach().amax(0)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = torch.exp(parts - peak)
    total = weights.sum(0)
    dead = total == 0.0
    total = total.masked_fill(dead, 1.0)
    shares = (weights / total).unsqueeze(-1)
    stacked = torch.stack(outs).masked_fill_((parts == -torch.inf).unsqueeze(-1), 0.0)  # 0 * NaN is NaN
    out = (shares * stacked).sum(0)
    lse = (peak + torch.log(total)).masked_fill(dead, -torch.inf)
    return out.to(outs[0].dtype), lse


class RunningMerge:
    """:func:`merge_attention` of parts that come one by one, without gradients and in constant memory."""

    def __init__(self) -> None:
        self._out: Tensor | None = None  # sum of exp(lse - peak) * out, in lse's precision

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Take in one more part; shapes as for :func:`merge_attention`."""
        if self._out is None:
            self._dtype, self._out = out.dtype, out.to(lse.dtype, copy=True)
            self._peak, self._total = lse.clone(), (lse != -torch.inf).to(lse.dtype)
            return
        peak = torch.maximum(self._peak, lse)
        finite = peak.masked_fill(peak == -torch.inf, 0.0)
        old, new = torch.exp(self._peak - finite), torch.exp(lse - finite)
        self._out.mul_(old.unsqueeze(-1)).addcmul_(out.to(lse.dtype), new.unsqueeze(-1))
        self._total.mul_(old).add_(new)
        self._peak.copy_(peak)  # in place like the rest: what stays in memory stays where it is

    def result(self) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of the parts so far, at least one; nothing may be added afterwards."""
        assert self._out is not None
        total = self._total.masked_fill(self._total == 0.0, 1.0)
        return self._out.div_(total.unsqueeze(-1)).to(self._dtype), self._peak + torch.log(total)


def _check(outs: tuple[Tensor, ...], lses: tuple[Tensor, ...]) -> None:
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be equally many, at least 1, got {len(outs)} and {len(lses)}")
    for name, tensors in (("outs", outs), ("lses", lses)):
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{i}] must be a torch.Tensor, got {type(tensor).__name__}")
            check_dtype(f"{name}[{i}]", tensor)
            check_device(f"{name}[{i}]", tensor, "outs[0]", outs[0])
            if tensor.dtype != tensors[0].dtype:
                kinds = dtype_name(tensor.dtype), dtype_name(tensors[0].dtype)
                raise TypeError(f"{name}[{i}] is {kinds[0]}, but {name}[0] is {kinds[1]}")
            if tensor.shape != tensors[0].shape:
                shapes = tuple(tensor.shape), tuple(tensors[0].shape)
                raise ValueError(f"{name}[{i}] has shape {shapes[0]}, but {name}[0] has {shapes[1]}")
    if lses[0].dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lses must be float32 or float64, got {dtype_name(lses[0].dtype)}")
    if outs[0].shape[:-1] != lses[0].shape:
        raise ValueError(
            f"lses must have outs' shape without its last dimension, got {tuple(lses[0].shape)} "
            f"for {tuple(outs[0].shape)}"
        )
