"""How likely a Perceiver AR finds a text: strided scores, each window's deep context as long as can be.

**The windows.** W latents move along the sequence by ``stride``: window i ends after input column
``e(i) = min(W + i stride, n)``, reads all inputs before its end, and is asked for the tokens that no window
before it was asked for, which is the last ``stride`` of its W (the first one: all). So every token but the
first W has at least ``W - stride`` latents before it. A smaller stride costs more and scores better.

Each input's keys and values of the cross-attentions are computed once for all windows, as in generation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perceiver_kernels.generation import CachedInputs, with_progress

if TYPE_CHECKING:
    from perceiver_kernels.models.perceiver_ar import PerceiverAR


@torch.no_grad()
def score(
    model: PerceiverAR,
    tokens: Tensor,
    stride: int | None = None,
    *,
    num_latents: int | None = None,
    pad_mask: Tensor | None = None,
    use_cache: bool = True,
    progress: bool = False,
) -> Tensor:
    """Log-probability of every token but the first, given those before it.

    The perplexity of unpadded text is ``model.score(tokens, stride).mean().neg().exp()``.

    Args:
        model: runs in eval mode, and is left in the mode that it was in.
        tokens: (B, N) int64 or int32, N at least 2 and any length. Windows that end beyond the model's
            ``max_seq_len`` see that many inputs, whose positions start again, so that nothing can be reused.
        stride: from 1 to W. None: W // 2 (at least 1).
        num_latents: W. None: the model's; never more than the N - 1 inputs.
        pad_mask: bool (B, N), True = padding, on either side.
        use_cache: False recomputes every window; the same scores up to rounding.
        progress: show a progress bar.

    Returns:
        Natural logarithms, float32 (float64 for such a model), (B, N - 1); 0 for padding and for what follows
        padding.

    Raises:
        ValueError: for a number outside its range, or fewer than two tokens.
    """
    model.check_tokens(tokens, pad_mask)
    length = tokens.shape[1] - 1
    if length < 1:
        raise ValueError(f"tokens must have at least 2 positions, got {length + 1}")
    num_latents = model.config.num_latents if num_latents is None else num_latents
    if not 1 <= num_latents <= model.config.max_seq_len:
        raise ValueError(
            f"num_latents must be from 1 to max_seq_len {model.config.max_seq_len}, got {num_latents}"
        )
    stride = max(num_latents // 2, 1) if stride is None else stride
    if not 1 <= stride <= num_latents:
        raise ValueError(f"stride must be from 1 to num_latents {num_latents}, got {stride}")

    window, longest = min(num_latents, length), model.config.max_seq_len
    cached = CachedInputs(model, min(length, longest)) if use_cache else None
    was_training = model.training
    model.eval()
    scores: list[Tensor] = []
    try:
        done = 0
        steps = range(window, length + stride, stride)
        for step in with_progress(steps, progress, "Scoring"):
            end = min(step, length)
            begin = max(end - longest, 0)
            seen, pads = tokens[:, begin:end], None if pad_mask is None else pad_mask[:, begin:end]
            if cached is None or begin > 0:
                logits = model(seen, num_latents=window, pad_mask=pads)
            else:
                logits = model.logits(cached.read(seen, window, pads, [None] * len(model.blocks)))
            logits = logits[:, window - (end - done) :]
            wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
            targets = tokens[:, done + 1 : end + 1].long().unsqueeze(-1)
            scores.append(logits.log_softmax(-1, dtype=wide).gather(-1, targets).squeeze(-1))
            done = end
    finally:
        model.train(was_training)
    whole = torch.cat(scores, dim=1)
    if pad_mask is not None:
        whole = whole.masked_fill(pad_mask[:, 1:] | pad_mask[:, :-1], 0.0)
    return whole
