"""The package's kernels for Hopper, compiled for sm_90a, run on the machine and broken on purpose."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from perceiver_kernels.spec import empty_gradients, empty_outputs
from perceiver_kernels.testing.budget import reference64, relative_error
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import make_inputs
from ptx import test_cuda_backward as backward
from ptx.cuda_kernels import CSRC, element_type, entries
from ptx.mutate import HOPPER_RULES, RULES, Mutant, mutants, score
from ptx.test_cuda_attention import Kernel, check_forward, launches

SOURCE, BACKWARD = (CSRC / "cuda" / "hopper" / name for name in ("forward.cu", "backward.cu"))
BF16, F16 = torch.bfloat16, torch.float16


@functools.cache
def forward_kernels() -> list[Kernel]:
    found = []
    for name in entries(SOURCE):
        dim, has_score = map(int, re.findall(r"L[ib](\d+)E", name))
        found.append(Kernel(name, element_type(name), dim, 128, 128, 12, 2, bool(has_score)))
    return found


def forward_kernel(dtype: torch.dtype, dim: int, rows: int, has_score: bool) -> Kernel:
    """As forward_kernel() in hopper/forward.cu chooses, whatever the rows."""
    key = (dtype, 64 if dim <= 64 else 128, has_score)
    return next(each for each in forward_kernels() if (each.dtype, each.dim, each.has_score) == key)


CASES: list[tuple[torch.dtype, int, Case]] = [  # and into how many splits
    (BF16, 1, Case("ragged", 1, 1, 1, 70, 150)),
    (F16, 1, Case("one_block", 1, 1, 1, 20, 128)),
    (BF16, 1, Case("full_128", 1, 1, 1, 130, 900, 128, 128)),
    (F16, 1, Case("rising_maxima", 1, 1, 1, 130, 660, scale=1.0)),
    (BF16, 3, Case("split", 1, 1, 1, 150, 1100)),
    (F16, 2, Case("split_128", 1, 1, 1, 40, 530, 128, 128, strides="transposed")),
    (F16, 2, Case("odd_dims", 1, 1, 1, 40, 200, 72, 40, scale=-0.2)),
    (BF16, 1, Case("grouped", 1, 6, 2, 33, 401)),
    (F16, 1, Case("masked", 2, 1, 1, 40, 330, key_mask="random")),
    (BF16, 2, Case("masked_dead", 2, 1, 1, 40, 330, 128, 128, key_mask="dead_example")),
    (BF16, 1, Case("left_padding", 2, 1, 1, 40, 450, key_mask="left_padding")),
    (F16, 1, Case("offsets", 2, 2, 1, 33, 290, q_offset="per_example")),
    (BF16, 2, Case("offset_before_all", 1, 1, 1, 70, 90, q_offset=-30)),
    (BF16, 1, Case("softcap", 1, 1, 1, 40, 330, softcap=2.0)),
    (F16, 1, Case("dropout", 1, 2, 1, 40, 130, 128, 128, dropout_p=0.2)),
    (BF16, 1, Case("not_causal", 1, 1, 1, 130, 270, is_causal=False)),
    (BF16, 1, Case("zero_scale", 1, 1, 1, 20, 70, scale=0.0)),
    (F16, 2, Case("packed", lengths=((5, 40), (33, 533), (0, 7), (4, 0), (40, 90)), H=2, Hkv=1)),
    (BF16, 2, Case("all_options", 2, 4, 2, 21, 177, 64, 64, True, "per_example", "random", 0.4, 2.0, 0.3,
                   "transposed")),
    (F16, 1, Case("all_options_packed", 0, 4, 2, 0, 0, 64, 40, True, "per_example", "random", 0.4, 2.0, 0.3,
                  lengths=((5, 40), (33, 133), (4, 0)))),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "splits", "case"), CASES, ids=[case.name for *_, case in CASES])
def test_forward(dtype: torch.dtype, splits: int, case: Case) -> None:
    check_forward(dtype, splits, case, forward_kernel, SOURCE)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("has_score", [False, True])
def test_every_instantiation(dim: int, has_score: bool, dtype: torch.dtype) -> None:
    case = Case("tile", 1, 1, 1, 20, 300, dim, dim, softcap=2.0 if has_score else None)
    check_forward(dtype, 1, case, forward_kernel, SOURCE)


def harmless(mutant: Mutant) -> bool:
    """Groups may forget their turns, a maximum may start at +1e38, a slot be left that nobody wants."""
    turn = mutant.kind == "delete a barrier" and mutant.before.endswith(", 256;")
    skipped = "\n".join(mutant.ptx.split("\n")[mutant.line : mutant.line + 6])
    leave = mutant.kind == "lose or negate a guard" and "bar.arrive" in skipped
    return turn or leave or mutant.kind == "add for subtract"


def test_every_mutant_is_caught() -> None:
    inputs = make_inputs(Case("mutants", 1, 1, 1, 100, 640, scale=1.0), BF16)
    out, lse = empty_outputs(inputs.query, inputs.value)
    forward = next(launches(inputs, out, lse, 1, forward_kernel, SOURCE))
    report = forward.run()
    want = [tensor.double().clone() for tensor in forward.written]

    def right(changed: str) -> bool:
        forward.run(changed)
        return all(
            relative_error(got.double().nan_to_num(), before) < 1e-6
            for got, before in zip(forward.written, want, strict=True)
        )

    ptx = entries(SOURCE)[forward.name]
    assert right(ptx)
    chosen = [
        one
        for one in mutants(ptx, forward.name, 5, report.executed, RULES | HOPPER_RULES)
        if not harmless(one)
    ]
    result = score(chosen, right)
    print(result)
    assert result.total >= 40
    assert set(result.caught) >= set(HOPPER_RULES)
    assert not result.survivors, str(result)


def test_every_backward_mutant_is_caught() -> None:
    inputs = make_inputs(Case("mutants", 1, 1, 1, 130, 400, 64, 64, q_offset=230), BF16)
    exact = reference64(inputs)
    gradients = empty_gradients(inputs.query, inputs.key, inputs.value)
    each_launch = backward.launches(
        inputs, exact["out"].to(BF16), exact["lse"].float(), gradients, 1, backward_kernel
    )
    each_launch[0].run()
    attention = each_launch[1]
    report = attention.run()
    want = [backward.as_bytes(tensor).clone() for tensor in attention.written]

    def right(changed: str) -> bool:
        attention.run(changed)
        return all(map(torch.equal, map(backward.as_bytes, attention.written), want))

    ptx = entries(BACKWARD)[attention.name]
    assert right(ptx)
    result = score(mutants(ptx, attention.name, 4, report.executed, RULES | HOPPER_RULES), right)
    print(result)
    assert result.total >= 30
    assert set(result.caught) >= set(HOPPER_RULES)
    assert not result.survivors, str(result)


@functools.cache
def backward_kernels() -> list[backward.Kernel]:
    found = []
    for name in entries(BACKWARD):
        if "attention_backward" not in name:
            continue
        dim, has_score = map(int, re.findall(r"L[ib](\d+)E", name))
        tile = re.findall(r"BackwardTileI\w+?EE", name)[0]
        keys, rows, gradients, numbers = 2 * 128 * dim, 4 * 64 * dim, 2 * 128 * 64, 8 * 64
        shared = 2 * (2 * keys + rows + gradients + numbers)
        fields = (element_type(name), dim, 64, 128, 384, shared, bool(has_score), 256, BACKWARD)
        found.append(backward.Kernel(name, tile, *fields))
    return found


def backward_kernel(dtype: torch.dtype, dim: int, has_score: bool) -> backward.Kernel:
    key = (dtype, 64 if dim <= 64 else 128, has_score)
    return next(each for each in backward_kernels() if (each.dtype, each.dim, each.has_score) == key)


@pytest.mark.parametrize(
    ("dtype", "runs", "case"), backward.CASES, ids=[case.name for *_, case in backward.CASES]
)
def test_backward(dtype: torch.dtype, runs: int, case: Case) -> None:
    backward.check_backward(dtype, runs, case, backward_kernel)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("has_score", [False, True])
def test_every_backward_instantiation(dim: int, has_score: bool, dtype: torch.dtype) -> None:
    case = Case("tile", 1, 1, 1, 70, 300, dim, dim, softcap=2.0 if has_score else None)
    backward.check_backward(dtype, 1, case, backward_kernel)
