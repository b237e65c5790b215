"""Reports as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .price import LoopReport, Report

COLUMNS = (
    "kernel",
    "arch",
    "threads",
    "regs",
    "spills",
    "shared",
    "CTAs/SM",
    "instr/MMA",
    "bound",
    "simulated",
    "limiter",
)


def table(rows: Iterable[tuple[str, Report]]) -> str:
    """A Markdown table with one row for each kernel and tensor loop."""
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "--:|" * (len(COLUMNS) - 3) + "---|",
    ]
    for label, report in rows:
        for loop in report.loops or (None,):
            lines.append("| " + " | ".join(_cells(label, report, loop)) + " |")
    return "\n".join(lines)


def _cells(label: str, report: Report, loop: LoopReport | None) -> list[str]:
    cells = [
        label,
        f"sm_{report.arch}",
        str(report.threads),
        str(report.registers),
        str(report.spill_instructions),
        f"{report.shared / 1024:.0f} KiB",
        f"{report.ctas_per_sm} ({report.occupancy_limiter})",
    ]
    if loop is None:
        return cells + ["-"] * 4
    return [
        *cells,
        f"{loop.per_tensor:.2f}",
        _fraction(loop.bound),
        _fraction(loop.simulated),
        loop.limiter or "-",
    ]


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _counts(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in values.items())


def details(report: Report) -> str:
    """Everything about one kernel, in lines."""
    resources = report.resources
    lines = [
        f"{report.function} (sm_{report.arch}): {report.instructions} instructions",
        f"  {resources.registers} registers, {resources.stack} bytes of stack, "
        f"{resources.spill_loads} + {resources.spill_stores} spill loads and stores, "
        f"{report.shared} bytes shared",
        f"  {report.ctas_per_sm} blocks of {report.threads} threads per SM "
        f"(limit: {report.occupancy_limiter}), {report.warps_per_sm} warps",
    ]
    for loop in report.loops:
        lines += [
            f"  loop at {loop.address:#x}: {loop.instructions} instructions "
            f"({loop.cold_instructions} more cold), {loop.per_tensor:.2f} per tensor instruction",
            f"    mix     {_counts(loop.mix)}",
            f"    cycles  {_counts(loop.pipes)}; stall counts {loop.stall_cycles}",
            f"    of peak: bound {_fraction(loop.bound)} ({loop.limiter or '-'}), "
            f"one warp {_fraction(loop.single_warp)}, simulated {_fraction(loop.simulated)}",
        ]
    return "\n".join(lines)
