"""Checks of single arguments. Each names the argument, what was expected and what came."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


def check_bool(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_int(name: str, value: Any) -> int:
    """The value as an int, numpy's and one-element tensors' included. Raises ``TypeError``, for bools too."""
    number: int = value
    if not isinstance(value, (int, torch.SymInt)):
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got bool")
    return number


def check_size(name: str, value: Any, least: int = 1) -> int:
    """:func:`check_int`, and ``ValueError`` for less than ``least``."""
    size = check_int(name, value)
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")
    return size


def check_tensor(name: str, value: Any) -> Tensor:
    """The value. Raises ``TypeError`` unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def check_device(name: str, tensor: Tensor, beside: str, other: Tensor) -> None:
    """Raise ``ValueError`` unless both are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, but {beside} is on {other.device}")
