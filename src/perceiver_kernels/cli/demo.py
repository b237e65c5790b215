"""The main job on real input: verify, bench three shapes, train on real text, swap into another model.

The text is Python's own standard library, which every machine has. Everything measured, drawn and trained
goes to the output folder. Ctrl-C ends it early and keeps what there is: training goes on from there.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

import perceiver_kernels as pk
from perceiver_kernels.cli import bench, charts, swap, verify
from perceiver_kernels.cli.bench import PRESETS, positive
from perceiver_kernels.cli.checkpoint import checkpointed
from perceiver_kernels.cli.corpus import load_corpus
from perceiver_kernels.cli.fresh import in_fresh_process
from perceiver_kernels.cli.machine import caption
from perceiver_kernels.cli.report import CommandError, Result, mib, out, progress, write_json
from perceiver_kernels.cli.train import HeldOut, Recipe, Training, continuation

PARTS = ("verify", "bench", "train", "swap")
PEERS_SHOWN = [
    "torch-sdpa"
]  # the strongest: eager in bfloat16 can take minutes, Flex compiles for half a one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which parts, how long to train, where to put the results."""
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: demo-output"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all four")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=2.5, help="time to train for (default 2.5)")
    length.add_argument("--steps", type=positive, help="train for this many steps instead")
    parser.add_argument("--threads", type=positive, help="torch threads (default: torch's own choice)")
    size = parser.add_argument_group("size", "smaller values make a quicker, poorer demo")
    size.add_argument(
        "--context", type=positive, default=Recipe.context, help="positions the model reads (%(default)s)"
    )
    size.add_argument(
        "--latents", type=positive, default=Recipe.latents, help="positions it predicts at once (%(default)s)"
    )
    size.add_argument(
        "--swap-positions",
        type=positive,
        default=swap.SHAPE["positions"],
        help="input of part 4 (%(default)s)",
    )


def run(args: argparse.Namespace, result: Result) -> int:
    """Run the parts in order. Returns 1 if anything is over its budget, else 0."""
    if args.threads:
        torch.set_num_threads(args.threads)
        result["machine"]["threads"] = args.threads
    if args.latents > args.context:
        raise CommandError(f"--latents {args.latents} is more than --context {args.context}")
    if args.minutes <= 0:
        raise CommandError(f"--minutes must be greater than 0, got {args.minutes}")
    charts.canvas(1, 1, (1, 1))  # a missing matplotlib should show at once
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output can't make {args.output}: {error.strerror}") from error
    codes = []
    try:
        for number, part in enumerate(args.parts, start=1):
            out.print(Rule(f"{number} of {len(args.parts)}: {part}", align="left"))
            result[part] = {key: result[key] for key in ("machine", "commit", "version")}
            codes.append(RUNNERS[part](args, result[part]))
    finally:
        write_json(args.output / "demo.json", result)
        out.print(f"Results, charts and weights are in {escape(str(args.output))}/")
    return max(codes)


def run_verify(args: argparse.Namespace, result: Result) -> int:
    """Every usable backend over a quick part of the case list."""
    return verify.verify(result, quick=True)


def run_bench(args: argparse.Namespace, result: Result) -> int:
    """Three shapes, and the chart."""
    usable = [name for name, reason in pk.available_backends("cpu").items() if reason is None]
    ours = [name for name in usable if name not in ("sdpa", "reference")] or usable
    problems = [(PRESETS[name], dtype, direction) for name, dtype, direction in BENCHED]
    options: dict[str, Any] = {"repeat": 5, "limit": 12.0, "weighed": True}
    bench.measure_all(problems, ours + PEERS_SHOWN, result, plot=args.output / "bench.png", **options)
    return 0


def run_train(args: argparse.Namespace, result: Result) -> int:
    """Train, score against zlib, save, draw, and write a continuation."""
    recipe = Recipe(
        context=args.context,
        latents=args.latents,
        short_context=max(args.latents, Recipe.short_context),
        seconds=60 * args.minutes,
        steps=args.steps,
    )
    text, held_text = load_corpus()
    held = HeldOut(held_text, recipe.context, recipe.latents)
    path = args.output / "training.pt"
    training = Training.load_or_begin(path, recipe)
    model, points = training.model, training.points
    parameters = sum(p.numel() for p in model.parameters())
    out.print(
        f"{len(text):,} bytes of Python's standard library to train on, {len(held_text):,} held out in other "
        f"files; {parameters:,} parameters, {recipe.context:,} bytes of context, {recipe.latents:,} latents"
    )
    if points:
        out.print(f"Going on after step {points[-1]['step']}, from {escape(str(path))}")
    result |= {
        "recipe": asdict(recipe),
        "parameters": parameters,
        "zlib_bits": held.zlib_bits,
        "points": points,
    }
    result |= {"train_bytes": len(text), "held_out_bytes": len(held_text), "scored_bytes": held.scored}
    try:
        with progress() as bar:
            task = bar.add_task("training", total=1000)
            steps = training.steps(text, lambda context: held.bits_per_byte(model, context, windows=2))
            for point in checkpointed(training, steps, path):
                if "held_out_bits" in point:
                    bar.console.print(
                        f"step {point['step']:5d}  {point['seconds']:6.1f} s  context {point['context']:5,}  "
                        f"held out {point['held_out_bits']:.3f} bits per byte"
                    )
                bar.update(task, completed=int(1000 * point["done"]))
            bar.update(task, description="scoring all held-out windows", total=None)
            result["held_out_bits"] = held.bits_per_byte(model, recipe.context)
            result["held_out_bits_short_context"] = held.bits_per_byte(model, recipe.context_at(0.0))
    finally:  # also after Ctrl-C: what was learnt is worth keeping
        model.save(args.output / "model.safetensors")
        charts.training_chart(points, held.zlib_bits, args.output / "training.png", caption(result))
    out.print(
        f"{held.scored:,} held-out bytes, in bits per byte: {result['held_out_bits']:.3f} with "
        f"{recipe.context:,} bytes of context, {result['held_out_bits_short_context']:.3f} with "
        f"{recipe.context_at(0.0):,}; zlib -9, given the same text before them: {held.zlib_bits:.3f}"
    )
    path.unlink()  # the same command begins anew
    prompt, written = continuation(model, held_text, length=min(400, args.context // 4))
    result["continuation"] = {
        "prompt_end": prompt[-300:].decode("latin-1"),
        "written": written.decode("latin-1"),
    }
    shown = Text(prompt[-300:].decode("utf-8", "replace"), style="dim")
    shown.append(written.decode("utf-8", "replace"), style="bold")
    out.print(
        Panel(
            shown,
            title="held-out prompt (dim, its end) and the model's continuation (bold)",
            title_align="left",
        )
    )
    return 0


def run_swap(args: argparse.Namespace, result: Result) -> int:
    """perceiver-ar-pytorch as published, with the op, and ours: logits, a training step's time and memory."""
    if importlib.util.find_spec("perceiver_ar_pytorch") is None:
        raise CommandError("the swap needs perceiver-ar-pytorch: pip install 'perceiver-kernels[demo]'")
    shape = {**swap.SHAPE, "positions": args.swap_positions}
    shape["latents"] = min(shape["latents"], args.swap_positions // 2)
    common = {"shape": shape, "threads": torch.get_num_threads()}
    result["shape"] = shape
    with progress() as bar:
        task = bar.add_task("comparing logits", total=1 + len(swap.DTYPES) * len(swap.MODELS))
        logits = result["logits"] = in_fresh_process(swap.compare_logits, common)
        for dtype in swap.DTYPES:
            result[dtype] = {}
            for model, name in swap.MODELS.items():
                bar.update(task, advance=1, description=f"one training step in {dtype}, {name}")
                arguments = {**common, "model": model, "dtype": dtype, "steps": 3}
                result[dtype][model] = in_fresh_process(swap.measure_step, arguments)
    out.print(
        f"{shape['positions']:,} positions, {shape['latents']:,} latents, dim {shape['dim']}, "
        f"depth {shape['depth']}, {shape['heads']} heads\n"
        f"logits once swapped: relative difference {logits['relative_error']:.1e}, "
        f"same argmax at {logits['same_argmax']:.2%} of positions"
    )
    for dtype in swap.DTYPES:
        out.print(f"one training step in {dtype}, and its peak extra memory:")
        published = result[dtype]["published"]
        for model, name in swap.MODELS.items():
            seconds, peak = result[dtype][model]["median_s"], result[dtype][model]["peak_bytes"]
            faster = f" ({published['median_s'] / seconds:.2f}x faster)" if model != "published" else ""
            out.print(f"  {name}: {seconds:.2f} s{faster}, {mib(peak)} MiB")
    charts.swap_chart(
        {dtype: result[dtype] for dtype in swap.DTYPES},
        swap.MODELS,
        args.output / "swap.png",
        caption(result),
    )
    return int(logits["relative_error"] > LOGITS_TOLERANCE)


BENCHED = (
    ("train", "float32", "fwdbwd"),
    ("train", "bfloat16", "fwd"),
    ("long", "float32", "fwd"),
    ("decode", "float32", "fwd"),
)
LOGITS_TOLERANCE = 1e-4  # float32, through three layers: rounding alone gives about 1e-6
RUNNERS = {"verify": run_verify, "bench": run_bench, "train": run_train, "swap": run_swap}
