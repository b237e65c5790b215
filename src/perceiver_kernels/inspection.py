"""What the latents attend to, without a matrix of M x N.

The log-sum-exp of a call says what every single weight is: ``p = exp(score - lse)``. So one walk over the
keys, chunk by chunk, gives each query's strongest keys (the strongest of each chunk, merged), the entropy of
its weights (``lse - sum p * score``) and how far back its weight lies, in memory of M x chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels import layers
from perceiver_kernels.attention import perceiver_attention
from perceiver_kernels.layers import CrossAttention, SelfAttention
from perceiver_kernels.reference import score, visible
from perceiver_kernels.spec import AttentionSpec, accumulator_dtype, make_spec
from perceiver_kernels.streaming import KeyStream

CHUNK_SIZE = 1024
Chunks = Iterable[tuple[int, Tensor]]


@dataclass(frozen=True, eq=False)
class Attended:
    """Where the weights of M queries over N keys lie, by example and query head.

    Attributes:
        keys: (B, H, M, k) int64, each query's strongest keys, strongest first; -1 where it sees fewer.
        shares: (B, H, M, k), their weights; 0 where there is none.
        entropy: (B, H, M) in nats. Its exponential is the number of keys that the weight is spread over.
        edges: (E + 1,) int64, 0, 1, 2, 4, 8, ...: bins of distance. 0 is the query's own position.
        by_distance: (B, H, E), the share of all weight at distances from ``edges[e]`` to
            ``edges[e + 1] - 1``: the mean over the queries that see a key.
    """

    keys: Tensor
    shares: Tensor
    entropy: Tensor
    edges: Tensor
    by_distance: Tensor

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.keys.shape[1]


@torch.no_grad()
def inspect_attention(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = True,
    q_offset: int | Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
    top: int = 8,
    chunk_size: int = CHUNK_SIZE,
) -> Attended:
    """What :func:`perceiver_kernels.perceiver_attention` of these arguments attends to.

    Args:
        query, key, is_causal, q_offset, key_mask, scale, softcap, backend: as there.
        top: how many of each query's strongest keys to tell.
        chunk_size: keys at a time.

    Raises:
        ValueError, TypeError: as there, and for ``top`` or ``chunk_size`` below 1.
    """
    _check_sizes(top, chunk_size)
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "q_offset": q_offset,
        "key_mask": key_mask,
        "scale": scale,
        "softcap": softcap,
    }
    _, lse = perceiver_attention(query, key, key, return_lse=True, backend=backend, **options)
    spec = make_spec(query, key, key, dropout_p=0.0, dropout_seed=None, **options)
    starts = range(0, key.shape[2], chunk_size)
    chunks = ((begin, key[:, :, begin : begin + chunk_size]) for begin in starts)
    return _summary(query, lse, chunks, key.shape[2], spec, top)


@torch.no_grad()
def inspect_model(
    model: nn.Module, *inputs: Any, top: int = 8, chunk_size: int = CHUNK_SIZE, **options: Any
) -> dict[str, Attended]:
    """What each cross-attention of a model attends to in ``model(*inputs, **options)``, by its name.

    The model runs as it is, in eval mode and without a graph; streamed, it makes its keys once more. Where a
    layer is called more than once, the last call counts.

    Args:
        model: any module with :class:`perceiver_kernels.CrossAttention` layers inside.
        inputs, options: what it is called with.
        top, chunk_size: as in :func:`inspect_attention`.

    Raises:
        ValueError: there is no such layer inside, or its keys are shared out over several ranks.
    """
    _check_sizes(top, chunk_size)
    watched = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, CrossAttention) and not isinstance(layer, SelfAttention)
    }
    if not watched:
        raise ValueError(f"model has no CrossAttention inside: {type(model).__name__}")
    found: dict[str, Attended] = {}
    modes = {module: module.training for module in model.modules()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ops_noted(top, chunk_size))
        for name, layer in watched.items():
            stack.enter_context(_watching(layer, partial(found.__setitem__, name)))
        model.eval()
        try:
            model(*inputs, **options)
        finally:
            for module, training in modes.items():
                module.training = training
    return found


# Where what is attended to goes: set inside of a watched layer's attend, for no other layer or thread.
_note: ContextVar[Callable[[Attended], None] | None] = ContextVar("note", default=None)


@contextlib.contextmanager
def _watching(layer: CrossAttention, note: Callable[[Attended], None]) -> Iterator[None]:
    """Have ``note`` called with what ``layer.attend`` attends to."""
    attend = layer.attend

    def watched(*inputs: Any, **options: Any) -> Tensor:
        if options.get("slices") is not None:
            raise ValueError(
                "attention over the keys of several ranks can't be inspected: call without group"
            )
        token = _note.set(note)
        try:
            return attend(*inputs, **options)
        finally:
            _note.reset(token)

    layer.attend = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.attend


@contextlib.contextmanager
def _ops_noted(top: int, chunk_size: int) -> Iterator[None]:
    """Have the layers' two ways to attend, the op and the walk over a stream, tell what they attend to."""
    names = vars(layers)
    plain, streamed = names["perceiver_attention"], names["streamed_attention"]

    def noting_plain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        note = _note.get()
        if note is not None:
            known = {name: value for name, value in options.items() if not name.startswith("dropout")}
            note(inspect_attention(query, key, **known, top=top, chunk_size=chunk_size))
        return plain(query, key, value, **options)

    def noting_streamed(
        query: Tensor, stream: KeyStream, spec: AttentionSpec, backend: str, slices: Any = None
    ) -> tuple[Tensor, Tensor]:
        out, lse = streamed(query, stream, spec, backend, slices=slices)
        note = _note.get()
        if note is not None:
            keys = replace(stream, chunk_size=chunk_size).keys(query)
            note(_summary(query, lse, keys, stream.length, spec, top))
        return out, lse

    names.update(perceiver_attention=noting_plain, streamed_attention=noting_streamed)
    try:
        yield
    finally:
        names.update(perceiver_attention=plain, streamed_attention=streamed)


def _summary(
    query: Tensor, lse: Tensor, chunks: Chunks, length: int, spec: AttentionSpec, top: int
) -> Attended:
    """One walk over the keys: ``chunks`` are (first index, keys (B, Hkv, n, D)), in order.

    Works on (B, Hkv, G, M, n): heads grouped by the key head that they share.
    """
    dtype = accumulator_dtype(query)
    batch, heads, queries, dim = query.shape
    edges = _edges(_furthest(spec, queries, length))
    best = query.new_full((batch, heads, queries, 0), -torch.inf, dtype=dtype)
    where = torch.empty_like(best, dtype=torch.int64)
    mean_score = query.new_zeros((batch, heads, queries), dtype=dtype)
    by_bin = query.new_zeros((batch, heads, queries, len(edges) - 1), dtype=dtype)
    dead = lse == -torch.inf
    base = lse.to(dtype).masked_fill(dead, 0.0).unsqueeze(-1)
    places = _places(spec, queries, query.device)  # (B or 1, M)
    for begin, key in chunks:
        end = begin + key.shape[2]
        grouped = query.to(dtype).reshape(batch, key.shape[1], heads // key.shape[1] * queries, dim)
        logits = (grouped @ key.to(dtype).mT).view(batch, heads, queries, end - begin)
        seen = visible(spec.over_keys(begin, end), queries, end - begin, query.device).unsqueeze(1)
        scores = score(logits * spec.scale, spec).masked_fill(~seen, -torch.inf)
        weights = torch.exp(scores - base)
        mean_score += (weights * scores.masked_fill(~seen, 0.0)).sum(-1)
        distance = (places.unsqueeze(-1) - torch.arange(begin, end, device=query.device)).abs()
        bins = torch.bucketize(distance, edges.to(query.device), right=True) - 1
        by_bin.scatter_add_(-1, bins.unsqueeze(1).expand_as(weights), weights)
        strongest = scores.topk(min(top, end - begin), dim=-1)
        best, order = torch.cat((best, strongest.values), -1).topk(
            min(top, best.shape[-1] + strongest.values.shape[-1]), dim=-1
        )
        where = torch.cat((where, strongest.indices + begin), -1).gather(-1, order)
    alive = (~dead).sum(-1, keepdim=True).clamp(min=1)
    return Attended(
        keys=where.masked_fill(best == -torch.inf, -1),
        shares=torch.exp(best - base),
        entropy=(lse.to(dtype) - mean_score).masked_fill(dead, 0.0).clamp(min=0.0),
        edges=edges,
        by_distance=by_bin.sum(2) / alive,
    )


def _places(spec: AttentionSpec, queries: int, device: torch.device) -> Tensor:
    """The key that each query stands at, int64 (B, M) or (1, M)."""
    offset = torch.tensor([spec.q_offset], device=device) if spec.q_offsets is None else spec.q_offsets
    return offset.unsqueeze(1) + torch.arange(queries, device=device)


def _furthest(spec: AttentionSpec, queries: int, length: int) -> int:
    """The largest distance that there can be."""
    places = _places(spec, queries, torch.device("cpu") if spec.q_offsets is None else spec.q_offsets.device)
    if not places.numel():
        return 0
    return max(int(places.max()), length - 1 - int(places.min()), 0)


def _edges(furthest: int) -> Tensor:
    """0, 1, 2, 4, ... until ``furthest`` lies before the last."""
    return torch.tensor([0, *(2**i for i in range(furthest.bit_length() + 1))])


def _check_sizes(top: int, chunk_size: int) -> None:
    for name, size in (("top", top), ("chunk_size", chunk_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
