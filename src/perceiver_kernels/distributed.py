"""Context parallel attention: every rank holds a slice of the keys, and only M x D results travel.

The queries are few and the same on every rank. Each attends to its own slice, and the partial results are
merged by their log-sum-exps (Flash-Decoding, Dao et al. 2023, among machines): with ``lse`` that of the
ranks' own, ``out = sum_r exp(lse_r - lse) out_r``. No key, no value and no gradient of either leaves its
rank. What travels, once per direction, is an all-reduce of M x D in the tensors' own dtype and in rank order
(:mod:`perceiver_kernels.collectives`): all ranks hold the same bits, every time.

**Gradients are those of the sum over ranks of what each rank differentiates**, as if all ranks were one
program: the backward first sums what reached ``out`` on any rank (its one exchange), and each rank then finds
its dk and dv, and what its slice adds to dq, alone. So where every rank computes the same loss from the same
``out``, each parameter's gradient *averaged* over the ranks is exactly that of one process, whether the
parameter makes keys, makes queries, or comes after. Averaging over the data and the context axis at once is
what DDP and FSDP do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from perceiver_kernels import dispatch
from perceiver_kernels.attention import autocast, autocast_dtype
from perceiver_kernels.checks import check_bool, check_size, check_tensor
from perceiver_kernels.collectives import (
    Group,
    compare,
    reduce_over_group,
    refusing,
    resolve_group,
    sum_over_group,
)
from perceiver_kernels.merge import merge_attention
from perceiver_kernels.spec import MAX_LENGTH, AttentionSpec, make_spec, needs_gradient

CALL = "the call"  # the first of the facts that are compared: the others are those of this call


@torch.compiler.disable  # type: ignore[untyped-decorator]
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group = None,
    lengths: Sequence[int] | None = None,
    is_causal: bool = True,
    q_offset: int | Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """:func:`perceiver_kernels.perceiver_attention` over keys whose slices lie on the ranks of a group.

    Rank r holds keys ``sum(lengths[:r])`` up to ``sum(lengths[: r + 1])`` of N in all; slices may be of any
    lengths, none included. Every rank calls this with the same queries and options and with its own slice of
    ``key``, ``value`` and ``key_mask``; positions and dropout count through all slices: the result is that
    of one process that holds all keys. The gradients are those of the sum over ranks of the losses, see the
    module: ``dk`` and ``dv`` of this rank's slice, and what this slice adds to ``dq``. Every rank must run
    the backward; the losses may differ, the queries may not.

    Args:
        query: (B, H, M, D), the same on every rank.
        key: (B, Hkv, n, D), this rank's slice.
        value: (B, Hkv, n, Dv).
        group: a process group or a one-dimensional DeviceMesh whose ranks hold the slices in order; None is
            the default group. Tensors must be where its backend works: gloo on CPUs, NCCL on GPUs.
        lengths: every rank's n, on all ranks or on none. None: the ranks tell each other, and compare all
            other arguments, before anything else: of query its shape and dtype, of key and value their heads
            and head dims, of a tensor q_offset the values (32 bytes to every rank, and with NCCL a wait for
            the GPU). key_mask is each rank's own.
        q_offset: position of query 0 among all N keys: None for N - M, an int, or an integer tensor (B,).
        key_mask: bool (B, n), this rank's slice.
        dropout_seed: None takes rank 0's draw; with ``lengths`` given it must be given too.
        is_causal, scale, softcap, dropout_p, return_lse, backend: as in the op.

    Returns:
        (B, H, M, Dv), with ``return_lse`` also (B, H, M): the same bits on every rank.

    Raises:
        TypeError, ValueError: as the op, before any kernel runs; without ``lengths`` on every rank as soon as
            one rank refuses, or their arguments differ. (For a wrong ``group`` there is nobody to tell.)
        RuntimeError: the exchange failed: a rank died, or took longer than the group's timeout.
    """
    ranks = resolve_group(group)
    with refusing(ranks, query) if lengths is None else nullcontext():
        for argument, tensor in (("query", query), ("key", key), ("value", value)):
            check_tensor(argument, tensor)
        query, key, value = autocast(query), autocast(key), autocast(value)
        spec = make_spec(
            query,
            key,
            value,
            is_causal=is_causal,
            q_offset=q_offset,
            key_mask=key_mask,
            scale=scale,
            softcap=softcap,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
        )
        check_bool("return_lse", return_lse)
        name = dispatch.choose(backend, query, key, value, spec, needs_gradient((query, key, value)))
    if lengths is None:
        offset = spec.q_offset if spec.q_offsets is None else spec.q_offsets.tolist()
        facts = {
            CALL: "context_parallel_attention",
            "query's shape": tuple(query.shape),
            "query's dtype": query.dtype,
            "key's number of heads": key.shape[1],
            "value's head dim": value.shape[3],
            "is_causal": is_causal,
            "q_offset": None if q_offset is None else offset,
            "scale": spec.scale,
            "softcap": spec.softcap or None,
            "dropout_p": spec.dropout_p,
            "dropout_seed": None if dropout_seed is None else int(dropout_seed),
            "return_lse": return_lse,
            "backend": backend,
            "whether a gradient is needed": needs_gradient((query, key, value)),
        }
        seed = 0 if spec.dropout_seed is None else int(spec.dropout_seed[0])
        lengths, seed = compare(ranks, query, key.shape[2], seed, facts)
        if spec.dropout_seed is not None:
            spec = replace(spec, dropout_seed=spec.dropout_seed.new_tensor((seed, 0)))
    elif dropout_p > 0.0 and dropout_seed is None:
        raise ValueError("dropout_seed must be given where lengths are: each rank would draw its own")
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    slices = Slices(ranks, _checked(lengths))
    own = slices.lengths[slices.rank]
    if own != key.shape[2]:
        raise ValueError(f"lengths[{slices.rank}] is {own}, but this rank's key has {key.shape[2]} positions")
    spec = slices.part_of(spec, query.shape[2] if q_offset is None else None)
    options = slices, spec, name, return_lse
    out, lse = _Attention.apply(query, key, value, *options)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Slices:
    """Where the slices lie: rank r of the group holds ``lengths[r]`` positions, after those of rank r - 1."""

    group: ProcessGroup
    lengths: tuple[int, ...]
    seed: int | None = None  # the same on every rank, another one in every step

    def __post_init__(self) -> None:
        if len(self.lengths) != self.group.size():
            raise ValueError(
                f"lengths must be one for each of the group's {self.group.size()} ranks, "
                f"got {len(self.lengths)}"
            )
        if self.total > MAX_LENGTH:
            raise ValueError(f"the slices must have at most 2**32 - 1 positions in all, got {self.total}")

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def share(
        cls,
        group: Group,
        module: nn.Module,
        given: Any,
        describe: Callable[[], tuple[int, Mapping[str, Any]]],
    ) -> Slices:
        """Where the ranks' parts of a module's call lie; in training with a seed of rank 0's.

        Args:
            given: an argument of the call, the tensor that tells where the group's messages may lie.
            describe: checks this rank's arguments, and gives the length of its part and the facts, by name,
                that must be those of all ranks.

        Raises:
            ValueError: on every rank where ``describe`` raised an error on another, or a fact differs.
        """
        ranks = resolve_group(group)
        with refusing(ranks, given):
            length, facts = describe()
        parameters = list(module.parameters())
        facts = {
            CALL: type(module).__name__,
            "training": module.training,
            "the parameters' dtypes": sorted({str(autocast_dtype(p.dtype, p.device)) for p in parameters}),
            "how many parameters need a gradient": sum(needs_gradient([p]) for p in parameters),
            **facts,
        }
        seed = int(torch.randint(2**62, (), device="cpu")) if module.training else 0
        lengths, seed = compare(ranks, given, length, seed, facts)
        return cls(ranks, lengths, seed if module.training else None)

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def is_last(self) -> bool:
        return self.rank == len(self.lengths) - 1

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def start(self) -> int:
        """How many positions lie before this rank's."""
        return sum(self.lengths[: self.rank])

    @property
    def stop(self) -> int:
        return self.start + self.lengths[self.rank]

    def map(self, length: Callable[[int], int]) -> Slices:
        """The slices after each has come to another length."""
        return replace(self, lengths=tuple(map(length, self.lengths)))

    def extended(self, more: int) -> Slices:
        """The slices after the last rank has taken in ``more`` positions."""
        return replace(self, lengths=(*self.lengths[:-1], self.lengths[-1] + more))

    def of_layer(self, index: int) -> Slices:
        """The slices for the model's cross-attention of this index, which draws for itself."""
        return self if self.seed is None else replace(self, seed=self.seed + index)

    def first(self, total: int) -> Slices:
        """What of the slices lies within the first ``total`` positions."""
        ends = [min(end, total) for end in accumulate(self.lengths, initial=0)]
        return replace(self, lengths=tuple(end - start for start, end in pairwise(ends)))

    def positions(self, num_latents: int, device: torch.device) -> Tensor:
        """Positions of this rank's part of the prefix and, after all parts, of the latents: int64."""
        own = torch.arange(self.start, self.stop, device=device)
        return torch.cat((own, torch.arange(self.total, self.total + num_latents, device=device)))

    def last(self, count: int, *parts: Tensor) -> list[Tensor]:
        """The last ``count`` columns of all the ranks' (B, length) parts, on every rank."""
        missing = self.total - count - self.start  # columns of this rank's before them
        wholes = []
        for part in parts:
            whole = part.new_zeros(part.shape[0], count)
            own = part[:, max(missing, 0) :]
            whole[:, max(-missing, 0) :][:, : own.shape[1]] = own
            wholes.append(whole)
        return self.sum(wholes)

    def counted(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the ranks' ``own`` before this one's, and of all."""
        counts = own.new_zeros(len(self.lengths), *own.shape)
        counts[self.rank] = own
        (counts,) = self.sum([counts])
        return counts[: self.rank].sum(0), counts.sum(0)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """:func:`context_parallel_attention` over keys that lie in these slices."""
        out: Tensor = context_parallel_attention(
            query, key, value, group=self.group, lengths=self.lengths, dropout_seed=self.seed, **options
        )
        return out

    def part_of(self, spec: AttentionSpec, queries: int | None) -> AttentionSpec:
        """This rank's part of a call over all positions; ``spec.key_mask`` is the slice's own already.

        ``queries`` puts so many of them at the end of all positions; None leaves them at ``spec.q_offset``.
        """
        whole = replace(spec, key_mask=None)
        if queries is not None and spec.is_causal:
            whole = replace(whole, q_offset=self.total - queries)
        return replace(whole.over_keys(self.start, self.stop), key_mask=spec.key_mask)

    def merge(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """The ranks' partial ``(out, lse)`` over their slices, merged; the same bits on all. No gradient.

        (B, H, M, Dv) and (B, H, M), the same shapes on every rank; ``out`` keeps its strides.
        """

        def reduce(parts: list[Tensor]) -> list[Tensor]:
            merged, lses = merge_attention(list(parts[0]), list(parts[1].squeeze(-1)))
            return [merged, lses.unsqueeze(-1)]

        rows = [out.reshape(-1, out.shape[-1]), lse.reshape(-1, 1)]
        what = "merging the ranks' partial results"
        merged, lses = reduce_over_group(rows, reduce, self.group, what)
        return torch.empty_like(out).copy_(merged.view(out.shape)), lses.view(lse.shape)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum over ranks of each tensor; the same bits on all. No gradient."""
        return sum_over_group(tensors, self.group)

    @contextmanager
    def randomness(self, use: str, device: torch.device, *, shared: bool = False) -> Iterator[None]:
        """Random numbers drawn inside are the same on all ranks (``shared``), or each rank's own.

        Every ``use`` has its own. Torch's default generators stay as they are, and they are what is drawn
        from where there is no seed.
        """
        if self.seed is None:
            yield
            return
        seed = Random(f"{self.seed} {use} {'all' if shared else self.rank}").getrandbits(62)
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type):
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.get_device_module(device).manual_seed(seed)
            yield


def _checked(lengths: Any) -> tuple[int, ...]:
    try:
        given = list(lengths)
    except TypeError:
        raise TypeError(f"lengths must be a sequence of ints, got {type(lengths).__name__}") from None
    return tuple(check_size(f"lengths[{rank}]", length, 0) for rank, length in enumerate(given))


class _Attention(torch.autograd.Function):
    """The local op, forward and backward, around the two exchanges.

    The backward is the op's own with the *merged* ``(out, lse)`` as residuals: ``exp(score - lse)`` is then a
    probability among all N keys, and delta the row's own, so nothing is differentiated through the merge.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slices: Slices,
        spec: AttentionSpec,
        backend: str,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.perceiver_kernels.attention_forward(query, key, value, *spec.options(), backend)
        out, lse = slices.merge(out, lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.slices, ctx.spec, ctx.backend, ctx.with_lse = slices, spec, backend, with_lse
        if not with_lse:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        dout, *dlses = ctx.slices.sum([dout, dlse] if ctx.with_lse else [dout])
        gradients = torch.ops.perceiver_kernels.attention_backward(
            dout, dlses[0] if dlses else None, query, key, value, out, lse, *ctx.spec.options(), ctx.backend
        )
        return (*gradients, None, None, None, None)
