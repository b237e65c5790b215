"""Audio: every sample as a mu-law code, or frames as the codes of residual codebooks."""

from __future__ import annotations

import math
import os
import wave

import numpy as np
import torch
from torch import Tensor

from perceiver_kernels.data.modality import Modality, at_least


class MuLaw(Modality[Tensor]):
    """Waveforms (time, channels) with values in [-1, 1], each rounded to one of ``levels`` mu-law codes.

    Codes lie densely around 0, as hearing does (ITU-T G.711; WaveNet, van den Oord et al. 2016). The channels
    of a moment follow one another. Values outside [-1, 1] are clipped; silence comes back as exact silence
    only where ``levels`` is odd.
    """

    axes = ("time", "channel")

    def __init__(self, channels: int = 1, *, levels: int = 256) -> None:
        at_least(1, channels=channels)
        at_least(2, levels=levels)
        self.channels, self.vocab_size = channels, levels

    def __repr__(self) -> str:
        return f"MuLaw({self.channels}, levels={self.vocab_size})"

    def encode(self, sample: Tensor) -> Tensor:
        """A waveform, floating (time, channels), to tokens (time * channels,)."""
        if not sample.is_floating_point():
            raise TypeError(f"sample must be floating point in [-1, 1], got {sample.dtype}")
        if sample.dim() != 2 or sample.shape[1] != self.channels:
            raise ValueError(f"sample must be (time, {self.channels}), got {tuple(sample.shape)}")
        if not sample.isfinite().all():
            raise ValueError("sample must be finite, got NaN or infinity")
        mu = self.vocab_size - 1
        x = sample.to("cpu", torch.float64).clamp(-1.0, 1.0)
        curved = x.sign() * torch.log1p(mu * x.abs()) / math.log1p(mu)
        return ((curved + 1) / 2 * mu).round().long().flatten()

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens to the waveform, float32 (time, channels)."""
        mu = self.vocab_size - 1
        curved = 2 * self.check(tokens).double() / mu - 1
        x = curved.sign() * torch.expm1(curved.abs() * math.log1p(mu)) / mu
        return x.float().reshape(-1, self.channels)

    def positions(self, length: int) -> Tensor:
        """Moment and channel: int64 (length, 2)."""
        return _two_axes(length, self.channels)

    def is_whole(self, length: int) -> bool:
        """Whole moments are."""
        return length % self.channels == 0


class ResidualCodes(Modality[Tensor]):
    """Frames (time, features) as codes of given codebooks, each for what those before it left over.

    That is residual vector quantisation, the output of neural audio codecs (SoundStream, Zeghidour et al.
    2021). A frame's codes follow one another from coarse to fine, each codebook with tokens of its own. One
    codebook is plain vector quantisation. Codes that a codec has made already become tokens by
    :meth:`tokens`.

    Args:
        codebooks: floating (books, size, features).
    """

    axes = ("time", "book")

    def __init__(self, codebooks: Tensor) -> None:
        if codebooks.dim() != 3 or 0 in codebooks.shape or not codebooks.is_floating_point():
            found = f"{codebooks.dtype} {tuple(codebooks.shape)}"
            raise ValueError(f"codebooks must be floating (books, size, features), got {found}")
        self.codebooks = codebooks.detach().to("cpu")
        self.books, self.size, self.features = codebooks.shape
        self.vocab_size, self.kinds = self.books * self.size, self.books

    def __repr__(self) -> str:
        return f"ResidualCodes({self.books} x {self.size} codes of {self.features} features)"

    def encode(self, sample: Tensor) -> Tensor:
        """Frames, floating (time, features), to tokens (time * books,): the nearest codes, book by book."""
        if sample.dim() != 2 or sample.shape[1] != self.features:
            raise ValueError(f"sample must be (time, {self.features}), got {tuple(sample.shape)}")
        left, codes = sample.to("cpu", self.codebooks.dtype), []
        for book in self.codebooks:
            codes.append(torch.cdist(left, book).argmin(dim=1))
            left = left - book[codes[-1]]
        return self.tokens(torch.stack(codes, dim=1))

    def tokens(self, codes: Tensor) -> Tensor:
        """A codec's codes, integer (time, books) from 0 to size - 1, to tokens (time * books,)."""
        if codes.dim() != 2 or codes.shape[1] != self.books:
            raise ValueError(f"codes must be (time, {self.books}), got {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.size:
            raise ValueError(f"codes must be from 0 to {self.size - 1}")
        return (codes.long() + self.size * torch.arange(self.books)).flatten()

    def codes(self, tokens: Tensor) -> Tensor:
        """Tokens back to a codec's codes, int64 (time, books)."""
        return (self.check(tokens) % self.size).reshape(-1, self.books)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens to frames (time, features): the sum of each frame's codes."""
        codes = self.codes(tokens)
        parts = [book[column] for book, column in zip(self.codebooks, codes.unbind(1), strict=True)]
        return torch.stack(parts).sum(0)

    def positions(self, length: int) -> Tensor:
        """Frame and codebook: int64 (length, 2)."""
        return _two_axes(length, self.books)

    def is_whole(self, length: int) -> bool:
        """Whole frames are."""
        return length % self.books == 0


def _two_axes(length: int, inner: int) -> Tensor:
    place = torch.arange(length)
    return torch.stack((place // inner, place % inner), dim=-1)


def read_wav(path: str | os.PathLike[str]) -> tuple[Tensor, int]:
    """A PCM wav file of 8, 16, 24 or 32 bits: float32 (time, channels) in [-1, 1), and the samples a second.

    ValueError: another width; wave.Error: no PCM wav file.
    """
    with wave.open(os.fspath(path), "rb") as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        data = np.frombuffer(file.readframes(file.getnframes()), dtype=np.uint8)
    if width not in (1, 2, 3, 4):
        raise ValueError(f"{os.fspath(path)} has samples of {8 * width} bits; 8, 16, 24 and 32 can be read")
    if width == 1:
        values = (data.astype(np.float64) - 128) / 128
    else:  # the bytes of a sample at the top of a little-endian int32
        wide = np.zeros((len(data) // width, 4), dtype=np.uint8)
        wide[:, 4 - width :] = data[: len(wide) * width].reshape(-1, width)
        values = wide.view("<i4")[:, 0] / 2.0**31
    return torch.from_numpy(values.astype(np.float32)).reshape(-1, channels), rate


def write_wav(path: str | os.PathLike[str], sample: Tensor, rate: int) -> None:
    """Write a waveform, floating (time, channels), clipped to [-1, 1], as wav of 16 bits."""
    if sample.dim() != 2 or not sample.is_floating_point():
        raise ValueError(
            f"sample must be floating (time, channels), got {sample.dtype} {tuple(sample.shape)}"
        )
    values = (sample.to("cpu", torch.float64) * 2**15).round().clamp(-(2**15), 2**15 - 1)
    with wave.open(os.fspath(path), "wb") as file:
        file.setparams((sample.shape[1], 2, rate, 0, "NONE", "not compressed"))
        file.writeframes(values.numpy().astype("<i2").tobytes())
