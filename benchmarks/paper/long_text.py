"""Bits per byte on real text at 1k, 4k, 16k and 65k bytes of context: a Transformer against Perceiver AR.

    python -m benchmarks.paper.long_text --output benchmarks/results

The text is Python's own standard library, split by file. Every model has the same width, the same number of
attention layers, the same learning rate and the same seconds of training, most of them on short pieces and
the rest at its full context; Perceiver AR learns from the last ``--latents`` bytes of a piece, the
Transformer from all of them. All are scored on the same held-out bytes, each with its own context before
them. A model that can't take a single step in the time for its full context, or in memory, is reported as
such. Each trains in a process of its own. Ctrl-C keeps what was measured.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.text_training import Contender, measure
from perceiver_kernels.cli import charts
from perceiver_kernels.cli.fresh import in_fresh_process
from perceiver_kernels.cli.machine import caption, memory_bytes, provenance
from perceiver_kernels.cli.report import Result, out, progress, write_json

Row = dict[str, Any]
NAMES = {"transformer": "Transformer", "perceiver_ar": "Perceiver AR"}
COLORS = {"transformer": charts.INK, "perceiver_ar": charts.OURS}


def contend(recipe: Contender, setting: dict[str, Any]) -> Row:
    """What :func:`measure` says, or why there was nothing to measure."""
    row: Row = {"kind": recipe.kind, "context": recipe.context}
    try:
        return row | in_fresh_process(measure, {**setting, "recipe": asdict(recipe)})
    except RuntimeError as error:
        for sign, reason in (
            ("SIGALRM", f"not one step in {recipe.seconds * (1 - recipe.short_share):.0f} s"),
            ("SIGKILL", "out of memory"),
            ("can't allocate memory", "out of memory"),
        ):
            if sign in str(error):
                return row | {"error": reason}
        return row | {"error": str(error)}


def tell(row: Row) -> str:
    """One line about a row."""
    if "error" in row:
        return str(row["error"])
    return (
        f"{row['held_out_bits']:.3f} bits per byte "
        f"({row['held_out_bits_short']:.3f} with {row['short_context']:,}), "
        f"{row['steps']:,} steps, {row['steps_full']:,} of them at full context"
    )


def draw(result: Result, path: Path) -> None:
    """Bits per byte, and seconds of a step, over context."""
    figure, (bits, pace) = charts.canvas(2, 1, (12, 4.8))
    setting = result["setting"]
    measured = [row for row in result["rows"] if "error" not in row]
    worst = {row["context"]: 0.0 for row in measured}
    for row in measured:
        worst[row["context"]] = max(worst[row["context"]], row["held_out_bits"])
    for i, (kind, name) in enumerate(NAMES.items()):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        good = [row for row in rows if "error" not in row]
        for axis, field in ((bits, "held_out_bits"), (pace, "step_seconds")):
            points = [(row["context"], row[field]) for row in good if row[field]]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=COLORS[kind], markersize=5, label=name)
        for row in good:
            note = f"{row['held_out_bits']:.2f}\n{row['steps_full']:,} full steps"
            above = row["held_out_bits"] == worst[row["context"]]
            bits.annotate(
                note, (row["context"], row["held_out_bits"]), (0, 8 if above else -8), size=7,
                textcoords="offset points", color=COLORS[kind], ha="center", va="bottom" if above else "top",
            )  # fmt: skip
        for row in rows:
            if "error" in row:
                bits.annotate(
                    f"{name}:\n{row['error']}", (row["context"], 0.03 + 0.12 * i), size=7, ha="center",
                    color=COLORS[kind], xycoords=("data", "axes fraction"),
                )  # fmt: skip
    if measured:
        zlib = measured[0]["zlib_bits"]
        bits.axhline(zlib, color=charts.INK, linestyle=":", linewidth=1, label=f"zlib -9: {zlib:.2f}")
        bits.legend(frameon=False, fontsize=8)
    contexts = sorted({row["context"] for row in result["rows"]})
    for axis in (bits, pace):
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [f"{n:,}" for n in contexts], size=8)
        axis.set_xlim(contexts[0] / 1.7, contexts[-1] * 1.7)
        axis.set_xlabel("bytes of context", size=8)
        axis.tick_params(labelsize=8, which="both")
    bits.margins(y=0.3)
    pace.set_yscale("log")
    bits.set_title(
        f"held-out bits per byte after {setting['seconds']:.0f} s of training each\n"
        f"dim {setting['dim']}, {setting['depth'] + 1} attention layers, "
        f"Perceiver AR {setting['latents']} latents",
        size=9,
        loc="left",
    )
    pace.set_title("seconds of a training step at full context", size=9, loc="left")
    charts.save(figure, path, caption(result))


def main() -> None:
    """Train, score, print, write long-text.json and .png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16_384, 65_536])
    parser.add_argument("--seconds", type=float, default=60.0, help="of training for each (%(default)s)")
    parser.add_argument("--latents", type=int, default=Contender.latents, help="default %(default)s")
    parser.add_argument("--dim", type=int, default=Contender.dim, help="default %(default)s")
    parser.add_argument("--depth", type=int, default=Contender.depth, help="default %(default)s")
    parser.add_argument("--runs", type=int, default=8, help="held-out places (%(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="of --latents bytes at each (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("long-text"), metavar="DIR", help="%(default)s")
    args = parser.parse_args()
    if min(args.contexts) < args.latents or args.latents < 1:
        parser.error(
            f"--latents must be from 1 to the shortest context {min(args.contexts)}, got {args.latents}"
        )
    if not (args.seconds > 0 and math.isfinite(args.seconds)):
        parser.error(f"--seconds must be greater than 0, got {args.seconds}")
    charts.canvas(1, 1, (1, 1))  # a missing matplotlib should show before minutes of measuring
    sizes = {name: getattr(args, name) for name in ("seconds", "latents", "dim", "depth")}
    setting = {name: getattr(args, name) for name in ("threads", "runs", "windows")}
    setting |= {"longest": max(args.contexts), "memory_bytes": int(0.75 * memory_bytes())}
    result: Result = {
        **provenance(),
        "command": shlex.join(["python", "-m", "benchmarks.paper.long_text", *sys.argv[1:]]),
        "setting": {**sizes, **setting},
        "rows": [],
    }
    result["machine"]["threads"] = args.threads
    recipes = [
        Contender(kind=kind, context=context, short_context=min(args.contexts), **sizes)
        for context in args.contexts
        for kind in args.only
    ]
    begin = time.perf_counter()
    try:
        with progress() as bar:
            task = bar.add_task("", total=len(recipes))
            for recipe in recipes:
                name = f"{NAMES[recipe.kind]}, {recipe.context:,} bytes"
                bar.update(task, description=name)
                result["rows"].append(contend(recipe, setting))
                bar.console.print(f"{name}: {tell(result['rows'][-1])}")
                bar.advance(task)
    except KeyboardInterrupt:
        result["interrupted"] = True
    result["total_seconds"] = time.perf_counter() - begin
    for row in result["rows"]:
        out.print(f"{NAMES[row['kind']]:13} {row['context']:>7,} bytes: {tell(row)}")
    write_json(args.output / "long-text.json", result)
    if result["rows"]:
        draw(result, args.output / "long-text.png")


if __name__ == "__main__":
    main()
