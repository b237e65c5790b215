"""All that a machine with a GPU can tell about this package, in one go and into one file.

In order: doctor, the whole test suite on the GPU, compute-sanitizer over a small verify run, and benchmarks
against torch's attention and flash-attn. Each step is a command in a process of its own, so that what breaks
one leaves the others alone; what can't run is recorded as missing. Everything goes to gpu-check.json and
gpu-check.png in the output folder. Exit code 0: nothing failed; 1: something did; 2: there is no usable GPU.
Ctrl-C, or SIGTERM, keeps what was measured so far.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

import perceiver_kernels as pk
from perceiver_kernels.cli import charts, gpu
from perceiver_kernels.cli.machine import PACKAGE, caption
from perceiver_kernels.cli.report import CommandError, Result, out, write_json
from perceiver_kernels.cli.steps import Step, run_step
from perceiver_kernels.testing.cases import BENCH_CASES
from perceiver_kernels.testing.peers import GPU_PEERS

PARTS = ("doctor", "tests", "sanitizer", "bench")
NO_GPU = 2
TORCHS_OWN = ("sdpa", "reference")  # backends that are no kernels of this package
PEERS = ("torch-sdpa", "torch-flex", *GPU_PEERS)
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZED = ("ragged", "decode_long", "more_queries_than_keys", "grouped_heads", "dead_example",
             "offset_per_example_masked", "softcap", "dropout", "packed")  # fmt: skip
KERNELS = "attention|combine_splits|pack_rows|reduce_slabs"  # this package's alone, by their names
QUICK_CASES = ("train", "train_128", "grouped", "decode")
COLORS = {
    "passed": "green",
    "failed": "red",
    "timed out": "red",
    "interrupted": "yellow",
    "missing": "yellow",
}
CLI = [sys.executable, "-m", "perceiver_kernels"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where results go and which parts to run."""
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-check-output"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all four")
    parser.add_argument(
        "--quick", action="store_true", help="no slow tests, four shapes in bfloat16, fewer rounds"
    )
    parser.add_argument(
        "--device", choices=gpu.DEVICES, default="cuda", help="cpu rehearses the check without a GPU"
    )


def run(args: argparse.Namespace, result: Result) -> int:
    """Say what is missing, run the steps, write JSON and chart. Returns 0, 1 or 2."""
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output can't make {args.output}: {error.strerror}") from error
    path = args.output / "gpu-check.json"
    found = inventory(args.device)
    result |= {"device": args.device, "inventory": found, "steps": [], "rows": [], "verdict": "interrupted"}
    try:
        print_inventory(found)
        if not all(item["found"] for item in found if item["needed"]):
            result["verdict"] = "no usable GPU"
            return NO_GPU
        for step in steps(args):
            out.print(f"[bold]{step.name}[/]")
            try:
                outcome = run_step(step, args.output / f"{step.name.replace(' ', '-')}.log")
            except KeyboardInterrupt as interruption:
                conclude(step, interruption.args[0], result)
                result["interrupted"] = True
                raise
            conclude(step, outcome, result)
            write_json(path, result)
        bad = any(step["status"] in ("failed", "timed out") for step in result["steps"])
        result["verdict"] = "failed" if bad else "passed"
        return int(bad)
    finally:
        write_json(path, result)  # first of all: drawing can break
        draw(result, args.output / "gpu-check.png")
        write_json(path, result)
        print_summary(result)
        out.print(f"Verdict: {result['verdict']}. All of it is in {escape(str(path))}", soft_wrap=True)


def ours(device: str) -> list[str]:
    """This package's own kernels that can run on `device`."""
    backends = pk.available_backends(device)
    return [name for name, reason in backends.items() if reason is None and name not in TORCHS_OWN]


def inventory(device: str) -> list[dict[str, Any]]:
    """What the check uses: name, found, needed (without it there is nothing to check), and what to do."""
    items: list[tuple[str, str | None, bool]] = []
    if device != "cpu":
        items.append(("a GPU", gpu.why_not(), True))
        items.append(
            ("a GPU driver", None if gpu.driver() else "neither NVIDIA's nor AMD's is loaded", False)
        )
    for name, reason in pk.available_backends(device).items():
        if name not in TORCHS_OWN and (name == "cpu") == (device == "cpu"):
            items.append((f"backend {name}", reason, device == "cpu"))
    tool = None if sanitizer() else "not on PATH; it comes with the CUDA toolkit, in its bin folder"
    items.append(("compute-sanitizer", tool, False))
    items.append(("the tests", no_tests(), False))
    for module, purpose in (
        ("flash_attn", "flash-attn"),
        ("flash_attn_interface", "flash-attn-3"),
        ("flash_attn.cute", "flash-attn-4"),
        ("matplotlib", "the chart"),
    ):
        missing = None if installed(module) else f"not installed; it is needed for {purpose}"
        items.append((module, missing, False))
    return [
        {"name": name, "found": reason is None, "needed": needed, "reason": reason}
        for name, reason, needed in items
    ]


def installed(module: str) -> bool:
    """Whether a module is there, without running it; a submodule's package is run."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def sanitizer() -> str | None:
    """compute-sanitizer, on PATH or where the CUDA toolkit usually is."""
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


def no_tests() -> str | None:
    """None where the tests can run, else why they can't."""
    if not (PACKAGE.parents[1] / "tests" / "conftest.py").exists():
        return "they are in the repository: install from a checkout with `pip install -e .[dev]`"
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed: `pip install -e .[dev]`"
    return None


def steps(args: argparse.Namespace) -> Iterator[Step]:
    """The check's commands, in order."""
    device, folder, names = args.device, args.output, ours(args.device)
    if "doctor" in args.parts:
        report = folder / "doctor.json"
        yield Step("doctor", [*CLI, "doctor", "--device", device, "--json", str(report)], report, 300)
    if "tests" in args.parts:
        report = folder / "tests.xml"
        command = [sys.executable, "-m", "pytest", str(PACKAGE.parents[1] / "tests"), "--device", device]
        command += [f"--junitxml={report}", "--quiet", *(["-m", "not slow"] if args.quick else [])]
        yield Step("tests", command, report, 7200, missing=no_tests())
    nothing = None if names else f"none of this package's kernels can run on {device}"
    if "sanitizer" in args.parts:
        tool = sanitizer()
        missing = nothing or (None if tool else "compute-sanitizer is not there")
        for check in SANITIZERS:
            command = [tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "99"]
            command += [
                "--report-api-errors",
                "no",
                "--target-processes",
                "all",
                "--kernel-regex",
                f"kns={KERNELS}",
            ]
            command += [*CLI, "verify", "--device", device, "--backends", *names, "--case", *SANITIZED]
            command += ["--dtype", "float32", "bfloat16"]
            # Without torch's cache each tensor is an allocation of its own, so that reading past one shows.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            yield Step(f"sanitizer {check}", command, None, 3600, alone, missing)
    if "bench" in args.parts:
        for case in BENCH_CASES:
            if args.quick and case.name not in QUICK_CASES:
                continue
            report = folder / f"bench-{case.name}.json"
            command = [*CLI, "bench", "--device", device, "--case", case.name, "--backends", *names, *PEERS]
            command += ["--dtype", "bfloat16", *([] if args.quick else ["float16"]), "--json", str(report)]
            command += ["--pass", "fwd", *(["fwdbwd"] if case.M > 1 else [])]
            command += ["--repeat", "5" if args.quick else "21", "--seconds", "20"]
            yield Step(f"bench {case.name}", command, report, 1800, missing=nothing)


def conclude(step: Step, outcome: dict[str, Any], result: Result) -> None:
    """Read what the step wrote, judge it, and keep it."""
    part = step.name.split()[0]
    if step.report is not None and step.report.exists() and step.report.stat().st_size:
        try:
            READERS[part](step.report, outcome, result)
        except (ValueError, KeyError, ET.ParseError) as error:  # cut off, most likely
            outcome.setdefault("reason", f"{step.report.name} can't be read: {error}")
            if outcome["status"] == "passed":
                outcome["status"] = "failed"
    result["steps"].append(outcome)
    took = f" in {outcome['seconds']:.0f} s" if "seconds" in outcome else ""
    color, reason = COLORS[outcome["status"]], escape(outcome.get("reason", ""))
    out.print(f"  [{color}]{outcome['status']}[/]{took} {reason}", soft_wrap=True)


def read_doctor(report: Path, outcome: dict[str, Any], result: Result) -> None:
    """Which backends run, and the advice."""
    outcome |= {key: json.loads(report.read_text())[key] for key in ("backends", "advice")}


def read_tests(report: Path, outcome: dict[str, Any], result: Result) -> None:
    """How many tests passed, failed and were skipped, and which failed, with the first line of why."""
    cases = ET.parse(report).getroot().findall(".//testcase")
    failures = {}
    for case in cases:
        for trouble in (*case.findall("failure"), *case.findall("error")):
            first_line = (trouble.get("message") or trouble.text or "").strip().partition("\n")[0]
            failures[f"{case.get('classname')}::{case.get('name')}"] = first_line[:300]
    skipped = sum(case.find("skipped") is not None for case in cases)
    outcome["tests"] = {
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
    }
    if failures and outcome["status"] == "failed":
        outcome["reason"] = f"{len(failures)} of {len(cases)} tests failed, the first: {next(iter(failures))}"


def read_bench(report: Path, outcome: dict[str, Any], result: Result) -> None:
    """The rows; a step in which one of this package's kernels was left out has failed."""
    rows = json.loads(report.read_text())["rows"]
    result["rows"] += rows
    outcome["rows"] = len(rows)
    left_out = [row for row in rows if row["kind"] == "backend" and "skipped" in row]
    if left_out and outcome["status"] == "passed":
        row = left_out[0]
        outcome["status"] = "failed"
        outcome["reason"] = f"{row['candidate']} {row['dtype']} {row['pass']}: {row['skipped']}"


READERS = {"doctor": read_doctor, "tests": read_tests, "bench": read_bench}


def draw(result: Result, path: Path) -> None:
    """The chart of all rows; without matplotlib, or rows, a word in the result instead."""
    if not result["rows"]:
        return
    try:
        charts.overview_chart(result["rows"], path, caption(result))
    except CommandError as error:
        result["chart"] = str(error)


def print_inventory(found: list[dict[str, Any]]) -> None:
    """One line for everything that the check uses."""
    for item in found:
        if item["found"]:
            out.print(f"[green]found[/]    {item['name']}")
        else:
            color = "red" if item["needed"] else "yellow"
            out.print(f"[{color}]missing[/]  {item['name']}: {escape(item['reason'])}", soft_wrap=True)


def print_summary(result: Result) -> None:
    """A row for each step."""
    if not result["steps"]:
        return
    table = Table(title="GPU check", title_justify="left")
    for column in ("step", "status", "seconds", "figures or reason"):
        table.add_column(column, overflow="fold")
    for step in result["steps"]:
        tests = step.get("tests")
        figures = (
            f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped" if tests else ""
        )
        figures = step.get("reason") or figures or (f"{step['rows']} rows" if "rows" in step else "")
        color = COLORS[step["status"]]
        table.add_row(
            step["name"], f"[{color}]{step['status']}[/]", str(step.get("seconds", "")), escape(figures)
        )
    out.print(table)
    for row in result["rows"]:
        if "median_s" in row and row.get("speedup") is not None and row["kind"] == "backend":
            unit, scale, _ = charts.units(row)
            where = f"{row['case']} {row['dtype']} {row['pass']}"
            out.print(
                f"{where}: {row['candidate']} {row['gflops'] * scale:,.1f} {unit}, {row['speedup']:.2f}x SDPA"
            )
