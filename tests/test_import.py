"""Importing: in fresh processes, without what is optional, and cheaply."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

import perceiver_kernels as pk

BLOCK = """
import importlib.abc, pathlib, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name == "perceiver_kernels._native":
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""
HIDE_LIBRARY = """
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, **kw: self.name != "_C.so" and exists(self, **kw)
"""


def run(program: str, warning: str = "") -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Warning: ") == (1 if warning else 0), done.stderr
    assert warning in done.stderr
    return done.stdout


def test_without_triton_and_without_the_compiled_library() -> None:
    output = run(
        BLOCK
        + HIDE_LIBRARY
        + """
import torch
import perceiver_kernels as pk
for name, reason in pk.available_backends().items():
    print(name, reason)
query = torch.randn(1, 2, 3, 8, requires_grad=True)
key = torch.randn(1, 2, 9, 8)
pk.perceiver_attention(query, key, key).sum().backward()
assert query.grad.isfinite().all()
try:
    pk.perceiver_attention(query, key, key, backend="cpu")
except ValueError as error:
    print(str(error).splitlines()[-1])
""",
        warning="RuntimeWarning: perceiver_kernels has no cpu backend here",
    )
    lines = output.splitlines()
    reason = "the package was installed without its compiled kernels; install a C++17 compiler and reinstall"
    assert lines[0].startswith(f"cpu {reason}")
    assert lines[1] == "cuda runs on cuda tensors, not on cpu"
    assert lines[2].startswith("triton triton is not installed; `pip install 'perceiver-kernels[triton]'`")
    assert lines[3:5] == ["sdpa None", "reference None"]
    assert lines[5].startswith(f"  cpu: {reason}")


def test_importing_loads_no_layers_no_compiler_and_no_kernels() -> None:
    output = run(
        """
import sys
import perceiver_kernels
own = ["perceiver_kernels.layers", "perceiver_kernels.models"]
heavy = ["triton", "matplotlib", "rich", "torch._dynamo", "torch._inductor", *own]
print([name for name in heavy if name in sys.modules])
"""
    )
    assert output.strip() == "[]"


def test_without_a_home_directory() -> None:
    """As in a container whose user has no entry in /etc/passwd."""
    run(
        """
import os, pathlib, pwd
def unknown(uid):
    raise KeyError(uid)
for name in ("HOME", "XDG_CACHE_HOME", "PERCEIVER_KERNELS_CACHE"):
    os.environ.pop(name, None)
pwd.getpwuid = unknown
import perceiver_kernels
from perceiver_kernels import cache
os.environ[cache.FOLDER] = "/tmp/x"
assert cache.path("y") == pathlib.Path("/tmp/x/y")
"""
    )


def test_public_names() -> None:
    for name in pk.__all__:
        assert getattr(pk, name) is not None
    assert pk.__version__.count(".") == 2
    assert list(pk.available_backends()) == ["cpu", "cuda", "triton", "sdpa", "reference"]
    assert pk.available_backends("meta") != pk.available_backends("cpu")


def test_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(pk, "no_such_thing")


def test_importing_costs_little() -> None:
    output = run(
        """
import time
import torch
begin = time.process_time()
import perceiver_kernels
print(time.process_time() - begin)
"""
    )
    assert float(output) < 0.15  # seconds of processor time: other programs don't count


@pytest.mark.parametrize(
    ("module", "package", "install"),
    [
        ("transformers", "transformers", "pip install 'perceiver-kernels[transformers]'"),
        ("transformers_perceiver", "transformers", "pip install 'perceiver-kernels[transformers]'"),
        ("perceiver_ar_pytorch", "perceiver_ar_pytorch", "pip install 'perceiver-kernels[demo]'"),
        ("perceiver_io", "perceiver", "pip install perceiver-io; on Python 3.11 and later, "),
    ],
)
def test_an_integration_names_what_to_install(
    module: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == package or name == f"perceiver_kernels.integrations.{module}":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"\b{package}\b.*: {re.escape(install)}"):
        importlib.import_module(f"perceiver_kernels.integrations.{module}")
