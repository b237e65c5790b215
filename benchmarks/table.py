"""Print the README's table from result files: `python benchmarks/table.py benchmarks/results/*.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(paths: list[str]) -> None:
    """One Markdown table for each file written by `perceiver-kernels bench --json`."""
    for path in paths:
        result = json.loads(Path(path).read_text())
        if "rows" not in result:
            continue
        where = result["machine"]
        print(
            f"{where['cpu']}, {where['threads']} threads, {where['isa']}, torch {where['torch']}, "
            f"commit {(result['commit'] or '?')[:12]}, {result['date'][:10]}, `{result['command']}`:\n"
        )
        print("| problem | dtype, pass | candidate | median | GFLOP/s | of FMA peak | vs SDPA | peak MiB |")
        print("|---|---|---|--:|--:|--:|--:|--:|")
        for row in result["rows"]:
            if "median_s" not in row:
                continue
            share = "-" if row["peak_fraction"] is None else f"{row['peak_fraction']:.0%}"
            speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
            memory = "-" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 2**20:,.0f}"
            print(
                f"| {row['shape']} | {row['dtype']} {row['pass']} | {row['candidate']} | "
                f"{1e3 * row['median_s']:,.1f} ms | {row['gflops']:,.1f} | {share} | {speedup} | {memory} |"
            )
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
