"""Attention over keys in several tensors: each by itself, merged as it comes, nothing concatenated.

The backward of every segment starts from the *merged* ``(out, lse)``: then P = exp(score - lse) and delta are
those of the whole call, and its gradients are exact without a derivative of the merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from perceiver_kernels.merge import RunningMerge
from perceiver_kernels.spec import AttentionSpec, accumulator_dtype


def segment_specs(spec: AttentionSpec, keys: Sequence[Tensor]) -> Iterator[AttentionSpec]:
    """The call restricted to each segment in turn."""
    begin = 0
    for key in keys:
        end = begin + key.shape[2]
        yield spec.over_keys(begin, end)
        begin = end


def forward(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], spec: AttentionSpec, backend: ModuleType
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` over all segments together."""
    merge = RunningMerge()
    for key, value, part in zip(keys, values, segment_specs(spec, keys), strict=True):
        merge.add(*backend.forward(query, key, value, part))
    return merge.result()


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    backend: ModuleType,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """``(dq, dks, dvs)`` from the residuals of the whole."""
    dq = torch.zeros_like(query, dtype=accumulator_dtype(query))
    dks, dvs = [], []
    for key, value, part in zip(keys, values, segment_specs(spec, keys), strict=True):
        dq_part, dk, dv = backend.backward(dout, dlse, query, key, value, out, lse, part)
        dq += dq_part
        dks.append(dk)
        dvs.append(dv)
    return dq.to(query.dtype), dks, dvs
