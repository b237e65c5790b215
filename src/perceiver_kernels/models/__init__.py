"""Whole models built on the layers."""

from perceiver_kernels.models.config import PerceiverARConfig
from perceiver_kernels.models.perceiver_ar import PerceiverAR
from perceiver_kernels.models.perceiver_io import Perceiver, PerceiverIO, PerceiverIOConfig
from perceiver_kernels.models.presets import PRESETS

__all__ = ["PRESETS", "Perceiver", "PerceiverAR", "PerceiverARConfig", "PerceiverIO", "PerceiverIOConfig"]
