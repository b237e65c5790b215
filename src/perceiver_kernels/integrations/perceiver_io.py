"""The op inside ``perceiver-io`` (PyPI, 0.11): same weights and results, less time and memory.

    from perceiver_kernels.integrations.perceiver_io import swap
    model = swap(perceiver.model.text.clm.CausalLanguageModel(...))  # or a Perceiver IO, or any part of one

Every ``MultiHeadAttention`` keeps its parameters, ``state_dict`` and hooks; only its ``forward`` changes.
What stays the same: outputs and gradients up to rounding, padding, rotary embeddings, head dims that differ
between keys and values, caches, and the rows of padding, which get the mean of all values. What differs:

- dropout of the attention weights drops with the same probability but draws other entries;
- ``max_heads_parallel`` has no effect: there are no M x N tensors whose number it could limit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.attention import perceiver_attention
from perceiver_kernels.integrations._classes import Model, installed_by, replace_classes
from perceiver_kernels.rotary import apply_rotary

with installed_by(
    "pip install perceiver-io; on Python 3.11 and later, "
    "pip install --no-deps --ignore-requires-python perceiver-io einops fairscale"
):
    from perceiver.model.core.modules import MultiHeadAttention
    from perceiver.model.core.utils import ModuleOutput


class FusedMultiHeadAttention(MultiHeadAttention):  # type: ignore[misc]
    """``MultiHeadAttention`` through the op."""

    def forward(
        self,
        x_q: Tensor,
        x_kv: Tensor,
        pad_mask: Tensor | None = None,
        rot_pos_emb_q: Any = None,
        rot_pos_emb_k: Any = None,
        kv_cache: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """(B or 1, M, C) over (B, N, C'); pad_mask bool (B, N), True = padding; kv_cache two (B, n, C'')."""
        query, key, value = self.q_proj(x_q), self.k_proj(x_kv), self.v_proj(x_kv)
        if kv_cache is not None:
            key, value = (torch.cat(pair, dim=1) for pair in zip(kv_cache, (key, value), strict=True))
            kv_cache = (key, value)
        batch = key.shape[0]
        query, key, value = (
            torch.unflatten(x.expand(batch, -1, -1), -1, (self.num_heads, -1)) for x in (query, key, value)
        )
        query, key = _rotate(query, rot_pos_emb_q), _rotate(key, rot_pos_emb_k)
        out, lse = perceiver_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=self.causal_attention,
            key_mask=None if pad_mask is None else ~pad_mask.expand(batch, -1),
            scale=self.dp_scale,
            dropout_p=self.dropout.p if self.training else 0.0,
            return_lse=True,
        )
        out = out.transpose(1, 2)
        if pad_mask is not None:
            # The latents of padding are keys of the layers above, so their value counts.
            blind = (lse == -torch.inf).transpose(1, 2).unsqueeze(-1)
            out = torch.where(blind, value.mean(1, keepdim=True), out)
        return ModuleOutput(last_hidden_state=self.o_proj(out.flatten(2)), kv_cache=kv_cache)


def _rotate(x: Tensor, embedding: Any) -> Tensor:
    """Rotate (B, L, H, D) by the first or last L angles, of which the embedding holds each twice."""
    if embedding is None:
        return x
    angles, length = embedding.frq_pos_enc[:, 0, :, ::2], x.shape[1]
    angles = angles[:, angles.shape[1] - length :] if embedding.right_align else angles[:, :length]
    angles = angles.expand(x.shape[0], -1, -1)
    return apply_rotary(x, angles.cos(), angles.sin(), layout="interleaved")


def swap(model: Model) -> Model:
    """Run every attention inside ``model`` through :func:`perceiver_kernels.perceiver_attention`, in place.

    Returns the same object; :func:`unswap` undoes it. Raises ``ValueError`` if there is none inside.
    """
    return replace_classes(model, {MultiHeadAttention: FusedMultiHeadAttention})


def unswap(model: Model) -> Model:
    """Give the attention modules their original ``forward`` back, in place."""
    return replace_classes(model, {FusedMultiHeadAttention: MultiHeadAttention})
