"""The specification as a backend: runs wherever torch runs, slowly, with the whole score matrix in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.reference import backward, forward
from perceiver_kernels.spec import AttentionSpec

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def unavailable(device: torch.device) -> str | None:
    """None where this backend can run on ``device``, else the reason and what to do about it."""
    return "the meta device holds no data" if device.type == "meta" else None


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, needs_gradient: bool
) -> list[str]:
    """Every reason why this backend can't serve the call: none, it is the specification."""
    return []
