"""The paper's models (Hawthorne et al. 2022, arXiv 2202.07765) as configurations.

    model = PerceiverAR(PRESETS["maestro"])
    small = dataclasses.replace(PRESETS["maestro"], depth=2, streamed=True)

What is known of each, and what is a choice of ours:

- ``copy``: from Google's published training configuration: 131,072 positions, 1024 latents, 6 layers,
  sinusoidal positions, 256 values and 3 reserved tokens.
- ``imagenet64``: from the same source: 12,416 positions for 64 x 64 x 3 bytes and a start token, 1024
  latents, 60 layers, learned positions on each axis. Theirs gives the start token a place of its own, ours
  the first of the array, so that every byte stands one place further.
- ``maestro``: 4096 positions, 2048 latents and 12 layers are the paper's; the rest is the published
  default. The vocabulary is that of :class:`perceiver_kernels.data.Notes`.
- ``wikitext``: the paper's model is reported with 358M parameters; ours has more, because each of the
  267,735 words has a whole vector.
- ``pg19``: a deep model for books in 32,000 subwords.
- ``books``: a long context, 16,384 positions, over 1024 latents.

For the three text models depth, lengths and vocabulary are *not* checked against a published configuration,
because none is public: take these numbers from the paper before you compare with it. All presets share the
published defaults: 1024 channels, 16 heads, 4 x wide feed-forward blocks with squared ReLU, dropout 0.1, a
z-loss of 1e-4, latents placed at random and a head that starts at zero (the text models tie it to the
embedding instead). Google's layers have biases and its latents go through a linear layer first: 9,216 more
parameters a block and 1.05 million; with these, ``imagenet64`` has the paper's 770.1 million.
"""

from __future__ import annotations

from typing import Any

from perceiver_kernels.models.config import PerceiverARConfig


def _config(vocab_size: int, length: int, latents: int, depth: int, **options: Any) -> PerceiverARConfig:
    """With the published defaults: rotary positions, whose longest wavelength is the context."""
    rotary: dict[str, Any] = {
        "positions": "none",
        "rotary_fraction": 0.5,
        "rotary_layout": "interleaved",
        "rotary_base": float(length),
        "rotary_endpoint": True,
    }
    shared: dict[str, Any] = {
        "dim": 1024,
        "num_heads": 16,
        "activation": "squared_relu",
        "dropout": 0.1,
        "z_loss": 1e-4,
        "zero_head": True,
        "random_crop": True,
    }
    return PerceiverARConfig(
        vocab_size=vocab_size,
        depth=depth,
        max_seq_len=length,
        num_latents=latents,
        **shared | rotary | options,
    )


_TIED = {"tie_embeddings": True, "zero_head": False}
_RESERVED = 3  # padding, start and end

PRESETS: dict[str, PerceiverARConfig] = {
    # Absolute positions, so that the source of a mirrored token can be told at all; base as published.
    "copy": _config(
        256 + _RESERVED,
        131_072,
        1024,
        6,
        positions="sinusoidal",
        position_base=10_000.0,
        rotary_fraction=0.0,
    ),
    "imagenet64": _config(
        256 + _RESERVED,
        12_416,
        1024,
        60,
        positions="learned",
        position_shape=(65, 64, 3),
        rotary_fraction=0.0,
    ),
    "maestro": _config(388, 4096, 2048, 12),
    "wikitext": _config(267_735, 2048, 1024, 18, **_TIED),
    "pg19": _config(32_000, 4096, 2048, 60, **_TIED),
    "books": _config(32_000, 16_384, 1024, 36, **_TIED),
}
