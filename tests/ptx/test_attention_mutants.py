"""Faults put into the PTX of the package's kernels: the machine's checks or the values catch them all."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from perceiver_kernels.testing.budget import relative_error
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import make_inputs
from ptx.mutate import Mutant, mutants, score
from ptx.test_attention import compile_launch, default_launches, execute, outputs

PER_RULE = 5
CASES = {
    "attention_forward": (torch.bfloat16, Case("ragged", 1, 1, 1, 130, 400)),
    "attention_backward": (torch.float16, Case("ragged", 1, 1, 1, 64, 389)),
}


def harmless(mutant: Mutant, ptx: str) -> bool:
    """Mutants that are correct kernels still, as a look at the code shows."""
    lines = ptx.split("\n")
    if mutant.kind == "delete a commit":  # its copies join a group that every wait includes anyway
        control = r"^\s*(cp\.async\.commit|cp\.async\.wait|bar\.sync|bra|@\S+ bra)"
        rest = re.search(control, "\n".join(lines[mutant.line :]), re.MULTILINE)
        return rest is not None and rest[1] == "cp.async.commit"
    if mutant.kind == "lose or negate a guard":  # a copy past the end, of no bytes
        return re.search(r"^@%p\d+ cp\.async.*0x\d+, %r\d+;$", mutant.before.strip()) is not None
    # Triton drains its pipeline after a loop, when no copy that matters is under way any more.
    block = lines[max(0, mutant.line - 8) : mutant.line - 1]
    drains = any("_crit_edge" in line for line in block)
    return drains and mutant.kind in ("delete a wait", "weaken a wait", "delete a barrier")


@pytest.mark.parametrize("kernel", CASES)
def test_every_mutant_is_caught(kernel: str) -> None:
    dtype, case = CASES[kernel]
    inputs = make_inputs(case, dtype)
    got = outputs(inputs)
    for launch in default_launches(inputs, got, processors=1):
        report = execute(launch)
        if launch.kernel.__name__ == kernel:
            break
    assert report is not None
    written = {name: launch.arguments[name].clone() for name in ("p_out", "p_lse", "p_slabs", "p_dk", "p_dv")
               if name in launch.arguments}  # fmt: skip
    ptx = compile_launch(launch, "sm_80").asm["ptx"]

    def right(changed: str) -> bool:
        execute(launch, changed)
        return all(close(launch.arguments[name], want) for name, want in written.items())

    assert right(ptx)
    chosen = [one for one in mutants(ptx, kernel, PER_RULE, report.executed) if not harmless(one, ptx)]
    result = score(chosen, right)
    print(result)
    assert result.total >= 40
    assert not result.survivors, str(result)


def close(got: Any, want: Any) -> bool:
    """Equal but for what another order of sums may change; what nothing has written is NaN in both."""
    got, want = got.double().nan_to_num(), want.double().nan_to_num()
    return relative_error(got, want) < 1e-6
