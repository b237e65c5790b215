"""Seconds and peak memory of a training step against the context that a prediction sees, six layers each.

    python -m benchmarks.paper.context_scaling --output benchmarks/results

Contenders of one width: Transformer, Transformer-XL, Sparse Transformer (strided), and Perceiver AR with
eager attention, with the fused op, streamed, and streamed with prefix dropout. How much context does each
take in the time, and in the memory, that the Transformer needs for 2,048 tokens? The paper's figure 1, on a
CPU. Each point is a process of its own. Ctrl-C keeps what was measured.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.training_step import measure
from perceiver_kernels.cli import charts
from perceiver_kernels.cli.fresh import in_fresh_process
from perceiver_kernels.cli.machine import caption, memory_bytes, provenance
from perceiver_kernels.cli.report import Result, mib, out, progress, write_json

Row = dict[str, Any]
KINDS = (
    "transformer",
    "transformer_xl",
    "sparse_transformer",
    "perceiver_ar_eager",
    "perceiver_ar_fused",
    "perceiver_ar_streamed",
)
DROPPED = "perceiver_ar_dropped"  # streamed, with prefix dropout
YARDSTICK = ("transformer", 2048)
COLORS = {
    "transformer": "#333333",
    "transformer_xl": "#8c6bb1",
    "sparse_transformer": "#dd8452",
    "perceiver_ar_eager": "#9ecae1",
    "perceiver_ar_fused": "#4292c6",
    "perceiver_ar_streamed": charts.OURS,
    DROPPED: "#053061",
}


def label(name: str, setting: dict[str, Any]) -> str:
    """A contender's name, and what it predicts or drops."""
    latents, dropout = setting["latents"], setting["prefix_dropout"]
    return {
        "transformer": "Transformer (predicts all)",
        "transformer_xl": f"Transformer-XL (segment {latents:,}, the rest memory)",
        "sparse_transformer": "Sparse Transformer (strided; predicts all)",
        "perceiver_ar_eager": f"Perceiver AR, eager ({latents:,} latents)",
        "perceiver_ar_fused": f"Perceiver AR, fused ({latents:,} latents)",
        "perceiver_ar_streamed": f"Perceiver AR, streamed ({latents:,} latents)",
        DROPPED: f"Perceiver AR, streamed ({latents:,} latents, prefix dropout {dropout:g})",
    }[name]


def series(name: str, setting: dict[str, Any], contexts: list[int], room: float) -> Any:
    """Rows of one contender, shortest context first, until the next would be too slow or too large."""
    for context in contexts:
        kind = "perceiver_ar_streamed" if name == DROPPED else name
        dropout = setting["prefix_dropout"] if name == DROPPED else 0.0
        argument = {**setting, "kind": kind, "prefix_dropout": dropout, "context": context}
        row: Row = {"name": name, "context": context}
        try:
            row |= in_fresh_process(measure, argument)
        except RuntimeError as error:
            yield row | {"error": str(error)}
            return
        row["median_s"] = statistics.median(row["seconds"])
        yield row
        if row["median_s"] > setting["limit"] or (row["peak_bytes"] or 0) > room:
            return


def reach(rows: list[Row], field: str, budget: float) -> tuple[float, bool]:
    """The context whose ``field`` is ``budget``, by log-log interpolation; whether there is no limit seen.

    Without a limit it is the longest context measured.
    """
    points = [(row["context"], row[field]) for row in rows if row.get(field)]
    fitting = [i for i, (_, value) in enumerate(points) if value <= budget]
    if not fitting:
        return 0.0, False
    last = fitting[-1]
    if last + 1 == len(points):
        return float(points[last][0]), True
    (low, a), (high, b) = points[last], points[last + 1]
    return low * (high / low) ** (math.log(budget / a) / math.log(b / a)), False


def report(result: Result) -> None:
    """How far each comes on the Transformer's budget."""
    groups = by_name(result["rows"])
    yard = next((r for r in groups.get(YARDSTICK[0], []) if r["context"] == YARDSTICK[1]), None)
    if yard is None or "median_s" not in yard:
        return
    out.print(
        f"The Transformer's step on {YARDSTICK[1]:,} tokens: {yard['median_s']:.2f} s, "
        f"{mib(yard['peak_bytes'])} MiB. In that time, and in that memory, the context is:"
    )
    result["reach"] = {}
    for name, rows in groups.items():
        entry = {}
        for field, budget in (("median_s", yard["median_s"]), ("peak_bytes", yard["peak_bytes"])):
            if budget:
                context, open_ended = reach(rows, field, budget)
                entry[field] = {"context": round(context), "or_more": open_ended}
        result["reach"][name] = entry
        told = [f"{e['context']:>9,}{' or more' if e['or_more'] else '':8}" for e in entry.values()]
        out.print(f"  {label(name, result['setting']):64} {'  '.join(told)}")


def by_name(rows: list[Row]) -> dict[str, list[Row]]:
    """Measured rows of each contender."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "median_s" in row:
            groups.setdefault(row["name"], []).append(row)
    return groups


def draw(result: Result, path: Path) -> None:
    """Time and memory over context, both logarithmic, and the Transformer's budget as dotted lines."""
    figure, panels = charts.canvas(2, 1, (12, 5.4))
    setting, groups = result["setting"], by_name(result["rows"])
    for axis, field, scale, title in (
        (panels[0], "median_s", 1.0, "seconds per training step"),
        (panels[1], "peak_bytes", 2.0**-30, "peak memory, weights and optimiser included, GiB"),
    ):
        for name, rows in groups.items():
            points = [(r["context"], r[field] * scale) for r in rows if r.get(field)]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=COLORS[name], markersize=4, label=name)
        yard = [r for r in groups.get(YARDSTICK[0], []) if r["context"] == YARDSTICK[1] and r.get(field)]
        if yard:
            axis.axhline(yard[0][field] * scale, color=charts.INK, linestyle=":", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        contexts = sorted({row["context"] for row in result["rows"]})
        axis.set_xticks(contexts, [f"{n:,}" for n in contexts], size=8)
        axis.tick_params(labelsize=8, which="both")
        axis.set_xlabel("context of a prediction, tokens", size=8)
        axis.set_title(title, size=9, loc="left")
    handles, names = panels[0].get_legend_handles_labels()
    heading = (
        f"dim {setting['dim']}, {setting['depth']} layers, {setting['heads']} heads, batch 1, float32, "
        f"AdamW; dotted: what the Transformer needs for {YARDSTICK[1]:,} tokens"
    )
    figure.legend(
        handles,
        [label(name, setting) for name in names],
        title=heading,
        loc="outside upper center",
        ncols=2,
        fontsize=8,
        title_fontsize=9,
        frameon=False,
    )
    charts.save(figure, path, caption(result))


def main() -> None:
    """Measure, print, write context-scaling.json and .png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--longest", type=int, default=131_072, help="a power of 2 (default %(default)s)")
    parser.add_argument("--shortest", type=int, default=1024, help="a power of 2 (default %(default)s)")
    parser.add_argument("--latents", type=int, default=512, help="default %(default)s")
    parser.add_argument("--prefix-dropout", type=float, default=0.75, help="of one contender (%(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="default %(default)s")
    parser.add_argument("--heads", type=int, default=8, help="default %(default)s")
    parser.add_argument("--depth", type=int, default=6, help="default %(default)s")
    parser.add_argument("--repeat", type=int, default=3, help="timed steps for each point (%(default)s)")
    parser.add_argument(
        "--limit", type=float, default=20.0, help="no longer ones after a step of so many seconds"
    )
    parser.add_argument("--only", nargs="+", choices=[*KINDS, DROPPED], default=[*KINDS, DROPPED])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--output", type=Path, default=Path("context-scaling"), metavar="DIR", help="%(default)s"
    )
    args = parser.parse_args()
    for name in ("longest", "shortest"):
        value = getattr(args, name)
        if value < 128 or value & (value - 1):
            parser.error(f"--{name} must be a power of 2 of at least 128, got {value}")
    charts.canvas(1, 1, (1, 1))  # a missing matplotlib should show before minutes of measuring
    names = ("dim", "depth", "heads", "latents", "prefix_dropout", "repeat", "limit", "threads")
    setting = {name: getattr(args, name) for name in names}
    result: Result = {
        **provenance(),
        "command": shlex.join(["python", "-m", "benchmarks.paper.context_scaling", *sys.argv[1:]]),
        "setting": setting,
        "rows": [],
    }
    result["machine"]["threads"] = args.threads
    contexts = [2**i for i in range(args.shortest.bit_length() - 1, args.longest.bit_length())]
    room = memory_bytes() / 6  # twice the context takes up to four times the memory
    try:
        with progress() as bar:
            task = bar.add_task("", total=len(args.only) * len(contexts))
            for i, name in enumerate(args.only):
                bar.update(task, description=name)
                for row in series(name, setting, contexts, room):
                    result["rows"].append(row)
                    told = row.get("error") or f"{row['median_s']:.3f} s, {mib(row['peak_bytes'])} MiB"
                    bar.console.print(f"{name} {row['context']:,}: {told}")
                    bar.advance(task)
                bar.update(task, completed=(i + 1) * len(contexts))
    except KeyboardInterrupt:
        result["interrupted"] = True
    report(result)
    write_json(args.output / "context-scaling.json", result)
    if result["rows"]:
        draw(result, args.output / "context-scaling.png")


if __name__ == "__main__":
    main()
