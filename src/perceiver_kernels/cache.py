"""Where measured choices are remembered: ``PERCEIVER_KERNELS_CACHE``, else a folder in the user's cache."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")
FOLDER = "PERCEIVER_KERNELS_CACHE"


def path(name: str) -> Path:
    """The file of this name in the cache's folder, whether or not it exists.

    Raises FileNotFoundError where the folder would be in a home directory and there is none.
    """
    if folder := os.environ.get(FOLDER):
        return Path(folder, name)
    try:
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError(f"no home directory was found; {FOLDER} can name a folder") from error
    return Path(user, "perceiver_kernels", name)


def store(name: str, content: Any) -> None:
    """JSON into the file, whole or not at all: other processes may read it at the same time.

    Raises OSError where it can't be written.
    """
    file = path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as temporary:
        json.dump(content, temporary, indent=1)
    os.replace(temporary.name, file)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """The file of this name to oneself, to load it, change it and store it: processes come one by one.

    Raises OSError where the folder can't be written. Windows has no such lock: there the last one wins.
    """
    file = path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(name: str, parse: Callable[[Any], T], consequence: str) -> T:
    """What ``parse`` makes of the file's JSON, or of {}: where there is no file, or, warning that ends in
    ``consequence``, where it is broken."""
    try:
        file = path(name)
        return parse(json.loads(file.read_text()))
    except FileNotFoundError:
        pass
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        LookupError,
        RecursionError,
    ) as error:
        warnings.warn(f"{file} can't be read ({error}); {consequence}", stacklevel=3)
    return parse({})
