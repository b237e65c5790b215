"""What the CUDA kernels of the built library cost, without a GPU: registers, spills, loops.

    python -m benchmarks.static_cuda                       the installed library, every kernel in bfloat16
    python -m benchmarks.static_cuda --quick               head dims 64 and 128 without options
    python -m benchmarks.static_cuda --library FILE --json F --markdown F

Exits with 1 if a loop spills registers and isn't on the list of known spills, or a block needs more shared
memory than there is on every GPU that the code runs on.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.sass.listing import Function, disassemble
from benchmarks.sass.price import price_function
from benchmarks.sass.resources import LIMITS
from perceiver_kernels import _library
from perceiver_kernels.cli.machine import provenance
from perceiver_kernels.cli.report import err, progress, write_json

Row = dict[str, Any]
LIBRARY = Path(_library.__file__).with_name("_C_cuda.so")
PRICED = (80, 90)  # those of which benchmarks.sass has a machine table
UNLIMITED = 1 << 30
ROOMY = ("sm_80", "sm_90", "sm_100")  # where every kernel's shared memory must fit
# Instructions in a loop, at most, on any of the GPUs: ptxas shares registers out differently for each. On
# sm_80, for which the tiles were chosen, the loop without masks or options never spills.
KNOWN_SPILLS = {
    ("attention_forward", 96, "score"): 3,
    ("attention_forward", 128, ""): 17,
    ("attention_forward", 128, "score"): 13,
    ("attention_backward", 64, ""): 5,
    ("attention_backward", 64, "score"): 54,
    ("attention_backward", 96, "score"): 1,
    ("attention_backward", 128, ""): 17,
    ("attention_backward", 128, "score"): 31,
    ("attention_backward", 192, ""): 4,
    ("attention_backward", 192, "score"): 9,
    ("Hopper attention_backward", 128, "score"): 23,
}
_PRODUCT = 16 * 8 * 16  # multiply-adds of what the price counts products in
_HOPPER = "Hopper "  # begins the names of kernels that are compiled for it alone


@dataclass(frozen=True)
class Rival:
    """FlashAttention-2 on an A100 by the same model, causal: of the peak, instructions per HMMA."""

    share: float
    per_tensor: float


FLASH_ATTENTION_2 = {
    ("attention_forward", 64): Rival(0.72, 4.56),
    ("attention_forward", 128): Rival(0.77, 3.57),
    ("attention_backward", 64): Rival(0.64, 4.01),
    ("attention_backward", 128): Rival(0.71, 3.05),
}


@dataclass(frozen=True)
class Kernel:
    """An instantiation, by its mangled name. ``work``: multiply-adds of a warp in one step of its loop.

    ``threads``: those of a block that run the loop, where others only copy for them.
    """

    verb: str
    dim: int
    tile: str
    has_score: bool
    shared: int
    work: float
    threads: int | None = None


def parse(name: str) -> Kernel | None:
    """The bfloat16 ones; float16 compiles alike."""
    if "__nv_bfloat16" not in name:
        return None
    numbers = [int(n) for n in re.findall(r"L[ib](\d+)E", name)]
    ops, bf16 = torch.ops.perceiver_kernels, torch.bfloat16
    if "hopper" in name and "attention_" in name:
        dim, has_score = numbers
        if "forward" in name:
            verb, products = "attention_forward", 2
            sizes = ops.cuda_forward_tile(bf16, dim, 1024, bool(has_score), 90, UNLIMITED)
        else:
            verb, products = "attention_backward", 5
            sizes = ops.cuda_backward_tile(bf16, dim, bool(has_score), 90, UNLIMITED)
        rows, keys, threads, shared = sizes[:4]
        computing = threads - 128  # the first warp group copies
        work = products * rows * keys * dim / (computing / 32)
        tile = f"{rows}x{keys} w{computing // 32} + 4"
        return Kernel(_HOPPER + verb, dim, tile, bool(has_score), shared, work, computing)
    if "attention_forward" in name:
        dim, rows, keys, row_warps, key_warps, stages, _, has_score = numbers
        found = (
            ops.cuda_forward_tile(bf16, dim, count, bool(has_score), 80, limit)
            for count in (1, 1024) for limit in (UNLIMITED, LIMITS["sm_86"].shared_per_block)
        )  # fmt: skip
        shared = next(shared for block_m, _, _, shared in found if block_m == rows)
        tile = f"{rows}x{keys} w{row_warps}x{key_warps} st{stages}"
        work = 2 * rows * keys * dim / (row_warps * key_warps)
        return Kernel("attention_forward", dim, tile, bool(has_score), shared, work)
    if "attention_backward" in name:
        dim, rows, key_tiles, key_warps, roles, step, *_, has_score = numbers
        keys = 16 * key_tiles * key_warps
        shared = ops.cuda_backward_tile(bf16, dim, bool(has_score), 80, UNLIMITED)[3]
        work = 5 * rows * keys * dim / (key_warps * roles)
        tile = f"{rows}x{keys} w{key_warps}x{roles} by {step}"
        return Kernel("attention_backward", dim, tile, bool(has_score), shared, work)
    verbs = (verb for verb in ("combine_splits", "pack_rows", "reduce_slabs") if verb in name)
    verb = next(verbs, None)
    return Kernel(verb, numbers[0] if numbers else 0, "", False, 0, 0.0) if verb else None


def measure(function: Function, kernel: Kernel) -> Row:
    """One row."""
    threads = kernel.threads or (None if function.resources.threads else 128)
    report = price_function(function, threads, kernel.shared, simulate=function.arch in PRICED)
    loops = []
    for loop in sorted(report.loops, key=lambda each: each.address):
        loops.append({
            "instructions": loop.instructions, "tensor": loop.tensor_instructions,
            "per_tensor": loop.per_tensor, "spills": loop.mix.get("spill", 0), "limiter": loop.limiter,
            "simulated": loop.simulated, "useful": kernel.work / _PRODUCT / loop.products,
        })  # fmt: skip
    return {
        "arch": f"sm_{function.arch}", "kernel": kernel.verb, "dim": kernel.dim, "tile": kernel.tile,
        "option": "score" if kernel.has_score else "", "registers": report.registers,
        "spills": report.spill_instructions, "shared": report.shared, "blocks": report.ctas_per_sm,
        "warps": report.warps_per_sm, "loops": loops,
    }  # fmt: skip


def fault(row: Row) -> str | None:
    """What is wrong with a row, None where nothing is."""
    known = KNOWN_SPILLS.get((row["kernel"], row["dim"], row["option"]), 0)
    spills = [loop["spills"] for loop in row["loops"]]
    strict = row["arch"] == "sm_80" and not row["option"]
    if spills and (max(spills) > known or (strict and (full(row) or {})["spills"])):
        return f"{' and '.join(map(str, spills))} spills in its loops"
    if row["shared"] > LIMITS[row["arch"]].shared_per_block and row["arch"] in ROOMY:
        return f"needs {row['shared']} bytes of shared memory"
    return None


def full(row: Row) -> Row | None:
    """The loop that carries no mask: the forward's first, the backward's last."""
    if not row["loops"]:
        return None
    found: Row = row["loops"][0 if row["kernel"].endswith("forward") else -1]
    return found


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Markdown lines."""
    yield (
        "| GPU | kernel | D | option | tile | registers | spills, in each loop | shared KiB | blocks/SM "
        "| instructions/HMMA | useful/issued HMMA | of tensor peak, by the model | limited by "
        "| FA-2: instructions/HMMA, of peak |"
    )
    yield "|---|---|--:|---|---|--:|--:|--:|--:|--:|--:|--:|---|---|"
    for row in rows:
        loop = full(row)
        plain = row["arch"] == "sm_80" and not row["option"] and not row["tile"].startswith("16x")
        rival = FLASH_ATTENTION_2.get((row["kernel"], row["dim"])) if plain else None
        cells = ["", "", "", ""]
        spills = ", ".join(map(str, [row["spills"], *(each["spills"] for each in row["loops"])]))
        if loop is not None:
            share = "" if loop["simulated"] is None else f"{loop['simulated']:.2f}"
            cells = [f"{loop['per_tensor']:.2f}", f"{loop['useful']:.2f}", share, loop["limiter"] or ""]
        yield (
            f"| {row['arch']} | {row['kernel']} | {row['dim'] or ''} | {row['option']} | {row['tile']} "
            f"| {row['registers']} | {spills} | {row['shared'] / 1024:.0f} | {row['blocks']} "
            f"| {' | '.join(cells)} | {f'{rival.per_tensor:.2f}, {rival.share:.2f}' if rival else ''} |"
        )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_cuda", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--library", type=Path, default=LIBRARY, metavar="FILE", help="default: the installed one"
    )
    parser.add_argument("--quick", action="store_true", help="head dims 64 and 128 without options")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if _library.cuda_missing is not None:
        parser.error(_library.cuda_missing)
    todo = [(each, kernel) for each in disassemble(options.library) if (kernel := parse(each.name))]
    if options.quick:
        todo = [(each, kernel) for each, kernel in todo if kernel.dim in (64, 128) and not kernel.has_score]
    todo.sort(key=lambda pair: (pair[0].arch, pair[1].verb, pair[1].dim, pair[1].has_score, pair[1].tile))
    rows: list[Row] = []
    with progress() as bar:
        for each, kernel in bar.track(todo, description="price"):
            rows.append(measure(each, kernel))
    print("\n".join(table(rows)))
    given = sys.argv[1:] if arguments is None else arguments
    origin = {key: value for key, value in provenance().items() if key != "machine"}
    command = shlex.join(["python", "-m", "benchmarks.static_cuda", *given])
    if options.json:
        write_json(options.json, {**origin, "command": command, "rows": rows})
    if options.markdown:
        options.markdown.write_text(
            f"# What the CUDA kernels compile to\n\ncommit {(origin['commit'] or '?')[:12]}, "
            f"{origin['date'][:10]}, `{command}`; no GPU took part. The loop is the one without masks; "
            "score: with the code of soft cap and dropout. FA-2 is FlashAttention-2, causal, by the same "
            "model. Hopper kernels: HGMMA instead of HMMA; the warps that copy are left out.\n\n"
            + "\n".join(table(rows)) + "\n"
        )  # fmt: skip
    faults = [(row, problem) for row in rows if (problem := fault(row))]
    for row, problem in faults:
        err.print(
            f"{row['arch']} {row['kernel']} D{row['dim']} {row['option']} {row['tile']}: {problem}",
            markup=False,
        )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
