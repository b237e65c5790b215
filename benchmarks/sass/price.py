"""A compiled kernel's price: what it takes of an SM, how near its loops come to the tensor cores' peak."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import issue
from .flow import BLOCK_TENSOR, TENSOR, WARP_TENSOR, Loop, tensor_loops
from .listing import Function, disassemble
from .machines import MACHINES, Machine, group, pipes, products
from .resources import LIMITS, Resources, occupancy

_SCHEDULERS = 4  # sub-partitions of an SM


@dataclass(frozen=True)
class LoopReport:
    """One innermost tensor loop. Fractions are of the data sheet's dense tensor peak; None: no machine table.

    Of roles that a block's warps share out, counts are the mean.

    ``bound``: if the busiest pipe never idled. ``single_warp``: one warp alone, stall counts only.
    ``simulated``: the resident warps together, mean over several offsets of the blocks (``cycles``).
    """

    address: int
    instructions: int
    cold_instructions: int
    tensor_instructions: int
    products: float | None  # of a warp, in tiles of 16 x 8 over 32 bytes of K; None: a block's, not a warp's
    mix: dict[str, int]
    pipes: dict[str, float]  # cycles per iteration and warp on one sub-partition
    stall_cycles: int
    limiter: str | None
    bound: float | None
    single_warp: float | None
    simulated: float | None
    cycles: tuple[float, ...]

    @property
    def per_tensor(self) -> float:
        """Instructions per tensor-core instruction, itself included."""
        return self.instructions / self.tensor_instructions


@dataclass(frozen=True)
class Report:
    """One kernel on one architecture, at ``threads`` per block and ``shared`` bytes per block in all."""

    function: str
    arch: int
    threads: int
    shared: int
    resources: Resources
    instructions: int
    ctas_per_sm: int
    warps_per_sm: int
    occupancy_limiter: str
    loops: tuple[LoopReport, ...]

    @property
    def registers(self) -> int:
        """Per thread."""
        return self.resources.registers

    @property
    def stack(self) -> int:
        """Bytes per thread."""
        return self.resources.stack

    @property
    def spill_instructions(self) -> int:
        """Local loads and stores, wherever they stand."""
        return self.resources.spill_loads + self.resources.spill_stores

    @property
    def simulated(self) -> float | None:
        """The slowest loop's fraction."""
        fractions = [loop.simulated for loop in self.loops if loop.simulated is not None]
        return min(fractions, default=None)

    def as_json(self) -> dict[str, Any]:
        """Plain data, with what is derived."""
        return asdict(self) | {
            "simulated": self.simulated,
            "loops": [asdict(loop) | {"per_tensor": loop.per_tensor} for loop in self.loops],
        }


def price_loop(
    loop: Loop, machine: Machine | None, warps: int, warps_per_block: int, simulate: bool = True
) -> LoopReport:
    """``warps`` warps on each sub-partition, ``warps_per_block`` of a block."""
    hot = [each for role in loop.roles for each in role]
    mean = 1 / len(loop.roles)
    mix = Counter(group(instruction) for instruction in hot)
    stalls = sum(max(1, instruction.stall) for instruction in hot) * mean
    used: dict[str, float] = {}
    limiter = bound = single = simulated = None
    cycles: tuple[float, ...] = ()
    if machine is not None:
        for instruction in hot:
            for pipe, cost in pipes(instruction, machine).items():
                used[pipe] = used.get(pipe, 0.0) + cost * mean
        limiter, busiest = max(used.items(), key=lambda item: item[1])
        by_warps = any(each.base in WARP_TENSOR for each in hot)
        peak = machine.warp_mma_at_peak / machine.warp_mma if by_warps else 1.0
        work = used["tensor"] * peak
        bound, single = work / busiest, work / stalls
        if simulate and warps:
            skews = (0.0, stalls // 4, stalls // 2) if warps > warps_per_block else (0.0,)
            cycles = tuple(
                issue.cycles_per_iteration(loop.roles, machine, warps, warps_per_block, skew)
                for skew in skews
            )
            simulated = warps * work * len(cycles) / sum(cycles)
    tensor = [each for each in hot if each.base in TENSOR]
    return LoopReport(
        address=loop.address,
        instructions=round(len(hot) * mean),
        cold_instructions=len(loop.cold),
        tensor_instructions=round(len(tensor) * mean),
        products=None if {each.base for each in tensor} & BLOCK_TENSOR else sum(map(products, tensor)) * mean,
        mix={kind: round(count * mean) for kind, count in mix.most_common()},
        pipes=dict(sorted(used.items(), key=lambda item: -item[1])),
        stall_cycles=round(stalls),
        limiter=limiter,
        bound=bound,
        single_warp=single,
        simulated=simulated,
        cycles=cycles,
    )


def price_function(
    function: Function, threads: int | None = None, shared: int = 0, simulate: bool = True
) -> Report:
    """``shared``: a launch's dynamic bytes per block. ``threads``: by default what the launch bounds say."""
    threads = threads or function.resources.threads
    if threads is None:
        raise ValueError(f"{function.name} has no launch bounds: say how many threads a block has")
    total = function.resources.shared + shared
    fit = occupancy(LIMITS[f"sm_{function.arch}"], function.resources.registers, total, threads)
    warps = max(1, fit.warps // _SCHEDULERS) if fit.blocks else 0
    per_block = max(1, threads // (32 * _SCHEDULERS))
    machine = MACHINES.get(function.arch)
    loops = tensor_loops(function.instructions)
    return Report(
        function=function.name,
        arch=function.arch,
        threads=threads,
        shared=total,
        resources=function.resources,
        instructions=len(function.instructions),
        ctas_per_sm=fit.blocks,
        warps_per_sm=fit.warps,
        occupancy_limiter=fit.limiter,
        loops=tuple(price_loop(loop, machine, warps, per_block, simulate) for loop in loops),
    )


def price_all(
    source: Path | str | bytes,
    function: str | None = None,
    threads: int | None = None,
    shared: int = 0,
    arch: int | None = None,
    simulate: bool = True,
) -> list[Report]:
    """Every function of a cubin (path or bytes) whose name matches the regular expression ``function``."""
    return [
        price_function(each, threads, shared, simulate)
        for each in disassemble(source)
        if (function is None or re.search(function, each.name)) and arch in (None, each.arch)
    ]


def price(
    source: Path | str | bytes,
    function: str | None = None,
    threads: int | None = None,
    shared: int = 0,
    arch: int | None = None,
    simulate: bool = True,
) -> Report:
    """Like :func:`price_all` where exactly one function matches."""
    reports = price_all(source, function, threads, shared, arch, simulate)
    if len(reports) != 1:
        names = ", ".join(f"{report.function} (sm_{report.arch})" for report in reports) or "none"
        raise ValueError(f"one function wanted, found {names}")
    return reports[0]
