"""The Sparse Transformer (Child et al. 2019, arXiv 1904.10509): who sees whom is fixed by hand.

Two patterns of about sqrt(N) keys each take turns from layer to layer, so that two layers connect any two
positions. With stride l, query i and key j <= i:

- ``"strided"``: i - j <= l, then i - j a multiple of l;
- ``"fixed"``: i and j in one block of l, then j among the last c positions of its block.

No N x N mask is made, nor for "strided" any larger than l x 2 l: positions are folded into rows so that each
pattern is dense attention within rows. Only the last, short row is padded; padding lies in the future.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines.transformer import Attention, Transformer

Pattern = Literal["strided", "fixed"]


class SparseAttention(Attention):
    """One of the four patterns: the first or the second of "strided" or "fixed"."""

    def __init__(
        self, dim: int, num_heads: int, pattern: Pattern, second: bool, stride: int, summaries: int = 8
    ) -> None:
        super().__init__(dim, num_heads)
        if pattern not in get_args(Pattern):
            raise ValueError(f"pattern must be one of {', '.join(get_args(Pattern))}, got {pattern!r}")
        if not 1 <= summaries <= stride:
            raise ValueError(f"summaries must be from 1 to the stride {stride}, got {summaries}")
        self.stride, self.summaries = stride, summaries
        self.rows = {
            ("strided", False): self.neighbours,
            ("strided", True): self.every_stride,
            ("fixed", False): self.own_block,
            ("fixed", True): self.block_ends,
        }[pattern, second]

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fold the positions into rows of one stride, (B, H, R, l, D), attend, unfold."""
        length = q.shape[2]
        short = -length % self.stride
        q, k, v = (F.pad(x, (0, 0, 0, short)).unflatten(2, (-1, self.stride)) for x in (q, k, v))
        return self.rows(q, k, v).flatten(2, 3)[:, :, :length]

    def neighbours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """i - j <= l: each row sees itself and the row before, within the band."""
        first = within_rows(q[:, :, :1], k[:, :, :1], v[:, :, :1], is_causal=True)
        k, v = (torch.cat((x[:, :, :-1], x[:, :, 1:]), dim=3) for x in (k, v))
        back = torch.arange(self.stride, device=q.device)[:, None] + self.stride
        back = back - torch.arange(2 * self.stride, device=q.device)  # i - j
        band = (back >= 0) & (back <= self.stride)
        return torch.cat((first, within_rows(q[:, :, 1:], k, v, attn_mask=band)), dim=2)

    def every_stride(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """i - j a multiple of l: columns are sequences of their own."""
        q, k, v = (x.transpose(2, 3) for x in (q, k, v))
        return within_rows(q, k, v, is_causal=True).transpose(2, 3)

    def own_block(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """i and j in one row."""
        return within_rows(q, k, v, is_causal=True)

    def block_ends(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """j among the last c of its row; a query that sees none yet (the first row's) gives 0."""
        places = torch.arange(q.shape[2] * self.stride, device=q.device)
        ends = places.unflatten(0, (-1, self.stride))[:, -self.summaries :].flatten()
        k, v = (x[..., -self.summaries :, :].flatten(2, 3) for x in (k, v))
        seen = ends <= places[:, None]
        out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=seen)
        return out.unflatten(2, (-1, self.stride))


def within_rows(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention over (B, H, R, L, D), each row by itself: as so many examples, which torch's kernels know."""
    examples, rows = q.shape[0], q.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, **options)
    return out.unflatten(0, (examples, rows)).transpose(1, 2)


class SparseTransformer(Transformer):
    """A :class:`Transformer` whose layers take the two patterns in turn; the stride is best near sqrt(N)."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        stride: int,
        pattern: Pattern = "strided",
        summaries: int = 8,
        ff_mult: float = 4.0,
    ) -> None:
        self.pattern, self.stride, self.summaries = pattern, stride, summaries
        super().__init__(vocab_size, dim, depth, num_heads, ff_mult=ff_mult)

    def attention(self, layer: int, dim: int, num_heads: int) -> Attention:
        """The first pattern in even layers, the second in odd ones."""
        return SparseAttention(
            dim, num_heads, self.pattern, layer % 2 == 1, self.stride, min(self.summaries, self.stride)
        )
