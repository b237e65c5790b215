"""The PNGs: bench, training, swap, inspection. matplotlib is imported only when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_kernels.cli.report import CommandError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from perceiver_kernels.inspection import Attended

OURS, PEER, INK = "#2166ac", "#b8b8b8", "#333333"
OUR_SHADES, PEER_SHADES = (
    (OURS, "#67a9cf", "#053061"),
    ("#d0d0d0", "#a8a8a8", "#808080", "#585858", "#e8e0d0"),
)
HEADS = (OURS, "#d6604d", "#5aae61", "#8c6bb1", "#dd8452", "#67a9cf", "#333333", "#e7298a")
KINDS = {"fwd": "forward", "fwdbwd": "forward + backward"}


def missing() -> str | None:
    """None where there is matplotlib to draw with, else what to install."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return "plots need matplotlib: pip install 'perceiver-kernels[demo]'"
    return None


def canvas(columns: int, rows: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns axes that needs no display. CommandError where matplotlib is missing."""
    reason = missing()
    if reason is not None:
        raise CommandError(reason)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
        unit, scale, peak = units(group[0])
        rates = [row["gflops"] * scale for row in group]
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
            limit *= scale
            axis.axvline(limit, color=INK, linestyle=":", linewidth=1)
            axis.annotate(peak + " ", (limit, -0.45), ha="right", va="bottom", size=7, color=INK)
        axis.set_xlim(0, 1.18 * max(*rates, limit or 0.0))
        axis.invert_yaxis()
        axis.set_title(f"{case}: {group[0]['shape']}\n{dtype}, {KINDS[direction]}", size=9, loc="left")
        axis.set_xlabel(f"{unit}, median and quartiles (speed-up over torch-sdpa)", size=8)
        axis.tick_params(labelsize=8)
    for axis in axes[len(problems) :]:
        axis.set_visible(False)
    save(figure, path, caption)


def units(row: dict[str, Any]) -> tuple[str, float, str]:
    """Unit of a row's rate, factor on GFLOP/s that makes it, and the name of the machine's limit."""
    if row.get("device", "cpu") == "cpu":
        return "GFLOP/s", 1.0, "FMA peak"
    return "TFLOP/s", 1e-3, "matrix product"


def overview_chart(rows: list[dict[str, Any]], path: Path, caption: str) -> None:
    """One panel per dtype and pass with a bar per candidate at every shape, ours blue, others grey.

    Decoding (M = 1) is a matter of memory: it has a panel of its own, in GB/s of keys and values.
    """
    measured = [row for row in rows if "median_s" in row]
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in measured:
        unit, scale, peak = units(row)
        if " M1 " in row["shape"] and row.get("kv_gb_per_s"):
            bar = {"at": f"{row['case']}, {row['dtype']}\n{row['shape']}", "height": row["kv_gb_per_s"]}
            bar |= {"limit": row["read_gb_per_s"], "limit_name": "reading alone"}
            title = "decode: GB/s of keys and values"
        else:
            bar = {"at": f"{row['case']}\n{row['shape'].replace(' M', chr(10) + 'M')}"}
            bar |= {"height": row["gflops"] * scale, "limit_name": peak}
            bar["limit"] = None if row["peak_gflops"] is None else row["peak_gflops"] * scale
            title = f"{row['dtype']}, {KINDS[row['pass']]}: {unit}"
        panels.setdefault(title, []).append({**bar, "candidate": row["candidate"]})
    if not panels:
        return
    colors: dict[str, str] = {}
    for kind, shades in (("backend", OUR_SHADES), ("peer", PEER_SHADES)):
        names = dict.fromkeys(row["candidate"] for row in measured if row["kind"] == kind)
        colors |= {name: shades[i % len(shades)] for i, name in enumerate(names)}
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = canvas(columns, lines, (7.5 * columns, 3.4 * lines))
    for axis, (title, bars) in zip(axes, panels.items(), strict=False):
        grouped_bars(axis, bars, colors)
        axis.set_title(title, size=9, loc="left")
    axes[0].legend(frameon=False, fontsize=7, loc="upper right", ncols=len(colors))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    save(figure, path, caption)


def grouped_bars(axis: Axes, bars: list[dict[str, Any]], colors: dict[str, str]) -> None:
    """The bars of each place side by side, one for each candidate, and the machine's limit as a line."""
    places = list(dict.fromkeys(bar["at"] for bar in bars))
    width = 0.84 / len(colors)
    for i, (name, color) in enumerate(colors.items()):
        heights = {places.index(bar["at"]): bar["height"] for bar in bars if bar["candidate"] == name}
        at = [x + (i - (len(colors) - 1) / 2) * width for x in heights]
        drawn = axis.bar(at, list(heights.values()), width, color=color, label=name)
        labels = [f"{height:,.0f}" if height >= 100 else f"{height:.3g}" for height in heights.values()]
        axis.bar_label(drawn, labels, size=5, rotation=90, padding=2)
    limit = bars[0]["limit"]
    if limit is not None:
        axis.axhline(limit, color=INK, linestyle=":", linewidth=1)
        axis.annotate(bars[0]["limit_name"], (-0.5, limit), va="bottom", size=7, color=INK)
    axis.set_xticks(range(len(places)), places, size=6)
    axis.margins(y=0.18)
    axis.tick_params(axis="y", labelsize=8)


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


def swap_chart(results: dict[str, Any], models: dict[str, str], path: Path, caption: str) -> None:
    """Time and peak memory of one training step, for each dtype of each of ``models``, which have names."""
    figure, axes = canvas(2, len(results), (9, 1.9 * len(results) + 0.4))
    for row, (dtype, result) in enumerate(results.items()):
        time_axis, memory_axis = axes[2 * row : 2 * row + 2]
        for axis, field, unit, scale in (
            (time_axis, "median_s", f"seconds per training step, {dtype}", 1.0),
            (memory_axis, "peak_bytes", f"peak extra memory, {dtype}, GiB", 2.0**-30),
        ):
            values = [(result[model][field] or 0) * scale for model in models]
            bars = axis.barh(list(models.values()), values, color=[PEER, OURS, OURS], height=0.6)
            axis.bar_label(bars, fmt="%.2f", size=9, padding=2)
            axis.margins(x=0.15)
            axis.set_title(unit, size=9, loc="left")
            axis.tick_params(labelsize=8)
            axis.invert_yaxis()
        memory_axis.tick_params(labelleft=False)
    save(figure, path, caption)


def inspection_chart(layers: dict[str, Attended], total: int, path: Path, caption: str) -> None:
    """One row for each cross-attention: strongest keys, entropy and distance, a colour for each head.

    ``total``: positions of the input, whose last are the latents. The first example is drawn.
    """
    figure, axes = canvas(3, len(layers), (13, 4.2 * len(layers) + 0.4))
    for row, (name, seen) in enumerate(layers.items()):
        keys, shares = seen.keys[0].cpu(), seen.shares[0].float().cpu()
        where, spread, far = axes[3 * row : 3 * row + 3]
        latents = list(range(total - keys.shape[1], total))
        for head in range(seen.heads):
            color = HEADS[head % len(HEADS)]
            top, share = keys[head, :, 0], shares[head, :, 0]
            faint: Any = share.clamp(0.08, 1.0)  # one for each point
            where.scatter(top, latents, s=3, color=color, alpha=faint, linewidths=0)
            breadth = seen.entropy[0, head].float().exp().cpu()
            spread.plot(latents, breadth, color=color, linewidth=0.8, label=f"head {head}")
            far.stairs(
                100 * seen.by_distance[0, head].float().cpu(),
                range(len(seen.edges)),
                color=color,
                linewidth=1.2,
            )
        where.plot([latents[0], latents[-1]], [latents[0], latents[-1]], color=PEER, linewidth=0.6, zorder=0)
        where.set(
            xlim=(-0.01 * total, 1.01 * total), xlabel="position of the strongest key (the fainter, the less)"
        )
        where.set_ylabel("position of the latent")
        where.set_title(name, size=9, loc="left")
        spread.set(yscale="log", xlabel="position of the latent")
        spread.set_title("keys that the weight is spread over: exp(entropy)", size=9, loc="left")
        spread.legend(frameon=False, fontsize=7, ncols=4)
        marks = range(0, len(seen.edges) - 1, 2)
        far.set_xticks(marks, [f"{int(seen.edges[e]):,}" for e in marks], size=6, rotation=45)
        far.set(ylim=0, xlabel="distance from the latent, positions")
        far.set_title("share of the weight at that distance, %", size=9, loc="left")
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.xaxis.label.set_fontsize(8)
        axis.yaxis.label.set_fontsize(8)
    save(figure, path, caption)


def save(figure: Figure, path: Path, caption: str) -> None:
    """Write the PNG with its machine and commit underneath."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.supxlabel(caption, size=7, color=INK)
    figure.savefig(path, dpi=144)
