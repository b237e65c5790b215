"""Images as one token for each channel of each pixel."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from perceiver_kernels.data.modality import Modality, at_least

Order = Literal["raster", "planes"]


class Images(Modality[Tensor]):
    """Images of one size: uint8 (height, width, channels), as files decode to.

    A channel has a range of tokens of its own, ``channel * levels + value``, so a model knows what it sees,
    and :meth:`allowed` what it may write.

    Args:
        height, width, channels: size of every image.
        order: ``"raster"`` goes through the pixels row by row and writes r, g, b of each (PixelRNN, van den
            Oord et al. 2016; Perceiver AR's ImageNet); ``"planes"`` writes all of r, then all of g, then b.
        levels: values are 0 ... levels - 1.
    """

    axes = ("row", "column", "channel")
    longest: int

    def __init__(
        self, height: int, width: int, channels: int = 3, *, order: Order = "raster", levels: int = 256
    ) -> None:
        at_least(1, height=height, width=width, channels=channels, levels=levels)
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {order!r}")
        if levels > 256:
            raise ValueError(f"levels must be at most 256, which is what uint8 holds, got {levels}")
        self.shape, self.order, self.levels = (height, width, channels), order, levels
        self.vocab_size, self.kinds = channels * levels, channels
        self.longest = height * width * channels

    def __repr__(self) -> str:
        return f"Images({', '.join(map(str, self.shape))}, order={self.order!r}, levels={self.levels})"

    def encode(self, sample: Tensor) -> Tensor:
        """An image, uint8 (height, width, channels), to tokens (longest,)."""
        if sample.dtype != torch.uint8:
            raise TypeError(f"sample must be uint8, got {sample.dtype}")
        if sample.shape != self.shape:
            raise ValueError(f"sample must be {self.shape}, got {tuple(sample.shape)}")
        values = sample.to("cpu", torch.int64)
        if int(values.max()) >= self.levels:
            raise ValueError(f"sample must hold values below {self.levels}, got {int(values.max())}")
        tokens = values + self.levels * torch.arange(self.shape[2])
        return (tokens if self.order == "raster" else tokens.permute(2, 0, 1)).flatten()

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (longest,) to the image, uint8 (height, width, channels)."""
        values = (self.check(tokens) % self.levels).to(torch.uint8)
        height, width, channels = self.shape
        if self.order == "raster":
            return values.reshape(self.shape)
        return values.reshape(channels, height, width).permute(1, 2, 0).contiguous()

    def positions(self, length: int) -> Tensor:
        """Row, column and channel of the first ``length`` tokens: int64 (length, 3)."""
        height, width, channels = self.shape
        if not 0 <= length <= self.longest:
            raise ValueError(f"length must be from 0 to the image's {self.longest} tokens, got {length}")
        place = torch.arange(length)
        if self.order == "raster":
            pixel, channel = place // channels, place % channels
        else:
            pixel, channel = place % (height * width), place // (height * width)
        return torch.stack((pixel // width, pixel % width, channel), dim=-1)

    def is_whole(self, length: int) -> bool:
        """Only a full image is."""
        return length == self.longest
