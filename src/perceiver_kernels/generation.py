"""Autoregressive generation with a Perceiver AR, cached or recomputed, by one rule.

**The window rule.** The latents that predict the token after the first n are columns start(n) to n - 1:

    start(n) = 0                                    for n <= W
    start(n) = stride * ceil((n - W) / stride)      for n >  W

W is ``num_latents``. So the window grows to W latents, then drops its oldest ``stride`` at once and grows
again; it holds more than ``W - stride`` and at most W latents. It depends on n alone, so generating 20
tokens is generating 10 and then 10 more, and it is the same with and without the cache.

**The cache.** A key and value of a cross-attention depends on its own token and position only, so they are
cached for all positions and never recomputed. The latents attend to one another, so while the window grows
each step adds one latent to the layers' caches, and when it moves its latents are computed anew, over the
cached cross-attention: once in ``stride`` steps. A small stride is closer to a full window at every step, a
large one is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perceiver_kernels.checks import check_ids
from perceiver_kernels.kv_cache import KVCache
from perceiver_kernels.rotary import positions_from_padding, right_aligned_positions

if TYPE_CHECKING:
    from perceiver_kernels.models.perceiver_ar import PerceiverAR


def window_start(length: int, num_latents: int, stride: int) -> int:
    """First column of the latents that predict the token after ``length``: the window rule above."""
    return stride * -(-max(length - num_latents, 0) // stride)


class CachedInputs:
    """Keys and values, at every cross-attention, of all columns so far; none of them is computed twice."""

    def __init__(self, model: PerceiverAR, capacity: int) -> None:
        if model.config.position_origin == "last":
            raise ValueError(
                "positions that count back from the last token move with every token, so no key can be "
                "cached: use_cache=False computes all of them again"
            )
        self.model = model
        self.caches = [KVCache(capacity) for _ in (model.cross, *model.later_crosses)]

    def read(
        self, tokens: Tensor, num_latents: int, pad_mask: Tensor | None, layers: Sequence[KVCache | None]
    ) -> Tensor:
        """(B, n) tokens, the whole sequence so far, into the latents of its last ``num_latents`` columns.

        ``layers`` are the caches of the layers above; they hold the latents before these, or are None.
        """
        total = tokens.shape[1]
        num_inputs = total - self.caches[0].length
        rows = max(num_latents, num_inputs)
        positions = right_aligned_positions(rows, total, device=tokens.device)
        key_mask = None
        if pad_mask is not None:
            positions, key_mask = positions_from_padding(pad_mask)[:, total - rows :], ~pad_mask
        x = self.model.embed(tokens[:, total - rows :], positions)
        own, inputs = x[:, rows - num_latents :], x[:, rows - num_inputs :]
        return self.model.read(own, inputs, positions, key_mask, [*self.caches, *layers])


class CachedDecoder:
    """Next-token logits of a growing batch of tokens; each call may add any number of columns."""

    def __init__(self, model: PerceiverAR, capacity: int, num_latents: int, stride: int) -> None:
        self.model, self.num_latents, self.stride = model, num_latents, stride
        self.start = self.end = 0  # columns of the latents that the layers' caches hold
        self.several = model.config.latents_per_position
        self.inputs = CachedInputs(model, capacity)
        self.layers = [KVCache(num_latents * self.several) for _ in model.blocks]

    def __call__(self, tokens: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """(B, n) tokens, the whole sequence so far, and its padding to (B, vocab_size)."""
        total = tokens.shape[1]
        start = window_start(total, self.num_latents, self.stride)
        if start != self.start:
            self.start = self.end = start
            for cache in self.layers:
                cache.clear()
        latents = self.inputs.read(tokens, total - self.end, pad_mask, self.layers)
        self.end = total
        return self.model.logits(latents[:, -self.several :])[:, -1]


class RecomputingDecoder:
    """The same logits with nothing kept between calls: the specification of :class:`CachedDecoder`."""

    def __init__(self, model: PerceiverAR, num_latents: int, stride: int) -> None:
        self.model, self.num_latents, self.stride = model, num_latents, stride

    def __call__(self, tokens: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """(B, n) tokens and their padding to (B, vocab_size)."""
        total = tokens.shape[1]
        window = total - window_start(total, self.num_latents, self.stride)
        logits: Tensor = self.model(tokens, num_latents=window, pad_mask=pad_mask)
        return logits[:, -1]


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token from each row of (B, vocab_size): (B,) int64. Temperature 0 takes the likeliest."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # Nucleus sampling (Holtzman et al. 2020): drop what lies beyond top_p, never the likeliest token.
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(
    model: PerceiverAR,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    allowed: Callable[[Tensor], Tensor] | None = None,
    eos: int | None = None,
    pad_mask: Tensor | None = None,
    num_latents: int | None = None,
    stride: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    progress: bool = False,
) -> Tensor:
    """Continue a batch of prompts.

    Args:
        model: runs in eval mode, and is left in the mode that it was in.
        prompt: (B, n) int64 or int32, n at least 1; may be shorter than the latents.
        max_new_tokens: how many tokens to add; n + max_new_tokens must not exceed the model's
            ``max_seq_len``: absolute positions do not slide.
        temperature: divides the logits; 0 is greedy.
        top_k: sample from the k most probable tokens (and ties of the last).
        top_p: sample from the fewest tokens that hold this much probability.
        allowed: given the tokens so far (B, n), padding included, tells which may come next: bool
            (vocab_size,) or (B, vocab_size). What :mod:`perceiver_kernels.data` says of a modality, for one.
        eos: a sequence that draws this token is filled up with it.
        pad_mask: bool (B, n), True = padding, on the left only: prompts of different lengths, see
            :func:`pad_left`. The latents' window counts columns, padding included.
        num_latents: W of the window rule, see the module. None: the model's.
        stride: stride of the window rule, from 1 to W. None: W // 2 (at least 1).
        generator: source of randomness. None: torch's.
        use_cache: False recomputes every step; the same logits up to rounding.
        progress: show a progress bar.

    Returns:
        (B, n + max_new_tokens), prompt included, dtype of the prompt.

    Raises:
        ValueError: for a number outside its range, padding on the right, or an empty or too long prompt.
    """
    batch, length = _check_prompt(model, prompt, max_new_tokens, pad_mask)
    num_latents = model.config.num_latents if num_latents is None else num_latents
    if not 1 <= num_latents <= model.config.max_seq_len:
        raise ValueError(
            f"num_latents must be from 1 to max_seq_len {model.config.max_seq_len}, got {num_latents}"
        )
    stride = max(num_latents // 2, 1) if stride is None else stride
    if not 1 <= stride <= num_latents:
        raise ValueError(f"stride must be from 1 to num_latents {num_latents}, got {stride}")
    if not temperature >= 0.0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")

    total = length + max_new_tokens
    tokens = torch.cat((prompt, prompt.new_zeros(batch, max_new_tokens)), dim=1)
    if pad_mask is not None:
        pad_mask = torch.cat((pad_mask, pad_mask.new_zeros(batch, max_new_tokens)), dim=1)
    decode = (
        CachedDecoder(model, total, min(num_latents, total), stride)
        if use_cache
        else RecomputingDecoder(model, num_latents, stride)
    )
    finished = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    was_training = model.training
    model.eval()
    try:
        for n in with_progress(range(length, total), progress, "Generating"):
            logits = decode(tokens[:, :n], None if pad_mask is None else pad_mask[:, :n])
            if allowed is not None:
                logits = logits.masked_fill(~_choices(allowed(tokens[:, :n]), logits), -torch.inf)
            drawn = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if eos is not None:
                drawn = drawn.masked_fill(finished, eos)
                finished = finished | (drawn == eos)
            tokens[:, n] = drawn
            if eos is not None and finished.all():
                tokens[:, n:] = eos
                break
    finally:
        model.train(was_training)
    return tokens


def pad_left(prompts: Sequence[Tensor], token: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths as one batch, for :func:`generate`.

    Args:
        prompts: tokens (n,) each, n at least 1.
        token: what stands in the padding; nothing sees it.

    Returns:
        Tokens (B, longest) and their padding, bool (B, longest).
    """
    if not prompts or not all(prompt.dim() == 1 and len(prompt) for prompt in prompts):
        shapes = [tuple(prompt.shape) for prompt in prompts]
        raise ValueError(f"prompts must be (n,) each with n at least 1, got {shapes}")
    longest = max(map(len, prompts))
    tokens = prompts[0].new_full((len(prompts), longest), token)
    pad_mask = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt) :] = prompt
        pad_mask[i, longest - len(prompt) :] = False
    return tokens, pad_mask


def _check_prompt(
    model: PerceiverAR, prompt: Tensor, max_new_tokens: int, pad_mask: Tensor | None
) -> tuple[int, int]:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if prompt.dim() != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt must be (B, n) with n at least 1, got {tuple(prompt.shape)}")
    check_ids("prompt", prompt, model.config.vocab_size)
    batch, length = prompt.shape
    if length + max_new_tokens > model.config.max_seq_len:
        raise ValueError(
            f"prompt of {length} and max_new_tokens {max_new_tokens} exceed "
            f"the model's max_seq_len {model.config.max_seq_len}"
        )
    if pad_mask is not None:
        if pad_mask.shape != prompt.shape or pad_mask.dtype != torch.bool:
            raise ValueError(
                f"pad_mask must be bool {tuple(prompt.shape)}, got {pad_mask.dtype} {tuple(pad_mask.shape)}"
            )
        if bool((pad_mask[:, 1:] & ~pad_mask[:, :-1]).any()) or bool(pad_mask[:, -1].any()):
            raise ValueError("prompts must be padded on the left only, and hold at least one token each")
    return batch, length


def _choices(allowed: Tensor, logits: Tensor) -> Tensor:
    """What ``allowed`` gave, if every row of the logits (B, vocab_size) has a token left."""
    if allowed.dtype != torch.bool or allowed.shape not in (logits.shape, logits.shape[1:]):
        raise ValueError(
            f"allowed must give bool {tuple(logits.shape[1:])} or {tuple(logits.shape)}, "
            f"got {allowed.dtype} {tuple(allowed.shape)}"
        )
    if not allowed.any(dim=-1).all():
        raise ValueError("allowed must leave every example a token that may come next, got none")
    return allowed.to(logits.device)


def with_progress(steps: Sequence[int], progress: bool, what: str) -> Iterable[int]:
    """The steps, with a progress bar where wanted."""
    if not progress:
        return steps
    from rich.progress import track

    return track(steps, description=what)
