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


def check_ids(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Raise ``TypeError`` unless they are int64 or int32, ``ValueError`` for one outside the vocabulary.

    The latter on a CPU alone: a GPU's ids can't be read without waiting for it.
    """
    if tokens.dtype not in (torch.int64, torch.int32):
        hint = "" if tokens.is_floating_point() else f": pass {name}.long()"
        raise TypeError(f"{name} must be int64 or int32, got {tokens.dtype}{hint}")
    readable = type(tokens) is Tensor and tokens.device.type == "cpu" and tokens.numel() > 0
    if readable and not torch.compiler.is_compiling():
        low, high = (int(each) for each in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            got = low if low < 0 else high
            raise ValueError(
                f"{name} must be from 0 to {vocab_size - 1} (vocab_size {vocab_size}), got {got}"
            )
