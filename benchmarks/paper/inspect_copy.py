"""What the copy task's model attends to: the mirror line, over the whole length.

    python -m benchmarks.paper.inspect_copy copy-task/copy-task-131072.safetensors

The weights are those that ``benchmarks.paper.copy_task`` saves, of any length. Runs of latents spread over
the second half of a held-out sequence, each reading all that stands before it: where does each look? A latent
at position p tells the token at p + 1, whose source is N - 2 - p. Keys are walked chunk by chunk; nothing of
size M x N is made.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.copy_task import HELD_OUT
from perceiver_kernels import PerceiverAR
from perceiver_kernels.cli import charts
from perceiver_kernels.cli.inspect import load_model
from perceiver_kernels.cli.machine import caption, provenance
from perceiver_kernels.cli.report import CommandError, Result, out, progress, write_json
from perceiver_kernels.inspection import Attended, inspect_model


def look(model: PerceiverAR, runs: int, latents: int) -> Iterator[tuple[int, Attended]]:
    """Position of the first latent, and what is attended to, of each run: first to last in the second half.

    The last run tells the sequence's last token.
    """
    positions = model.config.max_seq_len
    half = torch.randint(
        model.config.vocab_size, (1, positions // 2), generator=torch.Generator().manual_seed(HELD_OUT)
    )
    sequence = torch.cat((half, half.flip(1)), dim=1)
    starts = torch.linspace(positions // 2 - 1, positions - 1 - latents, runs).long().tolist()
    for first in starts:
        seen = inspect_model(model, sequence[:, : first + latents], num_latents=latents)
        yield first, seen["cross.attention"]


def facts(first: int, seen: Attended, positions: int) -> list[dict[str, Any]]:
    """For each latent of a run: its position, its source, and each head's strongest key and its share."""
    rows = []
    for i in range(seen.keys.shape[2]):
        source = positions - 2 - (first + i)
        at_source = (seen.keys[0, :, i] == source) * seen.shares[0, :, i]
        rows.append(
            {
                "latent": first + i,
                "source": source,
                "strongest": seen.keys[0, :, i, 0].tolist(),
                "share": [round(share, 4) for share in seen.shares[0, :, i, 0].tolist()],
                "source_share": [round(share, 4) for share in at_source.sum(-1).tolist()],
            }
        )
    return rows


def draw(result: Result, path: Path) -> None:
    """Strongest keys against positions with the mirror behind; the share that the source gets."""
    figure, (where, share) = charts.canvas(2, 1, (12, 5.2))
    rows, positions = result["rows"], result["positions"]
    latents = [row["latent"] for row in rows]
    where.plot(
        [positions // 2 - 1, positions - 2],
        [positions // 2 - 1, 0],
        color=charts.PEER,
        linewidth=5,
        alpha=0.5,
    )
    for head, color in zip(range(len(rows[0]["strongest"])), charts.HEADS * len(rows), strict=False):
        faint: Any = [max(0.05, row["share"][head]) for row in rows]
        strongest = [row["strongest"][head] for row in rows]
        where.scatter(latents, strongest, s=5, color=color, alpha=faint, linewidths=0)
        of_source = [100 * row["source_share"][head] for row in rows]
        share.plot(latents, of_source, ".", color=color, markersize=3, label=f"head {head}")
    where.set_title(
        f"Strongest key of each latent, {positions:,} positions (grey: the mirror)\n"
        f"some head's strongest key is the source for {result['found']:.2%} of {len(rows):,} latents",
        size=9,
        loc="left",
    )
    where.set_ylabel("position of the key", size=8)
    share.set_title("weight that the source gets, % (0: not among the 8 strongest)", size=9, loc="left")
    share.set_ylim(-2, 102)
    where.legend(*share.get_legend_handles_labels(), frameon=False, fontsize=8, markerscale=3)
    for axis in (where, share):
        axis.set_xlabel("position of the latent", size=8)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_formatter("{x:,.0f}")
    where.yaxis.set_major_formatter("{x:,.0f}")
    charts.save(figure, path, caption(result))


def main() -> None:
    """Inspect, print, write inspect-copy-N.json and .png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="copy-task-N.safetensors")
    parser.add_argument("--runs", type=int, default=64, help="places to look at (%(default)s)")
    parser.add_argument("--latents", type=int, default=16, help="latents at each (%(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--output", type=Path, default=Path("copy-task"), metavar="DIR", help="%(default)s")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    charts.canvas(1, 1, (1, 1))  # a missing matplotlib should show at once
    try:
        model = load_model(args.model)
    except CommandError as error:
        parser.exit(2, f"{error}\n")
    positions = model.config.max_seq_len
    for name, most in (("runs", positions // 2), ("latents", positions // 2)):
        if not 1 <= getattr(args, name) <= most:
            parser.error(f"--{name} must be from 1 to {most:,}, got {getattr(args, name)}")
    result: Result = {
        **provenance(),
        "command": shlex.join(["python", "-m", "benchmarks.paper.inspect_copy", *sys.argv[1:]]),
        "positions": positions,
        "config": dataclasses.asdict(model.config),
        "rows": [],
    }
    with progress() as bar:
        task = bar.add_task(f"{positions:,} positions", total=args.runs)
        for first, seen in look(model, args.runs, args.latents):
            result["rows"] += facts(first, seen, positions)
            bar.advance(task)
    rows = result["rows"]
    result["found"] = sum(row["source"] in row["strongest"] for row in rows) / len(rows)
    result["source_share"] = sum(max(row["source_share"]) for row in rows) / len(rows)
    out.print(
        f"{positions:,} positions: some head's strongest key is the source for {result['found']:.2%} of "
        f"{len(rows):,} latents; the best head gives it {result['source_share']:.1%} of its weight"
    )
    name = args.output / f"inspect-copy-{positions}"
    write_json(name.with_suffix(".json"), result)
    draw(result, name.with_suffix(".png"))


if __name__ == "__main__":
    main()
