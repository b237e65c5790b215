"""Whole models built on the layers."""

from perceiver_kernels.models.perceiver_ar import PerceiverAR, PerceiverARConfig

__all__ = ["PerceiverAR", "PerceiverARConfig"]
