"""Swapping the forward of modules that belong to another package: by their class, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def replace_classes(model: Model, classes: Mapping[type[nn.Module], type[nn.Module]]) -> Model:
    """Give every module inside ``model`` whose class is a key the class that stands there.

    Raises ``ValueError`` if there is none.
    """
    # Exact types only: a user's subclass has a forward of its own, which a swap would silently discard.
    found = [module for module in model.modules() if type(module) in classes]
    if not found:
        names = ", ".join(cls.__name__ for cls in classes)
        raise ValueError(f"{type(model).__name__} holds none of {names}: nothing to swap")
    for module in found:
        module.__class__ = classes[type(module)]
    return model
