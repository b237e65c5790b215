"""Builds the compiled libraries with CMake and Ninja; everything else is in pyproject.toml.

Without a working compiler the package installs all the same: the pure PyTorch backends need none.
Environment: PERCEIVER_KERNELS_BUILD=require turns a failed build into an error, =skip leaves it out;
PERCEIVER_KERNELS_EMULATED_SET=1 adds kernels that run the AVX-512 code paths, slowly, on any processor, for
tests; CI=1 makes compiler warnings errors.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "require", "skip")


def version() -> str:
    text = (ROOT / "src" / "perceiver_kernels" / "_version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "(.+)"', text)[1]


def _switch(variable: str) -> str:
    return "ON" if os.environ.get(variable) else "OFF"


class CMakeBuild(build_ext):
    """One run of CMake that yields both libraries."""

    def run(self) -> None:
        mode = os.environ.get("PERCEIVER_KERNELS_BUILD", "auto")
        if mode not in MODES:
            raise SystemExit(f"PERCEIVER_KERNELS_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
        if mode == "skip":
            return
        try:
            self.compile()
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if mode == "require":
                raise
            print(
                f"perceiver_kernels: the compiled kernels were not built ({error}). "
                "The sdpa and reference backends work; for the cpu backend, reinstall with a C++17 compiler.",
                file=sys.stderr,
            )

    def compile(self) -> None:
        import pybind11
        import torch

        package = ROOT / "src" if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": package / "perceiver_kernels",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_DIR": Path(torch.__file__).parent,
            "PERCEIVER_KERNELS_VERSION": version(),
            "PERCEIVER_KERNELS_EMULATED_SET": _switch("PERCEIVER_KERNELS_EMULATED_SET"),
            "PERCEIVER_KERNELS_WERROR": _switch("CI"),
        }
        flags = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *flags])
        subprocess.check_call(["cmake", "--build", str(build)])
        subprocess.check_call(["cmake", "--install", str(build)])

    def get_outputs(self) -> list[str]:
        return []


setup(
    ext_modules=[Extension("perceiver_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
