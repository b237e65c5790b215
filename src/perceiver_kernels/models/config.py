"""What a :class:`perceiver_kernels.PerceiverAR` is made of."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from perceiver_kernels.checks import check_bool, check_size
from perceiver_kernels.layers import Activation
from perceiver_kernels.rotary import LAYOUTS, RotaryLayout
from perceiver_kernels.streaming import CHUNK_SIZE

PositionKind = Literal["sinusoidal", "fourier", "learned", "none"]
PositionOrigin = Literal["first", "last"]


@dataclasses.dataclass(frozen=True)
class PerceiverARConfig:
    """What a :class:`PerceiverAR` is made of.

    Args:
        vocab_size: number of tokens.
        dim: channels of the residual stream.
        depth: self-attention layers over the latents, after the first cross-attention.
        num_heads: query heads of every attention.
        max_seq_len: longest input N.
        num_latents: latents M unless a call says otherwise; at most ``max_seq_len``.
        num_kv_heads: key and value heads, a divisor of ``num_heads``. None: ``num_heads``.
        head_dim: channels of a head. None: ``dim // num_heads``.
        cross_after: layers, counted from 0, that are followed by a cross-attention of their own, from all
            embedded inputs again.
        latents_per_position: latents that stand at each of the last positions, told apart by a learned
            vector. Each sees those before it, its position's included; the logits are of their mean.
        ff_mult: hidden channels of the feed-forward blocks, as a multiple of ``dim``.
        activation: of the feed-forward blocks: ``"gelu"``, ``"squared_relu"`` or ``"geglu"``.
        positions: absolute positions added to the embeddings: ``"sinusoidal"``, ``"fourier"`` (linearly
            spaced frequencies, as in the Perceiver), ``"learned"`` (a table that starts at the sinusoids) or
            ``"none"``; see :mod:`perceiver_kernels.models.positions`.
        position_base: wavelengths of the sinusoids run from 2 pi to 2 pi base. None: the axis' extent.
        position_shape: extents of the axes that the tokens fill in row-major order, such as (height, width,
            channels); an absolute position is then an index on each. None: one axis of ``max_seq_len``. A
            token that starts the sequence moves all others by one: let the first axis be one longer.
        position_origin: whether absolute positions count from the ``"first"`` token or back from the
            ``"last"`` one, which is then 0, as in Google's Perceiver AR. Counting back, every new token moves
            all positions, so that generation can cache nothing. (Rotary positions know distances only.)
        rotary_fraction, rotary_heads, rotary_layout, rotary_base, rotary_endpoint: rotary embedding, see
            :class:`perceiver_kernels.CrossAttention`.
        prefix_dropout: share of the prefix that the cross-attention leaves out in training.
        latent_dropout: share of the latents that the layers leave out as keys in training, each with this
            probability, the same ones in all layers; nothing learns from them but their own prediction.
        dropout: dropout of the embeddings, of each block's update and inside the feed-forward blocks.
        attention_dropout: dropout of the attention weights.
        tie_embeddings: whether the output projection is the token embedding.
        zero_head: whether the output projection starts at zero, so that the first predictions are uniform.
        label_smoothing, z_loss: of :meth:`PerceiverAR.loss` in training, see
            :mod:`perceiver_kernels.models.loss`.
        random_crop: whether that loss in training places the latents anywhere in each sequence, not at its
            end only.
        activation_checkpointing: whether training keeps only what goes into each block and computes the rest
            again in the backward: less memory, a third more time.
        streamed: whether the cross-attention walks the prefix in chunks, embedding its tokens as it goes: no
            tensor of N x dim exists, forward or backward. Same parameters, same results up to rounding.
        chunk_size: positions of each example at a time, where streamed.

    Raises:
        ValueError: for a value outside its range; TypeError: for a size that is not an int, a flag that
            is not a bool.
    """

    vocab_size: int
    dim: int
    depth: int
    num_heads: int
    max_seq_len: int
    num_latents: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    cross_after: tuple[int, ...] = ()
    latents_per_position: int = 1
    ff_mult: float = 4.0
    activation: Activation = "gelu"
    positions: PositionKind = "sinusoidal"
    position_base: float | None = None
    position_shape: tuple[int, ...] | None = None
    position_origin: PositionOrigin = "first"
    rotary_fraction: float = 0.5
    rotary_heads: float = 1.0
    rotary_layout: RotaryLayout = "half"
    rotary_base: float = 10_000.0
    rotary_endpoint: bool = False
    prefix_dropout: float = 0.0
    latent_dropout: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    tie_embeddings: bool = False
    zero_head: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    random_crop: bool = False
    activation_checkpointing: bool = False
    streamed: bool = False
    chunk_size: int = CHUNK_SIZE

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "dim", "depth", "num_heads", "max_seq_len", "num_latents"]
        sizes += ["latents_per_position", "chunk_size"]
        optional = [name for name in ("num_kv_heads", "head_dim") if getattr(self, name) is not None]
        for name in (*sizes, *optional):
            size = check_size(name, getattr(self, name), 0 if name == "depth" else 1)
            object.__setattr__(self, name, size)  # JSON knows no numpy ints
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool):
                check_bool(field.name, getattr(self, field.name))
        if self.num_latents > self.max_seq_len:
            raise ValueError(f"num_latents is {self.num_latents}, more than max_seq_len {self.max_seq_len}")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}, which does not divide num_heads {self.num_heads}"
            )
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}: give head_dim")
        for name in ("cross_after", "position_shape"):
            value = getattr(self, name)
            if isinstance(value, list):  # JSON knows no tuples
                object.__setattr__(self, name, tuple(value))
            elif not isinstance(value, tuple) and (name, value) != ("position_shape", None):
                raise TypeError(f"{name} must be a tuple of ints, got {value!r}")
        if list(self.cross_after) != [layer for layer in range(self.depth) if layer in self.cross_after]:
            raise ValueError(
                f"cross_after must name some of the {self.depth} layers, from 0 on and in order, "
                f"got {self.cross_after}"
            )
        self._check_positions()
        if self.rotary_layout not in LAYOUTS:
            raise ValueError(f"rotary_layout must be one of {', '.join(LAYOUTS)}, got {self.rotary_layout!r}")
        for name in ("rotary_fraction", "rotary_heads"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.activation not in get_args(Activation):
            choices = ", ".join(get_args(Activation))
            raise ValueError(f"activation must be one of {choices}, got {self.activation!r}")
        if self.zero_head and self.tie_embeddings:
            raise ValueError("zero_head needs an output projection of its own, got tie_embeddings=True")
        for name in ("prefix_dropout", "latent_dropout", "dropout", "attention_dropout", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not (self.z_loss >= 0 and math.isfinite(self.z_loss)):
            raise ValueError(f"z_loss must be finite and not negative, got {self.z_loss}")
        for name in ("ff_mult", "rotary_base", "position_base"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")

    @property
    def index_shape(self) -> tuple[int, ...]:
        """Extents of the axes of absolute positions."""
        return (self.max_seq_len,) if self.position_shape is None else self.position_shape

    def _check_positions(self) -> None:
        choices = {"positions": get_args(PositionKind), "position_origin": get_args(PositionOrigin)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.position_shape is not None:
            shape = self.position_shape
            if not all(isinstance(size, int) and size >= 1 for size in shape):
                raise ValueError(f"position_shape must be positive ints, got {shape}")
            if math.prod(shape) < self.max_seq_len:
                raise ValueError(
                    f"position_shape {shape} has {math.prod(shape)} places, "
                    f"less than max_seq_len {self.max_seq_len}"
                )
        if self.positions == "none":
            for name, default in (("position_shape", None), ("position_origin", "first")):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} needs absolute positions, got positions='none'")
            return
        if self.dim % 2:
            raise ValueError(f"dim must be even for {self.positions} positions, got {self.dim}")
        least = 3 if self.positions == "fourier" else 2
        if self.dim < least * len(self.index_shape):
            raise ValueError(
                f"dim must be at least {least} for each of the {len(self.index_shape)} axes of "
                f"{self.positions} positions, got {self.dim}"
            )
