"""Compile every shipped Triton kernel for every supported GPU, without one, and check what can be known.

    python -m benchmarks.static                         all of it (20 minutes on 2 cores)
    python -m benchmarks.static --quick                 two architectures, two head dims
    python -m benchmarks.static --arch sm_90 --json F   one architecture, with every figure in F

Exits with 1 if a kernel doesn't compile, needs more shared memory than there is, or spills registers and
isn't on the list of known spills below. An interruption keeps what was measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shipped import ARCHS, OPTIONS, Build, builds, measure
from perceiver_kernels.cli.machine import cores, provenance
from perceiver_kernels.cli.report import err, progress, write_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """Up to so many spills that stay, and why; with an option or without."""

    kernel: str
    archs: tuple[str, ...]
    dims: tuple[int, ...]
    at_most: int
    reason: str
    with_option: bool = False

    def covers(self, row: Row) -> bool:
        """Whether it excuses a row's spills."""
        same = row["kernel"] == self.kernel and row["arch"] in self.archs and row["dim"] in self.dims
        has_option = row["problem"].endswith(OPTIONS)
        return same and has_option == self.with_option and row["spills"] <= self.at_most


_SMALL = ("sm_86", "sm_89", "sm_120")  # shared memory
_PTXAS = "ptxas gives up two registers for another block per processor"
# Figures are the model's, of the full loop, for the tile and for the best that doesn't spill.
KNOWN_SPILLS: tuple[Known, ...] = (
    Known("attention_backward", ("sm_80",), (32,), 2, "not in the loops; 0.56, with 16 rows 0.40"),
    Known("attention_backward", ("sm_80",), (192,), 32, "not in the loops; 0.36, with 16x32 0.28"),
    Known("attention_backward", ("sm_80",), (256,), 40, "1 in the full loop; 0.42, with 64x32 0.31"),
    Known("attention_backward", ("sm_90",), (192,), 70, "10 in the full loop; 0.36, with 32x32 0.14"),
    Known("attention_backward", ("sm_90",), (256,), 130, "31 in the full loop; 0.38, with 32x32 0.16"),
    Known("reduce_slabs", ("sm_90",), (128,), 2, _PTXAS),
    Known("reduce_slabs", ("sm_90",), (128,), 2, _PTXAS, with_option=True),
    Known("combine_splits", ("sm_90",), (256,), 2, _PTXAS),
    # One tile serves all options.
    Known("attention_forward", ("sm_80",), (64,), 60,
          "0 to 4 in the loops; without options 0.73, with 128x32 0.66", with_option=True),
    Known("attention_forward", ("sm_80",), (128,), 36,
          "not in the loops; without options 0.74, with 64x64 0.65", with_option=True),
    Known("attention_forward", _SMALL, (64, 128), 70,
          "not in the full loop; their number differs between these architectures", with_option=True),
    Known("attention_backward", ("sm_80",), (128,), 110,
          "0 to 22 in the full loop; without options 0.56, with 16 rows 0.46", with_option=True),
    Known("attention_backward", _SMALL, (64, 128), 32, "not in the loops", with_option=True),
    Known("attention_backward", ("sm_90",), (64, 128), 70,
          "0 to 6 in the full loop; without options 0.56, with 32 rows 0.41", with_option=True),
    Known("attention_backward", ("sm_100",), (64, 128), 250, "not in the loops", with_option=True),
)  # fmt: skip
FLASH_ATTENTION_2 = {  # on sm_80 by the same model, from its own cubins: forward and backward, bf16
    ("attention_forward", 64): 0.71,
    ("attention_forward", 128): 0.81,
    ("attention_backward", 64): 0.65,
    ("attention_backward", 128): 0.71,
}


def known_spill(row: Row) -> str | None:
    """Why this kernel may spill as much as it does, None where it may not."""
    return next((known.reason for known in KNOWN_SPILLS if known.covers(row)), None)


def fault(row: Row) -> str | None:
    """What is wrong with a row, None where nothing is."""
    if "error" in row:
        return str(row["error"])
    if row["shared"] > row["limit"]:
        return f"needs {row['shared']} bytes of shared memory, {row['arch']} has {row['limit']}"
    if row["spills"] and not known_spill(row):
        return f"{row['spills']} spills"
    return None


def rival(row: Row) -> float | None:
    """FlashAttention-2's figure for the same problem."""
    plain = row["arch"] == "sm_80" and row["problem"] == f"D{row['dim']} bf16 M1024"
    return FLASH_ATTENTION_2.get((row["kernel"], row["dim"])) if plain else None


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Markdown lines."""
    yield (
        "| GPU | kernel | problem | tile | registers | spills | shared KiB "
        "| full loop: instructions/tensor, spills | edge loop | of tensor peak, full / edge | FA-2 |"
    )
    yield "|---|---|---|---|--:|--:|--:|---|---|---|--:|"
    for row in rows:
        head = f"| {row['arch']} | {row['kernel']} | {row['problem']} | {row['config']} |"
        if "error" in row:
            yield f"{head} {row['error'].splitlines()[0]} | | | | | | |"
            continue
        loops = [row["loops"].get(name) for name in ("full", "edge")]
        work = [
            f"{loop['instructions']}/{loop['tensor']}, {loop['spills']}" if loop else "" for loop in loops
        ]
        shares = [f"{loop['simulated']:.2f}" for loop in loops if loop and loop["simulated"]]
        flash = rival(row)
        spills = f"{row['spills']} (known)" if row["spills"] and known_spill(row) else str(row["spills"])
        yield (
            f"{head} {row['registers']} | {spills} | {row['shared'] / 1024:.0f} of {row['limit'] // 1024} "
            f"| {work[0]} | {work[1]} | {' / '.join(shares)} | {f'{flash:.2f}' if flash else ''} |"
        )


def report(result: dict[str, Any]) -> str:
    """The whole result as Markdown: origin, known spills, table."""
    lines = [
        "# What the Triton kernels compile to\n",
        f"triton {result['triton']}, ptxas {result['ptxas']}, commit {(result['commit'] or '?')[:12]}, "
        f"{result['date'][:10]}, `{result['command']}`; no GPU took part.\n",
        'Spills are instructions on NVIDIA, registers on AMD. "Of tensor peak" is what `benchmarks/sass` '
        "simulates for the two loops of a kernel; FA-2 is FlashAttention-2's full loop by the same model.\n",
    ]
    if KNOWN_SPILLS:
        lines.append("Known spills (each tile that avoids them loses more):\n")
    for known in KNOWN_SPILLS:
        option = ", with an option" if known.with_option else ""
        where = f"{', '.join(known.archs)}, head dim {', '.join(map(str, known.dims))}{option}"
        lines.append(f"- `{known.kernel}`, {where}: up to {known.at_most}; {known.reason}")
    return "\n".join([*lines, "", *table(result["rows"])]) + "\n"


def run(todo: list[Build], jobs: int, rows: list[Row]) -> None:
    """Fill ``rows``, in the order of ``todo``, whatever the order in which the workers finish."""
    context = multiprocessing.get_context("spawn")
    found: dict[Build, list[Row]] = {}
    with progress() as bar, tempfile.TemporaryDirectory(prefix="static-triton-") as cache:
        task = bar.add_task("compile", total=len(todo))
        pool = ProcessPoolExecutor(jobs, context, initializer=_prepare, initargs=(cache,))
        try:
            futures = {pool.submit(measure, build): build for build in todo}
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                bar.advance(task)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            rows += [row for build in todo for row in found.get(build, [])]


def _prepare(cache: str) -> None:
    """In a worker: an empty cache, and Ctrl-C left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TRITON_CACHE_DIR"] = cache


def versions() -> dict[str, str]:
    """Of the compilers."""
    import triton

    tools = (triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell)
    return {"triton": triton.__version__, "ptxas": ", ".join(sorted({tool.version for tool in tools}))}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--arch", nargs="+", choices=ARCHS, metavar="ARCH", help=f"default: {' '.join(ARCHS)}"
    )
    parser.add_argument("--quick", action="store_true", help="sm_80 and gfx942, head dims 64 and 128, bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("kernels can't be compiled under TRITON_INTERPRET=1")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's own wish where the option is given
    archs = tuple(options.arch or (("sm_80", "gfx942") if options.quick else ARCHS))
    rows: list[Row] = []
    origin = {key: value for key, value in provenance().items() if key != "machine"}
    command = shlex.join(
        ["python", "-m", "benchmarks.static", *(sys.argv[1:] if arguments is None else arguments)]
    )
    result = {**origin, "command": command, **versions(), "rows": rows}
    interrupted = False
    try:
        run(list(builds(archs, options.quick)), options.jobs, rows)
    except (KeyboardInterrupt, BrokenProcessPool) as stop:
        err.print(f"stopped ({type(stop).__name__}); what was measured is kept")
        interrupted = True
    print("\n".join(table(rows)))
    if options.json:
        write_json(options.json, result)
    if options.markdown:
        options.markdown.write_text(report(result))
    faults = [(row, problem) for row in rows if (problem := fault(row))]
    for row, problem in faults:
        err.print(f"{row['arch']} {row['kernel']} {row['problem']} {row['config']}: {problem}", markup=False)
    return 130 if interrupted else int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
