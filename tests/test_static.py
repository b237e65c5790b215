"""`make static` compiles what ships, and finds what it is there to find."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import shipped, static  # noqa: E402
from perceiver_kernels.backends.triton.configs import Config  # noqa: E402

pytestmark = pytest.mark.cpu_only("compiled there")

GOOD = {
    "arch": "sm_80", "kernel": "attention_forward", "problem": "D64 bf16 M1024", "dim": 64, "config": "",
    "registers": 255, "spills": 0, "shared": 1000, "limit": 1000, "loops": {},
}  # fmt: skip


def test_every_kernel_compiles_fits_and_keeps_its_registers(tmp_path: Path) -> None:
    file = tmp_path / "static.json"
    assert static.main(["--quick", "--json", str(file), "--markdown", str(tmp_path / "static.md")]) == 0
    result = json.loads(file.read_text())
    rows = result["rows"]
    kernels = {"attention_forward", "combine_splits", "attention_delta", "attention_backward", "reduce_slabs"}
    assert {(row["arch"], row["kernel"], row["dim"]) for row in rows} == {
        (arch, kernel, dim) for arch in ("sm_80", "gfx942") for kernel in kernels for dim in (64, 128)
    }
    for row in rows:
        if row["arch"] == "sm_80" and row["config"]:
            shares = {name: loop["simulated"] for name, loop in row["loops"].items()}
            assert set(shares) == {"full", "edge"}
            assert row["problem"].endswith("M1") or 0.4 < shares["full"] < 1, row
            assert row["loops"]["full"]["instructions"] < row["loops"]["edge"]["instructions"], row
    assert {static.rival(row) for row in rows} == {None, 0.71, 0.81, 0.65}
    text = (tmp_path / "static.md").read_text()
    assert text.count("\n| sm_80 |") == sum(row["arch"] == "sm_80" for row in rows)
    assert f"triton {result['triton']}, ptxas {result['ptxas']}" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"spills": 2}, "2 spills"),
        ({"shared": 1001}, "needs 1001 bytes of shared memory, sm_80 has 1000"),
        ({"error": "PTXASError: no"}, "PTXASError: no"),
    ],
)
def test_faults(change: dict[str, Any], message: str | None) -> None:
    assert static.fault(GOOD | change) == message


def test_a_known_spill_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    row = GOOD | {"spills": 2}
    known = static.Known("attention_forward", ("sm_80",), (64,), 2, "why")
    monkeypatch.setattr(static, "KNOWN_SPILLS", (known,))
    assert static.fault(row) is None
    assert static.known_spill(row) == "why"
    assert static.fault(row | {"spills": 3}) == "3 spills"
    assert "| 2 (known) |" in list(static.table([row]))[-1]
    for change in (
        {"arch": "sm_90"},
        {"dim": 128},
        {"kernel": "reduce_slabs"},
        {"problem": "D64 bf16 M1024 packed"},
    ):
        assert static.fault(row | change) == "2 spills"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(128, 128, 4, 2), "spills"),
        (Config(128, 128, 8, 5), "bytes of shared memory, sm_80 has 166912"),
        (Config(128, 24, 4, 2), "CompilationError"),
    ],
)
def test_bad_configurations_are_found(monkeypatch: pytest.MonkeyPatch, config: Config, message: str) -> None:
    monkeypatch.setattr(shipped, "forward_config", lambda *_: config)
    (row,) = shipped.measure(shipped.Build("sm_80", "forward", 128, "bf16", 1024))
    assert message in str(static.fault(row))


def test_the_whole_list_covers_what_ships() -> None:
    found = set(shipped.builds())
    assert {build.arch for build in found} == set(shipped.ARCHS)
    assert {(build.dim, build.dtype, build.rows) for build in found} >= {
        (dim, dtype, rows) for dim in shipped.DIMS for dtype in ("bf16", "f32") for rows in (1, 1024)
    }
    assert {build.option for build in found} == {"", *shipped.OPTIONS}


def test_command_line_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--arch", "sm_10"], ["--jobs", "0"]):
        with pytest.raises(SystemExit) as stop:
            static.main(arguments)
        assert stop.value.code == 2
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stop:
        static.main(["--quick"])
    assert stop.value.code == 2
