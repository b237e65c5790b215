"""The op inside Hugging Face's own Perceiver (``transformers.PerceiverModel`` and its heads), same weights.

    from perceiver_kernels.integrations.transformers_perceiver import swap
    model = swap(PerceiverForMaskedLM.from_pretrained(...))

Its attention doesn't go through transformers' attention interface, so each ``PerceiverSelfAttention`` (cross-
and self-attention of encoder and decoder) gets another ``forward``; parameters and ``state_dict`` stay.
Outputs and gradients are the same up to rounding; dropout of the weights draws other entries;
``output_attentions`` is refused, as the weights are never formed. Where inputs are padded, transformers
itself still makes one M x N mask for each forward; without padding nothing of that size is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.attention import perceiver_attention
from perceiver_kernels.integrations._classes import Model, installed_by, replace_classes

with installed_by("pip install 'perceiver-kernels[transformers]'"):
    from transformers.models.perceiver.modeling_perceiver import PerceiverSelfAttention


class FusedPerceiverSelfAttention(PerceiverSelfAttention):
    """``PerceiverSelfAttention`` through the op."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inputs: Tensor | None = None,
        inputs_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor]:
        """(B, M, C) and, for cross-attention, inputs (B, N, C') with their mask: (B, M, C'')."""
        if output_attentions:
            raise ValueError("output_attentions needs the original attention, which unswap() brings back")
        hidden_states = self.layernorm1(hidden_states)
        source, mask = hidden_states, attention_mask
        if inputs is not None:
            source, mask = self.layernorm2(inputs), inputs_mask
        query, key, value = (
            torch.unflatten(x, -1, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.query(hidden_states), self.key(source), self.value(source))
        )
        out = perceiver_attention(
            query,
            key,
            value,
            is_causal=False,
            key_mask=None if mask is None else _key_mask(mask, query.shape[0]),
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return (out.transpose(1, 2).flatten(2),)


def _key_mask(mask: Tensor, batch: int) -> Tensor:
    """What transformers adds to the scores, (B, 1, 1 or M, N) and the same in every row, as bool (B, N)."""
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(f"inputs_mask must be (B, 1, M, N), got {tuple(mask.shape)}")
    row = mask[:, 0, 0].expand(batch, -1)
    return row if row.dtype == torch.bool else row == 0


def swap(model: Model) -> Model:
    """Run every attention inside ``model`` through :func:`perceiver_kernels.perceiver_attention`, in place.

    Returns the same object; :func:`unswap` undoes it. Raises ``ValueError`` if there is none inside.
    """
    return replace_classes(model, {PerceiverSelfAttention: FusedPerceiverSelfAttention})


def unswap(model: Model) -> Model:
    """Give the attention modules their original ``forward`` back, in place."""
    return replace_classes(model, {FusedPerceiverSelfAttention: PerceiverSelfAttention})
