"""The built CUDA kernels: what they take of a GPU, and what the model makes of their loops."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from perceiver_kernels import _library

if _library.cuda_missing is not None:
    pytest.skip(str(_library.cuda_missing), allow_module_level=True)
pytest.importorskip("triton", reason="triton's wheel carries cuobjdump and nvdisasm")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import static_cuda

TARGETS = {  # of an A100's tensor peak, by the model
    ("attention_forward", 64): 0.75,
    ("attention_forward", 128): 0.82,
    ("attention_backward", 64): 0.68,
    ("attention_backward", 128): 0.74,
}
ROW = {
    "arch": "sm_80", "kernel": "attention_forward", "dim": 64, "option": "", "shared": 1000,
    "loops": [{"spills": 0}, {"spills": 0}],
}  # fmt: skip


def test_the_kernels_reach_their_targets(tmp_path: Path) -> None:
    file = tmp_path / "static.json"
    assert static_cuda.main(["--quick", "--json", str(file), "--markdown", str(tmp_path / "s.md")]) == 0
    rows = [row for row in json.loads(file.read_text())["rows"] if row["arch"] == "sm_80"]
    if not rows:
        pytest.skip("built for other GPUs")
    found = {(row["kernel"], row["dim"]): row for row in rows if not row["tile"].startswith("16x")}
    for key, target in TARGETS.items():
        loop = static_cuda.full(found[key])
        assert loop["spills"] == 0
        assert loop["useful"] == 1.0  # no product is wasted
        assert loop["simulated"] >= target
        rival = static_cuda.FLASH_ATTENTION_2[key]
        assert loop["simulated"] > rival.share
        assert loop["per_tensor"] < rival.per_tensor
    assert "| sm_80 | attention_forward | 64 |" in (tmp_path / "s.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"shared": 1 << 18}, "needs 262144 bytes of shared memory"),
        ({"shared": 1 << 18, "arch": "sm_86"}, None),
        ({"loops": [{"spills": 1}, {"spills": 0}]}, "1 and 0 spills in its loops"),
        ({"loops": [{"spills": 0}, {"spills": 2}], "dim": 128}, None),
        ({"loops": [{"spills": 2}, {"spills": 0}], "dim": 128}, "2 and 0 spills in its loops"),
        ({"loops": [{"spills": 2}, {"spills": 0}], "dim": 128, "arch": "sm_90"}, None),
        ({"loops": [{"spills": 3}, {"spills": 0}], "dim": 128, "option": "score"}, None),
    ],
)
def test_faults(change: dict[str, object], message: str | None) -> None:
    assert static_cuda.fault(ROW | change) == message
