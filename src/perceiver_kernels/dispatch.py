"""Choosing a backend: an ordered table, and reasons when none or the named one can't serve."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from perceiver_kernels import tuned
from perceiver_kernels.backends import cpu, cuda, reference, sdpa, triton
from perceiver_kernels.spec import AttentionSpec, describe

BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "sdpa": sdpa,
    "reference": reference,
}
"""Every backend by name; :func:`order` says which goes first where."""

# Their tensor cores reach their peak by instructions that Triton's kernels use and the CUDA ones don't.
_TRITON_FIRST = ((10, 0), (10, 3))


def order(device: torch.device) -> list[str]:
    """The backends' names in the order in which ``backend=None`` tries them on ``device``, before tuning."""
    names = list(BACKENDS)
    if (
        device.type == "cuda"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) in _TRITON_FIRST
    ):
        names.remove("triton")
        names.insert(names.index("cuda"), "triton")
    return names


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """What can run on ``device`` on this machine.

    Returns: for each backend, in the order in which ``backend=None`` tries them, None if it can run, else the
    reason why it can't and what to do about it. What ``perceiver-kernels tune`` found goes before this order.
    """
    device = torch.device(device)
    return {name: BACKENDS[name].unavailable(device) for name in order(device)}


def choose(
    backend: str | None, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, needs_gradient: bool
) -> str:
    """The name of the backend that serves this call.

    ``key`` and ``value`` may stand for others, of which ``needs_gradient`` knows: the longest segment, or a
    stream, which is never whole.

    Raises ``ValueError`` with every reason when the named backend, or none of them, can.
    """
    if backend is None:
        names = order(query.device)
        fastest = tuned.chosen(query, key, value, spec, needs_gradient)
        if fastest in names:
            names.remove(fastest)
            names.insert(0, fastest)
    else:
        if not isinstance(backend, str):
            raise TypeError(f"backend must be a str or None, got {type(backend).__name__}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, or None, got {backend!r}")
        names = [backend]
    refusals = []
    for name in names:
        reason = BACKENDS[name].unavailable(query.device)
        if reason is None:
            reasons = BACKENDS[name].unsupported(query, key, value, spec, needs_gradient)
        else:
            reasons = [reason]
        if not reasons:
            return name
        refusals += [f"{name}: {reason}" for reason in reasons]
    call = ", ".join([describe(n, t) for n, t in (("query", query), ("key", key), ("value", value))])
    subject = "no backend" if backend is None else f"backend {backend!r}"
    can = "can" if backend is None else "cannot"
    raise ValueError(f"{subject} {can} serve {call}\n  " + "\n  ".join(refusals))
