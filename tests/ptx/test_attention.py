"""The package's Triton kernels, compiled for sm_80, run on the machine: right values and not one finding."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from perceiver_kernels.spec import empty_gradients, empty_outputs
from perceiver_kernels.testing.budget import budget, math_reference, reference64, relative_error
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import Inputs, make_inputs
from ptx.findings import Report
from ptx.machine import Empty

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

from perceiver_kernels.backends.triton import launch as launches
from perceiver_kernels.backends.triton.compile import compile_launch
from perceiver_kernels.backends.triton.configs import Device, backward_config, forward_config
from ptx.triton_ptx import launch_triton

WRITTEN = {  # what each kernel writes; to the others the same names are inputs
    "attention_forward": ("p_out", "p_lse"),
    "combine_splits": ("p_out", "p_lse"),
    "attention_delta": ("p_shift", "p_delta"),
    "attention_backward": ("p_slabs", "p_dk", "p_dv"),
    "reduce_slabs": ("p_dq",),
}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES: list[tuple[torch.dtype, Case]] = [
    (BF16, Case("ragged", 1, 2, 2, 70, 150)),
    (F16, Case("ragged_128", 1, 1, 1, 70, 150, 128, 128)),
    (BF16, Case("split_128", 1, 1, 1, 150, 530, 128, 128)),
    (F16, Case("split", 1, 1, 1, 40, 700)),
    (BF16, Case("grouped", 1, 6, 2, 33, 101)),
    (F16, Case("masked", 2, 1, 1, 40, 130, key_mask="random")),
    (BF16, Case("masked_dead", 2, 1, 1, 40, 130, 128, 128, key_mask="dead_example")),
    (F16, Case("offsets", 2, 2, 1, 33, 90, q_offset="per_example")),
    (BF16, Case("offset_before_all", 1, 1, 1, 70, 90, q_offset=-30)),
    (BF16, Case("softcap", 1, 1, 1, 40, 130, softcap=2.0)),
    (F16, Case("dropout", 1, 2, 1, 40, 130, 128, 128, dropout_p=0.2)),
    (BF16, Case("not_causal", 1, 1, 1, 130, 70, is_causal=False)),
    (F16, Case("decode", 1, 4, 1, 1, 530)),
    (BF16, Case("decode_grouped", 1, 8, 2, 1, 400)),
    (F16, Case("decode_grouped_128", 1, 8, 2, 1, 400, 128, 128)),
    (BF16, Case("decode_128", 2, 8, 2, 1, 300, 128, 128, key_mask="left_padding")),
    (BF16, Case("packed", 1, 2, 1, 0, 0, lengths=((5, 40), (33, 33), (0, 7), (4, 0), (40, 90)))),
    (F16, Case("odd_dims", 1, 1, 1, 40, 70, 96, 40, scale=-0.2)),
    (BF16, Case("all_options", 2, 4, 2, 21, 77, 64, 64, True, "per_example", "random", 0.4, 2.0, 0.3,
                "transposed")),
    (BF16, Case("wide_192", 1, 2, 1, 40, 70, 192, 192)),
    (F16, Case("wide_256", 1, 1, 1, 70, 90, 256, 256)),
    (F32, Case("float32", 1, 2, 1, 20, 50, 64, 64)),
    (F32, Case("float32_narrow", 1, 1, 1, 17, 20, 8, 40)),  # lanes that share a row's sum
]  # fmt: skip


def execute(
    launch: launches.Launch, ptx: str | None = None, arch: str = "sm_80", **options: bool
) -> Report | None:
    """Run a launch on the machine; what it is to write counts as unwritten before."""
    if 0 in launch.grid:
        return None
    kernel = compile_launch(launch, arch)
    arguments = []
    for parameter in launch.kernel.params:
        value = launch.arguments.get(parameter.name)
        specialised = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or specialised:
            continue
        if parameter.name in WRITTEN[launch.kernel.__name__]:
            value.untyped_storage().fill_(0xFF)  # NaN
            value = Empty(value)
        arguments.append(value)
    return launch_triton(kernel, launch.grid, arguments, ptx=ptx, **options)


def outputs(inputs: Inputs) -> dict[str, Tensor]:
    """Memory for the results."""
    out, lse = empty_outputs(inputs.query, inputs.value)
    dq, dk, dv = empty_gradients(inputs.query, inputs.key, inputs.value)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def default_launches(
    inputs: Inputs, into: dict[str, Tensor], processors: int, arch: str = "sm_80"
) -> Iterator[launches.Launch]:
    """Forward and backward in the default configurations."""
    query, key, value = inputs.query, inputs.key, inputs.value
    problem, device = launches.make_problem(query, key, value, inputs.spec()), Device(arch, processors)
    sizes = (max(problem.D, problem.DV), problem.dtype, device.arch)
    ahead, back = forward_config(problem.rows, *sizes), backward_config(problem.M, *sizes)
    residuals, gradients = (into["out"], into["lse"]), (into["dq"], into["dk"], into["dv"])
    yield from launches.forward_launches(problem, query, key, value, *residuals, device, ahead)
    tensors = (inputs.dout, inputs.dlse, query, key, value, *residuals, gradients)
    yield from launches.backward_launches(problem, *tensors, device, back)


@pytest.mark.parametrize(("dtype", "case"), CASES, ids=[f"{case.name}" for _, case in CASES])
def test_forward_and_backward(dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(case, dtype)
    got = outputs(inputs)
    for launch in default_launches(inputs, got, processors=3):
        execute(launch)
    check(inputs, got)


def check(inputs: Inputs, got: dict[str, Tensor]) -> None:
    want, plain = reference64(inputs), math_reference(inputs)
    for name in got:
        limit = budget(plain[name], want[name], inputs.query.dtype)
        error = relative_error(got[name], want[name])
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"


# Few rows and many, one part of the head dim and two, with and without masks.
@pytest.mark.parametrize(("dtype", "case"), [CASES[i] for i in (0, 1, 5, 12, 18)], ids=lambda x: str(x)[:25])
def test_hopper(dtype: torch.dtype, case: Case) -> None:
    """What Triton makes of them for sm_90, with wgmma.

    It doesn't fence what cp.async has brought for the async proxy; that is its own affair.
    """
    inputs = make_inputs(case, dtype)
    got = outputs(inputs)
    for launch in default_launches(inputs, got, processors=3, arch="sm_90"):
        report = execute(launch, arch="sm_90", collect=True)
        assert report is None or {finding.kind for finding in report.findings} <= {"proxy"}
    check(inputs, got)
