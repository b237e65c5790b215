"""The layers of a Perceiver AR: cross-attention from all inputs onto the latents, and the latent stack.

Every layer is pre-norm and returns the update only; the caller adds it to the residual.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_kernels.attention import autocast_dtype, perceiver_attention
from perceiver_kernels.checks import check_bool, check_size
from perceiver_kernels.kv_cache import KVCache
from perceiver_kernels.layer_checks import check_call
from perceiver_kernels.recomputation import Snapshot
from perceiver_kernels.rotary import LAYOUTS, RotaryLayout, apply_rotary, rotary_cos_sin
from perceiver_kernels.rows import gather_rows, kept_indices, rows_at
from perceiver_kernels.spec import needs_gradient
from perceiver_kernels.streaming import (
    CHUNK_SIZE,
    Array,
    KeyStream,
    Recomputed,
    Rows,
    Source,
    stream_call,
    streamed_attention,
)

if TYPE_CHECKING:  # a torch without torch.distributed has no such modules
    from perceiver_kernels.collectives import Group
    from perceiver_kernels.distributed import Slices

Rotary = tuple[Tensor, Tensor]

# What ranks must agree on. Each may have a way of its own to walk its part: streamed, chunk_size.
_OPTIONS = (
    *("num_heads", "num_kv_heads", "head_dim", "value_dim"),
    *("rotary_dim", "rotary_kv_heads", "rotary_layout", "rotary_base", "rotary_endpoint"),
    *("scale", "softcap", "dropout", "prefix_dropout", "backend"),
)


def _apart(slices: Slices | None, device: torch.device) -> AbstractContextManager[None]:
    """In context parallel each rank's own random numbers, which its part of the prefix needs."""
    return nullcontext() if slices is None else slices.randomness("prefix", device)


class CrossAttention(nn.Module):
    """Causal cross-attention from prefix and latents onto the latents (Perceiver AR, arXiv 2202.07765).

    ``layer(latents, prefix)`` is attention over ``concat(prefix, latents)``, right-aligned. Keys and values
    of prefix and latents go through one norm, as in the paper, so a position keeps its key and value when it
    turns from latent to prefix and a cache of them stays exact.

    Args:
        dim: channels of latents and prefix.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads`` (grouped-query). None: ``num_heads``.
        head_dim: channels of a query or key head. None: ``dim // num_heads``.
        value_dim: channels of a value head. None: ``head_dim``.
        bias: whether the four projections have one.
        rotary_fraction: share of ``head_dim`` that is rotated (rounded down to even); 0 turns RoPE off.
        rotary_heads: share of the heads that are rotated, rounded down to whole key heads; the first ones.
        rotary_layout: ``"half"`` or ``"interleaved"``, see :mod:`perceiver_kernels.rotary`.
        rotary_base, rotary_endpoint: base of the rotary wavelengths, and whether the longest reaches it, see
            :func:`perceiver_kernels.rotary.rotary_cos_sin`.
        scale, softcap, backend: as in :func:`perceiver_kernels.perceiver_attention`.
        dropout: dropout probability of the attention weights, in training.
        prefix_dropout: share of the prefix left out in training. Each example keeps exactly
            ``P - int(P * prefix_dropout)`` random prefix positions, gathered before norm and projection: the
            layer's cost falls with what is dropped.
        streamed: whether forward and backward walk the inputs in chunks, so that no keys, values or
            normalised inputs of length N exist, see :mod:`perceiver_kernels.streaming`. The prefix may then
            also be a numpy array (one mapped from a file, for example), a tensor on another device, or
            :class:`perceiver_kernels.Recomputed`. Same parameters, same results up to rounding.
        chunk_size: positions of each example at a time, where streamed.

    Raises:
        ValueError: for sizes below 1, heads that do not divide, shares outside their range.
        TypeError: for a size that is no int, a flag that is no bool.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = False,
        rotary_fraction: float = 0.5,
        rotary_heads: float = 1.0,
        rotary_layout: RotaryLayout = "half",
        rotary_base: float = 10_000.0,
        rotary_endpoint: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        prefix_dropout: float = 0.0,
        streamed: bool = False,
        chunk_size: int = CHUNK_SIZE,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = check_size("dim", dim), check_size("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else check_size("num_kv_heads", num_kv_heads)
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}: give head_dim")
        head_dim = check_size("head_dim", dim // num_heads if head_dim is None else head_dim)
        value_dim = head_dim if value_dim is None else check_size("value_dim", value_dim)
        chunk_size = check_size("chunk_size", chunk_size)
        flags = {"bias": bias, "rotary_endpoint": rotary_endpoint, "streamed": streamed}
        for name, flag in flags.items():
            check_bool(name, flag)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads is {num_kv_heads}, which does not divide num_heads {num_heads}")
        for name, share in (("rotary_fraction", rotary_fraction), ("rotary_heads", rotary_heads)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        if rotary_layout not in LAYOUTS:
            raise ValueError(f"rotary_layout must be one of {', '.join(LAYOUTS)}, got {rotary_layout!r}")
        for name, p in (("dropout", dropout), ("prefix_dropout", prefix_dropout)):
            if not 0.0 <= p < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {p}")
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.rotary_dim = 2 * int(head_dim * rotary_fraction / 2)
        self.rotary_kv_heads = int(num_kv_heads * rotary_heads)
        self.rotary_layout, self.rotary_base = rotary_layout, rotary_base
        self.rotary_endpoint = rotary_endpoint
        self.scale, self.softcap, self.backend = scale, softcap, backend
        self.dropout, self.prefix_dropout = dropout, prefix_dropout
        self.streamed, self.chunk_size = streamed, chunk_size

        self.norm = nn.LayerNorm(dim)
        self.kv_norm: nn.Module | None = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * value_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * value_dim, dim, bias=bias)

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return f"dim={self.dim}, {heads}, rotary_dim={self.rotary_dim}"

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """cos and sin (..., rotary_dim / 2) of this layer's rotary embedding, for data of ``dtype``."""
        angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return rotary_cos_sin(
            positions,
            self.rotary_dim,
            base=self.rotary_base,
            endpoint=self.rotary_endpoint,
            dtype=angle_dtype,
        )

    def attend(
        self,
        latents: Tensor,
        inputs: Tensor | Source,
        *,
        own: Tensor | None = None,
        per_position: int = 1,
        positions: Tensor | None = None,
        rotary: Rotary | None = None,
        key_mask: Tensor | None = None,
        cache: KVCache | None = None,
        slices: Slices | None = None,
    ) -> Tensor:
        """Causal attention of the latents over the inputs, everything right-aligned.

        The last latent stands at the last key, so latent i sees keys up to ``N - M + i``.

        Args:
            latents: (B, M, dim), the queries; (B, M * per_position, dim) where several stand at each
                position, those of one position side by side.
            inputs: (B, n, dim), the keys and values, latents included. With ``cache`` they are appended to
                it, and the N keys are all that the cache then holds; without, N = n. Or a source of what
                stands *before* the latents, N - M inputs, which is streamed.
            own: (B, M, dim), the inputs at the latents' positions, where ``inputs`` is a source and these are
                not the latents themselves.
            per_position: latents at each position.
            positions: (L,) or (B, L) with L at least M and n: the last belongs to the last key.
            rotary: cos and sin, (L, R) or (B, L, R), instead of ``positions``.
            key_mask: bool (B, N), True = may be attended.
            cache: where to keep keys and values between calls.
            slices: context parallel: where each rank's part of the prefix lies. ``inputs``, ``rotary`` and
                ``key_mask`` are then those of this rank's part and of the latents, which all ranks share.

        Returns:
            The shape of ``latents``.
        """
        if not isinstance(inputs, Tensor):
            with _apart(slices, latents.device):
                own = latents if own is None else own
                streamed: Tensor = self._attend_streamed(
                    latents, inputs, own, per_position, positions, rotary, key_mask, slices
                )
            return streamed
        num_latents = latents.shape[1] // per_position
        if rotary is None:
            assert positions is not None
            rotary = self.rotary(positions, latents.dtype)
        if self.training and self.prefix_dropout > 0.0 and cache is None:
            with _apart(slices, latents.device):
                inputs, rotary, key_mask = self._drop_prefix(num_latents, inputs, rotary, key_mask)
            slices = self._after_drop(slices)
        queries = self.norm(latents)
        q = self._query_heads(self.q_proj(queries), per_position, rotary)
        if slices is not None and not slices.is_last:  # the latents' own keys are the last rank's
            keys = inputs.shape[1] - num_latents
            inputs, rotary = inputs[:, :keys], (rotary[0][..., :keys, :], rotary[1][..., :keys, :])
            key_mask = None if key_mask is None else key_mask[:, :keys]
        context = queries if self.kv_norm is None else self.kv_norm(inputs)
        k = self._heads(self.k_proj(context), self.num_kv_heads, rotary)
        v = self._heads(self.v_proj(context), self.num_kv_heads, None)
        if cache is not None:
            k, v = cache.append(k, v)
        attention = perceiver_attention if slices is None else slices.extended(num_latents).attention
        out = attention(
            q,
            k,
            v,
            key_mask=key_mask,
            scale=self.scale,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self._update(out, per_position)

    # torch.compile can't follow a walk whose chunks have graphs of their own: its own graph breaks here.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _attend_streamed(
        self,
        latents: Tensor,
        prefix: Source,
        own: Tensor,
        per_position: int,
        positions: Tensor | None,
        rotary: Rotary | None,
        key_mask: Tensor | None,
        slices: Slices | None,
    ) -> Tensor:
        """:meth:`attend` over prefix and own inputs, chunk by chunk."""
        (batch, num_latents), device, kept = own.shape[:2], latents.device, None
        if slices is not None and positions is None:
            positions = slices.positions(num_latents, device)
        if self.training and self.prefix_dropout > 0.0:
            kept = self._kept(batch, prefix.length, num_latents, device)
            prefix = prefix.keep(kept[:, : kept.shape[1] - num_latents])
            key_mask = None if key_mask is None else gather_rows(key_mask, kept)
            slices = self._after_drop(slices)
        total = prefix.length + num_latents

        def angles(begin: int, end: int) -> Rotary:
            """cos and sin of the keys from ``begin`` to ``end - 1``."""
            places = torch.arange(begin, end, device=device) if kept is None else kept[:, begin:end]
            if rotary is not None:
                cos, sin = (rows_at(t, places) for t in rotary)
                return cos, sin
            if positions is not None:
                places = rows_at(positions.unsqueeze(-1), places).squeeze(-1)
            return self.rotary(places, latents.dtype)

        modules = self.norm if self.kv_norm is None else self.kv_norm, self.k_proj, self.v_proj
        norm, k_proj, v_proj = (Snapshot(module) for module in modules)

        def project(x: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
            context = norm(x.to(latents.dtype))
            key = self._heads(k_proj(context), self.num_kv_heads, angles(begin, end))
            return key, self._heads(v_proj(context), self.num_kv_heads, None)

        weights = [*norm.tensors, *k_proj.tensors, *v_proj.tensors]
        watched = [t for t in (positions, kept, *(rotary or ())) if t is not None]
        if needs_gradient(watched):
            raise ValueError("positions and rotary must not require a gradient where the layer is streamed")
        sources = [prefix, Rows(own)] if slices is None or slices.is_last else [prefix]
        stream = KeyStream(sources, project, weights, self.dim, watched, self.chunk_size)
        last = angles(total - num_latents, total)
        query = self._query_heads(self.q_proj(self.norm(latents)), per_position, last)
        call = stream_call(
            query,
            stream,
            kv_heads=self.num_kv_heads,
            value_dim=self.value_dim,
            key_mask=None if key_mask is None else key_mask[:, : stream.length],
            scale=self.scale,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
            dropout_seed=None if slices is None else slices.seed,
            backend=self.backend,
        )
        out, _ = streamed_attention(
            query, stream, *call, slices=None if slices is None else slices.extended(num_latents)
        )
        return self._update(out, per_position)

    def _query_heads(self, x: Tensor, per_position: int, rotary: Rotary | None) -> Tensor:
        """(B, M * per_position, H * D) to (B, H * per_position, M, D).

        The latents of one position see the same keys: to the op they are so many more query heads of each
        key head.
        """
        if per_position > 1:
            x = torch.unflatten(torch.unflatten(x, 1, (-1, per_position)), -1, (self.num_kv_heads, -1))
            x = x.transpose(2, 3).flatten(2)
        return self._heads(x, self.num_heads * per_position, rotary)

    def _update(self, out: Tensor, per_position: int) -> Tensor:
        """What the op gave for :meth:`_query_heads` to (B, M * per_position, dim)."""
        out = out.transpose(1, 2)
        if per_position > 1:
            out = torch.unflatten(out, 2, (self.num_kv_heads, per_position, -1)).transpose(2, 3).flatten(1, 2)
        update: Tensor = self.out_proj(out.flatten(2))
        return update

    def _heads(self, x: Tensor, heads: int, rotary: Rotary | None) -> Tensor:
        """(B, L, heads * D) to (B, heads, L, D), a transposed view: the op takes its strides as they are."""
        x = torch.unflatten(x, -1, (heads, -1))
        if rotary is not None:
            begin = rotary[0].shape[-2] - x.shape[1]
            cos, sin = (t[..., begin:, :] for t in rotary)
            turned = self.rotary_kv_heads * heads // self.num_kv_heads  # queries turn with their key head
            if turned == heads:
                x = apply_rotary(x, cos, sin, layout=self.rotary_layout)
            else:
                first, others = torch.split(x, [turned, heads - turned], dim=2)
                x = torch.cat((apply_rotary(first, cos, sin, layout=self.rotary_layout), others), dim=2)
        return x.transpose(1, 2)

    def _kept(self, batch: int, prefix: int, num_latents: int, device: torch.device) -> Tensor:
        """Indices (B, K) of what prefix dropout keeps among all inputs: part of the prefix, all latents."""
        latents = torch.arange(prefix, prefix + num_latents, device=device).expand(batch, -1)
        return torch.cat((kept_indices(batch, prefix, self.prefix_dropout, device), latents), dim=1)

    def _after_drop(self, slices: Slices | None) -> Slices | None:
        """Where the slices lie after prefix dropout."""
        return slices and slices.map(lambda prefix: prefix - int(prefix * self.prefix_dropout))

    def _drop_prefix(
        self, num_latents: int, inputs: Tensor, rotary: Rotary, key_mask: Tensor | None
    ) -> tuple[Tensor, Rotary, Tensor | None]:
        """Keep a random part of the prefix, before any work is done on it, and all latents."""
        batch, total = inputs.shape[:2]
        kept = self._kept(batch, total - num_latents, num_latents, inputs.device)
        cos, sin = (gather_rows(t.expand(batch, *t.shape[-2:]), kept) for t in rotary)
        key_mask = None if key_mask is None else gather_rows(key_mask, kept)
        return gather_rows(inputs, kept), (cos, sin), key_mask

    def forward(
        self,
        latents: Tensor,
        prefix: Tensor | Array | Recomputed | None = None,
        *,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
        rotary: Rotary | None = None,
        group: Group = None,
    ) -> Tensor:
        """Attend from the latents to prefix and latents.

        Args:
            latents: (B, M, dim).
            prefix: (B, N - M, dim), what stands before the latents; None for nothing. Where streamed also a
                numpy array, a tensor on another device or of another dtype, or :class:`Recomputed`.
            key_mask: bool (B, N) over prefix and latents, True = may be attended.
            positions: (N,) or (B, N), for the rotary embedding. None: 0 ... N - 1.
            rotary: cos and sin, each (N, R) or (B, N, R) with one value for each pair of channels, from any
                formula; instead of ``positions``.
            group: context parallel over these ranks (:mod:`perceiver_kernels.distributed`). ``prefix`` is
                then this rank's part of it, None included; the latents are the same on every rank; key_mask,
                positions and rotary are those of this rank's part and the latents. ``prefix_dropout`` leaves
                out its share of each part.

        Returns:
            (B, M, dim), to be added to the latents.
        """
        given = latents, prefix, key_mask, positions, rotary
        if group is None:
            total, slices = check_call(self, *given) + latents.shape[1], None
        else:
            slices = self._share(group, *given)
            total = slices.lengths[slices.rank] + latents.shape[1]
        if self.streamed:
            before = latents[:, :0] if prefix is None else prefix
            source = before if isinstance(before, Recomputed) else Rows(before)
            return self.attend(
                latents, source, positions=positions, rotary=rotary, key_mask=key_mask, slices=slices
            )
        inputs = torch.cat((prefix, latents), dim=1) if isinstance(prefix, Tensor) else latents
        if rotary is None and positions is None:
            device = latents.device
            positions = (
                torch.arange(total, device=device)
                if slices is None
                else slices.positions(latents.shape[1], device)
            )
        return self.attend(
            latents, inputs, positions=positions, rotary=rotary, key_mask=key_mask, slices=slices
        )

    def _share(self, group: Group, latents: Tensor, prefix: Any, *given: Any) -> Slices:
        from perceiver_kernels.distributed import Slices

        def describe() -> tuple[int, dict[str, Any]]:
            length = check_call(self, latents, prefix, *given)
            tensors = prefix.parameters if isinstance(prefix, Recomputed) else (prefix,)
            leaves = [t for t in (latents, *self.parameters(), *tensors) if isinstance(t, Tensor)]
            facts = {
                "latents' shape": tuple(latents.shape),
                "latents' dtype": autocast_dtype(latents.dtype, latents.device),
                "whether a gradient is needed": needs_gradient(leaves),
            }
            return length, facts | {name: getattr(self, name) for name in _OPTIONS}

        slices: Slices = Slices.share(group, self, latents, describe)
        return slices


class SelfAttention(CrossAttention):
    """Causal self-attention over the latents: :class:`CrossAttention` without a prefix and with one norm.

    In context parallel every rank has all latents, and computes this layer by itself.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int | None = None, **options: Any) -> None:
        super().__init__(dim, num_heads, num_kv_heads, **options)
        self.kv_norm = None

    def forward(
        self, latents: Tensor, prefix: Tensor | Array | Recomputed | None = None, **options: Any
    ) -> Tensor:
        """As :meth:`CrossAttention.forward`, (B, M, dim) to (B, M, dim)."""
        for name, given in (("prefix", prefix), ("group", options.get("group"))):
            if given is not None:
                raise ValueError(f"SelfAttention takes no {name}: use CrossAttention")
        return super().forward(latents, **options)


class SquaredReLU(nn.Module):
    """``max(x, 0) ** 2`` (Primer, So et al. 2021, arXiv 2109.08668), Google's Perceiver AR's."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) to (...)."""
        return torch.relu(x).square()


class GeGLU(nn.Module):
    """One half of the channels times the GELU of the other (Shazeer 2020, arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2 n) to (..., n)."""
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


Activation = Literal["gelu", "squared_relu", "geglu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "squared_relu": SquaredReLU, "geglu": GeGLU}


class FeedForward(nn.Sequential):
    """LayerNorm, Linear to ``mult * dim``, activation, Dropout, Linear: (..., dim) to (..., dim).

    ``"geglu"`` has twice the channels before the activation, and ``mult * dim`` after it as the others.
    """

    def __init__(
        self,
        dim: int,
        *,
        mult: float = 4.0,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
        hidden = int(dim * mult)
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, 2 * hidden if activation == "geglu" else hidden, bias=bias),
            _ACTIVATIONS[activation](),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim, bias=bias),
        )
