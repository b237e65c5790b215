"""Lay the package out as a project of the Hugging Face hub's kernel-builder: python hub/layout.py FOLDER.

A kernel of the hub is loaded from anywhere, under a name of its own, several versions in one process: its
imports are relative, and its operators have that name for a namespace (perceiver_kernels.autograd takes its
package's). What torch-ext/perceiver_kernels/__init__.py here needs is copied, its imports made relative.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "src" / "perceiver_kernels"
ENTRY = HERE / "torch-ext" / "perceiver_kernels" / "__init__.py"
ABSOLUTE = re.compile(r"^(\s*from )perceiver_kernels\.?([\w.]*) import", re.MULTILINE)


def relative(path: Path) -> str:
    """The text of a module of the package, with relative imports."""
    dots = "." * len(path.relative_to(PACKAGE).parts)
    return ABSOLUTE.sub(rf"\g<1>{dots}\g<2> import", path.read_text(encoding="utf-8"))


def file_of(module: tuple[str, ...]) -> Path | None:
    """The file of a module named from the package's root, None if that's no module."""
    path = PACKAGE.joinpath(*module)
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if module and p.exists()), None)


def imported(text: str, package: tuple[str, ...]) -> Iterator[Path]:
    """Files of this package that a module's relative imports name, wherever in it they stand."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple(
                filter(None, (node.module or "").split("."))
            )
            names = [base[:n] for n in range(1, len(base) + 1)] + [
                (*base, alias.name) for alias in node.names
            ]
            yield from filter(None, map(file_of, names))


def lay_out(folder: Path) -> None:
    """Write the project to `folder`, which is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    target = folder / "torch-ext" / "perceiver_kernels"
    target.mkdir(parents=True)
    for path in (HERE / "build.toml", HERE / "flake.nix", HERE.parent / "LICENSE"):
        shutil.copy(path, folder)
    shutil.copy(ENTRY, target)
    todo, done = list(imported(ENTRY.read_text(encoding="utf-8"), ())), set()
    while todo:
        path = todo.pop()
        if path in done:
            continue
        done.add(path)
        text, inside = relative(path), path.relative_to(PACKAGE)
        todo += imported(text, inside.parent.parts)
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        (target / inside).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
