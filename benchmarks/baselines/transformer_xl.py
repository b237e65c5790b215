"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860): segments that see the hidden states of those before.

A segment of S tokens attends, in every layer, to itself and to a memory of the last states of that layer, to
which no gradient goes. Positions are relative: the score of query i and key j is
``(q_i + u) . k_j + (q_i + v) . W r_{i - j}`` with sinusoids r, so a state means the same in every segment.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_kernels.layers import FeedForward
from perceiver_kernels.rotary import rotary_cos_sin

Memory = list[Tensor]


class RelativeAttention(nn.Module):
    """Causal attention over memory and segment with relative positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads or dim % 2:
            raise ValueError(f"dim must be even and a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.kv_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.r_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, 1, dim // num_heads))  # u
        self.position_bias = nn.Parameter(torch.zeros(num_heads, 1, dim // num_heads))  # v

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """(B, S, dim) and (B, P, dim) to the update (B, S, dim)."""
        segment, total = x.shape[1], memory.shape[1] + x.shape[1]
        queries = self.norm(x)
        context = torch.cat((self.norm(memory), queries), dim=1)
        q = self.q_proj(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv_proj(context).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        distances = torch.arange(total - 1, -1, -1, device=x.device)  # from the last query to every key
        cos, sin = rotary_cos_sin(distances, x.shape[-1])
        r = self.r_proj(torch.cat((sin, cos), dim=-1).to(x.dtype))
        r = r.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        bias = shift((q + self.position_bias) @ r.mT) * q.shape[-1] ** -0.5
        ahead = torch.ones(segment, total, dtype=torch.bool, device=x.device).triu(total - segment + 1)
        out = F.scaled_dot_product_attention(
            q + self.content_bias, k, v, attn_mask=bias.masked_fill(ahead, -torch.inf)
        )
        update: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return update


def shift(scores: Tensor) -> Tensor:
    """Scores (..., S, T) by the last query's distances to scores by each query's own (appendix B).

    Row i moves left by S - 1 - i. What enters on the right belongs to keys ahead of the query.
    """
    *lead, segment, total = scores.shape
    padded = F.pad(scores, (1, 0)).reshape(*lead, total + 1, segment)
    return padded[..., 1:, :].reshape(*lead, segment, total)


class TransformerXL(nn.Module):
    """Tokens (B, S) of one segment after another, with the memory between them, to logits (B, S, vocab_size).

    Args:
        memory: how many states of every layer the next segment sees.
    """

    def __init__(
        self, vocab_size: int, dim: int, depth: int, num_heads: int, *, memory: int, ff_mult: float = 4.0
    ) -> None:
        super().__init__()
        self.memory = memory
        self.embedding = nn.Embedding(vocab_size, dim)
        self.attentions = nn.ModuleList(RelativeAttention(dim, num_heads) for _ in range(depth))
        self.feed_forwards = nn.ModuleList(FeedForward(dim, mult=ff_mult) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """(B, S) and what the segment before returned to logits (B, S, vocab_size) and the new memory."""
        x = self.embedding(tokens)
        kept: Memory = []
        before = [x[:, :0]] * len(self.attentions) if memory is None else memory
        for attention, feed_forward, states in zip(self.attentions, self.feed_forwards, before, strict=True):
            seen = torch.cat((states, x), dim=1).detach()
            kept.append(seen[:, max(seen.shape[1] - self.memory, 0) :])
            x = x + attention(x, states)
            x = x + feed_forward(x)
        logits: Tensor = self.head(self.norm(x))
        return logits, kept
