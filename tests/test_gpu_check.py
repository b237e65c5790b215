"""gpu-check: what it says is missing, its flow over pretended steps, what an interruption leaves."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEVICE
from test_cli import TINY, _consoles, run  # noqa: F401  (the fixture applies here, too)

import perceiver_kernels as pk
from perceiver_kernels.cli import bench, charts, gpu, gpu_check, measure, parser, steps
from perceiver_kernels.cli.steps import Step, run_step
from perceiver_kernels.testing import peers
from perceiver_kernels.testing.cases import BENCH_CASES, Case
from perceiver_kernels.testing.inputs import make_inputs

CARD = {"name": "NVIDIA H200", "arch": "sm_90", "sms": 132, "memory_gb": 139.8, "l2_mb": 50.0,
        "driver": "570.1", "runtime": "CUDA 12.9"}  # fmt: skip
JUNIT = """<testsuites><testsuite><testcase classname="tests.test_a" name="test_good"/>
<testcase classname="tests.test_a" name="test_skipped"><skipped message="no"/></testcase>
<testcase classname="tests.test_a" name="test_bad"><failure message="assert 1 == 2&#10;more"/></testcase>
</testsuite></testsuites>"""


def rows(
    case: str, dtype: str = "bfloat16", direction: str = "fwd", rate: float = 4e5
) -> list[dict[str, Any]]:
    """What bench writes for one problem on a GPU: one backend and one peer."""
    shape = f"B1 H8 M{1 if case == 'decode' else 1024} N16384 D64"
    head = {"case": case, "shape": shape, "dtype": dtype, "pass": direction, "device": "cuda"}
    timing = {"median_s": 1e-4, "q1_s": 9e-5, "q3_s": 2e-4, "peak_gflops": 7e5, "read_gb_per_s": 4e3}
    timing["kv_gb_per_s"] = 3e3
    return [
        {**head, "candidate": "triton", "kind": "backend", **timing, "gflops": rate, "speedup": 2.0},
        {**head, "candidate": "torch-sdpa", "kind": "peer", **timing, "gflops": rate / 2, "speedup": 1.0},
        {**head, "candidate": "flash-attn", "kind": "peer", "skipped": "not installed"},
    ]


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package pretends to lie in a checkout, also where the tests run against an installed copy."""
    (tmp_path / "checkout" / "tests").mkdir(parents=True)
    (tmp_path / "checkout" / "tests" / "conftest.py").touch()
    monkeypatch.setattr(gpu_check, "PACKAGE", tmp_path / "checkout" / "src" / "perceiver_kernels")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with a GPU whose steps write what `reports` holds and end with the code in `codes`."""
    world: dict[str, Any] = {
        "reports": {"doctor": '{"backends": {}, "advice": []}', "tests": JUNIT},
        "codes": {},
    }
    for case in BENCH_CASES:
        world["reports"][f"bench {case.name}"] = json.dumps({"rows": rows(case.name)})

    def execute(step: Step, log: Path) -> int | None:
        log.write_text("printed by " + step.name)
        if step.report is not None:
            step.report.write_text(world["reports"][step.name])
        code = world["codes"].get(step.name, 0)
        if code == "Ctrl-C":
            raise KeyboardInterrupt
        if code == "SIGTERM":
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)  # `timeout` sends it twice
        return code

    monkeypatch.setattr(steps, "execute", execute)
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "facts", lambda: CARD)
    monkeypatch.setattr(gpu_check, "ours", lambda device: ["triton"])
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: "/cuda/bin/compute-sanitizer")
    return world


def checked(
    capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str
) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what was printed, and the JSON."""
    code, out, _ = run(capsys, "gpu-check", "--output", str(folder), *arguments)
    result: dict[str, Any] = json.loads((folder / "gpu-check.json").read_text())
    assert {"machine", "commit", "date", "command", "inventory", "verdict"} <= result.keys()
    return code, out, result


def test_without_a_gpu_it_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "why_not", lambda: "torch 9 is built without CUDA and ROCm")
    monkeypatch.setattr(gpu, "driver", lambda: None)
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    code, out, result = checked(capsys, tmp_path / "new")
    assert code == 2
    for line in (
        "missing  a GPU: torch 9 is built without CUDA and ROCm",
        "missing  a GPU driver: neither NVIDIA's nor AMD's is loaded",
        "missing  compute-sanitizer: not on PATH",
        "missing  flash_attn: not installed",
        "missing  the tests: pytest is not installed",
    ):
        assert line in out
    assert result["verdict"] == "no usable GPU"
    assert [item["name"] for item in result["inventory"] if item["needed"]] == ["a GPU"]
    assert result["steps"] == result["rows"] == []
    assert not (tmp_path / "new" / "gpu-check.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_every_command_says_why_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    reason = gpu.why_not()
    assert reason is not None
    for command in ("doctor", "verify", "bench"):
        code, _, err = run(capsys, command, "--device", "cuda")
        assert code == 2
        assert f"--device cuda: {reason}" in err


@pytest.mark.usefixtures("pretended")
def test_all_is_well(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, result = checked(capsys, tmp_path)
    assert code == 0
    names = [step["name"] for step in result["steps"]]
    sanitized = [f"sanitizer {check}" for check in ("memcheck", "racecheck", "synccheck", "initcheck")]
    assert names == ["doctor", "tests", *sanitized, *(f"bench {case.name}" for case in BENCH_CASES)]
    assert {step["status"] for step in result["steps"]} == {"passed"}
    assert result["steps"][1]["tests"] == {
        "passed": 1, "failed": 1, "skipped": 1, "failures": {"tests.test_a::test_bad": "assert 1 == 2"},
    }  # fmt: skip
    assert len(result["rows"]) == 3 * len(BENCH_CASES)
    assert result["machine"]["gpu"] == CARD
    assert "train bfloat16 fwd: triton 400.0 TFLOP/s, 2.00x SDPA" in out
    assert (tmp_path / "gpu-check.png").read_bytes().startswith(b"\x89PNG")


def test_failures_are_recorded_and_the_rest_runs(
    pretended: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    left_out = rows("train")
    left_out[0] = {**left_out[0], "skipped": "out is over its error budget"}
    pretended["reports"]["bench train"] = json.dumps({"rows": left_out})
    pretended["reports"]["bench square"] = '{"rows": [{"case"'
    pretended["codes"] = {"tests": 1, "sanitizer racecheck": 99, "bench long": None}
    code, out, result = checked(capsys, tmp_path)
    assert code == 1
    bad = {step["name"]: (step["status"], step["reason"]) for step in result["steps"] if "reason" in step}
    assert bad["tests"] == ("failed", "1 of 3 tests failed, the first: tests.test_a::test_bad")
    assert bad["sanitizer racecheck"] == ("failed", "exit code 99: printed by sanitizer racecheck")
    assert bad["bench train"] == ("failed", "triton bfloat16 fwd: out is over its error budget")
    assert bad["bench long"] == ("timed out", "stopped after 1800 s")
    assert bad["bench square"][0] == "failed"
    assert "bench-square.json can't be read" in bad["bench square"][1]
    assert len(bad) == 5
    assert result["steps"][-1] == {**result["steps"][-1], "name": "bench batch", "status": "passed"}
    assert result["verdict"] == "failed"
    assert "Verdict: failed" in out


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_interrupted_it_keeps_what_it_has(
    how: str, pretended: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pretended["codes"] = {"bench train_128": how}
    code, _, result = checked(capsys, tmp_path)
    assert code == 130
    assert result["verdict"] == "interrupted"
    assert result["interrupted"] is True
    assert [step["status"] for step in result["steps"]] == ["passed"] * 7 + ["interrupted"]
    assert {row["case"] for row in result["rows"]} == {"train", "train_128"}
    assert (tmp_path / "gpu-check.png").exists()


def test_what_cannot_run_is_missing_not_failed(
    pretended: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: None)
    monkeypatch.setattr(gpu_check, "PACKAGE", tmp_path / "somewhere" / "else")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, result = checked(capsys, tmp_path, "--quick", "--parts", "tests", "sanitizer", "bench")
    assert code == 0
    statuses = {step["name"]: step["status"] for step in result["steps"]}
    assert statuses.pop("tests") == "missing"
    assert "install from a checkout" in out
    assert {statuses.pop(f"sanitizer {check}") for check in gpu_check.SANITIZERS} == {"missing"}
    assert statuses == {f"bench {name}": "passed" for name in gpu_check.QUICK_CASES}
    assert "plots need matplotlib" in result["chart"]


@pytest.mark.usefixtures("pretended")
def test_the_command_line_accepts_every_step(tmp_path: Path) -> None:
    for quick in (False, True):
        args = SimpleNamespace(device="cuda", output=tmp_path, parts=gpu_check.PARTS, quick=quick)
        ours = [step.command for step in gpu_check.steps(args) if "perceiver_kernels" in step.command]
        assert len(ours) >= 8
        for command in ours:
            arguments = command[command.index("perceiver_kernels") + 1 :]
            assert parser().parse_args(arguments).device == "cuda"


def test_the_sanitizer_looks_at_every_kernel() -> None:
    pytest.importorskip("triton", reason="the kernels are Triton's")
    from perceiver_kernels.backends.triton import launch

    launched = set(re.findall(r"ward_kernels\.(\w+)", inspect.getsource(launch)))
    assert {"attention_forward", "attention_backward"} <= launched
    assert all(re.fullmatch(f".*({gpu_check.KERNELS}).*", name) for name in launched)


def test_rehearsal_on_the_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, result = checked(capsys, tmp_path, "--device", "cpu", "--parts", "doctor")
    assert code == 0
    assert result["steps"][0]["backends"]["cpu"]["reference"] is None
    assert "Machine" in (tmp_path / "doctor.log").read_text()


# Steps, for real


def python(program: str, **options: Any) -> Step:
    return Step("step", [sys.executable, "-c", program], **options)


def test_a_step_passes_fails_or_runs_out_of_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    fine = run_step(python("print(1)"), log)
    assert (fine["status"], fine["code"], fine["log"]) == ("passed", 0, "log")
    assert fine["command"] == f"{sys.executable} -c 'print(1)'"
    failed = run_step(python("import sys; print('the cause'); sys.exit(3)"), log)
    assert (failed["status"], failed["reason"]) == ("failed", "exit code 3: the cause")
    slow = run_step(python("import time; time.sleep(60)", limit=1.0), log)
    assert (slow["status"], slow["reason"]) == ("timed out", "stopped after 1 s")
    seen = python("import os; print(os.environ['SEEN'])", environment={"SEEN": "here"})
    assert run_step(seen, log)["status"] == "passed"
    assert log.read_text() == "here\n"


def test_an_old_report_does_not_pass_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("old")
    run_step(python("", report=tmp_path / "report"), tmp_path / "log")
    assert not (tmp_path / "report").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_ctrl_c_reaches_the_command_and_waits_for_it(tmp_path: Path) -> None:
    report, log = tmp_path / "report", tmp_path / "log"
    program = f"""
import time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    open({str(report)!r}, "w").write("kept")
"""

    def press() -> None:
        while not log.exists() or "ready" not in log.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # CI may have it ignored
    try:
        threading.Thread(target=press, daemon=True).start()
        with pytest.raises(KeyboardInterrupt) as caught:
            run_step(python(program, report=report), log)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.args[0]["status"] == "interrupted"
    assert report.read_text() == "kept"


# Peers, charts, and what only a GPU can show


def test_flash_attn_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(
        q: Any, k: Any, v: Any, *, causal: bool, softmax_scale: float, num_splits: int = 1
    ) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        mask = seen if causal else None
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(q, k, v, mask, scale=softmax_scale, enable_gqa=True).transpose(1, 2)
        return out, None  # some versions return the lse, too

    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=flash_attn_func))
    for peer in ("flash-attn", "flash-attn-3", "flash-attn-4"):
        for case in (
            Case("", H=4, Hkv=2, M=5, N=20, D=8, Dv=8, scale=0.3),
            Case("", M=5, N=9, is_causal=False),
        ):
            inputs = make_inputs(case, torch.bfloat16)
            want, _ = inputs.attend(inputs.query, inputs.key, inputs.value, "reference")
            ways = measure.ways(peer, inputs, False)
            assert len(ways) == (1 if peer == "flash-attn" else 2)
            for attend in ways.values():
                got = attend(inputs.query, inputs.key, inputs.value)
                torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
        for case in (Case("", q_offset=3), Case("", key_mask="random"), Case("", M=9, N=5)):
            with pytest.raises(measure.Unsupported, match="flash-attn is causal from the bottom right alone"):
                measure.ways(peer, make_inputs(case, torch.bfloat16), False)
        with pytest.raises(measure.Unsupported, match="float16 and bfloat16"):
            measure.ways(peer, make_inputs(Case(""), torch.float32), False)


@pytest.mark.cpu_only("stands in for a GPU; there test_cli.py tries the real ways")
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch explains why a kernel is not for a problem
def test_sdpa_tries_every_kernel_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_has_several_kernels", lambda device: True)
    inputs = make_inputs(Case("", H=4, Hkv=2, M=5, N=20, D=8, Dv=8, scale=0.3), torch.float32)
    want, _ = inputs.attend(inputs.query, inputs.key, inputs.value, "reference")
    right = []
    for way, attend in measure.ways("torch-sdpa", inputs, False).items():
        try:
            got = attend(inputs.query, inputs.key, inputs.value)
        except RuntimeError:  # a CPU has two of the four
            continue
        torch.testing.assert_close(got, want)
        right.append(way)
    assert {"bool mask, math", "float mask, repeated heads, flash_attention"} <= set(right)
    assert any(way.startswith("lower-right bias") for way in right)
    square = make_inputs(Case("", M=7, N=7, q_offset=2), torch.float32)
    assert not any("lower-right" in way for way in measure.ways("torch-sdpa", square, False))


@pytest.mark.cpu_only("stands in for a GPU")
def test_bench_on_a_pretended_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    on_the_cpu = {"cuda": "cpu"}
    for module in (bench, measure):
        monkeypatch.setattr(
            module, "make_inputs", lambda c, dtype, d, seed: make_inputs(c, dtype, on_the_cpu[d])
        )
    available = pk.available_backends
    monkeypatch.setattr(pk, "available_backends", lambda device: available(on_the_cpu[device]))
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "facts", lambda: CARD)
    monkeypatch.setattr(gpu, "clock", measure.clock)
    monkeypatch.setattr(gpu, "launch_time", lambda call: 3e-5)
    monkeypatch.setattr(gpu, "matmul_rate", lambda dtype: 7e5)
    monkeypatch.setattr(gpu, "read_bandwidth", lambda: 4e3)
    monkeypatch.setattr(gpu, "peak_growth", lambda call: call()[0].numel())
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    names = ["--backends", "reference", "torch-sdpa", "flash-attn"]
    code, out, _ = run(capsys, "bench", *TINY, "--device", "cuda", "--dtype", "bfloat16", *names, *files)
    assert code == 0
    assert "launch" in out
    assert "flash-attn is left out" in out
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["device"] == "cuda"
    for row in result["rows"]:
        if row["candidate"] != "flash-attn":
            assert (row["device"], row["launch_s"], row["peak_gflops"]) == ("cuda", 3e-5, 7e5)
            assert row["peak_extra_bytes"] == 2 * 4 * 8  # out alone: H 2, M 4, D 8
    assert (tmp_path / "b.png").stat().st_size > 0


def test_a_way_that_computes_something_else_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Case("", 1, 2, 2, 4, 16, 8, 8), torch.float32)
    reference = measure.sample_reference(inputs, False)

    def ways(*arguments: Any) -> dict[str, Any]:
        def right(q: Any, k: Any, v: Any) -> Any:
            time.sleep(0.01)
            return inputs.attend(q, k, v, "reference")[0]

        return {"wrong": lambda q, k, v: torch.zeros_like(q), "right": right}

    monkeypatch.setattr(measure, "ways", ways)
    device = "cpu" if DEVICE.type == "cpu" else "cuda"
    assert measure.prepare("peer", inputs, False, reference, device).way == "right"
    assert measure.prepare("peer", inputs, False, None, device).way == "wrong"  # the faster one


def test_overview_chart(tmp_path: Path) -> None:
    drawn = [
        row
        for i, case in enumerate(BENCH_CASES)
        for dtype in ("bfloat16", "float16")
        for direction in ("fwd", "fwdbwd")
        if case.M > 1 or direction == "fwd"
        for row in rows(case.name, dtype, direction, 1e5 * (i + 1))
    ]
    charts.overview_chart(drawn, tmp_path / "o.png", "a machine")
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    charts.overview_chart([drawn[2]], tmp_path / "none.png", "a machine")
    assert not (tmp_path / "none.png").exists()
    assert charts.units({"device": "cuda"})[:2] == ("TFLOP/s", 1e-3)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU (--device cuda)")
def test_clock_and_memory_of_a_gpu() -> None:
    a = torch.randn(4096, 4096)
    once, thrice = gpu.clock(lambda: a @ a, 20), gpu.clock(lambda: (a @ a, a @ a, a @ a), 20)
    assert 2.5 < thrice / once < 3.5
    assert gpu.launch_time(lambda: a @ a) < once + 1e-3

    def call() -> torch.Tensor:
        torch.ones(16 * 2**20)  # 64 MiB, freed at once
        return torch.ones(2**20)

    assert 60 * 2**20 < gpu.peak_growth(call) < 80 * 2**20
    assert gpu.matmul_rate(torch.bfloat16) > 1000
    assert gpu.read_bandwidth() > 10
    assert gpu.facts() is not None
