"""What the tests share: the device and the backends under test, cached references, and poisoned memory.

python -m pytest --device cuda               everything that isn't about the CPU kernels, on a GPU
python -m pytest --backends triton,sdpa      these backends only
TRITON_INTERPRET=1 python -m pytest --backends triton tests/test_contract.py
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.testing.budget import budget, math_reference, reference64, relative_error
from perceiver_kernels.testing.cases import CASES, Case
from perceiver_kernels.testing.inputs import Inputs, make_inputs

# Set by pytest_configure, which runs before any test module is imported.
DEVICE = torch.device("cpu")  # where tensors are made unless a test says otherwise
USABLE: list[str] = []  # the backends under test
OURS: list[str] = []  # those not made of torch's own matmuls

BY_NAME = {case.name: case for case in CASES}
DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """--device and --backends."""
    group = parser.getgroup("perceiver_kernels")
    group.addoption("--device", default="cpu", help="where the tests' tensors live (default cpu)")
    group.addoption(
        "--backends", metavar="NAME[,NAME...]", help="backends under test (default: all usable on the device)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Fix the device and the backends; test modules read them while they are imported."""
    global DEVICE
    reason = (
        "cpu_only(reason): about the CPU, its kernels or its memory; skipped with --device of another kind"
    )
    config.addinivalue_line("markers", reason)
    try:
        DEVICE = torch.device(config.getoption("--device"))
        if DEVICE.type != "cpu":
            # cuBLAS repeats its bits, as deterministic algorithms (see `poison`) demand, with this alone.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            DEVICE = torch.zeros((), device=DEVICE).device  # "cuda" is "cuda:0", as messages name it
            torch.set_default_device(DEVICE)
            for notice in (  # about torch's own kernels
                ".* does not have a deterministic implementation",
                ".* non-deterministic algorithm",
                "TensorFloat32 tensor cores",
            ):
                config.addinivalue_line("filterwarnings", f"ignore:{notice}:UserWarning")
    except (RuntimeError, AssertionError) as error:
        raise pytest.UsageError(
            f"--device {config.getoption('--device')}: {str(error).splitlines()[0]}"
        ) from error
    usable = pk.available_backends(DEVICE)
    wanted = config.getoption("--backends")
    for name in wanted.split(",") if wanted else ():
        if usable.get(name, "there is no such backend") is not None:
            why = usable.get(name, f"choose from {', '.join(usable)}")
            raise pytest.UsageError(f"--backends {name} can't run on {DEVICE}: {why}")
    chosen = wanted.split(",") if wanted else [name for name, reason in usable.items() if reason is None]
    USABLE[:] = chosen
    OURS[:] = [name for name in chosen if name not in ("sdpa", "reference")]


def pytest_report_header() -> str:
    """The first lines of every run say what was tested."""
    return f"device: {DEVICE}, backends: {', '.join(USABLE)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip on other devices what is about the CPU, and tests/ptx, which stands in for a GPU."""
    for item in items if DEVICE.type != "cpu" else ():
        mark = item.get_closest_marker("cpu_only")
        if mark is not None or "ptx" in item.path.parts:
            reason = mark.args[0] if mark is not None else "it executes GPU kernels in numpy"
            item.add_marker(pytest.mark.skip(reason=f"about the CPU: {reason}"))


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh memory holds NaN (floats) and the largest integers, so that nothing passes by reading it."""
    torch.use_deterministic_algorithms(True, warn_only=DEVICE.type != "cpu")
    yield
    torch.use_deterministic_algorithms(False)


def seeded(seed: int) -> torch.Generator:
    """A generator on the device under test: torch draws there from such alone."""
    return torch.Generator(DEVICE).manual_seed(seed)


@functools.lru_cache(maxsize=64)
def answers(case: Case, dtype: torch.dtype) -> tuple[Inputs, dict[str, tuple[Tensor, float]]]:
    """A case's inputs, and for each result its float64 value and the error it may have."""
    inputs = make_inputs(case, dtype, DEVICE)
    want, plain = reference64(inputs), math_reference(inputs)
    return inputs, {name: (want[name], budget(plain[name], want[name], dtype)) for name in want}


def refusal(backend: str, case: Case, dtype: torch.dtype = torch.float32) -> str | None:
    """A part of the message with which ``backend`` refuses ``case``; None if it must serve it.

    What each backend may refuse is written here and nowhere else.
    """
    dims = (case.D, case.Dv)
    eighths = {
        f"head dim {dim}; the kernels take multiples of 8 up to 256": dim % 8 != 0 or dim > 256
        for dim in dims
    }
    refused: dict[str, dict[str, bool]] = {
        "cpu": {f"head dim {dim}; the kernels take up to 512": dim > 512 for dim in dims},
        "cuda": {"the kernels take bfloat16 and float16": dtype.itemsize > 2} | eighths,
        "triton": {"float64": dtype == torch.float64} | eighths,
        "sdpa": {
            "has no soft cap": bool(case.softcap),
            "other bits than the contract's Philox": bool(case.dropout_p),
        },
    }
    return next((text for text, refuses in refused.get(backend, {}).items() if refuses), None)


def assert_alike(got: Tensor, want: Tensor) -> None:
    """Two ways to the same result: equal element by element, or, where 16 bits round in between, in norm."""
    if want.dtype.itemsize == 2:
        assert relative_error(got, want) <= 2 * torch.finfo(want.dtype).eps
    else:
        torch.testing.assert_close(got, want)


def usual(backend: str) -> torch.dtype:
    """float32, or bfloat16 where ``backend`` doesn't serve it."""
    return torch.bfloat16 if refusal(backend, BY_NAME["ragged"], torch.float32) else torch.float32


def finest(backend: str) -> torch.dtype:
    """The widest dtype that ``backend`` serves."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    return next(dtype for dtype in dtypes if refusal(backend, BY_NAME["ragged"], dtype) is None)
