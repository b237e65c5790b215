"""Text as its UTF-8 bytes: 256 tokens, nothing to train, nothing out of vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.data.modality import Modality


class Bytes(Modality[bytes]):
    """Bytes of anything; text goes in as ``str`` too, and comes back by ``.decode()`` of the bytes."""

    vocab_size = 256

    def encode(self, sample: bytes | str) -> Tensor:
        """Bytes, or text in UTF-8, to tokens (n,)."""
        if not isinstance(sample, (str, bytes, bytearray)):
            raise TypeError(f"sample must be str or bytes, got {type(sample).__name__}")
        data = bytearray(sample.encode() if isinstance(sample, str) else sample)
        if not data:  # frombuffer takes no empty buffer
            return torch.empty(0, dtype=torch.int64)
        return torch.frombuffer(data, dtype=torch.uint8).long()

    def decode(self, tokens: Tensor) -> bytes:
        """Tokens (n,) to bytes. What a model wrote may be no UTF-8: ``.decode(errors="replace")``."""
        return bytes(self.check(tokens).tolist())

    def __repr__(self) -> str:
        return "Bytes()"
