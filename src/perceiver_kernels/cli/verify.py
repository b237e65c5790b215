"""Every usable backend over the case list, forward and all gradients, against float64.

A budget is 1.5 times the error that the plain computation (matmul, float32 softmax, matmul, and its autograd)
makes in the same dtype on the same inputs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.cli import gpu
from perceiver_kernels.cli.measure import DTYPES
from perceiver_kernels.cli.report import Result, out, progress
from perceiver_kernels.testing.budget import budget, math_reference, reference64, relative_error
from perceiver_kernels.testing.cases import CASES, Case
from perceiver_kernels.testing.inputs import Inputs, make_inputs

QUICK_CASES = {
    "ragged", "decode_long", "more_queries_than_keys", "grouped_heads", "dim_128", "odd_dims", "transposed",
    "dead_example",
    "offset_negative", "offset_per_example_masked", "softcap", "dropout", "packed", "all_options",
}  # fmt: skip
QUICK_DTYPES = ("float32", "bfloat16")
TENSORS = ("out", "lse", "dq", "dk", "dv")
COLORS = {"pass": "green", "FAIL": "red", "refused": "dim"}

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to verify; everything by default."""
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all that can run here")
    parser.add_argument("--device", choices=gpu.DEVICES, default="cpu", help="default: cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all")
    parser.add_argument(
        "--case", nargs="+", choices=[case.name for case in CASES], metavar="NAME", help="default: all cases"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a varied part of the cases in float32 and bfloat16"
    )
    parser.add_argument("--verbose", action="store_true", help="list every row, not the worst of each tensor")


def run(args: argparse.Namespace, result: Result) -> int:
    """Returns 1 if anything failed, else 0."""
    options = {"quick": args.quick, "verbose": args.verbose, "device": args.device}
    return verify(result, args.backends, args.dtype, args.case, **options)


def verify(
    result: Result,
    backends: list[str] | None = None,
    dtypes: list[str] | None = None,
    cases: list[str] | None = None,
    *,
    quick: bool = False,
    verbose: bool = False,
    device: str = "cpu",
) -> int:
    """Fill `result["rows"]`, print, return the exit code. CommandError for a backend that can't run."""
    usable = pk.available_backends(gpu.checked_device(device))
    result["device"] = device
    names = [name for name, reason in usable.items() if reason is None]
    if backends:
        names = gpu.checked_backends(backends, device)
    wanted = set(cases) if cases else QUICK_CASES if quick else {case.name for case in CASES}
    chosen = [case for case in CASES if case.name in wanted]
    kinds = dtypes or list(QUICK_DTYPES if quick else DTYPES)
    rows: list[Row] = []
    result["rows"] = rows
    try:
        with progress() as bar:
            task = bar.add_task("verify", total=len(chosen) * len(kinds))
            for dtype in kinds:
                for case in chosen:
                    bar.update(task, description=f"verify {dtype} {case.name}")
                    rows.extend(verify_case(case, dtype, names, device))
                    bar.advance(task)
    finally:
        counts = {status: sum(row["status"] == status for row in rows) for status in COLORS}
        result["counts"] = counts
        print_tables(rows, verbose)
        out.print(", ".join(f"[{COLORS[status]}]{count} {status}[/]" for status, count in counts.items()))
    return int(counts["FAIL"] > 0)


def verify_case(case: Case, dtype: str, backends: list[str], device: str = "cpu") -> Iterator[Row]:
    """One row for each backend and tensor of a case; the references are computed once."""
    inputs = make_inputs(case, DTYPES[dtype], device)
    want, plain = reference64(inputs), math_reference(inputs)
    allowed = {name: budget(plain[name], want[name], DTYPES[dtype]) for name in TENSORS}
    for backend in backends:
        head = {"backend": backend, "dtype": dtype, "case": case.name}
        got, trouble = attempt(inputs, backend)
        if trouble is not None:
            yield head | {"status": "refused" if got is None else "FAIL", "reason": trouble}
            continue
        for name in TENSORS:
            error = relative_error(got[name], want[name]) if got else math.nan
            status = "pass" if error <= allowed[name] else "FAIL"
            yield head | {"tensor": name, "error": error, "budget": allowed[name], "status": status}


def attempt(inputs: Inputs, backend: str) -> tuple[dict[str, Tensor] | None, str | None]:
    """Results and None; None and the reason of a refusal; or {} and the error of a backend that breaks."""
    try:
        return inputs.run(backend), None
    except ValueError as error:
        return None, str(error)
    except Exception as error:  # whatever a broken kernel or its compiler throws
        return {}, f"{type(error).__name__}: {error}"


def ratio(row: Row) -> float:
    """Error over budget; a NaN error is worst of all."""
    return row["error"] / row["budget"] if math.isfinite(row["error"]) else math.inf


def print_tables(rows: list[Row], verbose: bool) -> None:
    """The worst case of every backend, dtype and tensor (or all rows), what failed, what was refused."""
    measured = [row for row in rows if "error" in row]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in measured:
        groups.setdefault((row["backend"], row["dtype"], row["tensor"]), []).append(row)
    title = (
        "Every row"
        if verbose
        else "The row closest to its budget, or furthest over it, of each backend, dtype and tensor"
    )
    table = Table(title=title, title_justify="left")
    for column in ("backend", "dtype", "tensor", "rows", "worst case"):
        table.add_column(column)
    for column in ("error", "budget", "error/budget", "verdict"):
        table.add_column(column, justify="right")
    for (backend, dtype, tensor), group in groups.items():
        for row in group if verbose else [max(group, key=ratio)]:
            verdict = f"[{COLORS[row['status']]}]{row['status']}[/]"
            numbers = (f"{row['error']:.2e}", f"{row['budget']:.2e}", f"{ratio(row):.2f}", verdict)
            table.add_row(backend, dtype, tensor, str(len(group)), row["case"], *numbers)
    if measured:
        out.print(table)
    for row in rows:
        if row["status"] == "FAIL" and not verbose:
            what = (
                row.get("reason") or f"{row['tensor']}: error {row['error']:.2e}, budget {row['budget']:.2e}"
            )
            where = f"{row['backend']} {row['dtype']} {row['case']}"
            out.print(f"[{COLORS['FAIL']}]FAIL[/] {where} {escape(what)}")
    refusals: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] == "refused":
            reasons = row["reason"].splitlines()[1:] or [row["reason"]]
            key = (row["backend"], "; ".join(reason.strip() for reason in reasons))
            refusals.setdefault(key, []).append(row["case"])
    for (backend, reason), cases in refusals.items():
        out.print(f"[dim]{backend} refuses {', '.join(dict.fromkeys(cases))}: {escape(reason)}[/]")
