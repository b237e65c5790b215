"""Perceiver (Jaegle et al. 2021, arXiv 2103.03206) and Perceiver IO (Jaegle et al. 2021, arXiv 2107.14795).

The ancestors of Perceiver AR, with nothing in order: M learned latents read an input set of N vectors by
cross-attention, self-attention works on the latents, and what comes out is the latents' mean (Perceiver) or
whatever output queries read from them (Perceiver IO). The op is the same, with ``is_causal=False``.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from perceiver_kernels.attention import perceiver_attention
from perceiver_kernels.layers import FeedForward


@dataclasses.dataclass(frozen=True)
class PerceiverIOConfig:
    """What a :class:`Perceiver` or a :class:`PerceiverIO` is made of.

    Args:
        input_dim: channels of an input vector, features of its position included.
        output_dim: channels of an output, or classes.
        dim: channels of a latent.
        num_latents: M.
        depth: self-attention layers over the latents after each reading of the input.
        num_heads: heads of the self-attention; num_cross_heads: of the reading and of the output.
        rounds: how often the input is read. The weights of all rounds after the first are one set, as in the
            Perceiver; Perceiver IO has one round.
        query_dim: channels of an output query. None: ``dim``. (Perceiver IO only.)
        ff_mult: hidden channels of the feed-forward blocks, as a multiple of their input's.
        dropout: dropout inside the feed-forward blocks.

    Raises:
        ValueError: for a size below 1, or heads that do not divide ``dim`` (or ``query_dim``).
    """

    input_dim: int
    output_dim: int
    dim: int
    num_latents: int
    depth: int
    num_heads: int
    num_cross_heads: int = 1
    rounds: int = 1
    query_dim: int | None = None
    ff_mult: float = 4.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "depth" else 1
            if field.name not in ("ff_mult", "dropout", "query_dim") and value < least:
                raise ValueError(f"{field.name} must be at least {least}, got {value}")
        for name in ("num_heads", "num_cross_heads"):
            if self.dim % getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, which does not divide dim {self.dim}")
        if self.query_dim is not None and (self.query_dim < 1 or self.query_dim % self.num_cross_heads):
            raise ValueError(f"query_dim must be a multiple of num_cross_heads, got {self.query_dim}")


class Block(nn.Module):
    """Attention of x over inputs (x itself where ``input_dim`` is None), then a feed-forward update.

    Pre-norm, both updates added to x; every query sees every input that ``key_mask`` keeps.
    """

    def __init__(self, dim: int, input_dim: int | None, num_heads: int, config: PerceiverIOConfig) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.input_norm = None if input_dim is None else nn.LayerNorm(input_dim)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(input_dim or dim, dim)
        self.v_proj = nn.Linear(input_dim or dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.feed_forward = FeedForward(dim, mult=config.ff_mult, dropout=config.dropout, bias=True)

    def forward(self, x: Tensor, inputs: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """(B, M, dim), (B, N, input_dim) and bool (B, N) to (B, M, dim)."""
        queries = self.norm(x)
        context = queries if self.input_norm is None else self.input_norm(inputs)
        q, k, v = (
            projection(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, source in ((self.q_proj, queries), (self.k_proj, context), (self.v_proj, context))
        )
        out = perceiver_attention(q, k, v, is_causal=False, key_mask=key_mask)
        x = x + self.out_proj(out.transpose(1, 2).flatten(2))
        x = x + self.feed_forward(x)
        return x


class Round(nn.Module):
    """One reading of the input, and ``depth`` layers over the latents."""

    def __init__(self, config: PerceiverIOConfig) -> None:
        super().__init__()
        self.read = Block(config.dim, config.input_dim, config.num_cross_heads, config)
        self.process = nn.ModuleList(
            Block(config.dim, None, config.num_heads, config) for _ in range(config.depth)
        )

    def forward(self, latents: Tensor, inputs: Tensor, key_mask: Tensor | None) -> Tensor:
        """(B, M, dim), (B, N, input_dim) to (B, M, dim)."""
        latents = self.read(latents, inputs, key_mask)
        for block in self.process:
            latents = block(latents)
        return latents


class Encoder(nn.Module):
    """What both have in common: input vectors to latents."""

    def __init__(self, config: PerceiverIOConfig) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(0.2 * torch.randn(config.num_latents, config.dim))
        self.first = Round(config)
        self.later = Round(config) if config.rounds > 1 else None

    def encode(self, inputs: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, N, input_dim) and bool (B, N), True = may be read, to latents (B, M, dim)."""
        if inputs.dim() != 3 or inputs.shape[-1] != self.config.input_dim:
            raise ValueError(f"inputs must be (B, N, {self.config.input_dim}), got {tuple(inputs.shape)}")
        if key_mask is not None and key_mask.shape != inputs.shape[:2]:
            raise ValueError(f"key_mask must be {tuple(inputs.shape[:2])}, got {tuple(key_mask.shape)}")
        latents: Tensor = self.first(self.latents.expand(len(inputs), -1, -1), inputs, key_mask)
        if self.later is not None:
            for _ in range(1, self.config.rounds):
                latents = self.later(latents, inputs, key_mask)
        return latents


class Perceiver(Encoder):
    """Classify a set of inputs by the mean of the latents that read them, ``rounds`` times."""

    def __init__(self, config: PerceiverIOConfig) -> None:
        super().__init__(config)
        self.head = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, config.output_dim))

    def forward(self, inputs: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, N, input_dim) and bool (B, N), True = may be read, to (B, output_dim)."""
        logits: Tensor = self.head(self.encode(inputs, key_mask).mean(dim=1))
        return logits


class PerceiverIO(Encoder):
    """Anything to anything: each output is what its query reads from the latents, whatever the others are."""

    def __init__(self, config: PerceiverIOConfig) -> None:
        super().__init__(config)
        self.query_dim = config.dim if config.query_dim is None else config.query_dim
        self.write = Block(self.query_dim, config.dim, config.num_cross_heads, config)
        self.head = nn.Sequential(nn.LayerNorm(self.query_dim), nn.Linear(self.query_dim, config.output_dim))

    def forward(self, inputs: Tensor, queries: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Outputs for every query.

        Args:
            inputs: (B, N, input_dim).
            queries: (B, O, query_dim) or (O, query_dim), the same for every example: learned vectors, or
                features of the positions that are asked for.
            key_mask: bool (B, N), True = may be read.

        Returns:
            (B, O, output_dim).
        """
        latents = self.encode(inputs, key_mask)
        if queries.dim() == 2:
            queries = queries.expand(len(inputs), -1, -1)
        if queries.dim() != 3 or queries.shape[::2] != (len(inputs), self.query_dim):
            raise ValueError(
                f"queries must be ({len(inputs)}, O, {self.query_dim}), got {tuple(queries.shape)}"
            )
        outputs: Tensor = self.head(self.write(queries, latents))
        return outputs
