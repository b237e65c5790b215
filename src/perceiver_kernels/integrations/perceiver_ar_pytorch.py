"""The op inside ``perceiver-ar-pytorch`` (PyPI, 0.0.10): same weights and results, less time and memory.

    from perceiver_kernels.integrations.perceiver_ar_pytorch import swap
    model = swap(perceiver_ar_pytorch.PerceiverAR(...))

The attention modules keep their parameters, ``state_dict`` and hooks; only their ``forward`` changes. What
stays the same: logits and gradients up to rounding, prefix masks, prefixes and sequences of any length, and
``cross_attn_dropout`` with the same torch seed. What differs:

- ``dropout`` of the attention weights drops with the same probability but draws other entries;
- ``perceive_max_heads_process`` has no effect: there are no M x N tensors whose number it could limit;
- a query that may see no key gets 0, not the mean of all values. It cannot happen here: every query sees
  itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_kernels.attention import perceiver_attention
from perceiver_kernels.integrations._classes import Model, installed_by, replace_classes
from perceiver_kernels.rotary import apply_rotary
from perceiver_kernels.rows import gather_rows, kept_indices

with installed_by("pip install 'perceiver-kernels[demo]'"):
    from perceiver_ar_pytorch.perceiver_ar_pytorch import CausalAttention, CausalPrefixAttention


class FusedCausalAttention(CausalAttention):  # type: ignore[misc]
    """``CausalAttention`` through the op."""

    def forward(self, x: Tensor, rotary_pos_emb: Tensor | None = None) -> Tensor:
        """(B, M, dim), angles (N, R) right-aligned with x, to (B, M, dim)."""
        x = self.norm(x)
        weights = self.to_qkv.weight.chunk(3)
        return _attend(self, x, x, weights, rotary_pos_emb, rotary_pos_emb, None)


class FusedCausalPrefixAttention(CausalPrefixAttention):  # type: ignore[misc]
    """``CausalPrefixAttention`` through the op."""

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
    ) -> Tensor:
        """(B, M, dim), prefix (B, P, dim), bool (B, P) True = keep, angles (P + M, R), to (B, M, dim)."""
        batch, prefix = context.shape[:2]
        key_angles = rotary_pos_emb
        if self.training and self.cross_attn_dropout > 0.0:
            kept = kept_indices(batch, prefix, self.cross_attn_dropout, x.device)
            context = gather_rows(context, kept)
            if context_mask is not None:
                context_mask = gather_rows(context_mask, kept)
            if rotary_pos_emb is not None:
                of_prefix, of_x = (
                    t.expand(batch, -1, -1) for t in (rotary_pos_emb[:prefix], rotary_pos_emb[prefix:])
                )
                key_angles = torch.cat((gather_rows(of_prefix, kept), of_x), dim=1)
        x = self.norm(x)
        # Joined before the projection: one copy of dim channels instead of one each of key and value.
        inputs = torch.cat((self.context_norm(context), x), dim=1)
        key_mask = None
        if context_mask is not None:
            beyond = inputs.shape[1] - context_mask.shape[1]
            key_mask = F.pad(context_mask, (0, beyond), value=True).expand(batch, -1)
        weights = (self.to_q.weight, *self.to_kv.weight.chunk(2))
        return _attend(self, x, inputs, weights, rotary_pos_emb, key_angles, key_mask)


def _attend(
    module: FusedCausalAttention | FusedCausalPrefixAttention,
    x: Tensor,
    inputs: Tensor,
    weights: tuple[Tensor, ...],
    query_angles: Tensor | None,
    key_angles: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """Queries from x (B, M, dim), keys and values from inputs (B, N, dim): (B, M, dim)."""
    # Keys and values come from separate products so that each is dense: halves of one would be copied in the
    # backward.
    query, key, value = (
        torch.unflatten(F.linear(t, weight), -1, (module.heads, -1))
        for t, weight in zip((x, inputs, inputs), weights, strict=True)
    )
    query, key = _rotate(query, query_angles), _rotate(key, key_angles)
    out = perceiver_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        key_mask=key_mask,
        scale=module.scale,
        dropout_p=module.dropout.p if module.training else 0.0,
    )
    update: Tensor = module.to_out(out.transpose(1, 2).flatten(2))
    return update


def _rotate(x: Tensor, angles: Tensor | None) -> Tensor:
    """Rotate (B, L, H, D) by the last L of the angles (..., R), which hold each pair's angle twice."""
    if angles is None:
        return x
    angles = angles[..., angles.shape[-2] - x.shape[1] :, : angles.shape[-1] // 2]
    return apply_rotary(x, angles.cos(), angles.sin(), layout="half")


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    CausalAttention: FusedCausalAttention,
    CausalPrefixAttention: FusedCausalPrefixAttention,
}


def swap(model: Model) -> Model:
    """Run every attention inside ``model`` through :func:`perceiver_kernels.perceiver_attention`, in place.

    Args:
        model: a ``perceiver_ar_pytorch.PerceiverAR``, or any module that holds its attention modules.

    Returns:
        The same object. :func:`unswap` undoes it.

    Raises:
        ValueError: if there is no attention of that package inside.
    """
    return replace_classes(model, _FUSED)


def unswap(model: Model) -> Model:
    """Give the attention modules their original ``forward`` back, in place."""
    return replace_classes(model, {fused: original for original, fused in _FUSED.items()})
