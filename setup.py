"""Builds the compiled libraries with CMake and Ninja; everything else is in pyproject.toml.

Without a working compiler the package installs all the same: the pure PyTorch backends need none. The CUDA
kernels are built where nvcc is. Environment:

PERCEIVER_KERNELS_BUILD=require turns a failed build into an error, =skip leaves it out.
PERCEIVER_KERNELS_CUDA=require and =skip do the same for the CUDA kernels alone.
CUDACXX names nvcc, CUDA_HOME its toolkit; without them it is the one on PATH or in /usr/local/cuda.
PERCEIVER_KERNELS_CUDA_ARCHS=80,90-real says what they are compiled for, in CMake's words (native: this
machine's GPU). By default 80, 90, 100 and 120, and PTX that newer GPUs compile for themselves.
PERCEIVER_KERNELS_EMULATED_SET=1 adds kernels that run the AVX-512 and AMX code paths, slowly, on any
processor, for tests; CI=1 makes compiler warnings errors.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "require", "skip")


def version() -> str:
    text = (ROOT / "src" / "perceiver_kernels" / "_version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "(.+)"', text)[1]


def _switch(variable: str) -> str:
    return "ON" if os.environ.get(variable) else "OFF"


def _mode(variable: str) -> str:
    mode = os.environ.get(variable, "auto")
    if mode not in MODES:
        raise SystemExit(f"{variable} must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def _say(text: str) -> None:
    print(f"perceiver_kernels: {text}", file=sys.stderr)


def _nvcc() -> str | None:
    """The compiler that was asked for, else the first one found."""
    home = os.environ.get("CUDA_HOME")
    found = (shutil.which(f"{home}/bin/nvcc") if home else None) or shutil.which("nvcc")
    return os.environ.get("CUDACXX") or found or shutil.which("/usr/local/cuda/bin/nvcc")


class CMakeBuild(build_ext):
    """One CMake project that yields all libraries."""

    def run(self) -> None:
        mode = _mode("PERCEIVER_KERNELS_BUILD")
        if mode == "skip":
            return
        try:
            self.compile()
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if mode == "require":
                raise
            _say(
                f"the compiled kernels were not built ({error}). The sdpa and reference backends work; "
                "for the cpu backend, reinstall with a C++17 compiler."
            )

    def compile(self) -> None:
        import pybind11
        import torch

        in_place = self.inplace or self.editable_mode
        package = (ROOT / "src" if in_place else Path(self.build_lib).resolve()) / "perceiver_kernels"
        # In place, objects are kept, so that another build compiles only what has changed.
        self.folder = (ROOT / "build" if in_place else Path(self.build_temp).resolve()) / "cmake"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": package,
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_DIR": Path(torch.__file__).parent,
            "PERCEIVER_KERNELS_VERSION": version(),
            "PERCEIVER_KERNELS_EMULATED_SET": _switch("PERCEIVER_KERNELS_EMULATED_SET"),
            "PERCEIVER_KERNELS_WERROR": _switch("CI"),
        }
        with_cuda = self.configure_cuda(options)
        if not with_cuda:
            self.configure(options | {"PERCEIVER_KERNELS_CUDA": "OFF"})
        self.build("kernels")
        (package / "_C_cuda.so").unlink(missing_ok=True)  # of an earlier build
        if with_cuda:
            self.try_cuda(lambda: self.build("cuda_kernels"))

    def configure(self, options: dict[str, Any]) -> None:
        flags = [f"-D{name}={value}" for name, value in options.items()]
        # CMake itself starts over for another compiler, but forgets all other options.
        if self.has_other_compiler(options.get("CMAKE_CUDA_COMPILER")):
            flags.append("--fresh")
        subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(self.folder), "-G", "Ninja", *flags])

    def has_other_compiler(self, nvcc: str | None) -> bool:
        """Whether the folder was configured with another nvcc, or another C++ compiler than CXX names."""
        cache = self.folder / "CMakeCache.txt"
        if not cache.exists():
            return False
        cxx, *_flags = shlex.split(os.environ.get("CXX", "")) or [None]
        for variable, wanted in (("CMAKE_CUDA_COMPILER", nvcc), ("CMAKE_CXX_COMPILER", cxx)):
            known = re.search(rf"^{variable}:\w+=(.+)$", cache.read_text(), re.MULTILINE)
            if wanted is not None and known is not None and known[1] != shutil.which(wanted):
                return True
        return False

    def build(self, target: str) -> None:
        subprocess.check_call(["cmake", "--build", str(self.folder), "--target", target])
        subprocess.check_call(["cmake", "--install", str(self.folder), "--component", target])

    def configure_cuda(self, options: dict[str, Any]) -> bool:
        """Whether the project is now configured with the CUDA kernels."""
        mode, nvcc = _mode("PERCEIVER_KERNELS_CUDA"), _nvcc()
        reason = None
        if nvcc is None:
            reason = "nvcc was not found (PATH, CUDACXX, CUDA_HOME)"
        if mode == "skip" or reason is not None:
            if mode == "require":
                raise SystemExit(f"PERCEIVER_KERNELS_CUDA=require, but {reason}")
            _say(f"the CUDA kernels are not built: {reason or 'PERCEIVER_KERNELS_CUDA=skip'}")
            return False
        chosen = {
            "PERCEIVER_KERNELS_CUDA": "ON",
            "PERCEIVER_KERNELS_CUDA_ARCHS": os.environ.get("PERCEIVER_KERNELS_CUDA_ARCHS", ""),
            "CMAKE_CUDA_COMPILER": nvcc,
        }
        return self.try_cuda(lambda: self.configure(options | chosen))

    def try_cuda(self, step: Callable[[], None]) -> bool:
        try:
            step()
        except subprocess.CalledProcessError as error:
            if _mode("PERCEIVER_KERNELS_CUDA") == "require":
                raise
            _say(f"the CUDA kernels were not built ({error}); everything else works without them")
            return False
        return True

    def get_outputs(self) -> list[str]:
        return []


setup(
    ext_modules=[Extension("perceiver_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
