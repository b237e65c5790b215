"""What every modality can do: samples to tokens and back, where each token stands, which may stand there."""

from __future__ import annotations

import abc
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Sample = TypeVar("Sample")


class Modality(abc.ABC, Generic[Sample]):
    """A way to write samples as tokens in a fixed order.

    Attributes:
        vocab_size: tokens are 0 ... vocab_size - 1.
        axes: names of the columns of :meth:`positions`.
        kinds: the vocabulary is so many ranges of equal size, and where there are several, the last axis says
            which of them a place takes its token from (a colour channel, a codebook).
        longest: tokens of a sample at most, None for any number.
    """

    vocab_size: int
    axes: tuple[str, ...] = ("place",)
    kinds: int = 1
    longest: int | None = None

    @abc.abstractmethod
    def encode(self, sample: Sample) -> Tensor:
        """A sample to int64 tokens (n,)."""

    @abc.abstractmethod
    def decode(self, tokens: Tensor) -> Sample:
        """Tokens (n,) to the sample that they stand for. ValueError: they stand for none."""

    def positions(self, length: int) -> Tensor:
        """Where the first ``length`` tokens stand: int64 (length, len(axes))."""
        return torch.arange(length).unsqueeze(-1)

    def allowed(self, length: int) -> Tensor:
        """Which tokens may stand at each of the first ``length`` places: bool (length, vocab_size).

        A mask for logits: ``logits.masked_fill(~allowed, -inf)``.
        """
        return torch.arange(self.vocab_size) // self._range == self._kind(length).unsqueeze(-1)

    def is_whole(self, length: int) -> bool:
        """Whether a sample can have ``length`` tokens."""
        return True

    def check(self, tokens: Tensor) -> Tensor:
        """The tokens as int64, or what is wrong with them."""
        tokens = token_row(tokens, self.vocab_size)
        if not self.is_whole(len(tokens)):
            raise ValueError(f"tokens are {len(tokens)}, which is no whole sample of {self}")
        wrong = tokens // self._range != self._kind(len(tokens))
        if wrong.any():
            place = int(wrong.nonzero()[0])
            raise ValueError(f"token {int(tokens[place])} may not stand at place {place} of {self}")
        return tokens

    @property
    def _range(self) -> int:
        return self.vocab_size // self.kinds

    def _kind(self, length: int) -> Tensor:
        if self.kinds == 1:
            return torch.zeros(length, dtype=torch.int64)
        return self.positions(length)[:, -1]


def token_row(tokens: Tensor, vocab_size: int) -> Tensor:
    """One row of tokens within the vocabulary, as int64 on the CPU."""
    if tokens.dim() != 1:
        raise ValueError(f"tokens must be (n,), got {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    tokens = tokens.to("cpu", torch.int64)
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise ValueError(f"tokens must be from 0 to {vocab_size - 1}, got {int(outside)}")
    return tokens


def at_least(least: int, **sizes: Any) -> None:
    """Refuse sizes that are not ints of at least ``least``, by name."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {size!r}")
