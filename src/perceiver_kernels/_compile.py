"""One thing that ``torch.compile`` has to be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_result(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which would load the whole compiler with the package."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
