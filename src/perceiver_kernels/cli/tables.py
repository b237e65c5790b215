"""Rows of `bench` as text: grouped into problems, with one cell for each figure."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from perceiver_kernels.cli.report import mib, out, seconds

Row = dict[str, Any]


def problems(rows: list[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """The rows of each (case, shape, dtype, pass), in the order in which they were measured."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["shape"], row["dtype"], row["pass"]), []).append(row)
    return groups


def measured(group: list[Row]) -> list[Row]:
    """The rows that have a time."""
    return [row for row in group if "median_s" in row]


def left_out(group: list[Row]) -> dict[str, str]:
    """The candidates without a time, and why."""
    return {
        row["candidate"]: row.get("skipped", "interrupted before it ran")
        for row in group
        if "median_s" not in row
    }


def cells(row: Row) -> dict[str, str]:
    """A measured row's figures under their headings; a dash where nothing was measured."""

    def figure(value: float | None, form: str, unit: str = "") -> str:
        return "-" if value is None else format(value, form) + unit

    way = f" ({row['way']})" if row.get("way") else ""
    launch = row.get("launch_s")
    return {
        "candidate": row["candidate"] + way,
        "median": seconds(row["median_s"]),
        "quartiles": f"{seconds(row['q1_s'])} - {seconds(row['q3_s'])}",
        "GFLOP/s": f"{row['gflops']:,.1f}",
        "of peak": figure(row["peak_fraction"], ".0%"),
        "vs sdpa": figure(row["speedup"], ".2f", "x"),
        "K,V GB/s": figure(row["kv_gb_per_s"], ".1f"),
        "of read": figure(row["bandwidth_fraction"], ".0%"),
        "peak MiB": mib(row["peak_extra_bytes"]),
        "error/budget": f"{float(row['error']):.1e} / {float(row['budget']):.1e}",  # JSON: "nan"
        **({} if launch is None else {"launch": seconds(launch)}),
    }


def print_tables(rows: list[Row]) -> None:
    """One table for each problem; an error over its budget in red."""
    for (case, shape, dtype, direction), group in problems(rows).items():
        table = Table(title=f"{case}: {shape}, {dtype}, {direction}", title_justify="left")
        timed = measured(group)
        for heading in cells(timed[0]) if timed else ("candidate",):
            table.add_column(heading, justify="left" if heading == "candidate" else "right")
        for row in timed:
            texts = cells(row)
            if not row["within_budget"]:
                texts["error/budget"] = f"[red]{texts['error/budget']}[/]"
            table.add_row(*texts.values())
        out.print(table)
        for name, why in left_out(group).items():
            out.print(f"[dim]{name} is left out: {escape(why)}[/]")
