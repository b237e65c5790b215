"""How the cpu backend's speed depends on the shape, its time and memory on N, and its time on threads.

    python benchmarks/scaling.py shapes   --json FILE --plot FILE.png    GFLOP/s over M and D: no cliffs
    python benchmarks/scaling.py length   --json FILE --plot FILE.png    time and extra memory over N
    python benchmarks/scaling.py threads  --json FILE                    one (batch, head): one thread and all

An interruption keeps what was measured.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from perceiver_kernels.cli import charts, measure
from perceiver_kernels.cli.machine import caption, provenance
from perceiver_kernels.cli.report import Result, out, progress, write_json
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import make_inputs

QUERIES = (1, 2, 4, 8, 16, 33, 64, 100, 256, 1000, 4096)
DIMS = (32, 40, 64, 80, 96, 128, 192, 256)
LENGTHS = tuple(4096 * 4**i for i in range(5))
Row = dict[str, Any]


def timed(case: Case, dtype: str, direction: str, rounds: int) -> Row:
    """Median seconds and GFLOP/s of the cpu backend."""
    inputs = make_inputs(case, measure.DTYPES[dtype], "cpu", 0)
    backward = direction == "fwdbwd"
    candidate = measure.prepare("cpu", inputs, backward)
    for _ in measure.rounds([candidate], rounds, 2.0):
        pass
    summary = measure.summary(candidate.samples)
    work = measure.operations(inputs, backward)
    head = {"M": case.M, "N": case.N, "D": case.D, "dtype": dtype, "pass": direction}
    return {**head, **summary, "gflops": work / summary["median_s"] / 1e9}


def shapes(args: argparse.Namespace) -> Iterator[Callable[[], Row]]:
    """B1 H8 over every M, D, dtype and pass."""
    for dtype in ("float32", "bfloat16", "float16"):
        for direction in ("fwd",) if dtype == "float16" else measure.PASSES:
            for d in DIMS:
                for m in QUERIES:
                    case = Case("shape", 1, 8, 8, m, args.keys, d, d)
                    yield partial(timed, case, dtype, direction, args.repeat)


def add_trends(rows: list[Row]) -> None:
    """Compare each shape with what its neighbours lead to expect: the better of both trends, along M and D.

    The trend along an axis interpolates between the two neighbours, linearly in log GFLOP/s over log size.
    """
    rate = {(r["dtype"], r["pass"], r["M"], r["D"]): r["gflops"] for r in rows}

    def trend(axis: tuple[int, ...], size: int, at: Callable[[int], float | None]) -> float:
        i = axis.index(size)
        if i in (0, len(axis) - 1):
            return 0.0
        low, high = at(axis[i - 1]), at(axis[i + 1])
        if low is None or high is None:
            return 0.0
        share = math.log(size / axis[i - 1]) / math.log(axis[i + 1] / axis[i - 1])
        return math.exp((1 - share) * math.log(low) + share * math.log(high))

    for r in rows:
        key = (r["dtype"], r["pass"])
        along_m = trend(QUERIES, r["M"], lambda m, key=key, r=r: rate.get((*key, m, r["D"])))
        along_d = trend(DIMS, r["D"], lambda d, key=key, r=r: rate.get((*key, r["M"], d)))
        best = max(along_m, along_d)
        r["of_trend"] = r["gflops"] / best if best else None


def report_shapes(result: Result, plot: Path | None) -> None:
    """The lowest share of the trend for each dtype and pass, and one panel of curves for each."""
    rows = result["rows"]
    add_trends(rows)
    panels = by_kind(rows)
    for panel, group in panels.items():
        inner = [r for r in group if r["of_trend"]]
        if inner:
            low = min(inner, key=lambda r: r["of_trend"])
            out.print(f"{panel}: lowest {low['of_trend']:.2f} of the trend at M={low['M']} D={low['D']}")
    pairs = {(r["M"], r["D"], r["dtype"]): r["gflops"] for r in rows if r["pass"] == "fwd"}
    ratios = [
        (rate / pairs[m, d, "float32"], m, d)
        for (m, d, dtype), rate in pairs.items()
        if dtype == "float16" and (m, d, "float32") in pairs
    ]
    if ratios:
        middle = statistics.median(ratio for ratio, _, _ in ratios)
        out.print(f"float16 over float32, forward: median {middle:.2f}, lowest {min(ratios)}")
    if plot and rows:
        figure, axes = charts.canvas(2, -(-len(panels) // 2), (11, 3.3 * -(-len(panels) // 2)))
        for axis, ((dtype, direction), group) in zip(axes, panels.items(), strict=False):
            for i, d in enumerate(DIMS):
                line = [r for r in group if r["D"] == d]
                shade = (0.75 - 0.6 * i / len(DIMS), 0.85 - 0.5 * i / len(DIMS), 0.95 - 0.25 * i / len(DIMS))
                axis.plot(
                    [r["M"] for r in line], [r["gflops"] for r in line], ".-", color=shade, label=f"D{d}"
                )
            if result["peak_gflops"].get(dtype):
                axis.axhline(result["peak_gflops"][dtype], color=charts.INK, linestyle=":", linewidth=1)
            axis.set_xscale("log")
            axis.set_xticks(QUERIES, [str(m) for m in QUERIES], size=7)
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            axis.set_title(f"{dtype}, {direction}: GFLOP/s over M (dotted: FMA peak)", size=9, loc="left")
        axes[0].legend(frameon=False, fontsize=7, ncols=2)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        charts.save(figure, plot, caption(result))


def outputs_bytes(case: Case, dtype: str, backward: bool) -> int:
    """Size of out and lse, and with the backward of dq, dk and dv: memory that belongs to the result."""
    size = measure.DTYPES[dtype].itemsize
    queries, keys = case.B * case.H * case.M * case.D, 2 * case.B * case.Hkv * case.N * case.D
    return size * (queries + backward * (queries + keys)) + 4 * case.B * case.H * case.M


def timed_and_weighed(case: Case, dtype: str, direction: str, rounds: int) -> Row:
    """The same with peak memory beyond the outputs."""
    row = timed(case, dtype, direction, rounds)
    backward = direction == "fwdbwd"
    peak = measure.weigh(case, dtype, backward, "cpu")
    if peak is not None:
        row["extra_bytes"] = peak - outputs_bytes(case, dtype, backward)
    return row


def length(args: argparse.Namespace) -> Iterator[Callable[[], Row]]:
    """B1 H8 M256 D64 over N: time for each visible pair, and peak memory beyond the outputs."""
    for dtype in ("float32", "bfloat16"):
        for direction in measure.PASSES:
            for n in LENGTHS:
                case = Case("length", 1, 8, 8, 256, n, 64, 64)
                yield partial(timed_and_weighed, case, dtype, direction, args.repeat)


def by_kind(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows of each (dtype, pass), in the order in which they were measured."""
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row["dtype"], row["pass"]), []).append(row)
    return kinds


def report_length(result: Result, plot: Path | None) -> None:
    """GFLOP/s and extra memory over N; linear time is a flat line."""
    rows = result["rows"]
    kinds = by_kind(rows)
    for kind, group in kinds.items():
        rates = [r["gflops"] for r in group]
        memory = max((r["extra_bytes"] for r in group if "extra_bytes" in r), default=0)
        listed = ", ".join(f"{rate:.0f}" for rate in rates)
        out.print(
            f"{kind}: {listed} GFLOP/s, fastest / slowest {max(rates) / min(rates):.2f}, "
            f"at most {memory / 2**20:.1f} MiB extra"
        )
    if plot and rows:
        figure, (speed, extra) = charts.canvas(2, 1, (10, 3.6))
        for kind, group in kinds.items():
            style = {"float32": "-", "bfloat16": "--"}[kind[0]]
            color = {"fwd": charts.OURS, "fwdbwd": "#d6604d"}[kind[1]]
            label = f"{kind[0]} {kind[1]}"
            speed.plot(
                [r["N"] for r in group], [r["gflops"] for r in group], "o" + style, color=color, label=label
            )
            weighed = [r for r in group if "extra_bytes" in r]
            extra.plot(
                [r["N"] for r in weighed],
                [r["extra_bytes"] / 2**20 for r in weighed],
                "o" + style,
                color=color,
            )
        for axis, title in (
            (speed, "GFLOP/s over N"),
            (extra, "peak memory beyond the outputs, MiB, over N"),
        ):
            axis.set_xscale("log", base=2)
            axis.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS], size=7)
            axis.set_ylim(bottom=0)
            axis.set_title(title, size=9, loc="left")
        extra.axhline(64, color=charts.INK, linestyle=":", linewidth=1)
        speed.legend(frameon=False, fontsize=8, loc="lower right")
        charts.save(figure, plot, caption(result))


def timed_on_threads(dtype: str, direction: str, rounds: int) -> Row:
    """B1 H1 M256 N131072 D64 with one thread and with all, in turns."""
    everyone = torch.get_num_threads()
    inputs = make_inputs(Case("threads", 1, 1, 1, 256, 131072, 64, 64), measure.DTYPES[dtype], "cpu", 0)
    candidate = measure.prepare("cpu", inputs, direction == "fwdbwd")
    samples: dict[int, list[float]] = {1: [], everyone: []}
    try:
        for _ in range(rounds):
            for count, seconds in samples.items():
                torch.set_num_threads(count)
                seconds.append(measure.clock(candidate.call, candidate.loops))
    finally:
        torch.set_num_threads(everyone)
    medians = {count: statistics.median(seconds) for count, seconds in samples.items()}
    return {
        "dtype": dtype,
        "pass": direction,
        "threads": everyone,
        "one_thread_s": medians[1],
        "all_threads_s": medians[everyone],
        "speedup": medians[1] / medians[everyone],
    }


def threads(args: argparse.Namespace) -> Iterator[Callable[[], Row]]:
    """One (batch, head) in each dtype and pass."""
    for dtype in ("float32", "bfloat16"):
        for direction in measure.PASSES:
            yield partial(timed_on_threads, dtype, direction, args.repeat)


def report_threads(result: Result, plot: Path | None) -> None:
    """One line for each dtype and pass."""
    for r in result["rows"]:
        out.print(f"{r['dtype']} {r['pass']}: {r['threads']} threads are {r['speedup']:.2f}x one")


STUDIES = {
    "shapes": (shapes, report_shapes),
    "length": (length, report_length),
    "threads": (threads, report_threads),
}


def main() -> None:
    """Run one study; write and print what was measured, however far it gets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--keys", type=int, default=8192, help="N of the shapes study (default 8192)")
    parser.add_argument("--repeat", type=int, default=7, help="samples for each shape (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    jobs, report = STUDIES[args.study]
    result: Result = {
        **provenance(),
        "command": shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]]),
    }
    if args.plot:
        charts.canvas(1, 1, (1, 1))  # a missing matplotlib should show before minutes of measuring
    result["peak_gflops"] = {
        dtype: next(iter(measure.fma_peak(dtype)), None) for dtype in ("float32", "bfloat16", "float16")
    }
    result["rows"] = []
    todo = list(jobs(args))
    try:
        with progress() as bar:
            task = bar.add_task(args.study, total=len(todo))
            for job in todo:
                result["rows"].append(job())
                bar.advance(task)
    except KeyboardInterrupt:
        result["interrupted"] = True
    finally:
        report(result, args.plot)
        if args.json:
            write_json(args.json, result)


if __name__ == "__main__":
    main()
