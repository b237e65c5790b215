"""Whole models built on the layers."""

from perceiver_kernels.models.config import PerceiverARConfig
from perceiver_kernels.models.perceiver_ar import PerceiverAR
from perceiver_kernels.models.perceiver_io import Perceiver, PerceiverIO, PerceiverIOConfig

__all__ = ["Perceiver", "PerceiverAR", "PerceiverARConfig", "PerceiverIO", "PerceiverIOConfig"]
