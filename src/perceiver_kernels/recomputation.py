"""What a backward needs that computes part of the forward again: everything as it was, and no other graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

State = list[tuple[dict[str, Any], str, Any]]  # attributes of modules: where they are held, name, value
Edge = tuple[Any, int]  # a node of a graph, and which of its outputs
_one_at_a_time = threading.RLock()  # threads that put into one module must each find what they put back


class Snapshot:
    """A module as it is now, to be called later, whatever parameters and modes it has by then.

    What it computes ends at :attr:`tensors`, which are views of the module's parameters: gradients can be
    taken there in parts, and tensor hooks on the parameters see the sum alone.

    Raises:
        NotImplementedError: within ``torch.nn.utils.parametrize.cached()``, whose parametrised weights are
            computed once, with a graph or without.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        cached = torch.is_grad_enabled() and getattr(parametrize, "_cache_enabled", False)
        if cached and any(map(parametrize.is_parametrized, parts)):
            raise NotImplementedError("streamed attention: parametrize.cached() is not supported")
        self.module = module
        self.tensors: list[Tensor] = []  # the views
        self._state: State = [(vars(part), "training", part.training) for part in parts]
        for part in parts:
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    tensor = parameter.view_as(parameter) if parameter.requires_grad else parameter
                    self.tensors.append(tensor)
                    self._state.append((part._parameters, name, tensor))

    def __call__(self, x: Tensor) -> Any:
        """What the module gives for ``x``, hooks and all."""
        if not torch.is_grad_enabled():  # the forward: it is as it is
            return self.module(x)
        with _one_at_a_time:
            present: State = [(holder, name, holder[name]) for holder, name, _ in self._state]
            _put(self._state)
            try:
                return self.module(x)
            finally:
                _put(present)


def _put(state: State) -> None:
    # As torch.func.functional_call does, without its overhead: this is for every chunk.
    for holder, name, value in state:
        holder[name] = value


class Ambient:
    """Autocast and the random generators as they were in the forward, so that the backward repeats it."""

    def __init__(self, device: torch.device) -> None:
        kind = device.type
        self.device = device
        self.autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if self.autocast else None
        self.cpu_state = torch.get_rng_state()
        self.cuda_state = torch.cuda.get_rng_state(device) if kind == "cuda" else None

    def casts(self) -> Any:
        """Autocast, but its cache: weights cast here, without a graph, are not for what comes later."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Both as they were."""
        with torch.random.fork_rng([] if self.cuda_state is None else [self.device]), self.casts():
            torch.set_rng_state(self.cpu_state)
            if self.cuda_state is not None:
                torch.cuda.set_rng_state(self.cuda_state, self.device)
            yield


class Ends:
    """The tensors at which the graphs of a recomputation may end: no gradient is lost, none comes twice.

    Raises:
        ValueError: for a tensor with another one in its history.
    """

    def __init__(self, declared: Iterable[Tensor]) -> None:
        self._edges = set(_edges(declared))
        histories = [edge for node, _ in self._edges for edge in node.next_functions]
        if any(edge in self._edges for edge in self._behind(histories)):
            raise ValueError(
                "one of Recomputed's parameters was computed from another one, or from a weight "
                "of the layer, which would get that gradient twice: declare one of the two"
            )

    def check(self, x: Tensor, computed: bool, outputs: Iterable[Tensor]) -> None:
        """Refuse outputs of the layer for ``x`` that depend on anything else: its gradient would be lost.

        ``computed``: x has a graph of its own. Otherwise it is an end, too.
        """
        leaf = next(self._undeclared([x]), None) if computed else None
        if leaf is not None:
            raise ValueError(
                f"compute depends on a tensor {tuple(leaf.shape)} that requires a gradient: "
                "it must be among the parameters of Recomputed"
            )
        leaf = next((leaf for leaf in self._undeclared(outputs) if leaf is not x), None)
        if leaf is not None:
            raise ValueError(
                f"norm or projections depend on a tensor {tuple(leaf.shape)} that requires a gradient: "
                "where the layer is streamed it must be a parameter of these modules"
            )

    def _undeclared(self, outputs: Iterable[Tensor]) -> Iterator[Tensor]:
        for edge in self._behind(_edges(outputs)):
            if edge not in self._edges:
                yield edge[0].variable

    def _behind(self, todo: list[Edge]) -> Iterator[Edge]:
        """Where the graph behind some edges comes to an end, or to a leaf that is none."""
        seen: set[Any] = set()
        while todo:
            edge = todo.pop()
            node = edge[0]
            if node is None:
                continue
            if edge in self._edges or (not node.next_functions and hasattr(node, "variable")):
                yield edge
            elif node not in seen:
                seen.add(node)
                todo += node.next_functions


def _edges(tensors: Iterable[Tensor]) -> list[Edge]:
    """Where their gradients go; views that were made without a graph have none."""
    with torch.enable_grad():
        nodes = [t.view_as(t).grad_fn for t in tensors if t.requires_grad]
    return [edge for node in nodes if node is not None for edge in node.next_functions if edge[0] is not None]
