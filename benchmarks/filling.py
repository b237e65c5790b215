"""How the splits fill a GPU: blocks and waves of the forward and backward, beside FlashAttention's rules.

    python -m benchmarks.filling --json filling.json --markdown filling.md

Arithmetic alone: nothing runs. FlashAttention's rules are those of its sources (flash_api.cpp of version 2,
hopper/heuristics.h of version 3), head dim 64, no dropout.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from perceiver_kernels.backends.cuda import Device, Problem, Tile, plan_backward, plan_forward
from perceiver_kernels.cli.machine import provenance
from perceiver_kernels.cli.report import write_json

DEVICES = {"A100": Device(108, 166912, 167936), "H100": Device(132, 232448, 233472)}
QUERIES, HEADS, KEYS = (256, 1024, 4096), (1, 8, 64), (8 << 10, 64 << 10, 1 << 20)
DIM = 64
ENOUGH = 0.9  # of the places for blocks, in the last wave

Row = dict[str, Any]


def blocks_up(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def filled(splits: int, blocks: int, slots: int, key_blocks: int) -> Row:
    """How ``blocks`` equal blocks run in ``slots`` places.

    ``last``: how full the last wave is; ``all``: the share of places and time in which a block runs;
    ``steps``: blocks of keys that each block goes through.
    """
    waves = blocks_up(blocks, slots)
    last = blocks - (waves - 1) * slots
    return {
        "splits": splits, "blocks": blocks, "slots": slots, "waves": waves, "last": last / slots,
        "all": blocks / (waves * slots), "key_blocks": key_blocks, "steps": blocks_up(key_blocks, splits),
    }  # fmt: skip


def most_efficient(blocks: int, slots: int, candidates: list[int]) -> int:
    """The smallest count whose waves are at least 0.85 times as full as those of the best."""

    def efficiency(count: int) -> float:
        waves = blocks * count / slots
        return waves / math.ceil(waves)

    best = max(map(efficiency, candidates))
    return next(count for count in candidates if efficiency(count) >= 0.85 * best)


def flash_attention_2(queries: int, heads: int, keys: int, processors: int) -> Row:
    """Blocks of 128 rows, or of 64 where it splits; two of them on a processor."""
    small, key_blocks, slots = heads * blocks_up(queries, 64), blocks_up(keys, 256), 2 * processors
    splits = 1
    if small < 0.8 * slots:
        highest = min(128, slots, key_blocks)
        counts = range(1, highest + 1)
        eligible = [n for n in counts if n == 1 or blocks_up(key_blocks, n) != blocks_up(key_blocks, n - 1)]
        splits = most_efficient(small, slots, eligible)
    blocks = small * splits if splits > 1 else heads * blocks_up(queries, 128)
    return filled(splits, blocks, slots, key_blocks)


def flash_attention_3(queries: int, heads: int, keys: int, processors: int) -> Row:
    """Blocks of 192 rows and 128 keys, one on a processor; where it is asked to choose: else one split."""
    blocks, key_blocks = heads * blocks_up(queries, 192), blocks_up(keys, 128)
    splits = 1
    if blocks < 0.8 * processors and key_blocks > 4:
        highest = min(128, processors, key_blocks)
        splits = most_efficient(blocks, processors, list(range(1, highest + 1)))
    return filled(splits, blocks * splits, processors, key_blocks)


def ours(problem: Problem, device: Device) -> tuple[Row, Row]:
    """Forward and backward."""

    def run(tile: Tile, blocks: int, count: int) -> Row:
        slots = device.processors * tile.per_processor(device)
        return filled(count, blocks * count, slots, blocks_up(problem.keys, tile.block_n))

    tile, splits = plan_forward(problem, device)
    forward = run(tile, blocks_up(problem.rows, tile.block_m) * problem.kv_heads, splits)
    tile, _, runs = plan_backward(problem, device)
    return forward, run(tile, problem.kv_heads, runs)


def rows() -> Iterator[Row]:
    """Every shape on both GPUs."""
    for gpu, device in DEVICES.items():
        for queries, heads, keys in itertools.product(QUERIES, HEADS, KEYS):
            problem = Problem(torch.bfloat16, 1, heads, heads, queries, keys, DIM, DIM, False)
            forward, backward = ours(problem, device)
            shape = (queries, heads, keys, device.processors)
            yield {
                "gpu": gpu, "queries": queries, "heads": heads, "keys": keys, "forward": forward,
                "backward": backward, "fa2": flash_attention_2(*shape), "fa3": flash_attention_3(*shape),
            }  # fmt: skip


def reason(row: Row, direction: str) -> str:
    """Why less than ENOUGH of the last wave is filled; empty where it is."""
    plan = row[direction]
    if plan["last"] >= ENOUGH:
        return ""
    if plan["all"] >= ENOUGH:
        return f"the last of {plan['waves']} waves is {1 - plan['all']:.1%} of the whole"
    if plan["steps"] == 1:
        return "every block of keys is a run"
    shorter = blocks_up(plan["key_blocks"], plan["steps"] - 1)  # runs, so that each has a block less
    if plan["blocks"] // plan["splits"] * shorter > plan["waves"] * plan["slots"]:
        return f"{shorter} runs, the next that are shorter, would begin another wave"
    return f"{shorter} runs, the next that are shorter, cost more to merge than they save"


def table(found: list[Row]) -> Iterator[str]:
    """Markdown lines."""
    yield (
        "| GPU | M | B x H | N | forward: splits, blocks, waves, last wave | FA-2 | FA-3 "
        "| backward: runs, blocks, waves, last wave | where less than 0.9 of the last wave is filled |"
    )
    yield "|---|--:|--:|--:|---|---|---|---|---|"
    for row in found:

        def cell(plan: Row) -> str:
            return f"{plan['splits']}, {plan['blocks']}, {plan['waves']}, {plan['last']:.2f}"

        notes = [f"{name}: {text}" for name in ("forward", "backward") if (text := reason(row, name))]
        keys = f"{row['keys'] >> 10}k" if row["keys"] < 1 << 20 else "1M"
        yield (
            f"| {row['gpu']} | {row['queries']} | {row['heads']} | {keys} | {cell(row['forward'])} "
            f"| {cell(row['fa2'])} | {cell(row['fa3'])} | {cell(row['backward'])} | {'; '.join(notes)} |"
        )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filling", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    found = list(rows())
    print("\n".join(table(found)))
    given = sys.argv[1:] if arguments is None else arguments
    origin = {key: value for key, value in provenance().items() if key != "machine"}
    result = {**origin, "command": shlex.join(["python", "-m", "benchmarks.filling", *given]), "rows": found}
    if options.json:
        write_json(options.json, result)
    if options.markdown:
        head = (
            "# How the splits fill a GPU\n\n"
            f"commit {(result['commit'] or '?')[:12]}, {result['date'][:10]}, `{result['command']}`; "
            "arithmetic alone, head dim 64. Columns: parts that the keys are cut into, blocks, waves, and "
            "how full the last wave is. FlashAttention's are its own rules for the forward; version 3 "
            "follows its rule only where it is asked to choose, by default it doesn't split.\n\n"
        )
        options.markdown.write_text(head + "\n".join(table(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
