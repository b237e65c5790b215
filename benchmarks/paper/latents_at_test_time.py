"""One trained model, more or fewer latents at test time: what each costs, and what it brings.

    python -m benchmarks.paper.latents_at_test_time --output benchmarks/results

A byte-level Perceiver AR learns from Python's own standard library with one number of latents. Then the same
weights predict the same held-out bytes with other numbers, each byte from the same context before it: the
last ``--scored`` bytes of every window, read with M latents. More latents are more compute in the layers, and
more context for them; the cross-attention sees all of the context with any. As the paper's figure does, this
needs no new training. Ctrl-C leaves a checkpoint; the same command goes on from it.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_kernels.cli import charts
from perceiver_kernels.cli.checkpoint import checkpointed
from perceiver_kernels.cli.corpus import load_corpus
from perceiver_kernels.cli.machine import caption, provenance
from perceiver_kernels.cli.report import CommandError, Result, out, progress, seconds, write_json
from perceiver_kernels.cli.train import Recipe, Training

Row = dict[str, Any]


def windows(text: Tensor, context: int, count: int) -> Tensor:
    """Pieces of the text, spread evenly: int64 (count, context + 1)."""
    starts = torch.linspace(0, len(text) - context - 1, count).long().tolist()
    return torch.stack([text[start : start + context + 1] for start in starts]).long()


@torch.no_grad()
def score(model: nn.Module, pieces: Tensor, latents: int, scored: int) -> Iterator[tuple[float, float]]:
    """(bits per byte of its last ``scored`` bytes, seconds) of each piece, told by so many latents."""
    model.eval()
    model(pieces[:1, :-1], num_latents=latents)  # what a first call allocates
    for piece in pieces:
        begin = time.perf_counter()
        logits = model(piece[None, :-1], num_latents=latents)[0, -scored:]
        took = time.perf_counter() - begin
        yield F.cross_entropy(logits, piece[-scored:]).item() / math.log(2), took


def draw(result: Result, path: Path) -> None:
    """Bits per byte over seconds, a point for each number of latents."""
    figure, (axis,) = charts.canvas(1, 1, (7.5, 4.8))
    rows, recipe = result["rows"], result["recipe"]
    axis.plot([row["median_s"] for row in rows], [row["bits"] for row in rows], "o-", color=charts.OURS)
    for row in rows:
        trained = row["latents"] == recipe["latents"]
        axis.annotate(
            f"{row['latents']:,}" + (" (trained)" if trained else ""),
            (row["median_s"], row["bits"]),
            (4, 6),
            textcoords="offset points",
            size=8,
            weight="bold" if trained else "normal",
        )
    axis.set_xscale("log")
    axis.margins(0.12)
    axis.set_xlabel("seconds of a forward pass (median), by number of latents", size=8)
    axis.set_ylabel("bits per byte, held out", size=8)
    axis.set_title(
        f"One model, {recipe['context']:,} bytes of context, trained with {recipe['latents']:,} latents for "
        f"{result['train_seconds']:.0f} s;\n"
        f"the last {result['scored']} bytes of {result['windows']} windows, with other numbers of latents",
        size=9,
        loc="left",
    )
    axis.tick_params(labelsize=8)
    charts.save(figure, path, caption(result))


def train(training: Training, text: Tensor, path: Path) -> None:
    """Train to the end. KeyboardInterrupt: after Ctrl-C, with everything saved."""
    with progress() as bar:
        task = bar.add_task("training", total=1000)
        for point in checkpointed(training, training.steps(text, lambda context: math.nan), path):
            told = f"training, step {point['step']}, {point.get('train_bits', 0):.2f} bits per byte"
            bar.update(task, completed=int(1000 * point["done"]), description=told)


def main() -> None:
    """Train or go on, measure, write latents-at-test-time.json and .png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="of training (%(default)s)")
    parser.add_argument("--context", type=int, default=8192, help="bytes (%(default)s)")
    parser.add_argument("--latents", type=int, default=512, help="trained with (%(default)s)")
    parser.add_argument("--scored", type=int, default=32, help="bytes of each window, the fewest latents too")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows (%(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument(
        "--output", type=Path, default=Path("latents-at-test-time"), metavar="DIR", help="%(default)s"
    )
    args = parser.parse_args()
    if not 1 <= args.scored <= args.latents <= args.context:
        parser.error(
            "--scored, --latents and --context must rise, from 1: "
            f"got {args.scored}, {args.latents} and {args.context}"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    charts.canvas(1, 1, (1, 1))  # a missing matplotlib should show at once
    recipe = Recipe(
        context=args.context,
        latents=args.latents,
        short_context=max(args.latents, Recipe.short_context),
        seconds=60 * args.minutes,
        evaluations=1,
    )
    name = args.output / "latents-at-test-time"
    path = name.with_suffix(".pt")
    result: Result = {
        **provenance(),
        "command": shlex.join(["python", "-m", "benchmarks.paper.latents_at_test_time", *sys.argv[1:]]),
        "recipe": asdict(recipe),
        "scored": args.scored,
        "windows": args.windows,
        "rows": [],
    }
    try:
        training = Training.load_or_begin(path, recipe)
    except CommandError as error:
        parser.exit(2, f"{error}\n")
    text, held_text = load_corpus()
    pieces = windows(held_text, args.context, args.windows)
    numbers = [args.scored * 2**i for i in range((args.context // args.scored).bit_length())]
    try:
        train(training, text, path)
        result["train_seconds"] = training.seconds
        with progress() as bar:
            task = bar.add_task("", total=len(numbers) * args.windows)
            for latents in sorted({*numbers, args.latents, args.context}):
                bar.update(task, description=f"{latents:,} latents")
                samples = []
                for sample in score(training.model, pieces, latents, args.scored):
                    samples.append(sample)
                    bar.advance(task)
                bits, times = zip(*samples, strict=True)
                row: Row = {"latents": latents, "bits": sum(bits) / len(bits)}
                row |= {"median_s": statistics.median(times), "seconds": [round(t, 5) for t in times]}
                row["window_bits"] = [round(b, 4) for b in bits]
                result["rows"].append(row)
                out.print(
                    f"{latents:6,} latents: {row['bits']:.3f} bits per byte, {seconds(row['median_s'])}"
                )
    except KeyboardInterrupt:
        out.print(f"stopped; the same command goes on from {path}")
        sys.exit(130)
    write_json(name.with_suffix(".json"), result)
    draw(result, name.with_suffix(".png"))
    path.unlink()  # the same command begins anew


if __name__ == "__main__":
    main()
