"""Perceiver AR attention: few queries over a very long input, bottom-right causal, forward and backward."""

from ._version import __version__
from .attention import perceiver_attention, perceiver_attention_varlen
from .dispatch import available_backends
from .merge import merge_attention

__all__ = [
    "__version__",
    "available_backends",
    "merge_attention",
    "perceiver_attention",
    "perceiver_attention_varlen",
]
