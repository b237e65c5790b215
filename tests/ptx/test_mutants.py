"""Faults put into the PTX of a real attention kernel: the machine's checks or the values catch every one."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ptx.findings import Report
from ptx.machine import empty, launch
from ptx.mutate import LOOSE_RULES, RULES, Mutant, mutants, score
from ptx.test_samples import Attention, needs_nvcc, ptx_of

PER_RULE = 6


def harmless(mutant: Mutant, ptx: str) -> bool:
    """Mutants that are correct kernels still, as a look at the code shows."""
    rest = ptx.split("\n")[mutant.line :]
    following = [
        line.strip()
        for line in rest
        if re.match(r"\s*(cp\.async\.(wait|commit)|bar\.sync|bra|@\S+ bra)", line)
    ]
    if mutant.kind == "delete a commit":  # its copies join a group that every wait includes anyway
        return following[0].startswith("cp.async.commit_group")
    last_loop = ptx.rindex("bra.uni")
    after_loop = mutant.line > ptx[:last_loop].count("\n")
    # Triton drains its pipeline after the loop, when no copy that matters is under way any more.
    drain = (
        "cp.async.wait_group" in mutant.before or "cp.async.wait_group" in ptx.split("\n")[mutant.line - 2]
    )
    return after_loop and drain and mutant.kind in ("delete a wait", "weaken a wait", "delete a barrier")


@pytest.mark.parametrize(("name", "stages"), [("f16", 3), ("bf16", 2)])
def test_every_mutant_is_caught(name: str, stages: int) -> None:
    """Ragged sizes, so that every guard matters: 70 queries in blocks of 64, 150 keys in blocks of 32."""
    case = Attention(name, stages, 70, 150)
    ptx = case.kernel.asm["ptx"]
    executed = case.run().executed
    assert case.right()

    def right(changed: str) -> bool:
        case.run(changed)
        return case.right()

    chosen = mutants(ptx, "attention_sample", PER_RULE, executed)
    chosen = [mutant for mutant in chosen if not harmless(mutant, ptx)]
    result = score(chosen, right)
    print(result)
    assert result.total >= 40
    assert not result.survivors, str(result)
    assert set(result.caught) == set(RULES), "every kind of mutant was tried"


@needs_nvcc
def test_mutants_of_a_cuda_kernel() -> None:
    ptx = ptx_of("matmul")
    rng = np.random.default_rng(4)
    a, b = (rng.standard_normal((n, 96)).astype(np.float16) for n in (100, 70))
    want = a.astype(np.float64) @ b.astype(np.float64).T

    reports: list[Report] = []
    # A wider store is no fault here: the same thread writes the neighbour next.
    rules = {kind: rule for kind, rule in RULES.items() if kind != "widen a store"}

    def right(changed: str) -> bool:
        c = empty(want.shape, np.float32)
        reports.append(launch(changed, "matmul_f16", (2, 3), 128, [a, b, c, 100, 70, 96]))
        return np.allclose(c.array, want, rtol=1e-4, atol=1e-4)

    assert right(ptx)
    result = score(mutants(ptx, "matmul_f16", 10, reports[0].executed, rules), right)
    print(result)
    assert result.total >= 40
    assert not result.survivors, str(result)


def test_the_score_knows_survivors() -> None:
    """A maximum that only stabilises may be any other number: those mutants live, and the score says so."""
    case = Attention("f16", 3, 70, 150)
    only = {"minimum for maximum": LOOSE_RULES["minimum for maximum"]}
    chosen = mutants(case.kernel.asm["ptx"], "attention_sample", 2, rules=only)

    def right(changed: str) -> bool:
        case.run(changed)
        return case.right()

    assert {mutant.kind for mutant in score(chosen, right).survivors} == set(only)
