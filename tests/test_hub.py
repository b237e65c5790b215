"""The project for the Hugging Face hub: laid out by its rules, and loadable as it is loaded from there."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("layout", ROOT / "hub" / "layout.py")
assert SPEC is not None
layout = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(layout)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project that `make hub` writes."""
    folder: Path = tmp_path_factory.mktemp("hub")
    layout.lay_out(folder)
    return folder


def test_layout(project: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    build = tomllib.loads((project / "build.toml").read_text())
    assert build.keys() == {"general", "torch-noarch"}
    assert build["general"].keys() == {"name", "version", "edition", "license", "backends"}
    package = project / "torch-ext" / build["general"]["name"].replace("-", "_")
    assert (package / "__init__.py").exists()
    assert (project / "flake.nix").exists()
    assert {path.suffix for path in package.rglob("*") if path.is_file()} == {".py"}
    assert (package / "backends" / "triton" / "forward_kernels.py").exists()


def test_imports_are_relative_or_torch_or_of_the_standard_library(project: Path) -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for path in project.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, path


LOAD = """
import importlib.util, json, pathlib, sys
import torch
sys.modules["perceiver_kernels"] = None  # an installed copy would hide what's missing
torch.manual_seed(0)
query, key = torch.randn(1, 2, 5, 16, requires_grad=True), torch.randn(1, 2, 40, 16)
results = []
for folder in map(pathlib.Path, sys.argv[1:]):
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert getattr(torch.ops, name).attention_forward
    out = module.perceiver_attention(query, key, key)
    results += [out, *torch.autograd.grad(out.sum(), query)]
    print(name, *module.available_backends().values(), sep=";")
assert all(torch.equal(a, b) for a, b in zip(results[:2], results[2:], strict=True))
try:
    torch.ops.perceiver_kernels.attention_forward
except AttributeError:
    print("no other names")
"""


def test_two_versions_load_side_by_side(project: Path, tmp_path: Path) -> None:
    folders = []
    for name in ("_perceiver_kernels_cuda_1a2b3c4", "_perceiver_kernels_cuda_5d6e7f8"):
        folder = tmp_path / name / "torch-cuda"
        shutil.copytree(project / "torch-ext" / "perceiver_kernels", folder)
        metadata = {"id": name, "name": "perceiver-kernels", "version": 0, "backend": {"type": "cuda"}}
        (folder / "metadata.json").write_text(json.dumps(metadata))
        folders.append(str(folder))
    command = [sys.executable, "-c", LOAD, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert last == "no other names"
    assert re.sub("^[^;]*", "", first) == re.sub("^[^;]*", "", second)
    assert first.endswith("None;None")  # sdpa and reference run everywhere
