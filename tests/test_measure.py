"""What the benchmarks count and time: visible pairs, peers, rounds, peak memory, fresh processes."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import DEVICE

from perceiver_kernels.cli import charts, measure, report
from perceiver_kernels.cli.fresh import in_fresh_process
from perceiver_kernels.cli.memory import peak_growth
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import make_inputs
from perceiver_kernels.testing.peers import PEERS, Unsupported


def test_counts_visible_pairs() -> None:
    for case in (
        Case("plain", B=2, H=4, Hkv=2, M=5, N=9, D=4, Dv=4),
        Case("masked", B=2, H=4, Hkv=2, M=5, N=9, D=4, Dv=4, key_mask="random", q_offset="per_example"),
        Case("full", B=2, H=4, Hkv=2, M=5, N=9, D=4, Dv=4, is_causal=False, key_mask="random"),
        Case("dead", B=1, H=1, Hkv=1, M=5, N=9, D=4, Dv=4, q_offset=-3),
    ):
        inputs = make_inputs(case, torch.float32)
        from perceiver_kernels.reference import visible

        seen = visible(inputs.spec(), case.M, case.N, DEVICE).expand(case.B, -1, -1)
        assert measure.visible_pairs(inputs) == case.H * int(seen.sum()), case.name
    inputs = make_inputs(Case("", B=1, H=1, Hkv=1, M=1, N=10, D=8, Dv=8), torch.float32)
    assert measure.operations(inputs, False) == 4 * 8 * 10
    assert measure.operations(inputs, True) == 3.5 * 4 * 8 * 10


@pytest.mark.parametrize("case", [
    Case("plain", M=5, N=20, D=8, Dv=8), Case("grouped", H=4, Hkv=2, M=5, N=20, D=8, Dv=8),
    Case("square", M=7, N=7, D=8, Dv=8), Case("decode", M=1, N=9, D=8, Dv=8),
    Case("full", M=5, N=20, D=8, Dv=8, is_causal=False),
    Case("masked", M=5, N=20, D=8, Dv=4, key_mask="right_padding", q_offset=15),
])  # fmt: skip
@pytest.mark.parametrize("peer", ["torch-eager", "torch-sdpa"])
def test_peers_agree_with_the_reference(peer: str, case: Case) -> None:
    on_cpu = DEVICE.type == "cpu"
    inputs = make_inputs(case, torch.float64 if on_cpu else torch.float16)
    want, _ = inputs.attend(inputs.query, inputs.key, inputs.value, "reference")
    right = []
    for way, attend in measure.ways(peer, inputs, False).items():
        try:
            out = attend(inputs.query, inputs.key, inputs.value)
        except RuntimeError:  # on a GPU the ways name torch's kernels, and not each is for every problem
            assert not on_cpu
            continue
        torch.testing.assert_close(out, want, **({} if on_cpu else {"rtol": 0.01, "atol": 0.01}))
        right.append(way)
    assert right
    assert peer != "torch-sdpa" or case.name != "square" or any("is_causal" in way for way in right)
    assert peer != "torch-sdpa" or case.name != "decode" or any("no mask" in way for way in right)


def test_peers_refuse() -> None:
    inputs = make_inputs(Case("", dropout_p=0.5, softcap=1.0), torch.float32)
    for peer in PEERS:
        with pytest.raises(Unsupported):
            measure.ways(peer, inputs, False)
    with pytest.raises(Unsupported, match="no backward on a CPU"):
        measure.ways("torch-flex", make_inputs(Case(""), torch.float32, "cpu"), True)


def test_rounds_interleave_and_stop() -> None:
    order: list[str] = []
    candidates = [measure.Candidate(name, lambda name=name: order.append(name)) for name in "AB"]  # type: ignore[misc,arg-type]
    for _ in measure.rounds(candidates, repeat=3, limit=60.0):
        pass
    assert "".join(order) == "ABABAB"
    for _ in measure.rounds(candidates, repeat=1000, limit=0.0):
        pass
    assert len(candidates[0].samples) == 6


@pytest.mark.cpu_only("its memory")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_growth_sees_what_was_freed() -> None:
    def call() -> torch.Tensor:
        torch.ones(16 * 2**20)  # 64 MiB, freed at once
        return torch.ones(2**20)

    growth = peak_growth(call)
    assert growth is not None
    assert 60 * 2**20 < growth < 80 * 2**20


def test_fresh_process_reports_errors() -> None:
    with pytest.raises(RuntimeError, match="KeyError"):
        in_fresh_process(measure.peak_memory, {"threads": 1})


def test_seconds_and_json() -> None:
    assert [report.seconds(x) for x in (2.5, 0.0123, 4.2e-5)] == ["2.5 s", "12.3 ms", "42 us"]
    assert report.finite({"a": [1.0, float("nan")]}) == {"a": [1.0, "nan"]}
    assert charts.OURS != charts.PEER
