"""The operators: schemas, implementations, fakes and the one autograd registration of all backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import segments
from perceiver_kernels.backends import cpu
from perceiver_kernels.dispatch import BACKENDS
from perceiver_kernels.spec import AttentionSpec, check_contents, empty_gradients, empty_outputs

_OPTIONS = (
    "Tensor? q_offsets, Tensor? key_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? dropout_seed, "
    "SymInt q_offset, bool is_causal, float scale, float softcap, float dropout_p, str backend"
)
_NAMESPACE = __package__.partition(".")[0]  # another where the package is loaded under another name
_operators = getattr(torch.ops, _NAMESPACE)
_library: Any = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor out, Tensor lse)"
)
_library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)"
)
_library.define(
    f"segments_forward(Tensor query, Tensor[] keys, Tensor[] values, {_OPTIONS}) -> (Tensor out, Tensor lse)"
)
_library.define(
    "segments_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor[] keys, Tensor[] values, Tensor out, "
    f"Tensor lse, {_OPTIONS}) -> (Tensor dq, Tensor[] dks, Tensor[] dvs)"
)

_library.define("rotate(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor")


def attention(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, backend: str
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` from the named backend, differentiable. The caller has checked that it can serve."""
    out, lse = _operators.attention_forward(query, key, value, *spec.options(), backend)
    return out, lse


def segmented_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], spec: AttentionSpec, backend: str
) -> tuple[Tensor, Tensor]:
    """:func:`attention` over the segments of ``keys`` and ``values`` together."""
    out, lse = _operators.segments_forward(query, keys, values, *spec.options(), backend)
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residuals: tuple[Tensor, Tensor],
    spec: AttentionSpec,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` from ``(out, lse)``, be they of these keys or, for exact parts, of all keys merged."""
    dq, dk, dv = _operators.attention_backward(
        dout, dlse, query, key, value, *residuals, *spec.options(), backend
    )
    return dq, dk, dv


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """:func:`perceiver_kernels.rotary.apply_rotary` in one pass, on a CPU, differentiable in ``x``."""
    turned: Tensor = _operators.rotate(x, cos, sin, interleaved, False)
    return turned


def _unpack(options: tuple[Any, ...]) -> tuple[AttentionSpec, str]:
    offsets, mask, cu_seqlens_q, cu_seqlens_k, seed, offset, is_causal, scale, softcap, dropout_p, backend = (
        options
    )
    spec = AttentionSpec(
        is_causal, offset, scale, softcap, dropout_p, offsets, mask, cu_seqlens_q, cu_seqlens_k, seed
    )
    return spec, backend


def _forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Any:
    spec, backend = _unpack(options)
    check_contents(query, key, spec)
    with torch.autocast(query.device.type, enabled=False):  # the backend's own arithmetic is not to be recast
        return BACKENDS[backend].forward(query, key, value, spec)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> Any:
    spec, backend = _unpack(options)
    check_contents(query, key, spec)  # again: their memory is the caller's
    with torch.autocast(query.device.type, enabled=False):
        return BACKENDS[backend].backward(dout, dlse, query, key, value, out, lse, spec)


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(query, value)


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(query, key, value)


def _segments_forward(query: Tensor, keys: list[Tensor], values: list[Tensor], *options: Any) -> Any:
    spec, backend = _unpack(options)
    check_contents(query, keys[0], spec)
    with torch.autocast(query.device.type, enabled=False):
        return segments.forward(query, keys, values, spec, BACKENDS[backend])


def _segments_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> Any:
    spec, backend = _unpack(options)
    check_contents(query, keys[0], spec)
    with torch.autocast(query.device.type, enabled=False):
        return segments.backward(dout, dlse, query, keys, values, out, lse, spec, BACKENDS[backend])


def _segments_forward_fake(
    query: Tensor, keys: list[Tensor], values: list[Tensor], *options: Any
) -> tuple[Tensor, Tensor]:
    return empty_outputs(query, values[0])


def _segments_backward_fake(
    dout: Tensor, dlse: Tensor | None, query: Tensor, keys: list[Tensor], values: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return torch.empty_like(query), [torch.empty_like(t) for t in keys], [torch.empty_like(t) for t in values]


def _rotate_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _save_angles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, *ctx.how = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_back(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    interleaved, inverse = ctx.how
    return (_operators.rotate(dout, *ctx.saved_tensors, interleaved, not inverse), None, None, None, None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keys and values as they come: one tensor each, or lists of segments."""
    query, key, value, *options = inputs
    tensors, ctx.scalars = options[:5], options[5:]
    ctx.parts = None if isinstance(key, Tensor) else len(key)
    pairs = (key, value) if isinstance(key, Tensor) else (*key, *value)
    ctx.save_for_backward(query, *output, *tensors, *pairs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    query, out, lse, *rest = ctx.saved_tensors
    tensors, pairs = rest[:5], rest[5:]
    without_gradient = (None,) * (len(tensors) + len(ctx.scalars))
    if dout is None and dlse is None:
        nothing = None if ctx.parts is None else [None] * ctx.parts
        return (None, nothing, nothing, *without_gradient)
    if dout is None:
        dout = torch.zeros_like(out)
    if ctx.parts is None:
        backward, (key, value) = _operators.attention_backward, pairs
    else:
        backward = _operators.segments_backward
        key, value = pairs[: ctx.parts], pairs[ctx.parts :]
    gradients = backward(dout, dlse, query, key, value, out, lse, *tensors, *ctx.scalars)
    return (*gradients, *without_gradient)


def _refuse_double_backward(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError("perceiver_attention: double backward is not supported")


for _name, _implementation, _fake in (
    ("attention_forward", _forward, _forward_fake),
    ("attention_backward", _backward, _backward_fake),
    ("segments_forward", _segments_forward, _segments_forward_fake),
    ("segments_backward", _segments_backward, _segments_backward_fake),
):
    _name = f"{_NAMESPACE}::{_name}"
    torch.library.impl(_name, "CompositeExplicitAutograd", lib=_library)(_implementation)
    torch.library.register_fake(_name, _fake, lib=_library)
    if _name.endswith("forward"):
        torch.library.register_autograd(_name, _differentiate, setup_context=_save, lib=_library)
    else:
        torch.library.register_autograd(_name, _refuse_double_backward, lib=_library)

torch.library.impl(f"{_NAMESPACE}::rotate", "CPU", lib=_library)(cpu.rotate)
torch.library.register_fake(f"{_NAMESPACE}::rotate", _rotate_fake, lib=_library)
torch.library.register_autograd(
    f"{_NAMESPACE}::rotate", _rotate_back, setup_context=_save_angles, lib=_library
)
