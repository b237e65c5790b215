"""Attention over inputs of any length in memory that does not grow with it.

Normalised inputs, keys and values, and the gradients of all of these, are up to six times as large as the
inputs. Here they exist for one chunk at a time. Forward walks the inputs: norm, project, rotate, attend,
merge by ``(out, lse)``, forget. Backward walks again, recomputes the chunk's keys and values, and
differentiates the chunk from the merged ``(out, lse)``: its gradients are those of the whole call, exact. The
price is the norm and the projections once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from perceiver_kernels.autograd import attention, attention_backward
from perceiver_kernels.checks import check_size, check_tensor
from perceiver_kernels.dispatch import choose
from perceiver_kernels.merge import RunningMerge
from perceiver_kernels.recomputation import Ambient, Ends
from perceiver_kernels.spec import AttentionSpec, accumulator_dtype, dtype_name, make_spec, needs_gradient

if TYPE_CHECKING:  # a torch without torch.distributed has no such module
    from perceiver_kernels.distributed import Slices

CHUNK_SIZE = 4096
Array = np.ndarray[Any, Any]


class Recomputed:
    """Inputs that a function computes, chunk by chunk, in every forward and once more in every backward.

    Embedded tokens, for one: only the tokens are kept, and the gradient reaches the embedding table all the
    same. A lookup by ``torch.nn.functional.embedding(..., sparse=True)`` spares each chunk a gradient of the
    table's size. Random numbers that ``compute`` draws from torch's default generators are drawn again.

    Args:
        compute: ``compute(begin, end)`` gives the inputs at these positions, (B, end - begin, dim), on the
            layer's device, differentiably.
        length: number of positions.
        parameters: all the tensors that require a gradient and that ``compute`` depends on; of other
            tensors those that torch should watch for changes in place. One with tensor hooks must be a view,
            ``parameter.view_as(parameter)``, both here and in ``compute``: its gradient comes in parts.
        at: ``at(indices)``, int64 (B, n), gives the inputs (B, n, dim) there: what prefix dropout keeps.

    Raises:
        TypeError, ValueError: for arguments that are something else.
    """

    _call = "compute(begin, end)"  # in messages

    def __init__(
        self,
        compute: Callable[[int, int], Tensor],
        length: int,
        parameters: Iterable[Tensor] = (),
        *,
        at: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        for name, function in (("compute", compute), ("at", compute if at is None else at)):
            if not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
            raise TypeError(f"parameters must be an iterable of tensors, got {type(parameters).__name__}")
        self.compute, self.length, self.at = compute, check_size("length", length, 0), at
        self.parameters = tuple({id(p): p for p in parameters}.values())
        for i, parameter in enumerate(self.parameters):
            check_tensor(f"parameters[{i}]", parameter)

    def read(self, begin: int, end: int, batch: int, dim: int) -> Tensor:
        """The inputs of one chunk, of this shape and no other."""
        x, shape = self.compute(begin, end), (batch, end - begin, dim)
        if not isinstance(x, Tensor):
            raise TypeError(f"{self._call} must give a torch.Tensor, got {type(x).__name__}")
        if x.shape != shape:
            raise ValueError(f"{self._call} must give {shape} at {begin} to {end}, got {tuple(x.shape)}")
        if x.is_complex():
            raise TypeError(f"{self._call} must give real numbers, got {dtype_name(x.dtype)}")
        return x

    def keep(self, indices: Tensor) -> Recomputed:
        """The inputs at ``indices`` (B, n) alone."""
        if self.at is None:
            raise ValueError("prefix dropout over Recomputed inputs needs them as a function of indices: at=")
        at = self.at
        kept = Recomputed(lambda begin, end: at(indices[:, begin:end]), indices.shape[1], self.parameters)
        kept._call = "at(indices)"
        return kept


class Rows:
    """Inputs that lie somewhere: a tensor on any device, or a numpy array, such as one mapped from a file.

    ``indices`` (B, n) are the rows that count, None for all.
    """

    def __init__(self, rows: Tensor | Array, indices: Tensor | None = None) -> None:
        self.rows, self.indices = rows, indices
        self.length = rows.shape[1] if indices is None else indices.shape[1]
        self.device = rows.device if isinstance(rows, Tensor) else torch.device("cpu")

    def read(self, begin: int, end: int) -> Tensor:
        """The inputs of one chunk, where they lie, without their history."""
        if self.indices is None:
            chunk = self.rows[:, begin:end]
            return chunk.detach() if isinstance(chunk, Tensor) else torch.from_numpy(np.array(chunk))
        indices = self.indices[:, begin:end].to(self.device)
        shape = (*indices.shape, *self.rows.shape[2:])
        if isinstance(self.rows, Tensor):
            chosen = self.rows.new_empty(shape)
            for example, kept, out in zip(self.rows.detach(), indices, chosen, strict=True):
                torch.index_select(example, 0, kept, out=out)
            return chosen
        array = np.empty(shape, self.rows.dtype)
        for rows, kept, into in zip(self.rows, indices.numpy(), array, strict=True):
            into[...] = rows[kept]
        return torch.from_numpy(array)

    def keep(self, indices: Tensor) -> Rows:
        """The inputs at ``indices`` (B, n) alone."""
        return Rows(self.rows, indices)

    def empty_gradient(self) -> Tensor:
        """Where :meth:`write` puts the gradient of the tensor; rows that don't count have 0."""
        assert isinstance(self.rows, Tensor)
        return torch.empty_like(self.rows) if self.indices is None else torch.zeros_like(self.rows)

    def write(self, gradient: Tensor, begin: int, end: int, chunk: Tensor) -> None:
        """Put the gradient of one chunk in its place."""
        if self.indices is None:
            gradient[:, begin:end] = chunk
            return
        indices = self.indices[:, begin:end].to(self.device)
        for example, kept, rows in zip(gradient, indices, chunk.to(self.device), strict=True):
            example[kept] = rows


Source = Rows | Recomputed


@dataclass(frozen=True, eq=False)
class KeyStream:
    """Keys and values of long inputs, made and forgotten chunk by chunk.

    Args:
        sources: the inputs, one source after the other.
        project: ``project(x, begin, end)`` turns inputs (B, n, dim), which stand at ``begin`` to ``end - 1``
            among all, into keys (B, Hkv, n, D) and values (B, Hkv, n, Dv).
        weights: the tensors that ``project`` depends on and that may require a gradient; tensor hooks are
            refused, since each chunk would run them: views have none, see :class:`Snapshot`.
        dim: channels of the inputs.
        watched: other tensors that ``project`` reads: torch notices if they change before the backward.
        chunk_size: positions of each example at a time.
    """

    sources: Sequence[Source]
    project: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
    weights: Sequence[Tensor]
    dim: int
    watched: Sequence[Tensor] = ()
    chunk_size: int = CHUNK_SIZE

    @property
    def tensors(self) -> list[Tensor]:
        """What may require a gradient: the sources' tensors, one chunk of rows at a time, and the rest."""
        return [*(source.rows for source in self._row_sources()), *self._parameters()]

    @property
    def length(self) -> int:
        """Number of inputs."""
        return sum(source.length for source in self.sources)

    def forward(
        self, query: Tensor, spec: AttentionSpec, backend: str, constant: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of the query (B, H, M, D) over all keys, without a graph.

        ``constant``: gradients are wanted, and nothing declared requires one, so nothing else may.
        """
        merge, allowed = RunningMerge(), Ends([])

        def attend(source: Source, begin: int, end: int, read: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
            """One chunk; what it made is gone when this returns."""
            with torch.set_grad_enabled(constant):
                x = read()
                key, value = (t.to(query.dtype) for t in self.project(x, begin, end))
            if constant:
                allowed.check(x, isinstance(source, Recomputed), (key, value))
            return attention(query, key, value, spec.over_keys(begin, end), backend)

        with torch.no_grad():
            for source, begin, end, at, read in self._walk(query):
                merge.add(*attend(source, at + begin, at + end, read))
        return merge.result()

    def keys(self, query: Tensor) -> Iterator[tuple[int, Tensor]]:
        """First index and keys (B, Hkv, n, D) of every chunk, in the query's dtype, without a graph."""
        for _, begin, end, at, read in self._walk(query):
            with torch.no_grad():
                yield at + begin, self.project(read(), at + begin, at + end)[0].to(query.dtype)

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        query: Tensor,
        residuals: tuple[Tensor, Tensor],
        spec: AttentionSpec,
        backend: str,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradient of the query, and those of the :attr:`tensors` where ``wanted``.

        ``residuals`` are ``(out, lse)`` over these keys, or over these and others merged.
        """
        row_sources = self._row_sources()
        into = {s: s.empty_gradient() for s, want in zip(row_sources, wanted, strict=False) if want}
        declared = self._parameters()
        rest = zip(declared, wanted[len(row_sources) :], strict=True)
        parameters = [parameter for parameter, want in rest if want]
        _refuse_hooks(parameters)
        allowed = Ends(declared)
        dq, *sums = (torch.zeros_like(t, dtype=accumulator_dtype(t)) for t in (query, *parameters))

        def differentiate(source: Source, begin: int, end: int, at: int, read: Callable[[], Tensor]) -> None:
            """One chunk; what it made is gone when this returns."""
            with torch.enable_grad():
                x = read()
                leaves = [*parameters, x.requires_grad_()] if source in into else parameters
                key, value = (t.to(query.dtype) for t in self.project(x, at + begin, at + end))
            allowed.check(x, isinstance(source, Recomputed), (key, value))
            part = spec.over_keys(at + begin, at + end)
            dq_part, dk, dv = attention_backward(
                dout, dlse, query, key.detach(), value.detach(), residuals, part, backend
            )
            dq.add_(dq_part)
            outputs = [(t, gradient) for t, gradient in ((key, dk), (value, dv)) if t.requires_grad]
            if not outputs or not leaves:
                return
            ends, gradients = zip(*outputs, strict=True)
            gradients = torch.autograd.grad(ends, leaves, gradients, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=False):  # the last may be that of x
                if gradient is not None:
                    total += gradient.to(total.dtype)
            if isinstance(source, Rows) and source in into:
                source.write(into[source], begin, end, gradients[-1])

        for chunk in self._walk(query):
            differentiate(*chunk)
        totals = [total.to(p.dtype) for total, p in zip(sums, parameters, strict=True)]
        return dq.to(query.dtype), [*into.values(), *totals]

    def _row_sources(self) -> list[Any]:
        return [s for s in self.sources if isinstance(s, Rows) and isinstance(s.rows, Tensor)]

    def _parameters(self) -> list[Tensor]:
        recomputed = [p for s in self.sources if isinstance(s, Recomputed) for p in s.parameters]
        return list({id(p): p for p in (*self.weights, *recomputed)}.values())

    def _walk(self, query: Tensor) -> Iterator[tuple[Source, int, int, int, Callable[[], Tensor]]]:
        """All chunks in order: source, begin and end in it, where it begins among all, how to read.

        Rows in CPU memory are copied to a GPU while that works on the chunk before.
        """
        jobs: list[tuple[Source, int, int, int]] = []
        at = 0
        for source in self.sources:
            for begin in range(0, source.length, self.chunk_size):
                jobs.append((source, begin, min(begin + self.chunk_size, source.length), at))
            at += source.length
        jobs = jobs or [(self.sources[-1], 0, 0, 0)]  # no inputs at all
        start = _Reader(query.device, len(query), self.dim)
        reads = (start(*job[:3]) for job in jobs)
        ahead = next(reads)
        for job in jobs:
            read, ahead = ahead, next(reads, ahead)
            yield (*job, read)


class _Reader:
    """Gets chunks onto a device; onto a GPU from page-locked memory and by a stream of its own."""

    def __init__(self, device: torch.device, batch: int, dim: int) -> None:
        self.device, self.batch, self.dim = device, batch, dim
        self.stream: Any = torch.Stream(device) if device.type == "cuda" else None

    def __call__(self, source: Source, begin: int, end: int) -> Callable[[], Tensor]:
        """Start to read, where that is another device's work; the result delivers the chunk."""
        if isinstance(source, Recomputed):
            return lambda: source.read(begin, end, self.batch, self.dim).to(self.device)
        if self.stream is None or source.device == self.device:
            return lambda: source.read(begin, end).to(self.device)
        stream, rows = self.stream, source.read(begin, end)
        with torch.cuda.stream(stream):
            chunk = (rows if rows.is_pinned() else rows.pin_memory()).to(self.device, non_blocking=True)

        def finish() -> Tensor:
            present = torch.cuda.current_stream(self.device)
            present.wait_stream(stream)
            chunk.record_stream(present)
            return chunk

        return finish


class _StreamedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: KeyStream,
        spec: AttentionSpec,
        backend: str,
        slices: Slices | None,
        differentiable: bool,
        query: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.slices, ctx.ambient = (stream, spec, backend), slices, Ambient(query.device)
        with ctx.ambient.casts():
            constant = differentiable and not any(ctx.needs_input_grad)
            out, lse = stream.forward(query, spec, backend, constant)
        if slices is not None:
            out, lse = slices.merge(out, lse)
            ctx.mark_non_differentiable(lse)
        # All that the backward reads again: torch then notices if one is overwritten.
        masks = [option for option in spec.options() if isinstance(option, Tensor)]
        ctx.save_for_backward(query, out, lse, *tensors, *stream.watched, *masks)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("streamed attention: double backward is not supported")
        query, out, lse, *_ = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        if ctx.slices is not None:
            (dout,) = ctx.slices.sum([dout])
        (stream, *call), wanted = ctx.call, ctx.needs_input_grad[6:]
        with ctx.ambient.again():
            dq, gradients = stream.backward(dout, dlse, query, (out, lse), *call, wanted)
        found = iter(gradients)
        return None, None, None, None, None, dq, *(next(found) if want else None for want in wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("streamed attention: forward-mode differentiation is not supported")


def streamed_attention(
    query: Tensor, stream: KeyStream, spec: AttentionSpec, backend: str, slices: Slices | None = None
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of the query (B, H, M, D) over all of the stream's keys; both differentiable, once.

    ``spec`` is the call over these keys. Gradients reach the query and the stream's
    :attr:`~KeyStream.tensors`. The walk is in order: the same bits from run to run; another ``chunk_size`` is
    another rounding. With ``slices`` the stream is this rank's part of all keys, and lse has no gradient.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError("streamed attention: torch.func's transforms are not supported")
    apply: Any = _StreamedAttention.apply
    spec = spec if slices is None else slices.part_of(spec, query.shape[2])
    out, lse = apply(stream, spec, backend, slices, torch.is_grad_enabled(), query, *stream.tensors)
    return out, lse


def stream_call(
    query: Tensor, stream: KeyStream, *, kv_heads: int, value_dim: int, backend: str | None, **options: Any
) -> tuple[AttentionSpec, str]:
    """The causal call of the query over all of a stream's keys, and the backend that serves it.

    The options, and the errors, are those of :func:`perceiver_kernels.perceiver_attention`.
    """
    key, value = (
        query.new_empty(1).expand(len(query), kv_heads, stream.length, dim)
        for dim in (query.shape[-1], value_dim)
    )
    unset = {"is_causal": True, "q_offset": None, "dropout_seed": None}
    spec = make_spec(query, key, value, **(unset | options))
    return spec, choose(backend, query, key, value, spec, needs_gradient([query, *stream.tensors]))


def _refuse_hooks(parameters: Iterable[Tensor]) -> None:
    """What would run on each chunk's gradient. Views of a layer's own weights have none."""
    for parameter in parameters:
        if parameter._backward_hooks or parameter.retains_grad:
            raise NotImplementedError(
                f"a parameter {tuple(parameter.shape)} of Recomputed has hooks or retains its gradient, "
                "which comes in parts: declare, and compute from, parameter.view_as(parameter)"
            )
