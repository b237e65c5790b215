"""Whole models built on the layers."""

from perceiver_kernels.models.perceiver_ar import PerceiverAR, PerceiverARConfig
from perceiver_kernels.models.perceiver_io import Perceiver, PerceiverIO, PerceiverIOConfig

__all__ = ["Perceiver", "PerceiverAR", "PerceiverARConfig", "PerceiverIO", "PerceiverIOConfig"]
