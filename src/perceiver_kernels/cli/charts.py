"""The PNGs: bench bars, training curve, before and after. matplotlib is imported only when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_kernels.cli.report import CommandError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, PEER, INK = "#2166ac", "#b8b8b8", "#333333"


def canvas(columns: int, rows: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns axes that needs no display. CommandError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CommandError("plots need matplotlib: pip install 'perceiver-kernels\\[demo]'") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def bench_chart(rows: list[dict[str, Any]], path: Path, caption: str) -> None:
    """One panel per problem: GFLOP/s of every candidate, and the machine's own limit as a line."""
    problems: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "median_s" in row:
            problems.setdefault((row["case"], row["dtype"], row["pass"]), []).append(row)
    if not problems:
        return
    columns = min(2, len(problems))
    lines = -(-len(problems) // columns)
    deepest = max(len(group) for group in problems.values())
    figure, axes = canvas(columns, lines, (6.2 * columns, lines * (1.3 + 0.34 * deepest) + 0.3))
    for axis, ((case, dtype, direction), group) in zip(axes, problems.items(), strict=False):
        names = [row["candidate"] for row in group]
        rates = [row["gflops"] for row in group]
        spread = [
            [rate * (1 - row["median_s"] / row["q3_s"]) for rate, row in zip(rates, group, strict=True)],
            [rate * (row["median_s"] / row["q1_s"] - 1) for rate, row in zip(rates, group, strict=True)],
        ]
        colors = [OURS if row["kind"] == "backend" else PEER for row in group]
        axis.barh(names, rates, color=colors, xerr=spread, error_kw={"ecolor": INK, "elinewidth": 0.8})
        for y, (rate, row) in enumerate(zip(rates, group, strict=True)):
            speedup = "" if row["speedup"] is None else f"  ({row['speedup']:.2f}x)"
            edge = rate + spread[1][y]
            axis.annotate(
                f"{rate:,.0f}{speedup}", (edge, y), (6, 0), textcoords="offset points", va="center", size=8
            )
        limit = group[0]["peak_gflops"]
        if limit is not None:
            axis.axvline(limit, color=INK, linestyle=":", linewidth=1)
            axis.annotate("FMA peak ", (limit, -0.45), ha="right", va="bottom", size=7, color=INK)
        axis.set_xlim(0, 1.18 * max(*rates, limit or 0.0))
        axis.invert_yaxis()
        kind = {"fwd": "forward", "fwdbwd": "forward + backward"}[direction]
        axis.set_title(f"{case}: {group[0]['shape']}\n{dtype}, {kind}", size=9, loc="left")
        axis.set_xlabel("GFLOP/s, median and quartiles (speed-up over torch-sdpa)", size=8)
        axis.tick_params(labelsize=8)
    for axis in axes[len(problems) :]:
        axis.set_visible(False)
    save(figure, path, caption)


def training_chart(points: list[dict[str, Any]], zlib_bits: float, path: Path, caption: str) -> None:
    """Bits per byte over time: training as a thin line, held-out as dots, zlib as the line to beat."""
    figure, (axis,) = canvas(1, 1, (7, 4.2))
    steps = [point for point in points if "train_bits" in point]
    held = [point for point in points if "held_out_bits" in point]
    axis.plot(
        [p["seconds"] for p in steps],
        [p["train_bits"] for p in steps],
        color=PEER,
        linewidth=0.7,
        label="training",
    )
    axis.plot(
        [p["seconds"] for p in held],
        [p["held_out_bits"] for p in held],
        "o-",
        color=OURS,
        markersize=4,
        label="held out",
    )
    longer = next((p["seconds"] for p in points if p["context"] > points[0]["context"]), None)
    if longer is not None:
        axis.axvline(longer, color=PEER, linestyle="--", linewidth=0.8)
        axis.annotate(
            f" {points[-1]['context']:,} bytes of context from here", (longer, 0.1), size=8, color=INK
        )
    axis.axhline(zlib_bits, color=INK, linestyle=":", label=f"zlib -9, held out: {zlib_bits:.2f}")
    if held:
        axis.annotate(
            f"{held[-1]['held_out_bits']:.2f}",
            (held[-1]["seconds"], held[-1]["held_out_bits"]),
            (0, 7),
            textcoords="offset points",
            ha="center",
            color=OURS,
        )
    axis.set_xlabel("seconds of training")
    axis.set_ylabel("bits per byte")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    save(figure, path, caption)


def swap_chart(before: dict[str, Any], after: dict[str, Any], path: Path, caption: str) -> None:
    """Time and peak memory of one training step, as published and swapped."""
    figure, (time_axis, memory_axis) = canvas(2, 1, (8, 3.2))
    names = ["as published", "with perceiver_kernels"]
    for axis, field, unit, scale in (
        (time_axis, "median_s", "seconds per training step", 1.0),
        (memory_axis, "peak_bytes", "peak extra memory, GiB", 2.0**-30),
    ):
        values = [(side[field] or 0) * scale for side in (before, after)]
        bars = axis.bar(names, values, color=[PEER, OURS], width=0.6)
        axis.bar_label(bars, fmt="%.2f", size=9)
        axis.set_title(unit, size=9, loc="left")
        axis.tick_params(labelsize=8)
    save(figure, path, caption)


def save(figure: Figure, path: Path, caption: str) -> None:
    """Write the PNG with its machine and commit underneath."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.supxlabel(caption, size=7, color=INK)
    figure.savefig(path, dpi=144)
