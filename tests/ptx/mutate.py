"""Mutants of a kernel's PTX: small faults, each of which a check of that kernel should catch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from .findings import Finding
from .parser import parse
from .syntax import Instr, Mem


@dataclass(frozen=True)
class Mutant:
    kind: str
    line: int
    before: str
    after: str
    ptx: str

    def __str__(self) -> str:
        return f"{self.kind}, line {self.line}: `{self.before}` -> `{self.after or 'nothing'}`"


@dataclass
class Score:
    caught: dict[str, Counter[str]] = field(default_factory=dict)  # by kind of mutant: how it was caught
    survivors: list[Mutant] = field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.survivors) + sum(sum(counter.values()) for counter in self.caught.values())

    def __str__(self) -> str:
        lines = [f"{self.total - len(self.survivors)} of {self.total} mutants caught"]
        lines += [f"  {kind}: {dict(counter)}" for kind, counter in self.caught.items()]
        return "\n".join(lines + [f"  SURVIVED {mutant}" for mutant in self.survivors])


Rule = Callable[[Instr, str], Iterable[str]]  # an instruction and its text to its mutants' texts


def _delete(*ops: str) -> Rule:
    def rule(instr: Instr, text: str) -> Iterator[str]:
        if ".".join((instr.op, *instr.mods)) in ops:
            yield ""

    return rule


def _weaker_wait(instr: Instr, text: str) -> Iterator[str]:
    if "wait_group" in instr.mods:
        yield re.sub(r"(\d+)(\s*;)", lambda m: f"{int(m[1]) + 1}{m[2]}", text)


def _shift(*ops: str, by: int) -> Rule:
    """The address moves by `by` bytes, a row of a tile."""

    def rule(instr: Instr, text: str) -> Iterator[str]:
        if instr.op in ops and any(isinstance(o, Mem) for o in instr.operands) and "param" not in instr.mods:
            yield re.sub(
                r"\[([^\]]*?)\s*(?:\+\s*(-?\d+)\s*)?\]",
                lambda m: f"[{m[1]}+{int(m[2] or 0) + by}]",
                text,
                count=1,
            )

    return rule


def _swap_in_mma(instr: Instr, text: str) -> Iterator[str]:
    """Swap the first two registers of A, and the two of B."""
    if instr.op == "mma":
        groups = re.findall(r"\{[^}]*\}", text)
        for which in (1, 2):
            names = [name.strip() for name in groups[which][1:-1].split(",")]
            if len(names) > 1:
                names[0], names[1] = names[1], names[0]
                parts = list(groups)
                parts[which] = "{ " + ", ".join(names) + " }"
                yield f"{text[: text.index('{')]}{', '.join(parts)};"


def _swap_in_wgmma(instr: Instr, text: str) -> Iterator[str]:
    """Swap the first two registers of the sums, or of a left operand that is in registers."""
    if "mma_async" in instr.mods:
        for group in re.findall(r"\{[^}]*\}", text):
            first, second, *rest = group[1:-1].split(",")
            yield text.replace(group, "{" + ",".join((second, first, *rest)) + "}", 1)


def _flip_in_wgmma(instr: Instr, text: str) -> Iterator[str]:
    if "mma_async" in instr.mods:
        yield re.sub(r"([01])(\s*;)", lambda m: f"{1 - int(m[1])}{m[2]}", text)


def _widen(instr: Instr, text: str) -> Iterator[str]:
    """A store writes its last register once more, behind its place."""
    if instr.op == "st" and {"b32", "f32"} & set(instr.mods):
        values = re.search(r"\{([^}]*)\}", text)
        if values is None:
            yield re.sub(r"\.([bf]32)(\s.*,\s*)(%\w+);", r".v2.\1\2{\3, \3};", text)
        elif "v2" in instr.mods:
            names = [name.strip() for name in values[1].split(",")]
            wide = "{" + ", ".join([*names, *names]) + "}"
            yield text.replace(".v2.", ".v4.").replace(values[0], wide)


def _predicate(instr: Instr, text: str) -> Iterator[str]:
    """A guard is lost, or negated."""
    if instr.pred is not None and instr.op in ("ld", "st", "bra", "cp", "atom", "red"):
        guard = re.match(r"\s*@(!?)(%\w+)", text)
        assert guard is not None
        if instr.op != "bra":
            yield text.replace(guard[0], "", 1)
        yield text.replace(guard[0], f"@{'' if guard[1] else '!'}{guard[2]}", 1)


def _replace(op: str, old: str, new: str) -> Rule:
    def rule(instr: Instr, text: str) -> Iterator[str]:
        if instr.op == op and old in text:
            yield text.replace(old, new, 1)

    return rule


def _shuffle(instr: Instr, text: str) -> Iterator[str]:
    if instr.op == "shfl" and "bfly" in instr.mods:
        yield re.sub(r", (\d+), (\d+), -1", lambda m: f", {int(m[1]) * 2 % 32 or 1}, {m[2]}, -1", text)


RULES: dict[str, Rule] = {
    "delete a barrier": _delete("bar.sync", "bar.warp.sync", "bar.arrive"),
    "delete a wait": _delete("cp.async.wait_group", "cp.async.wait_all", "wgmma.wait_group.sync.aligned"),
    "weaken a wait": _weaker_wait,
    "delete a commit": _delete("cp.async.commit_group", "wgmma.commit_group.sync.aligned"),
    "shift a load": _shift("ld", "ldmatrix", by=128),
    "shift a store": _shift("st", by=128),
    "shift a copy": _shift("cp", by=128),
    "swap mma operands": _swap_in_mma,
    "widen a store": _widen,
    "lose or negate a guard": _predicate,
    "shuffle elsewhere": _shuffle,
    "add for subtract": _replace("sub", "sub.f32", "add.f32"),
    "drop the transposition": _replace("ldmatrix", ".trans", ""),
}

HOPPER_RULES: dict[str, Rule] = {
    "delete a fence": _delete("fence.proxy.async.shared::cta"),
    "swap sums or weights of a wgmma": _swap_in_wgmma,
    "flip a transposition of a wgmma": _flip_in_wgmma,
}

# These often change nothing: a bound that no size meets exactly, a maximum that serves only as a stabiliser.
LOOSE_RULES: dict[str, Rule] = {
    "one too few": _replace("setp", ".le.", ".lt."),
    "one too many": _replace("setp", ".lt.", ".le."),
    "minimum for maximum": _replace("max", "max.f32", "min.f32"),
}


def mutants(
    ptx: str,
    kernel: str,
    per_rule: int | None = None,
    lines: set[int] | None = None,
    rules: Mapping[str, Rule] = RULES,
) -> list[Mutant]:
    """All mutants of one kernel, or `per_rule` of each rule, spread over the kernel.

    `lines`: only these, such as a report's `executed`; a fault in code that the test never runs says nothing.
    """
    source = ptx.split("\n")
    found: list[Mutant] = []
    code = [i for i in parse(ptx).functions[kernel].code if lines is None or i.line in lines]
    for kind, rule in rules.items():
        mine = []
        for instr in code:
            text = source[instr.line - 1]
            for after in rule(instr, text):
                if after != text:
                    changed = [*source[: instr.line - 1], after, *source[instr.line :]]
                    mine.append(Mutant(kind, instr.line, text.strip(), after.strip(), "\n".join(changed)))
        if per_rule is not None and len(mine) > per_rule:
            mine = [mine[i] for i in np.linspace(0, len(mine) - 1, per_rule).astype(int)]
        found += mine
    return found


def score(candidates: Iterable[Mutant], right: Callable[[str], bool]) -> Score:
    """Run each mutant: `right` launches it and compares its values."""
    result = Score()
    for mutant in candidates:
        try:
            how = None if right(mutant.ptx) else "values"
        except Finding as finding:
            how = finding.kind
        if how is None:
            result.survivors.append(mutant)
        else:
            result.caught.setdefault(mutant.kind, Counter())[how] += 1
    return result
