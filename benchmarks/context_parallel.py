"""What context parallel costs: bytes sent and memory, planned and measured.

    python benchmarks/context_parallel.py plan                      the tables of docs/scaling.md
    unshare -rn sh -c 'ip link set lo up; exec python benchmarks/context_parallel.py measure --json FILE'

``measure`` runs forward and backward on 2, 3 and 4 gloo processes. The network namespace that unshare makes
has a loopback of its own, whose counters show what really went over it: payload, TCP headers and all.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import perceiver_kernels as pk
from perceiver_kernels.cli.machine import provenance
from perceiver_kernels.cli.memory import peak_growth
from perceiver_kernels.cli.report import Result, out, progress, write_json

RANKS = (2, 3, 4)
LENGTHS = (8192, 131072)
HEADS, QUERIES, DIM = 8, 1024, 64  # measured, bfloat16


def sent_bytes(
    ranks: int, rows: int, value_dim: int, element: int, *, with_lse: bool = False
) -> tuple[int, int]:
    """Payload that each rank sends in a forward and in a backward; ``rows`` are B H M.

    Each of ``ranks - 1`` others gets one block of the rows twice: first to be reduced, then reduced.
    Forward's blocks are out and lse (float32, 8 bytes for float64 elements), backward's the gradient of out,
    and of lse where it was asked for.
    """
    lse = max(element, 4)
    forward = -(-rows // ranks) * (value_dim * element + lse)
    backward = -(-rows * value_dim // ranks) * element + with_lse * -(-rows // ranks) * lse
    return 2 * (ranks - 1) * forward, 2 * (ranks - 1) * backward


def plan() -> None:
    """Tables for one layer of 16 heads of 64 channels, M = 1024, one example, bfloat16."""
    heads, queries, dim, element = 16, 1024, 64, 2
    rows = heads * queries
    out.print("| N | ranks | keys a rank | K, V, dK, dV | sent a step | messages of | attention FLOP |")
    out.print("|--:|--:|--:|--:|--:|--:|--:|")
    for total in (2**20, 10**8, 10**9):
        for ranks in (1, 8, 64, 512, 4096):
            keys = -(-total // ranks)
            sent = sum(sent_bytes(ranks, rows, dim, element))
            message = -(-rows // ranks) * (dim * element + 4)
            work = 14 * rows * keys * dim
            sizes = f"{_bytes(4 * heads * keys * dim * element)} | {_bytes(sent)} | {_bytes(message)}"
            sizes = sizes if ranks > 1 else sizes.rsplit("|", 1)[0] + "| -"
            out.print(f"| {total:,} | {ranks:,} | {keys:,} | {sizes} | {work:.1e} |")


def _bytes(count: float) -> str:
    power = 0 if count < 1 else min(int(math.log10(count) / 3), 4)
    return f"{count / 1000**power:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


def measure(args: argparse.Namespace) -> Result:
    """Rows of bytes and memory over ranks and N."""
    command = shlex.join(["python", "benchmarks/context_parallel.py", *sys.argv[1:]])
    rows: list[dict[str, Any]] = []
    result = {**provenance(), "command": command, "rows": rows}
    with progress() as bar:
        task = bar.add_task("processes", total=len(RANKS))
        for ranks in RANKS:
            with mp.Manager() as manager:
                into = manager.list()
                mp.spawn(_process, (ranks, _free_port(), into), nprocs=ranks)
                rows += sorted(into, key=lambda row: row["keys"])
            bar.advance(task)
    for row in rows:
        out.print(row)
    if args.json:
        write_json(args.json, result)
    return result


def _process(rank: int, ranks: int, port: int, into: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    for total in (64, *LENGTHS):  # the first warms up
        keys = total * (rank + 1) // ranks - total * rank // ranks
        query = torch.randn(1, HEADS, QUERIES, DIM, dtype=torch.bfloat16).requires_grad_()
        key, value = (torch.randn(1, HEADS, keys, DIM, dtype=torch.bfloat16).requires_grad_() for _ in "kv")

        def step(q: Any = query, k: Any = key, v: Any = value) -> Any:
            pk.context_parallel_attention(q, k, v).sum().backward()

        idle = _over_loopback(lambda: None)
        wire = _over_loopback(step) - idle
        query.grad = key.grad = value.grad = None
        growth = peak_growth(step)
        if rank == 0 and total in LENGTHS:
            sent = sum(sent_bytes(ranks, HEADS * QUERIES, DIM, 2)) + (ranks - 1) * 20 * 8
            gradients = sum(t.numel() * t.element_size() for t in (key, value))
            into.append(
                {
                    "ranks": ranks,
                    "keys": total,
                    "planned_bytes_per_rank": sent,
                    "wire_bytes_per_rank": round(wire / ranks),
                    "peak_growth_bytes": growth,
                    "of_which_dk_dv_bytes": gradients,
                }
            )
    dist.destroy_process_group()


def _over_loopback(action: Any) -> int:
    """Bytes that all ranks together sent while they ran this; with what two barriers send."""
    dist.barrier()
    before = _loopback()
    dist.barrier()
    action()
    dist.barrier()
    return _loopback() - before


def _loopback() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    raise KeyError("lo")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("plan", "measure"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    plan() if args.what == "plan" else measure(args)


if __name__ == "__main__":
    main()
