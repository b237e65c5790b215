"""The command line, as a user runs it: exit codes, messages, JSON, plots, and what an interruption leaves."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BY_NAME, DEVICE, USABLE, refusal

import perceiver_kernels as pk
from perceiver_kernels.cli import bench, demo, doctor, main, report, verify
from perceiver_kernels.cli.train import HeldOut

TINY = ["--batch", "1", "--heads", "2", "--queries", "4", "--keys", "16", "--dim", "8", "--repeat", "2"]
COMMAND = [sys.executable, "-m", "perceiver_kernels"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def _consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles that write to whatever pytest captures now, wide enough not to wrap."""
    for name, stderr in (("out", False), ("err", True)):
        console = report.Console(stderr=stderr, highlight=False, width=300)
        for module in (report, bench, demo, doctor, verify, sys.modules["perceiver_kernels.cli"]):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, console)


def load(path: Path) -> dict[str, Any]:
    """A result file, which must name its origin."""
    result: dict[str, Any] = json.loads(path.read_text())
    assert {"version", "commit", "command", "date", "machine"} <= result.keys()
    assert result["command"].startswith("perceiver-kernels ")
    assert {"cpu", "cores", "memory_gb", "torch", "threads", "isa"} <= result["machine"].keys()
    return result


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[1].strip() == f"perceiver-kernels {pk.__version__}"
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(command in out for command in ("doctor", "verify", "bench", "demo", "inspect"))


def test_help_imports_no_subcommand() -> None:
    code = """
import contextlib, sys
from perceiver_kernels.cli import main
with contextlib.suppress(SystemExit):
    main(["--help"])
assert not {"torch._dynamo", "perceiver_kernels.cli.bench", "perceiver_kernels.layers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_doctor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "doctor", "--json", str(tmp_path / "new" / "d.json"))
    assert code == 0
    assert "reference" in out
    assert sum("gpu" in line.split("│")[1] for line in out.splitlines() if line.count("│") == 3) == 1
    result = load(tmp_path / "new" / "d.json")
    assert result["backends"]["cpu"] == pk.available_backends("cpu")


def test_doctor_without_the_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "missing", "it was installed without")
    monkeypatch.setattr(doctor.machine, "build", dict)
    monkeypatch.setattr(doctor, "OPTIONAL", {"abacus": "sums"})
    monkeypatch.setattr(
        pk, "available_backends", lambda device: {"cpu": "it was installed without", "sdpa": None}
    )
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "it was installed without" in out
    assert "Install a C++17 compiler" in out
    assert "abacus is missing, needed for sums: pip install 'perceiver-kernels[demo]'." in out
    monkeypatch.setattr(pk, "available_backends", lambda device: {"cpu": "no", "sdpa": "no"})
    assert run(capsys, "doctor")[0] == 1


def test_verify(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cases = ["ragged", "softcap", "packed"]
    path = tmp_path / "v.json"
    arguments = ("--case", *cases, "--dtype", "float32", "--json", str(path))
    code, out, _ = run(capsys, "verify", "--device", DEVICE.type, "--backends", *USABLE, *arguments)
    assert code == 0
    assert ("sdpa refuses softcap" in out) == ("sdpa" in USABLE)
    rows = load(path)["rows"]
    for backend in USABLE:
        for case in cases:
            mine = [row for row in rows if (row["backend"], row["case"]) == (backend, case)]
            if refusal(backend, BY_NAME[case]):
                assert [row["status"] for row in mine] == ["refused"]
            else:
                assert [row["tensor"] for row in mine] == ["out", "lse", "dq", "dk", "dv"]
                assert all(row["error"] <= row["budget"] for row in mine)


@pytest.mark.parametrize("damage", ["wrong", "nan", "raises"])
def test_verify_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    from perceiver_kernels.backends import reference

    forward = reference.forward

    def broken(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if damage == "raises":
            raise RuntimeError("the kernel broke")
        out, lse = forward(*arguments)
        return out * (1.001 if damage == "wrong" else float("nan")), lse

    monkeypatch.setattr(reference, "forward", broken)
    arguments = ("verify", "--backends", "reference", "--case", "ragged", "--dtype", "float32")
    code, out, _ = run(capsys, *arguments)
    assert code == 1
    assert "FAIL reference float32 ragged" in out
    assert "the kernel broke" in out or damage != "raises"


def test_bench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = ["reference", "torch-sdpa"]
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    arguments = (*TINY, "--device", DEVICE.type, "--dtype", "float32", "--backends", *names, *files)
    code, out, _ = run(capsys, "bench", *arguments)
    assert code == 0
    assert "GFLOP/s" in out
    rows = load(tmp_path / "b.json")["rows"]
    assert [(row["pass"], row["candidate"]) for row in rows] == [
        (direction, name) for direction in ("fwd", "fwdbwd") for name in names
    ]
    for row in rows:
        assert row["shape"] == "B1 H2 M4 N16 D8"
        assert row["rounds"] == 2
        assert row["q1_s"] <= row["median_s"] <= row["q3_s"]
        assert row["within_budget"]
        assert (row["speedup"] == 1.0) == (row["candidate"] == "torch-sdpa")
        if sys.platform == "linux" or DEVICE.type == "cuda":
            assert row["peak_extra_bytes"] >= 0
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_bench_quick_gives_way_to_other_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    code, _, err = run(capsys, "bench", "--quick", *TINY, "--dtype", "bfloat16", "--json", str(path))
    assert code == 0
    rows = load(path)["rows"]
    problems = {(row["case"], row["dtype"], row["pass"]) for row in rows}
    assert problems == {("train*", "bfloat16", "fwd"), ("decode*", "bfloat16", "fwd")}
    names = {row["candidate"] for row in rows}
    assert "torch-sdpa" in names
    assert not names & {"sdpa", "reference", "torch-eager", "torch-flex"}
    assert all(row["rounds"] == 2 and row["peak_extra_bytes"] is None for row in rows)
    assert err.splitlines() == ["1 of 2 done: train* bfloat16 fwd", "2 of 2 done: decode* bfloat16 fwd"]


def test_bench_prints_each_table_when_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure_problem(problem: bench.Problem, names: list[str], result: report.Result, **_: Any) -> None:
        printed.append(capsys.readouterr().out)
        result["rows"] = [*result["rows"], {**problem.head, "candidate": "cpu", "skipped": "no time"}]

    printed: list[str] = []
    monkeypatch.setattr(bench, "measure_problem", measure_problem)
    run(capsys, "bench", *TINY, "--dtype", "float32")
    assert printed[0] == ""
    assert "float32, fwd" in printed[1]


def test_bench_leaves_out_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from perceiver_kernels.backends import reference

    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *a: tuple(1.001 * x for x in forward(*a)))
    arguments = (
        *TINY,
        "--dtype",
        "float32",
        "--pass",
        "fwd",
        "--no-memory",
        "--backends",
        "reference",
        "torch-eager",
    )
    code, out, _ = run(capsys, "bench", *arguments)
    assert code == 0
    assert "reference is left out: out is over its error budget" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required"),
        (("paint",), "invalid choice: 'paint'"),
        (("bench", "--dim", "0"), "must be at least 1, got 0"),
        (("bench", "--dim", "many"), "invalid positive value: 'many'"),
        (("bench", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("bench", "--case", "nowhere"), "invalid choice: 'nowhere'"),
        (("bench", "--heads", "4", "--kv-heads", "3"), "--kv-heads 3 does not divide --heads 4"),
        (("bench", "--backends", "abacus"), "unknown backend 'abacus'"),
        (("bench", "--json", "/dev/null/b.json"), "--json can't write /dev/null/b.json"),
        (("bench", "--json", "/nowhere/[b].json"), "--json can't write /nowhere/[b].json"),
        (("verify", "--backends", "abacus"), "unknown backend 'abacus'"),
        (("verify", "--backends", "cuda"), "not on cpu; use --device cuda"),
        (("verify", "--case", "nowhere"), "invalid choice: 'nowhere'"),
        (("demo", "--minutes", "1", "--steps", "1"), "not allowed with argument"),
        (("demo", "--minutes", "-1"), "--minutes must be greater than 0"),
        (("demo", "--context", "64", "--latents", "128"), "--latents 128 is more than --context 64"),
        (("demo", "--output", "/dev/null/demo"), "--output can't make /dev/null/demo"),
    ],
)
def test_bad_requests(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err


def test_missing_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run(capsys, "bench", *TINY, "--plot", "b.png")
    assert code == 2
    assert "plots need matplotlib: pip install 'perceiver-kernels[demo]'" in err


def test_a_claim_makes_one_folder_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("a.json"), Path("new/a.json"), tmp_path / "other" / "a.json"):
        report.claim("--json", path)
        assert path.exists()
    for path in (Path("/nowhere/a.json"), Path("two/levels/a.json")):
        with pytest.raises(report.CommandError, match="--json can't write"):
            report.claim("--json", path)
        assert not path.parent.exists()


def interrupt(
    arguments: list[str], ready: Any, timeout: float = 60.0, sent: int = signal.SIGINT
) -> tuple[int, str]:
    """Start the command, press Ctrl-C once `ready()`, return exit code and stderr."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # CI may have it ignored
    )
    begin = time.monotonic()
    while not ready() and process.poll() is None and time.monotonic() - begin < timeout:
        time.sleep(0.2)
    time.sleep(1.0)
    process.send_signal(sent)
    _, err = process.communicate(timeout=timeout)
    return process.returncode, err


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_bench_keeps_what_it_has(tmp_path: Path, sent: int) -> None:
    path, page = tmp_path / "[b].json", tmp_path / "b.html"
    arguments = [
        "bench",
        *TINY,
        "--repeat",
        "1000000",
        "--seconds",
        "1000000",
        "--no-memory",
        "--dtype",
        "float32",
    ]
    arguments += ["--backends", "reference", "--json", str(path), "--report", str(page)]
    begin: list[float] = []

    def ready() -> bool:  # --json claims its file at the start; some seconds later rounds are under way
        if path.exists() and not begin:
            begin.append(time.monotonic())
        return bool(begin) and time.monotonic() - begin[0] > 4

    code, err = interrupt(arguments, ready, sent=sent)
    assert code == 130
    assert f"interrupted; what was measured is in {path}" in err
    assert "The run was interrupted" in page.read_text(encoding="utf-8")
    assert "Traceback" not in err
    result = load(path)
    assert result["interrupted"] is True
    assert result["rows"][0]["rounds"] >= 1


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_interrupted_training_keeps_the_model(tmp_path: Path) -> None:
    arguments = ["demo", "--parts", "train", "--steps", "1000000", "--context", "128", "--latents", "32"]
    code, err = interrupt([*arguments, "--output", str(tmp_path)], lambda: _age(tmp_path) > 8)
    assert code == 130
    assert "Traceback" not in err
    assert pk.PerceiverAR.load(tmp_path / "model.safetensors").config.max_seq_len == 128
    assert (tmp_path / "training.png").exists()
    points = load(tmp_path / "demo.json")["train"]["points"]
    assert points[0]["held_out_bits"] > 0
    (tmp_path / "model.safetensors").unlink()
    code, err = interrupt([*arguments, "--output", str(tmp_path)], lambda: _age(tmp_path) > 8)
    assert code == 130
    again = load(tmp_path / "demo.json")["train"]["points"]
    assert [point["step"] for point in again] == list(range(len(again)))
    assert again[: len(points)] == points
    assert len(again) > len(points)


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


@pytest.mark.cpu_only("the demo trains there")
def test_demo_trains_and_swaps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "HeldOut", functools.partial(HeldOut, runs=2, windows=2))
    size = ["--context", "256", "--latents", "64", "--steps", "40", "--swap-positions", "128"]
    code, out, err = run(capsys, "demo", "--parts", "train", "swap", *size, "--output", str(tmp_path))
    assert code == 0, err
    assert "zlib -9" in out
    assert "same argmax at 100.00% of positions" in out
    for name in ("training.png", "swap.png", "model.safetensors", "demo.json"):
        assert (tmp_path / name).stat().st_size > 0
    result = load(tmp_path / "demo.json")
    assert result["swap"]["logits"]["relative_error"] < 1e-5
    held = [p["held_out_bits"] for p in result["train"]["points"] if "held_out_bits" in p]
    assert held[-1] < held[0] - 0.3
    assert len(result["train"]["continuation"]["written"]) == 64
