"""Simulated issue of a loop's instructions by the warps that one sub-partition of an SM holds.

In order within a warp; one instruction per cycle; the warp that issued last goes on as long as it can, else
the oldest that can issue. A warp waits for its stall count, for the scoreboards in its wait mask, for full
pipes, for asynchronous copies and warpgroup products at its DEPBARs, and for others of its block at barriers.
Not modelled: caches, bank conflicts, register ports, instruction fetch, mbarriers, barriers whose number is
in a register, and cold blocks.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .flow import GROUP_TENSOR
from .listing import NO_BARRIER, Instruction
from .machines import Machine, pipes

ROUNDS = 10  # iterations per warp; the first three warm the pipes up
WARM_UP = 3
MEMORY_QUEUE = 8  # memory instructions that a sub-partition accepts ahead of their service
SPECIAL_QUEUE = 2
OPERANDS_READ = 4  # cycles from service to the release of the read barrier
LOOP_BRANCH = 5  # cycles from the last instruction to the first of the next iteration
BARRIER = 25  # cycles from the last warp's arrival
GROUPS_KEPT = 8  # at most so many outstanding copies or products matter
_BARRIER = re.compile(r"(0x[0-9a-f]+)(?:, (0x[0-9a-f]+))?")  # number, threads
_WARPS_APART = 128  # threads of a block for each of its warps on one sub-partition


class _Step(NamedTuple):
    """What the simulation needs of one instruction."""

    held: tuple[tuple[str, float], ...]  # pipes that must be free, with cycles
    queued: tuple[tuple[str, float], ...]  # pipes that take work ahead of its service
    l2: float
    latency: float  # cycles from service to result
    source: str  # the pipe whose service the latency follows; none: it follows the issue
    stall: int
    waits: tuple[int, ...]
    write_barrier: int
    read_barrier: int
    action: str  # "copy", "commit", "wait copies", "product", "wait products", "barrier", "arrive" or none
    keep: int  # groups that a wait leaves outstanding
    barrier: tuple[int, int | None]  # number, and warps that meet there; None: the whole block


@dataclass
class _Warp:
    block: int
    steps: list[_Step]
    ready: float
    step: int = 0
    issued: int = 0
    at_barrier: bool = False
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    last_copy: float = 0
    copies: deque[float] = field(default_factory=lambda: deque(maxlen=GROUPS_KEPT))
    products: deque[float] = field(default_factory=lambda: deque(maxlen=GROUPS_KEPT))


def _action(instruction: Instruction, barrier: re.Match[str] | None) -> str:
    base, opcode = instruction.base, instruction.opcode
    if base == "WARPGROUP" and "DEPBAR" in opcode:
        return "wait products"
    if barrier:
        return "arrive" if "ARV" in opcode else "barrier"
    if base in GROUP_TENSOR:
        return "product" if "gsb" in instruction.operands else ""  # only the last of a group signals
    return {"LDGSTS": "copy", "LDGDEPBAR": "commit", "DEPBAR": "wait copies"}.get(base, "")


def _step(instruction: Instruction, machine: Machine) -> _Step:
    used = pipes(instruction, machine)
    named = _BARRIER.match(instruction.operands) if instruction.base == "BAR" else None
    action = _action(instruction, named)
    queues = ["memory", "special"]
    if instruction.base in GROUP_TENSOR:
        queues.append("tensor")
    latency = machine.latency_other
    if "l2" in used:
        latency = machine.latency_copy if action == "copy" else machine.latency_global
    elif "tensor" in used:
        latency = machine.latency_tensor
    elif "special" in used:
        latency = machine.latency_special
    elif "memory" in used:
        latency = machine.latency_shuffle if instruction.base == "SHFL" else machine.latency_shared
    keep = re.search(r", (0x[0-9a-f]+)\s*$", instruction.operands) if action.startswith("wait") else None
    return _Step(
        held=tuple((pipe, cost) for pipe, cost in used.items() if pipe not in ("issue", "l2", *queues)),
        queued=tuple((pipe, cost) for pipe, cost in used.items() if pipe in queues),
        l2=used.get("l2", 0),
        latency=latency,
        source=next((pipe for pipe in ("tensor", "special", "memory") if pipe in used), ""),
        stall=max(1, instruction.stall),
        waits=instruction.waits,
        write_barrier=NO_BARRIER if action == "commit" else instruction.write_barrier,
        read_barrier=instruction.read_barrier,
        action=action,
        keep=int(keep[1], 16) if keep else 0,
        barrier=(int(named[1], 16), int(named[2], 16) // _WARPS_APART if named[2] else None)
        if named
        else (0, None),
    )


class _Partition:
    """The pipes of one sub-partition, with the time at which each is free."""

    def __init__(self) -> None:
        self.free: dict[str, float] = {}
        self.l2_free = 0.0
        self.queues: dict[str, deque[float]] = {
            "memory": deque([0.0] * MEMORY_QUEUE, MEMORY_QUEUE),
            "special": deque([0.0] * SPECIAL_QUEUE, SPECIAL_QUEUE),
        }

    def accepts(self, step: _Step) -> float:
        """When the pipes take this instruction; a full queue takes one more when its oldest is served."""
        when = 0.0
        for pipe, _ in step.held:
            when = max(when, self.free.get(pipe, 0.0))
        for pipe, _ in step.queued:
            if pipe in self.queues:
                when = max(when, self.queues[pipe][0])
        return when

    def serve(self, step: _Step, now: float) -> tuple[float, float]:
        """Occupies the pipes; when the operands have been read and when the result is there."""
        read, served = now + OPERANDS_READ + 2, now
        for pipe, cost in (*step.held, *step.queued):
            # Issue is by whole cycles; a pipe that got free within the last one works on without a gap.
            free = self.free.get(pipe, 0.0)
            start = free if free > now - 1 else now
            self.free[pipe] = start + cost
            if pipe == step.source:
                served = start + cost
            if pipe in self.queues:
                self.queues[pipe].append(start + cost)
                read = start + cost + OPERANDS_READ
        if step.l2:
            served = self.l2_free = max(self.l2_free, now) + step.l2
        return read, served + step.latency


def cycles_per_iteration(
    roles: Sequence[Sequence[Instruction]],
    machine: Machine,
    warps: int,
    warps_per_block: int,
    skew: float = 0,
) -> float:
    """Cycles in which each of ``warps`` warps on one sub-partition does one iteration.

    ``warps_per_block`` of them are one block's and meet at its barriers; blocks start ``skew`` cycles apart.
    A block's warps share the ``roles`` out in equal parts, in order.
    """
    if warps_per_block % len(roles):
        raise ValueError(f"{warps_per_block} warps of a block can't have {len(roles)} roles in equal parts")
    programs = [[_step(instruction, machine) for instruction in role] for role in roles]
    partition = _Partition()
    crew = [
        _Warp(block, programs[place * len(roles) // warps_per_block], block * skew)
        for block, place in (divmod(index, warps_per_block) for index in range(warps))
    ]
    meetings: dict[tuple[int, int], list[_Warp | None]] = {}
    now, iterations = 0.0, 0
    begun: tuple[float, list[int]] | None = None
    current: _Warp | None = None
    while iterations < warps * ROUNDS:
        if begun is None and iterations >= WARM_UP * warps:
            begun = (now, [warp.issued for warp in crew])
        soonest, chosen = float("inf"), None
        for warp in [current, *crew] if current else crew:
            if warp.at_barrier:
                continue
            when = _ready(warp, warp.steps[warp.step], partition)
            if when <= now:
                chosen = warp
                break
            soonest = min(soonest, when)
        if chosen is None:
            if soonest == float("inf"):
                raise RuntimeError("every warp waits at a barrier")
            now = float(-(-soonest // 1))
            continue
        current, step = chosen, chosen.steps[chosen.step]
        _issue(chosen, step, partition, now)
        if step.action in ("barrier", "arrive"):
            number, count = step.barrier
            _meet(
                chosen, step, meetings.setdefault((chosen.block, number), []), count or warps_per_block, now
            )
        chosen.issued += 1
        chosen.step += 1
        if chosen.step == len(chosen.steps):
            chosen.step = 0
            chosen.ready += LOOP_BRANCH
            iterations += 1
        now += 1
    assert begun is not None
    # All warps' instructions count, so a warp that ran ahead doesn't distort the result.
    done = sum((w.issued - before) / len(w.steps) for w, before in zip(crew, begun[1], strict=True))
    return (now - begun[0]) * warps / done


def _meet(warp: _Warp, step: _Step, there: list[_Warp | None], count: int, now: float) -> None:
    """A warp at a barrier: waits, or only says that it has come; the last of ``count`` lets all go on."""
    if step.action == "barrier":
        warp.at_barrier = True
    there.append(warp if step.action == "barrier" else None)
    if len(there) >= count:
        for each in filter(None, there):
            each.at_barrier = False
            each.ready = max(each.ready, now + BARRIER)
        there.clear()


def _ready(warp: _Warp, step: _Step, partition: _Partition) -> float:
    """When this warp can issue its next instruction."""
    when = max(warp.ready, partition.accepts(step))
    for barrier in step.waits:
        when = max(when, warp.scoreboards[barrier])
    if step.action.startswith("wait"):
        groups = sorted(warp.copies) if step.action == "wait copies" else list(warp.products)
        if len(groups) > step.keep:
            when = max(when, groups[len(groups) - step.keep - 1])
    return when


def _issue(warp: _Warp, step: _Step, partition: _Partition, now: float) -> None:
    read, done = partition.serve(step, now)
    if step.action == "copy":
        warp.last_copy = max(warp.last_copy, done)
    elif step.action == "commit":
        warp.copies.append(warp.last_copy)
    elif step.action == "product":
        warp.products.append(done)
    if step.write_barrier != NO_BARRIER:
        warp.scoreboards[step.write_barrier] = max(warp.scoreboards[step.write_barrier], done)
    if step.read_barrier != NO_BARRIER:
        warp.scoreboards[step.read_barrier] = max(warp.scoreboards[step.read_barrier], read)
    warp.ready = now + step.stall
