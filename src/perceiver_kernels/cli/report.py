"""What the subcommands share: the console, the result that grows while a command runs, and progress bars."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

out = Console(highlight=False)
if not out.is_terminal:
    out = Console(highlight=False, width=150)  # a pipe has no width of its own: don't cut tables at 80
err = Console(stderr=True, highlight=False)

Result = dict[str, Any]  # what --json writes; a command fills it as it goes, so an interruption loses nothing


class CommandError(Exception):
    """A request that can't be met on this machine; the message tells the user what to change. Exit code 2."""


def progress() -> Progress:
    """A progress bar on stderr, so that it never mixes with results sent to a file."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity as a string: strict JSON has no number for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def claim(flag: str, path: Path) -> None:
    """Fail now, not after minutes of measuring, when the `path` given as `flag` can't be written.

    Its folder is made, but only that one, and none in the file system's root: more is a mistyped path.
    """
    try:
        if str(path.parent.parent) != path.anchor:
            path.parent.mkdir(exist_ok=True)
        path.touch()
    except OSError as error:
        raise CommandError(f"{flag} can't write {path}: {error.strerror}") from error


def write_json(path: Path, result: Result) -> None:
    """Write `result` to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(result), indent=2, allow_nan=False) + "\n")


def mib(count: int | None) -> str:
    """Bytes for people; a dash where nothing was measured."""
    return "-" if count is None else f"{count / 2**20:,.1f}"


def seconds(value: float) -> str:
    """A duration in the unit that leaves one to three digits before the point."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:.0f} {unit}"
    return f"{value * 1e6:.3g} us"
