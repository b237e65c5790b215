"""What the machine says: findings about the kernel, and refusals about itself."""

from __future__ import annotations

from dataclasses import dataclass, field


class Unsupported(Exception):
    """The machine doesn't know this instruction, modifier or directive; nothing is ever skipped silently."""


@dataclass
class Finding(Exception):
    """One fault of the kernel, with the place where it showed."""

    kind: str  # out-of-bounds, misaligned, uninitialised, race, cp-async, barrier, warp, trap, ...
    message: str
    kernel: str = ""
    line: int = 0
    text: str = ""
    block: tuple[int, int, int] | None = None
    thread: tuple[int, int, int] | None = None
    address: int | None = None

    def __str__(self) -> str:
        where = f"{self.kernel}, PTX line {self.line}: `{self.text}`"
        if self.block is not None:
            where += f", block {self.block} thread {self.thread}"
        if self.address is not None:
            where += f", address {self.address:#x}"
        return f"{self.kind}: {self.message} [{where}]"


@dataclass
class Report:
    """What a launch did: its findings (when they are collected, not raised) and what it cost."""

    findings: list[Finding] = field(default_factory=list)
    instructions: int = 0  # executed, counted once for all the lanes that ran together
    waves: int = 0
    executed: set[int] = field(default_factory=set)  # PTX lines that ran at least once

    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}
