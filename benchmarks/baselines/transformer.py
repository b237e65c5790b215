"""A decoder-only Transformer over tokens: pre-norm, rotary positions, torch's own fused causal attention.

N tokens cost N^2 in every layer. The sizes and the feed-forward blocks are those of PerceiverAR.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_kernels.layers import FeedForward
from perceiver_kernels.rotary import apply_rotary, rotary_cos_sin


class Attention(nn.Module):
    """Causal self-attention with rotary positions. Subclasses change :meth:`mix`, who sees whom."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads or dim // num_heads % 2:
            raise ValueError(f"dim must be an even multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, N, D) each to (B, H, N, D)."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) to the update (B, N, dim)."""
        q, k, v = self.qkv_proj(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        cos, sin = rotary_cos_sin(torch.arange(x.shape[1], device=x.device), q.shape[-1])
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        out = self.mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        update: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return update


class Transformer(nn.Module):
    """Tokens (B, N) to the logits of what follows each, (B, N, vocab_size)."""

    def __init__(
        self, vocab_size: int, dim: int, depth: int, num_heads: int, *, ff_mult: float = 4.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.attentions = nn.ModuleList(self.attention(layer, dim, num_heads) for layer in range(depth))
        self.feed_forwards = nn.ModuleList(FeedForward(dim, mult=ff_mult) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def attention(self, layer: int, dim: int, num_heads: int) -> Attention:
        """The attention of one layer."""
        return Attention(dim, num_heads)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N) to (B, N, vocab_size)."""
        x = self.embedding(tokens)
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            x = x + attention(x)
            x = x + feed_forward(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
