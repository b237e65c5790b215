"""The bench cases under pytest-benchmark: `python -m pytest benchmarks -k "read and fwdbwd and cpu"`.

`perceiver-kernels bench` compares candidates in interleaved rounds; this one follows a candidate over time
(`--benchmark-autosave`, `--benchmark-compare`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

import perceiver_kernels as pk
from perceiver_kernels.cli import measure
from perceiver_kernels.testing.cases import BENCH_CASES, Case
from perceiver_kernels.testing.inputs import make_inputs
from perceiver_kernels.testing.peers import PEERS, Unsupported

NAMES = [name for name, reason in pk.available_backends("cpu").items() if reason is None] + list(PEERS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", measure.PASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", BENCH_CASES, ids=lambda case: case.name)
def test_attention(benchmark: Callable[..., None], case: Case, dtype: str, direction: str, name: str) -> None:
    """Check once against float64, then time."""
    backward = direction == "fwdbwd"
    inputs = make_inputs(case, measure.DTYPES[dtype], "cpu", 0)
    try:
        candidate = measure.prepare(name, inputs, backward)
    except Unsupported as reason:
        pytest.skip(str(reason))
    verdict = measure.accuracy(candidate, inputs, measure.sample_reference(inputs, backward))
    if name not in PEERS and not verdict["within_budget"]:
        pytest.skip(f"over its error budget: {verdict}")
    benchmark.group = f"{case.name} {dtype} {direction}"  # type: ignore[attr-defined]
    benchmark.extra_info.update(verdict, way=candidate.way, flop=measure.operations(inputs, backward))  # type: ignore[attr-defined]
    benchmark.pedantic(candidate.call, rounds=7, iterations=candidate.loops)  # type: ignore[attr-defined]
