"""One attention call, canonicalised once: no default is worked out again below this file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from perceiver_kernels.checks import check_bool, check_device, check_int, check_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_OFFSET = 2**48  # leaves room for offset + query index in int64
MAX_FACTOR = 1e30  # scale and softcap stay finite and normal in float32
MAX_LENGTH = 2**32 - 1  # dropout counts examples, heads, queries and keys in 32 bits each


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Everything but query, key and value, with every default applied.

    Key j is visible to query i of example b iff ``key_mask[b, j]`` (where given) and, where causal,
    ``j <= q_offset + i``, with ``q_offsets[b]`` in place of ``q_offset`` where given. The packed form
    (``cu_seqlens_q`` and ``cu_seqlens_k`` present) always carries ``q_offsets`` when it is causal.
    """

    is_causal: bool
    q_offset: int
    scale: float
    softcap: float  # 0 means none
    dropout_p: float
    q_offsets: Tensor | None = None  # (B,) int64
    key_mask: Tensor | None = None  # (B, N) bool; packed: (Tk,)
    cu_seqlens_q: Tensor | None = None  # (B + 1,) int64
    cu_seqlens_k: Tensor | None = None  # (B + 1,) int64
    # (2,) int64, present iff dropout_p > 0: the seed, and the index of key 0 in dropout's counter.
    dropout_seed: Tensor | None = None

    def options(self) -> tuple[Any, ...]:
        """The fields in the order in which the operators, Python's and C++'s, take them."""
        return (
            self.q_offsets,
            self.key_mask,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.dropout_seed,
            self.q_offset,
            self.is_causal,
            self.scale,
            self.softcap,
            self.dropout_p,
        )

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def has_score(self) -> bool:
        """Whether scores are more than scaled: a soft cap or dropout."""
        return self.softcap > 0.0 or self.dropout_p > 0.0

    def over_keys(self, begin: int, end: int) -> AttentionSpec:
        """This call (dense form) restricted to keys ``begin`` to ``end - 1``, for a segment, chunk or rank.

        Its keys are numbered from 0 again; they are seen, and dropped, as they are in the whole call.
        """
        seed = self.dropout_seed
        return replace(
            self,
            q_offset=self.q_offset - begin if self.is_causal else 0,
            q_offsets=None if self.q_offsets is None else self.q_offsets - begin,
            key_mask=None if self.key_mask is None else self.key_mask[:, begin:end].contiguous(),
            dropout_seed=None if seed is None else torch.stack((seed[0], seed[1] + begin)),
        )


def make_spec(
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    *,
    is_causal: bool,
    q_offset: int | Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    dropout_seed: int | None,
    cu_seqlens: tuple[Any, Any] | None = None,
) -> AttentionSpec:
    """Check every argument and apply every default.

    Shapes, dtypes and devices are checked here; what needs the contents of a tensor is checked by
    :func:`check_contents`. Raises ``TypeError`` for a wrong type or dtype, ``ValueError`` for the rest.
    """
    if cu_seqlens is None and (is_segmented(key) or is_segmented(value)):
        _check_segments(query, key, value)
    else:
        _check_tensors(query, key, value, packed=cu_seqlens is not None)
    check_bool("is_causal", is_causal)
    cu_seqlens_q = cu_seqlens_k = None
    if cu_seqlens is None:
        batch, num_keys = query.shape[0], sum(segment.shape[2] for segment in segments(key))
        if num_keys > MAX_LENGTH:
            raise ValueError(f"key must have no more than 2**32 - 1 positions in all, got {num_keys}")
    else:
        cu_seqlens_q = _check_cu_seqlens("cu_seqlens_q", cu_seqlens[0], query)
        cu_seqlens_k = _check_cu_seqlens("cu_seqlens_k", cu_seqlens[1], query)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"cu_seqlens_q and cu_seqlens_k must have the same length, "
                f"got {cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
            )
        batch, num_keys = cu_seqlens_q.shape[0] - 1, segments(key)[0].shape[0]

    offset, offsets = 0, None
    if isinstance(q_offset, Tensor):
        offsets = _check_tensor_option("q_offset", q_offset, (batch,), _INTEGERS, query)
        offsets = offsets.to(torch.int64).contiguous()
    elif q_offset is not None:
        offset = _check_int("q_offset", q_offset, -MAX_OFFSET, MAX_OFFSET)
    elif cu_seqlens_q is not None and cu_seqlens_k is not None:
        offsets = cu_seqlens_k.diff() - cu_seqlens_q.diff()
    else:
        offset = num_keys - query.shape[2]
    if not is_causal:  # the offset plays no part
        offset, offsets = 0, None
    elif cu_seqlens_q is not None and offsets is None:
        offsets = torch.full((batch,), offset, dtype=torch.int64, device=query.device)

    if key_mask is not None:
        mask_shape = (num_keys,) if cu_seqlens is not None else (batch, num_keys)
        key_mask = _check_tensor_option("key_mask", key_mask, mask_shape, (torch.bool,), query).contiguous()

    dropout_p = _check_float("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if softcap is not None:
        softcap = _check_float("softcap", softcap)
        if softcap <= 0.0:
            raise ValueError(f"softcap must be greater than 0, or None for no cap, got {softcap}")
        if not 1 / MAX_FACTOR <= softcap <= MAX_FACTOR:
            raise ValueError(f"softcap must be between 1e-30 and 1e30, got {softcap}")
    scale = query.shape[-1] ** -0.5 if scale is None else _check_float("scale", scale)
    if abs(scale) > MAX_FACTOR:
        raise ValueError(f"scale must be at most 1e30 in magnitude, got {scale}")
    if dropout_seed is not None:
        dropout_seed = _check_int("dropout_seed", dropout_seed, -(2**63), 2**63 - 1)
    return AttentionSpec(
        is_causal=is_causal,
        q_offset=offset,
        scale=scale,
        softcap=0.0 if softcap is None else softcap,
        dropout_p=dropout_p,
        q_offsets=offsets,
        key_mask=key_mask,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        dropout_seed=_seed_tensor(dropout_seed, query.device) if dropout_p > 0.0 else None,
    )


def check_contents(query: Tensor, key: Tensor, spec: AttentionSpec) -> None:
    """The checks that read tensors; they run inside the op, so they also hold under ``torch.compile``.

    Raises ``ValueError`` for cumulative lengths that don't start at 0, decrease, or don't end at the number
    of packed rows, and for offsets beyond ``2**48``.
    """
    for name, cu_seqlens, total in (
        ("cu_seqlens_q", spec.cu_seqlens_q, query.shape[0]),
        ("cu_seqlens_k", spec.cu_seqlens_k, key.shape[0]),
    ):
        if cu_seqlens is None:
            continue
        lengths = cu_seqlens.tolist()
        if lengths[0] != 0:
            raise ValueError(f"{name} must start at 0, got {lengths[0]}")
        for i, (before, after) in enumerate(itertools.pairwise(lengths), start=1):
            if after < before:
                raise ValueError(f"{name} must not decrease, got {before} then {after} at index {i}")
        if lengths[-1] != total:
            rows = "query" if name == "cu_seqlens_q" else "key"
            raise ValueError(f"{name} must end at {rows}'s {total} rows, got {lengths[-1]}")
    if spec.q_offsets is not None and spec.q_offsets.numel() > 0:
        low, high = (int(x) for x in spec.q_offsets.aminmax())
        if low < -MAX_OFFSET or high > MAX_OFFSET:
            worst = low if low < -MAX_OFFSET else high
            raise ValueError(f"q_offset must be between -2**48 and 2**48, got {worst}")


def is_segmented(tensors: Tensor | Sequence[Tensor]) -> bool:
    """Whether keys or values came as a sequence of segments."""
    return isinstance(tensors, (list, tuple))


def segments(tensors: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """The segments of keys or values; one tensor is one segment."""
    return [tensors] if isinstance(tensors, Tensor) else tensors


def needs_gradient(tensors: Iterable[Tensor]) -> bool:
    """Whether a call that depends on these tensors will be differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def has_tangent(tensors: Iterable[Tensor]) -> bool:
    """Whether forward-mode differentiation goes through one of these tensors."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
        for tensor in tensors
    )


def empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised ``(out, lse)`` for any backend and for the fakes.

    ``out`` has query's shape with value's head dim and lies in memory as query does: (B, M, H, Dv) seen
    through a transpose where query is such a view, contiguous otherwise. ``lse`` is (B, H, M), packed
    (H, Tq), in float32 (float64 for float64).
    """
    lse_dtype = accumulator_dtype(query)
    if query.dim() == 3:
        total, heads, _ = query.shape
        return query.new_empty(total, heads, value.shape[-1]), query.new_empty(heads, total, dtype=lse_dtype)
    batch, heads, queries, _ = query.shape
    lse = query.new_empty(batch, heads, queries, dtype=lse_dtype)
    if heads > 1 and queries > 1 and query.stride(1) < query.stride(2):
        return query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2), lse
    return query.new_empty(batch, heads, queries, value.shape[-1]), lse


def empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``(dq, dk, dv)``, each dense and in its input's dimension order."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def accumulator_dtype(query: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else: the precision of ``lse`` and of every sum."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class DenseProblem:
    """A dense (B, H, M, D) problem within a call: all of it, or one sequence of a packed call."""

    spec: AttentionSpec
    first_example: int = 0  # what example 0 of this problem is called in the dropout counter
    queries: slice | None = None
    keys: slice | None = None

    def q(self, tensor: Tensor) -> Tensor:
        """This problem's part of a query-like tensor: a view of shape (B, H, M, D)."""
        return tensor if self.queries is None else tensor[self.queries].transpose(0, 1).unsqueeze(0)

    def k(self, tensor: Tensor) -> Tensor:
        """This problem's part of a key-like tensor: a view of shape (B, Hkv, N, D)."""
        return tensor if self.keys is None else tensor[self.keys].transpose(0, 1).unsqueeze(0)

    def rows(self, tensor: Tensor) -> Tensor:
        """This problem's part of lse: a view of shape (B, H, M)."""
        return tensor if self.queries is None else tensor[:, self.queries].unsqueeze(0)


def dense_problems(spec: AttentionSpec) -> Iterator[DenseProblem]:
    """The call as dense problems: itself, or for the packed form one problem per sequence."""
    if spec.cu_seqlens_q is None or spec.cu_seqlens_k is None:
        yield DenseProblem(spec)
        return
    q_ends, k_ends = spec.cu_seqlens_q.tolist(), spec.cu_seqlens_k.tolist()
    offsets = [0] * len(q_ends) if spec.q_offsets is None else spec.q_offsets.tolist()
    for b in range(len(q_ends) - 1):
        queries, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        dense = replace(
            spec,
            q_offset=offsets[b],
            q_offsets=None,
            key_mask=None if spec.key_mask is None else spec.key_mask[keys].unsqueeze(0),
            cu_seqlens_q=None,
            cu_seqlens_k=None,
        )
        yield DenseProblem(dense, b, queries, keys)


def describe(name: str, tensor: Tensor) -> str:
    """``query (1, 8, 1024, 64) float32 on cpu``, as error messages name a tensor."""
    return f"{name} {tuple(tensor.shape)} {dtype_name(tensor.dtype)} on {tensor.device}"


def dtype_name(dtype: torch.dtype | torch.layout) -> str:
    """``float32``, without the ``torch.`` in front."""
    return str(dtype).removeprefix("torch.")


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless the tensor has one of ``DTYPES``."""
    if tensor.dtype not in DTYPES:
        expected = ", ".join(dtype_name(dtype) for dtype in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {expected}, got {dtype_name(tensor.dtype)}")


# The checks. Each names the argument, what was expected and what came.

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_segments(query: Tensor, keys: Any, values: Any) -> None:
    for name, given, other in (("key", keys, "value"), ("value", values, "key")):
        if not is_segmented(given):
            raise TypeError(f"{name} must be a sequence of tensors as {other} is, got {type(given).__name__}")
    if not keys or len(keys) != len(values):
        raise ValueError(
            f"key and value must be equally many segments, at least 1, got {len(keys)} and {len(values)}"
        )
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        _check_tensors(query, key, value, packed=False, at=f"[{i}]")
        if key.shape[1] != keys[0].shape[1]:
            raise ValueError(f"key[{i}] has {key.shape[1]} heads, but key[0] has {keys[0].shape[1]}")
        if value.shape[-1] != values[0].shape[-1]:
            raise ValueError(
                f"value[{i}] has head dim {value.shape[-1]}, but value[0] has {values[0].shape[-1]}"
            )


def _check_tensors(query: Any, key: Any, value: Any, packed: bool, at: str = "") -> None:
    key_name, value_name = f"key{at}", f"value{at}"
    shapes = {
        "query": "(Tq, H, D)" if packed else "(B, H, M, D)",
        key_name: "(Tk, Hkv, D)" if packed else "(B, Hkv, N, D)",
        value_name: "(Tk, Hkv, Dv)" if packed else "(B, Hkv, N, Dv)",
    }
    for name, tensor in (("query", query), (key_name, key), (value_name, value)):
        check_tensor(name, tensor)
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "a nested tensor" if tensor.is_nested else dtype_name(tensor.layout)
            raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")
        check_dtype(name, tensor)
        if tensor.dim() != (3 if packed else 4):
            raise ValueError(f"{name} must have shape {shapes[name]}, got {tuple(tensor.shape)}")
    for name, tensor in ((key_name, key), (value_name, value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {dtype_name(tensor.dtype)}, but query is {dtype_name(query.dtype)}")
        check_device(name, tensor, "query", query)
        if not packed and tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} has batch size {tensor.shape[0]}, but query has {query.shape[0]}")

    head_dim, length_dim = 1, 0 if packed else 2
    for name, tensor in (("query", query), (key_name, key)):
        if tensor.shape[head_dim] < 1:
            raise ValueError(f"{name} must have at least 1 head, got shape {tuple(tensor.shape)}")
    heads, kv_heads = query.shape[head_dim], key.shape[head_dim]
    if heads % kv_heads != 0:
        raise ValueError(
            f"{key_name} has {kv_heads} heads, which does not divide query's {heads}: "
            f"expected {shapes['query']} and {shapes[key_name]}"
        )
    if value.shape[head_dim] != kv_heads:
        raise ValueError(f"{value_name} has {value.shape[head_dim]} heads, but {key_name} has {kv_heads}")
    if value.shape[length_dim] != key.shape[length_dim]:
        raise ValueError(
            f"{value_name} has {value.shape[length_dim]} positions, "
            f"but {key_name} has {key.shape[length_dim]}"
        )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{key_name} has head dim {key.shape[-1]}, but query has {query.shape[-1]}")
    for name, tensor in (("query", query), (value_name, value)):
        if tensor.shape[-1] < 1:
            raise ValueError(f"{name} must have a head dim of at least 1, got shape {tuple(tensor.shape)}")
    for name, tensor in (("query", query), (key_name, key), (value_name, value)):
        if any(size > MAX_LENGTH for size in tensor.shape):
            raise ValueError(
                f"{name} must have no dimension beyond 2**32 - 1, got shape {tuple(tensor.shape)}"
            )
    rows = math.prod(query.shape[:-1])
    if rows * max(query.shape[-1], value.shape[-1]) * 8 >= 2**63:
        raise ValueError(
            f"query {tuple(query.shape)} with value head dim {value.shape[-1]} "
            f"makes an output of 2**63 bytes or more"
        )


def _check_cu_seqlens(name: str, value: Any, query: Tensor) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {dtype_name(tensor.dtype)}")
    if tensor.dim() != 1 or tensor.shape[0] < 1:
        raise ValueError(f"{name} must have shape (B + 1,), got {tuple(tensor.shape)}")
    check_device(name, tensor, "query", query)
    return tensor.to(torch.int64).contiguous()


def _check_tensor_option(
    name: str, value: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], query: Tensor
) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.dtype not in dtypes:
        expected = "bool" if dtypes == (torch.bool,) else "an integer dtype"
        raise TypeError(f"{name} must be {expected}, got {dtype_name(tensor.dtype)}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    check_device(name, tensor, "query", query)
    return tensor


def _check_int(name: str, value: Any, low: int, high: int) -> int:
    number = check_int(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {_power(low)} and {_power(high)}, got {number}")
    return number


def _check_float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # false for NaN; math.isfinite does not trace
        raise ValueError(f"{name} must be finite, got {value}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an int beyond every float") from None


def _seed_tensor(seed: int | None, device: torch.device) -> Tensor:
    if seed is None:
        drawn = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    else:
        drawn = torch.full((), seed, dtype=torch.int64, device=device)
    return torch.stack((drawn, torch.zeros_like(drawn)))


def _power(bound: int) -> str:
    return {MAX_OFFSET: "2**48", -MAX_OFFSET: "-2**48", 2**63 - 1: "2**63 - 1", -(2**63): "-2**63"}[bound]
