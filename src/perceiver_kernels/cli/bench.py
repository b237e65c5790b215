"""Time every usable backend against torch's own ways to compute the same attention, in one interleaved run.

The peers are torch-eager (matmul, softmax, matmul), torch-sdpa (scaled_dot_product_attention with the
bottom-right mask, in its fastest form) and torch-flex (compiled FlexAttention); on a GPU also flash-attn,
flash-attn-3 and flash-attn-4, where they are installed. A backend is timed only if its results are within
budget first.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import perceiver_kernels as pk
from perceiver_kernels.cli import charts, gpu, measure, page
from perceiver_kernels.cli.machine import caption
from perceiver_kernels.cli.measure import DTYPES, PASSES, Candidate
from perceiver_kernels.cli.report import CommandError, Result, claim, err, progress
from perceiver_kernels.cli.tables import print_tables
from perceiver_kernels.testing.cases import BENCH_CASES, Case
from perceiver_kernels.testing.inputs import Inputs, make_inputs
from perceiver_kernels.testing.peers import GPU_PEERS, PEERS

SHAPE_FLAGS = {
    "batch": ("B", "examples"),
    "heads": ("H", "query heads"),
    "kv_heads": ("Hkv", "key and value heads, a divisor of H"),
    "queries": ("M", "queries (the last M positions)"),
    "keys": ("N", "keys (all N positions)"),
    "dim": ("D", "head dim of queries and keys"),
    "value_dim": ("Dv", "head dim of values"),
}
PRESETS = {case.name: case for case in BENCH_CASES}
# What flags that are not given stand for.
DEFAULTS: dict[str, Any] = {
    "case": ["train"],
    "dtype": ["float32", "bfloat16"],
    "passes": list(PASSES),
    "repeat": 11,
}
QUICK: dict[str, Any] = {"case": ["train", "decode"], "dtype": ["float32"], "passes": ["fwd"], "repeat": 5}


def positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """--case, and a flag for each size."""
    shape = parser.add_argument_group(
        "shape", "named shapes, or one of your own; a flag overrides the named shape's value"
    )
    shape.add_argument(
        "--case", nargs="+", choices=PRESETS, metavar="NAME", help="one or more of: " + ", ".join(PRESETS)
    )
    for flag, (letter, meaning) in SHAPE_FLAGS.items():
        shape.add_argument("--" + flag.replace("_", "-"), type=positive, metavar=letter, help=meaning)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shape, what to run, and how long."""
    add_shape_arguments(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="unless other flags say otherwise: train and decode in float32, forward, this package's kernels "
        "and torch-sdpa, 5 rounds, no memory (half a minute on 2 cores)",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32 bfloat16")
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, help="default: both")
    parser.add_argument(
        "--backends", nargs="+", metavar="NAME", help="backends and peers; default: all that can run here"
    )
    parser.add_argument("--repeat", type=positive, help="interleaved rounds (default 11)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="start no new round after this long (default 60)"
    )
    parser.add_argument("--device", choices=gpu.DEVICES, default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=positive, help="torch threads (default: torch's own choice)")
    parser.add_argument(
        "--no-memory", action="store_true", help="skip peak memory, which takes a fresh process each"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a bar chart (PNG)")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write one HTML page with charts, tables and machine"
    )


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """The named cases with the shape flags applied. CommandError for heads that don't divide."""
    given = {
        letter: getattr(args, flag)
        for flag, (letter, _) in SHAPE_FLAGS.items()
        if getattr(args, flag) is not None
    }
    cases = [PRESETS[name] for name in args.case or DEFAULTS["case"]]
    if not given:
        return cases
    if "D" in given:
        given.setdefault("Dv", given["D"])
    if "H" in given:
        given.setdefault("Hkv", given["H"])
    cases = [replace(case, name="custom" if len(cases) == 1 else f"{case.name}*", **given) for case in cases]
    for case in cases:
        if case.H % case.Hkv:
            raise CommandError(f"--kv-heads {case.Hkv} does not divide --heads {case.H}")
    return cases


def chosen_names(args: argparse.Namespace) -> list[str]:
    """Backends and peers to run. CommandError for a name that is unknown or can't run here."""
    if args.backends is not None:
        return gpu.checked_backends(args.backends, args.device, PEERS)
    backends = pk.available_backends(gpu.checked_device(args.device))
    usable = [name for name, reason in backends.items() if reason is None]
    if args.quick:
        ours = [name for name in usable if name not in ("sdpa", "reference")] or usable
        return [*ours, "torch-sdpa"]
    return usable + [name for name in PEERS if args.device != "cpu" or name not in GPU_PEERS]


def shape_text(case: Case) -> str:
    """B1 H8 M1024 N16384 D64, with Hkv and Dv where they differ."""
    heads = f"H{case.H}" if case.Hkv == case.H else f"H{case.H}/{case.Hkv}"
    dims = f"D{case.D}" if case.Dv == case.D else f"D{case.D}/{case.Dv}"
    return f"B{case.B} {heads} M{case.M} N{case.N} {dims}"


class Problem:
    """One shape, dtype and pass: its inputs, its candidates and the rows that come out."""

    def __init__(self, case: Case, dtype: str, direction: str, device: str = "cpu") -> None:
        self.case, self.dtype, self.direction, self.device = case, dtype, direction, device
        self.backward = direction == "fwdbwd"
        self.inputs: Inputs = make_inputs(case, DTYPES[dtype], device, 0)
        self.head = {"case": case.name, "shape": shape_text(case), "dtype": dtype, "pass": direction}
        self.head["device"] = device
        self.candidates: list[Candidate] = []
        self.notes: dict[str, dict[str, Any]] = {}
        # What the machine can do, once in each round: its clock and its shared memory bus drift.
        self.peaks: list[float] = []  # GFLOP/s of multiply-adds alone
        self.reads: list[float] = []  # GB/s of reads alone

    def admit(self, name: str, reference: measure.Reference) -> None:
        """Prepare and check one candidate; a backend over budget, or one that can't run, is left out."""
        kind = "peer" if name in PEERS else "backend"
        note: dict[str, Any] = {**self.head, "candidate": name, "kind": kind}
        self.notes[name] = note
        try:
            candidate = measure.prepare(name, self.inputs, self.backward, reference, self.device)
        except (ValueError, RuntimeError, MemoryError) as error:  # Unsupported is a ValueError
            note["skipped"] = str(error)
            return
        note["way"] = candidate.way
        note |= measure.accuracy(candidate, self.inputs, reference)
        if not note["within_budget"] and kind == "backend":
            note["skipped"] = (
                f"{note['worst_tensor']} is over its error budget: {note['error']:.2g} > {note['budget']:.2g}"
            )
            return
        self.candidates.append(candidate)

    def probe(self) -> None:
        """Sample the limits that rows are compared with."""
        self.peaks += measure.fma_peak(self.dtype, self.device)
        if not self.backward:
            self.reads += measure.read_bandwidth(self.device)

    def rows(self, memory: dict[str, int | None]) -> list[dict[str, Any]]:
        """One row for each candidate, with what has been sampled so far."""
        sampled = {c.name: c for c in self.candidates if c.samples}
        timings = {name: measure.summary(c.samples) for name, c in sampled.items()}
        work = measure.operations(self.inputs, self.backward)
        kv_bytes = sum(x.numel() * x.element_size() for x in (self.inputs.key, self.inputs.value))
        peak = statistics.median(self.peaks) if self.peaks else None
        read = statistics.median(self.reads) if self.reads else None
        rows = []
        for name, note in self.notes.items():
            row = dict(note)
            if name in timings:
                timing = timings[name]
                rate = work / timing["median_s"] / 1e9
                bandwidth = kv_bytes / timing["median_s"] / 1e9
                base = timings.get("torch-sdpa")
                row |= timing
                row |= {
                    "rounds": len(sampled[name].samples),
                    "calls_per_sample": sampled[name].loops,
                    "gflops": rate,
                    "peak_gflops": peak,
                    "peak_fraction": None if peak is None else rate / peak,
                    "speedup": None if base is None else base["median_s"] / timing["median_s"],
                    "kv_gb_per_s": None if self.backward else bandwidth,
                    "read_gb_per_s": read,
                    "bandwidth_fraction": None if read is None else bandwidth / read,
                    "peak_extra_bytes": memory.get(name),
                    "launch_s": sampled[name].launch_s,
                }
            rows.append(row)
        return rows


def measure_problem(
    problem: Problem, names: list[str], result: Result, *, repeat: int, limit: float, weighed: bool
) -> None:
    """Check, time and weigh one problem; its rows enter `result` however far it gets.

    At most `repeat` rounds, none started after `limit` seconds; `weighed`: measure peak memory, too.
    """
    reference = measure.sample_reference(problem.inputs, problem.backward)
    label = f"{problem.case.name} {problem.dtype} {problem.direction}"
    memory: dict[str, int | None] = {}
    earlier = list(result["rows"])
    try:
        with progress() as bar:
            task = bar.add_task(f"{label}: warm-up and check", total=len(names))
            for name in names:
                bar.update(task, description=f"{label}: warm-up and check of {name}")
                problem.admit(name, reference)
                bar.advance(task)
            bar.reset(task, total=repeat * len(problem.candidates), description=f"{label}: timing")
            for i, _ in enumerate(measure.rounds(problem.candidates, repeat, limit)):
                if (i + 1) % len(problem.candidates) == 0:
                    problem.probe()
                bar.advance(task)
            if weighed:
                bar.reset(task, total=len(problem.candidates), description=f"{label}: memory")
                for candidate in problem.candidates:
                    memory[candidate.name] = weigh(problem, candidate)
                    bar.advance(task)
    finally:
        result["rows"] = earlier + problem.rows(memory)


def weigh(problem: Problem, candidate: Candidate) -> int | None:
    """The candidate's peak extra memory; why not, in its note."""
    try:
        return measure.weigh(
            problem.case, problem.dtype, problem.backward, candidate.name, candidate.way, problem.device
        )
    except Exception as error:  # triton's errors share no base with torch's
        problem.notes[candidate.name]["memory_error"] = str(error)
        return None


def run(args: argparse.Namespace, result: Result) -> int:
    """Measure every chosen problem. Returns 1 if a backend was left out for its errors, else 0."""
    for flag, value in (QUICK if args.quick else DEFAULTS).items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.threads:
        torch.set_num_threads(args.threads)
    cases, names = chosen_cases(args), chosen_names(args)
    if args.plot:
        charts.canvas(1, 1, (1, 1))  # a missing matplotlib should show before minutes of measuring
    for flag in ("plot", "report"):
        if path := getattr(args, flag):
            claim(f"--{flag}", path)
    result["machine"]["threads"] = torch.get_num_threads()
    result["device"] = args.device
    problems = [(c, d, p) for c in cases for d in args.dtype for p in args.passes]
    measure_all(
        problems,
        names,
        result,
        repeat=args.repeat,
        limit=args.seconds,
        weighed=not (args.no_memory or args.quick),
        plot=args.plot,
        report=args.report,
        device=args.device,
    )
    return 0


def measure_all(
    problems: list[tuple[Case, str, str]],
    names: list[str],
    result: Result,
    *,
    plot: Path | None = None,
    report: Path | None = None,
    device: str = "cpu",
    **options: Any,
) -> None:
    """Measure each (case, dtype, pass) into `result`; print, draw, report: what there is, if interrupted."""
    result["rows"] = []
    try:
        for number, (case, dtype, direction) in enumerate(problems, start=1):
            done = len(result["rows"])
            try:
                measure_problem(Problem(case, dtype, direction, device), names, result, **options)
            finally:
                print_tables(result["rows"][done:])
            if not err.is_terminal:  # a log shows no progress bar
                err.print(f"{number} of {len(problems)} done: {case.name} {dtype} {direction}")
    except KeyboardInterrupt:
        result["interrupted"] = True  # for the page to say
        raise
    finally:
        if plot and result["rows"]:
            charts.bench_chart(result["rows"], plot, caption(result))
        if report:
            page.write(result, report)
