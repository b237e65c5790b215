"""The operators: schemas, implementations, fakes and the one autograd registration of all backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.dispatch import BACKENDS
from perceiver_kernels.spec import AttentionSpec, check_contents, empty_gradients, empty_outputs

_OPTIONS = (
    "Tensor? q_offsets, Tensor? key_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? dropout_seed, "
    "SymInt q_offset, bool is_causal, float scale, float softcap, float dropout_p, str backend"
)
_library: Any = torch.library.Library("perceiver_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor out, Tensor lse)"
)
_library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)"
)
_FORWARD = "perceiver_kernels::attention_forward"
_BACKWARD = "perceiver_kernels::attention_backward"


def attention(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, backend: str
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` from the named backend, differentiable. The caller has checked that it can serve."""
    out, lse = torch.ops.perceiver_kernels.attention_forward(query, key, value, *spec.options(), backend)
    return out, lse


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *options = inputs
    tensors, ctx.scalars = options[:5], options[5:]
    ctx.save_for_backward(query, key, value, *output, *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, *tensors = ctx.saved_tensors
    without_gradient = (None,) * (len(tensors) + len(ctx.scalars))
    if dout is None and dlse is None:
        return (None, None, None, *without_gradient)
    if dout is None:
        dout = torch.zeros_like(out)
    gradients = torch.ops.perceiver_kernels.attention_backward(
        dout, dlse, query, key, value, out, lse, *tensors, *ctx.scalars
    )
    return (*gradients, *without_gradient)


def _refuse_double_backward(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError("perceiver_attention: double backward is not supported")


for _name, _implementation, _fake in (
    (_FORWARD, _forward, _forward_fake),
    (_BACKWARD, _backward, _backward_fake),
):
    torch.library.impl(_name, "CompositeExplicitAutograd", lib=_library)(_implementation)
    torch.library.register_fake(_name, _fake, lib=_library)
torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd(_BACKWARD, _refuse_double_backward, lib=_library)
