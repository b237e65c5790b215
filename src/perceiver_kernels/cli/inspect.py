"""Show what the latents of your own Perceiver AR attend to: strongest positions, entropy, distances.

The checkpoint is one that PerceiverAR.save wrote. The input is a .npy file of token ids, (n,), or any other
file, whose bytes are the tokens. Nothing of size M x N is made, however long the input is.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from perceiver_kernels.cli import charts
from perceiver_kernels.cli.bench import positive
from perceiver_kernels.cli.machine import caption
from perceiver_kernels.cli.report import CommandError, Result, claim, err, out
from perceiver_kernels.data import Bytes
from perceiver_kernels.data.modality import token_row
from perceiver_kernels.inspection import CHUNK_SIZE, Attended, inspect_model
from perceiver_kernels.models import PerceiverAR

SNIPPET = 24  # bytes of text shown around a position


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, input, which part of it, and where the picture goes."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a .safetensors file of PerceiverAR.save")
    parser.add_argument("input", type=Path, metavar="INPUT", help="token ids in a .npy file, or any file")
    parser.add_argument("--end", type=positive, help="read the tokens before this one (default: all)")
    parser.add_argument("--latents", type=positive, help="default: the model's own number")
    parser.add_argument("--top", type=positive, default=8, help="strongest positions of each (%(default)s)")
    parser.add_argument(
        "--chunk", type=positive, default=CHUNK_SIZE, help="positions at a time (%(default)s)"
    )
    parser.add_argument(
        "--plot", type=Path, default=Path("inspect.png"), metavar="FILE", help="default: %(default)s"
    )


def run(args: argparse.Namespace, result: Result) -> int:
    """Inspect, print, and draw where there is matplotlib."""
    model = load_model(args.model)
    tokens = load_tokens(args.input, model.config.vocab_size)[: args.end]
    longest = model.config.max_seq_len
    if not len(tokens):
        raise CommandError(f"{args.input} holds no tokens")
    if len(tokens) > longest:
        err.print(f"of {len(tokens):,} tokens the last {longest:,} are read: the model's max_seq_len")
        tokens = tokens[-longest:]
    latents = min(args.latents or model.config.num_latents, len(tokens))
    no_picture = charts.missing()
    if no_picture is None:
        claim("--plot", args.plot)
    with err.status(f"{len(tokens):,} positions, {latents:,} latents"):
        layers = inspect_model(model, tokens[None], num_latents=latents, top=args.top, chunk_size=args.chunk)
    result |= {"positions": len(tokens), "latents": latents, "layers": {}}
    is_text = args.input.suffix != ".npy"
    for name, seen in layers.items():
        result["layers"][name] = [facts(seen, head) for head in range(seen.heads)]
        out.print(table(f"{name}: {len(tokens):,} positions, {latents:,} latents", result["layers"][name]))
        show_last(seen, tokens, is_text)
    if no_picture is not None:
        err.print(f"There is no picture: {escape(no_picture)}", soft_wrap=True)
        return 0
    charts.inspection_chart(layers, len(tokens), args.plot, caption(result))
    out.print(f"The picture is {escape(str(args.plot))}", soft_wrap=True)
    return 0


def load_model(path: Path) -> PerceiverAR:
    """The checkpoint as a model that embeds and reads its input chunk by chunk."""
    try:
        model = PerceiverAR.load(path)
    except FileNotFoundError as error:
        raise CommandError(f"{path}: no such file") from error
    except Exception as error:  # what a file can be instead has no common base
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise CommandError(f"{path} is no model that PerceiverAR.save wrote: {problem}") from error
    model.config = dataclasses.replace(model.config, streamed=True)
    return model


def load_tokens(path: Path, vocab_size: int) -> Tensor:
    """The file's tokens, int64 (n,)."""
    try:
        if path.suffix != ".npy":
            return token_row(Bytes().encode(path.read_bytes()), vocab_size)
        return token_row(torch.from_numpy(np.asarray(np.load(path, allow_pickle=False))), vocab_size)
    except FileNotFoundError as error:
        raise CommandError(f"{path}: no such file") from error
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"{path} can't be read as tokens: {error}") from error


def facts(seen: Attended, head: int) -> dict[str, Any]:
    """Numbers of one head, over all latents of the first example."""
    return {
        "head": head,
        "spread_over_keys": seen.entropy[0, head].exp().median().item(),
        "strongest_share": seen.shares[0, head, :, 0].mean().item(),
        "top_share": seen.shares[0, head].sum(-1).mean().item(),
        "distance_edges": seen.edges.tolist(),
        "by_distance": seen.by_distance[0, head].tolist(),
        "strongest_keys": seen.keys[0, head, :, 0].tolist(),
    }


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """A row for each head."""
    shown = Table(title=title, title_justify="left")
    for column in ("head", "spread over (median)", "strongest key", "top keys", "half lies within"):
        shown.add_column(column, justify="right")
    for row in rows:
        shares = torch.tensor(row["by_distance"]).cumsum(0)
        half = int((shares < 0.5).sum())
        shown.add_row(
            str(row["head"]),
            f"{row['spread_over_keys']:,.1f} keys",
            f"{row['strongest_share']:.1%}",
            f"{row['top_share']:.1%}",
            f"{row['distance_edges'][min(half + 1, len(shares))] - 1:,} positions",
        )
    return shown


def show_last(seen: Attended, tokens: Tensor, is_text: bool) -> None:
    """The strongest positions of the last latent, head by head; for text with what stands there."""
    out.print(f"The last latent, position {len(tokens) - 1:,}:")
    for head in range(seen.heads):
        key, share = int(seen.keys[0, head, -1, 0]), seen.shares[0, head, -1, 0].item()
        line = f"  head {head}: {share:6.1%} on position {key:,}"
        if is_text:
            around = tokens[max(key - SNIPPET, 0) : key + SNIPPET + 1].tolist()
            line += f"  {bytes(around).decode('utf-8', 'replace')!r}"
        out.print(escape(line), soft_wrap=True)
