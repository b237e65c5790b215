"""Which compilers setup.py takes, and what becomes of a build folder that others made."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

setuptools = pytest.importorskip("setuptools")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines."""
    for variable in ("CUDACXX", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def compiler(folder: Path, runs: str = "false") -> str:
    """An nvcc in this folder."""
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text(f'#!/bin/sh\nexec {runs} "$@"\n')
    (folder / "nvcc").chmod(0o755)
    return str(folder / "nvcc")


def test_the_nvcc_that_was_asked_for_goes_before_one_found(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path, at_home = compiler(tmp_path / "path"), compiler(tmp_path / "home" / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert script["_nvcc"]() == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert script["_nvcc"]() == at_home
    monkeypatch.setenv("CUDACXX", "/elsewhere/nvcc")
    assert script["_nvcc"]() == "/elsewhere/nvcc"
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no toolkit"))
    assert script["_nvcc"]() == on_path


def test_another_nvcc_keeps_the_options(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    nvcc = script["_nvcc"]()
    if nvcc is None or shutil.which("cmake") is None:
        pytest.skip("needs nvcc and cmake")
    build = script["CMakeBuild"](setuptools.Distribution())
    build.folder = tmp_path / "cmake"
    options = {"PERCEIVER_KERNELS_CUDA": "ON", "PERCEIVER_KERNELS_CUDA_ARCHS": "80", "TORCH_DIR": "/torch"}
    options |= {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pytest.importorskip("pybind11").get_cmake_dir(),
    }
    for name in ("old", "new"):
        build.configure(options | {"CMAKE_CUDA_COMPILER": compiler(tmp_path / name, nvcc)})
        cache = (tmp_path / "cmake" / "CMakeCache.txt").read_text()
        for option, value in options.items():
            assert re.search(rf"^{option}:\w+={re.escape(value)}$", cache, re.MULTILINE), option


def test_another_cxx_starts_over(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = script["CMakeBuild"](setuptools.Distribution())
    build.folder = tmp_path
    old, new = compiler(tmp_path / "old"), compiler(tmp_path / "new")
    monkeypatch.setenv("CXX", new)
    assert not build.has_other_compiler(None)  # nothing was configured yet
    (tmp_path / "CMakeCache.txt").write_text(f"CMAKE_CXX_COMPILER:FILEPATH={old}\n")
    assert build.has_other_compiler(None)
    monkeypatch.setenv("CXX", f"{old} -pipe")
    assert not build.has_other_compiler(None)
    monkeypatch.delenv("CXX")
    assert not build.has_other_compiler(None)
