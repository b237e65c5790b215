"""Modules that belong to another package: importing them, and swapping their forward by class, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def installed_by(command: str) -> Iterator[None]:
    """Where an import in this block finds no module, the error names the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.msg}: {command}", name=error.name) from error


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
