"""The cuda backend from Python through C++ to its launches, with the PTX machine for a GPU."""

from __future__ import annotations

import pytest
import torch

from perceiver_kernels.backends import cpu, cuda
from perceiver_kernels.splits import VARIABLE as SPLITS
from perceiver_kernels.testing.budget import budget, math_reference, reference64, relative_error
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import make_inputs
from ptx.nvcc_ptx import NVCC

if NVCC is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)

from ptx.recorder import STREAM, recorded

BF16, F16 = torch.bfloat16, torch.float16
PROCESSORS = 2

CASES = [
    (BF16, Case("plain", 1, 2, 2, 20, 150)),
    (F16, Case("decode", 1, 4, 2, 1, 600, 128, 128, strides="transposed")),
    (BF16, Case("unaligned", 2, 1, 1, 20, 100, 64, 40, strides="sliced")),
    (F16, Case("inner", 1, 1, 1, 20, 100, strides="inner")),
    (F16, Case("grouped_masked", 2, 4, 2, 11, 130, key_mask="random", q_offset="per_example")),
    (BF16, Case("scores", 1, 2, 1, 20, 100, softcap=2.0, scale=-0.4, dropout_p=0.3)),
    (F16, Case("negative_scale", 1, 1, 1, 20, 100, scale=-0.2, is_causal=False)),
    (BF16, Case("no_keys", 1, 1, 1, 20, 0)),
    (F16, Case("no_queries", 1, 2, 1, 0, 300)),
    (BF16, Case("packed", lengths=((5, 40), (21, 233), (0, 7), (4, 0)), H=2, Hkv=1, dropout_p=0.2)),
]  # fmt: skip


@pytest.mark.parametrize("splits", ["", "3"], ids=["default", "split"])
@pytest.mark.parametrize(("dtype", "case"), CASES, ids=[case.name for _, case in CASES])
def test_values(dtype: torch.dtype, case: Case, splits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward."""
    monkeypatch.setenv(SPLITS, splits)
    inputs = make_inputs(case, dtype)
    tensors, spec = (inputs.query, inputs.key, inputs.value), inputs.spec()
    want, plain = reference64(inputs), math_reference(inputs)
    with recorded(PROCESSORS) as gpu:
        out, lse = cuda.forward(*tensors, spec)
        gradients = cuda.backward(inputs.dout, inputs.dlse, *tensors, out, lse, spec)
    if splits:
        assert any("combine" in kernel for kernel, *_ in gpu.launches) == (case.M * case.N > 64)
    for name, got in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True):
        limit = budget(plain[name], want[name], dtype)
        error = relative_error(got, want[name])
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"


@pytest.mark.parametrize(
    ("dtype", "case"), [CASES[0], CASES[2], CASES[4], CASES[-1]], ids=lambda x: str(x)[:20]
)
def test_values_on_hopper(dtype: torch.dtype, case: Case) -> None:
    """Which has kernels of its own for many rows."""
    inputs = make_inputs(case, dtype)
    tensors, spec = (inputs.query, inputs.key, inputs.value), inputs.spec()
    want, plain = reference64(inputs), math_reference(inputs)
    with recorded(PROCESSORS, 232448, arch=90) as gpu:
        out, lse = cuda.forward(*tensors, spec)
        gradients = cuda.backward(inputs.dout, inputs.dlse, *tensors, out, lse, spec)
    assert all("hopper" in kernel for kernel, *_ in gpu.launches if "attention" in kernel)
    for name, got in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True):
        assert relative_error(got, want[name]) <= budget(plain[name], want[name], dtype), name


@pytest.mark.parametrize("forward", ["cuda", "cpu"])
def test_pairs_with_another_backend(forward: str) -> None:
    """One's forward with the other's backward: the residuals are the same."""
    backends = {"cuda": cuda, "cpu": cpu}
    inputs = make_inputs(Case("pair", 1, 4, 2, 20, 150, key_mask="random", dropout_p=0.2), BF16)
    tensors, spec = (inputs.query, inputs.key, inputs.value), inputs.spec()
    want, plain = reference64(inputs), math_reference(inputs)
    with recorded(PROCESSORS):
        out, lse = backends.pop(forward).forward(*tensors, spec)
        (other,) = backends.values()
        gradients = other.backward(inputs.dout, inputs.dlse, *tensors, out, lse, spec)
    for name, got in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert relative_error(got, want[name]) <= budget(plain[name], want[name], BF16), name


def test_a_launch_that_fails_names_the_shapes() -> None:
    inputs = make_inputs(Case("case", 1, 4, 2, 20, 150), BF16)
    with recorded(PROCESSORS) as gpu:
        gpu.error = 1
        with pytest.raises(RuntimeError) as error:
            cuda.forward(inputs.query, inputs.key, inputs.value, inputs.spec())
    text = (
        "attention_forward of bfloat16 B 1, H 4, Hkv 2, M 20, N 150, D 64, Dv 64 on device -1 failed: "
        "no reason (grid 2 x 1, 128 threads, 49152 of 166912 bytes of shared memory)"
    )
    assert text in str(error.value)


def test_the_operator_refuses_what_would_read_foreign_memory() -> None:
    inputs = make_inputs(Case("case", 1, 2, 2, 20, 100, strides="sliced"), BF16)
    out, lse = torch.empty(1, 2, 20, 64, dtype=BF16), torch.empty(1, 2, 20)
    parts = torch.empty(2, 1, 2, 20, 64), torch.empty(2, 1, 2, 20)
    query, key, value = (tensor.contiguous() for tensor in (inputs.query, inputs.key, inputs.value))

    def run(query: torch.Tensor, longest: int = 20, part_outs=parts[0], part_lses=parts[1]) -> None:
        options, kind = inputs.spec().options(), (80, 166912)
        gpu.cuda_forward(
            query, key, value, *options, longest, 100, *kind, STREAM, part_outs, part_lses, out, lse
        )

    with recorded(PROCESSORS) as gpu:
        for arguments, message in (
            ({"query": inputs.query}, "rows must begin at multiples of 16 bytes"),
            ({"query": query.float()}, "tensors differ in device or dtype"),
            ({"query": query, "longest": 21}, "counted in 31 bits"),
            ({"query": query, "part_outs": parts[0][..., :32]}, "of the right type and size"),
            ({"query": query, "part_lses": None}, "come together"),
        ):
            with pytest.raises(RuntimeError, match=message):
                run(**arguments)
        assert not gpu.launches


def test_a_gpu_without_the_shared_memory_is_refused() -> None:
    inputs = make_inputs(Case("case", 1, 1, 1, 20, 100), BF16)
    with (
        recorded(PROCESSORS, shared_per_block=40000),
        pytest.raises(RuntimeError, match="no forward kernel for head dim 64 with 40000 bytes"),
    ):
        cuda.forward(inputs.query, inputs.key, inputs.value, inputs.spec())
