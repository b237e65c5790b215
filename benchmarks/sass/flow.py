"""Control flow of a function, and its innermost loops that run the tensor cores."""

from __future__ import annotations

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
_OPERAND_PREDICATE = re.compile(r"!?U?P\d")


@dataclass(frozen=True)
class Graph:
    """Basic blocks as [start, end) of instruction indices, and edges between them. Block 0 is the entry."""

    blocks: list[tuple[int, int]]
    successors: list[list[int]]
    predecessors: list[list[int]]


@dataclass(frozen=True)
class Loop:
    """``hot``: what every iteration does. ``cold``: conditional code without tensor work or global loads."""

    address: int
    hot: tuple[Instruction, ...]
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
        hot: list[Instruction] = []
        cold: list[Instruction] = []
        always = set.intersection(*(dominates[latch] for latch in latches))
        for block in reversed(_postorder(flow, head, body)):
            start, end = flow.blocks[block]
            runs = block in always or has(block, TENSOR | _LOADS)
            (hot if runs else cold).extend(code[start:end])
        found.append(Loop(code[flow.blocks[head][0]].address, tuple(hot), tuple(cold)))
    return found
