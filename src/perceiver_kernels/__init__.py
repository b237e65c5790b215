"""Perceiver AR attention: few queries over a very long input, bottom-right causal, forward and backward."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from perceiver_kernels import _library
from perceiver_kernels._version import __version__
from perceiver_kernels.attention import perceiver_attention, perceiver_attention_varlen
from perceiver_kernels.dispatch import available_backends
from perceiver_kernels.merge import merge_attention

if _library.missing is not None:  # calls go to torch's own attention then: not silently
    warnings.warn(
        f"perceiver_kernels has no cpu backend here: {_library.missing}", RuntimeWarning, stacklevel=2
    )

if TYPE_CHECKING:
    from perceiver_kernels.distributed import context_parallel_attention
    from perceiver_kernels.layers import CrossAttention
    from perceiver_kernels.models import PerceiverAR, PerceiverARConfig
    from perceiver_kernels.streaming import Recomputed

__all__ = [
    "CrossAttention",
    "PerceiverAR",
    "PerceiverARConfig",
    "Recomputed",
    "__version__",
    "available_backends",
    "context_parallel_attention",
    "merge_attention",
    "perceiver_attention",
    "perceiver_attention_varlen",
]

_LAZY = {
    "CrossAttention": "perceiver_kernels.layers",
    "PerceiverAR": "perceiver_kernels.models",
    "PerceiverARConfig": "perceiver_kernels.models",
    "Recomputed": "perceiver_kernels.streaming",
    "context_parallel_attention": "perceiver_kernels.distributed",
}


def __getattr__(name: str) -> Any:
    """Layers and models load when first asked for, so that importing the op alone stays cheap."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
