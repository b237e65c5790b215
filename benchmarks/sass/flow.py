"""Control flow of a function, and its innermost loops that run the tensor cores."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .listing import Instruction

# HMMA...OMMA: a warp's own; the G ones a warpgroup's (Hopper); UTC ones a block's (Blackwell).
WARP_TENSOR = frozenset(("HMMA", "IMMA", "DMMA", "QMMA", "OMMA"))
GROUP_TENSOR = frozenset(("HGMMA", "IGMMA", "QGMMA", "BGMMA"))
BLOCK_TENSOR = frozenset(("UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA", "UTCMXQMMA"))
TENSOR = WARP_TENSOR | GROUP_TENSOR | BLOCK_TENSOR
_ENDS = frozenset(("BRA", "BRX", "JMP", "JMX", "EXIT", "RET"))
_LOADS = frozenset(("LDG", "LDGSTS", "RED", "REDG", "UTMALDG", "UBLKCP"))
_OPERAND_PREDICATE = re.compile(r"(!?)(U?P\d)")


@dataclass(frozen=True)
class Graph:
    """Basic blocks as [start, end) of instruction indices, and edges between them. Block 0 is the entry."""

    blocks: list[tuple[int, int]]
    successors: list[list[int]]
    predecessors: list[list[int]]


@dataclass(frozen=True)
class Loop:
    """``roles``: what every iteration does; several where a block's warps take different branches for good.

    ``cold``: conditional code without tensor work or global loads.
    """

    address: int
    roles: tuple[tuple[Instruction, ...], ...]
    cold: tuple[Instruction, ...]


def _is_conditional(instruction: Instruction) -> bool:
    guarded = instruction.predicate not in ("", "@PT")
    return guarded or ".DIV" in instruction.opcode or bool(_OPERAND_PREDICATE.match(instruction.operands))


def graph(code: Sequence[Instruction]) -> Graph:
    """Blocks begin at branch targets and after branches."""
    at = {instruction.address: index for index, instruction in enumerate(code)}
    leaders = {0}
    for index, instruction in enumerate(code):
        if instruction.base in _ENDS:
            leaders.add(index + 1)
        if instruction.base == "BRA" and instruction.target in at:
            leaders.add(at[instruction.target])
    starts = sorted(leaders - {len(code)})
    blocks = list(zip(starts, [*starts[1:], len(code)], strict=True))
    number = {start: block for block, start in enumerate(starts)}
    successors: list[list[int]] = []
    for _, end in blocks:
        last = code[end - 1]
        after = []
        if last.base == "BRA" and last.target in at:
            after.append(number[at[last.target]])
        if end < len(code) and (last.base not in _ENDS or _is_conditional(last)):
            after.append(number[end])
        successors.append(after)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for block, after in enumerate(successors):
        for each in after:
            predecessors[each].append(block)
    return Graph(blocks, successors, predecessors)


def dominators(flow: Graph) -> list[set[int]]:
    """For each block, the blocks on every way to it from the entry, itself included; none if unreachable."""
    reachable = set(_postorder(flow, 0, set(range(len(flow.blocks)))))
    found = [set(reachable) if block in reachable else set() for block in range(len(flow.blocks))]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            before = [found[each] for each in flow.predecessors[block] if each in reachable]
            now = set.intersection(*before) | {block}
            if now != found[block]:
                found[block], changed = now, True
    return found


def _postorder(flow: Graph, start: int, inside: set[int]) -> list[int]:
    """Blocks of ``inside`` in the order in which a depth-first walk from ``start`` leaves them."""
    order: list[int] = []
    seen = {start}

    def onward(block: int) -> Iterator[int]:
        return (each for each in flow.successors[block] if each in inside)

    stack = [(start, onward(start))]
    while stack:
        block, rest = stack[-1]
        step = next((each for each in rest if each not in seen), None)
        if step is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(step)
            stack.append((step, onward(step)))
    return order


def natural_loops(flow: Graph, dominates: list[set[int]]) -> dict[int, tuple[set[int], set[int]]]:
    """By head: the blocks of the loop, and its latches (the blocks that jump back to the head)."""
    loops: dict[int, tuple[set[int], set[int]]] = {}
    for latch, after in enumerate(flow.successors):
        for head in after:
            if head not in dominates[latch]:
                continue
            body, latches = loops.setdefault(head, ({head}, set()))
            latches.add(latch)
            pending = [latch]
            while pending:
                block = pending.pop()
                if block not in body:
                    body.add(block)
                    pending += flow.predecessors[block]
    return loops


def tensor_loops(code: Sequence[Instruction]) -> list[Loop]:
    """The innermost loops with tensor-core work, in the order of their addresses."""
    flow = graph(code)
    dominates = dominators(flow)

    def has(block: int, bases: frozenset[str]) -> bool:
        start, end = flow.blocks[block]
        return any(instruction.base in bases for instruction in code[start:end])

    loops = {
        head: (body, latches)
        for head, (body, latches) in natural_loops(flow, dominates).items()
        if any(has(block, TENSOR) for block in body)
    }
    found = []
    for head, (body, latches) in sorted(loops.items()):
        if any(other != head and other in body for other in loops):
            continue
        always = set.intersection(*(dominates[latch] for latch in latches))
        order = _postorder(flow, head, body)[::-1]
        hot = {block for block in order if block in always or has(block, TENSOR | _LOADS)}
        roles = [(hot | does) - others for does, others in _roles(code, flow, dominates, body)]

        def listing(blocks: set[int], order: Sequence[int] = order) -> tuple[Instruction, ...]:
            return tuple(
                each for block in order if block in blocks for each in code[slice(*flow.blocks[block])]
            )

        cold = body - set.union(*roles)
        found.append(Loop(code[flow.blocks[head][0]].address, tuple(map(listing, roles)), listing(cold)))
    return found


def _roles(
    code: Sequence[Instruction], flow: Graph, dominates: list[set[int]], body: set[int]
) -> list[tuple[set[int], set[int]]]:
    """For each role of the warps, the blocks that are its own, and those that are another's.

    Branches part two roles where named barriers stand on both sides: what meets there must come from
    different warps. Where several predicates say who is who, a role arrives at no barrier that it awaits.
    """
    sides: dict[str, tuple[set[int], set[int]]] = {}
    for block in sorted(body):
        last, after = code[flow.blocks[block][1] - 1], flow.successors[block]
        match = _OPERAND_PREDICATE.search(last.predicate) or _OPERAND_PREDICATE.match(last.operands)
        if match is None or len(after) != 2 or not body.issuperset(after):
            continue
        # An arm is what one can't get to but through it; the first is that of a true predicate.
        arms = [{each for each in body if arm in dominates[each]} for arm in after]
        if match[1]:
            arms.reverse()
        if all(_barriers(code, flow, arm) for arm in arms):
            true, false = sides.setdefault(match[2], (set(), set()))
            true |= arms[0]
            false |= arms[1]
    if not sides:
        return [(set(), set())]
    first, *rest = sides.values()
    for turned in itertools.product((False, True), repeat=len(rest)):
        roles = tuple(map(set, first))
        for side, turn in zip(rest, turned, strict=True):
            for role, arm in zip(roles, reversed(side) if turn else side, strict=True):
                role |= arm
        if not any(_crosses_itself(_barriers(code, flow, role)) for role in roles):
            return [(roles[0], roles[1]), (roles[1], roles[0])]
    raise ValueError(f"who is who at {', '.join(sides)}?")


def _barriers(code: Sequence[Instruction], flow: Graph, blocks: set[int]) -> list[Instruction]:
    """Those for some of a block's warps: any but number 0."""
    inside = itertools.chain.from_iterable(code[slice(*flow.blocks[block])] for block in blocks)
    return [each for each in inside if each.base == "BAR" and not re.match(r"0x0\b", each.operands)]


def _crosses_itself(barriers: list[Instruction]) -> bool:
    arrives, awaits = ({b.operands for b in barriers if ("ARV" in b.opcode) == arv} for arv in (True, False))
    return not arrives.isdisjoint(awaits)
