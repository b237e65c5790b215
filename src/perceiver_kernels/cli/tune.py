"""Time the usable backends on your device and shapes, and remember which is fastest: backend=None follows.

A choice holds for calls of the same dtype, head dims and pass whose other sizes lie between the same powers
of two, on the same processor. It is kept in ~/.cache/perceiver_kernels, or in PERCEIVER_KERNELS_CACHE.
A backend is timed only if its results are within budget first.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rich.markup import escape

import perceiver_kernels as pk
from perceiver_kernels import tuned
from perceiver_kernels.cli import bench, gpu
from perceiver_kernels.cli.measure import DTYPES, PASSES
from perceiver_kernels.cli.report import CommandError, Result, out, seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shape, as for `bench`, and what to time."""
    bench.add_shape_arguments(parser)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="default: bfloat16")
    parser.add_argument(
        "--pass", dest="passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: both"
    )
    parser.add_argument("--repeat", type=bench.positive, default=11, help="interleaved rounds (default 11)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="start no new round after this long (default 20)"
    )
    parser.add_argument("--device", choices=gpu.DEVICES, help="default: cuda where there is a GPU, else cpu")


def run(args: argparse.Namespace, result: Result) -> int:
    """Measure, print, remember: what was measured so far, if interrupted."""
    device = gpu.checked_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    usable = [name for name, reason in pk.available_backends(device).items() if reason is None]
    names = [name for name in usable if name != "reference"]
    problems = [(c, d, p) for c in bench.chosen_cases(args) for d in args.dtype for p in args.passes]
    result |= {"device": device, "rows": [], "choices": []}
    choices = []
    try:
        for case, dtype, direction in problems:
            problem = bench.Problem(case, dtype, direction, device)
            bench.measure_problem(
                problem, names, result, repeat=args.repeat, limit=args.seconds, weighed=False
            )
            times = {each.name: statistics.median(each.samples) for each in problem.candidates}
            if not times:
                out.print(f"[yellow]{case.name} {dtype} {direction}: no backend serves it[/]")
                continue
            best = min(times, key=lambda name: times[name])
            tensors = (problem.inputs.query, problem.inputs.key, problem.inputs.value)
            choices.append(tuned.kind(*tensors, problem.backward, best))
            others = ", ".join(
                f"backend {name}: {seconds(time)}" for name, time in times.items() if name != best
            )
            line = f"{bench.shape_text(case)} {dtype} {direction}: [bold]{best}[/] {seconds(times[best])}"
            out.print(line + (f" ({others})" if others else ""))
            result["choices"].append({"case": case.name, "dtype": dtype, "pass": direction, "backend": best})
    finally:
        if choices:
            name = tuned.processor(tensors[0].device)
            try:
                path = tuned.remember(name, choices)
            except OSError as error:
                raise CommandError(f"the choices can't be remembered: {error}") from error
            out.print(f"Remembered for {escape(name)} in {escape(str(path))}")
    return 0
