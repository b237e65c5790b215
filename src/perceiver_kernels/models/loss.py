"""What a model is trained on: the cross-entropy of next tokens, with latents anywhere in the sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_kernels.rows import gather_rows


def next_token_loss(
    logits: Tensor,
    targets: Tensor,
    counted: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Mean cross-entropy in nats.

    Args:
        logits: (B, M, vocab_size); the loss of half precision is worked out in float32.
        targets: (B, M), the tokens that came.
        counted: bool (B, M), which of them count. None: all.
        label_smoothing: this share of the target's probability is spread evenly over the vocabulary.
        z_loss: weight of the squared log-sum-exp of the logits, which keeps them from drifting (Chowdhery et
            al. 2022, arXiv 2204.02311, section 5).

    Returns:
        A scalar; 0 where nothing counts.
    """
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten().long(), label_smoothing=label_smoothing, reduction="none"
    )
    if z_loss > 0.0:
        losses = losses + z_loss * logits.logsumexp(-1).square().flatten()
    if counted is None:
        return losses.mean()
    return losses[counted.flatten()].sum() / counted.sum().clamp(min=1)


def random_crop(tokens: Tensor, pad_mask: Tensor | None, shortest: int) -> tuple[Tensor, Tensor | None]:
    """Cut a random number of columns off each example's end, so that the last ones may be any of it.

    The latents always stand in the last columns: without a crop, a model trained on whole sequences would
    learn to predict their ends only. Ends move to the last column and padding comes in on the left, as far as
    one example is shorter than the longest; what is left keeps its positions.

    Args:
        tokens: (B, n).
        pad_mask: bool (B, n), True = padding, or None.
        shortest: columns left to each example at least. (Google's choice is the latents' number: shorter
            crops would show the first tokens more often than others.)

    Returns:
        Tokens (B, longest) and their padding, None where there is none. The draw is torch's on the CPU.
    """
    batch, length = tokens.shape
    cut = torch.randint(max(length - shortest, 0) + 1, (batch,), device="cpu")
    longest = length - int(cut.min())
    columns = torch.arange(length - longest, length, device="cpu") - cut.unsqueeze(-1)
    begins_late = columns < 0
    columns = columns.clamp(min=0).to(tokens.device)
    if pad_mask is None and not begins_late.any():
        return gather_rows(tokens, columns), None
    padded = begins_late.to(tokens.device)
    if pad_mask is not None:
        padded = padded | gather_rows(pad_mask, columns)
    return gather_rows(tokens, columns), padded
