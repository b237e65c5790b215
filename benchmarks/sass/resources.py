"""What one block of a kernel takes of the machine, what the machine has, and so how many blocks fit."""

from __future__ import annotations

import re
from dataclasses import dataclass

SYSTEM_SHARED = 1024  # bytes that the driver keeps in every block, from sm_80 on (CUDA Programming Guide)
RESERVED_SHARED_SINCE = 90  # from here on cuobjdump counts those bytes among a kernel's own


@dataclass(frozen=True)
class Resources:
    """Registers (32 bits) per thread, bytes per thread (stack) and per block (shared), spills."""

    registers: int
    stack: int = 0
    shared: int = 0  # what the code declares; a launch's dynamic bytes come on top
    spill_loads: int = 0  # instructions, where the machine code was read
    spill_stores: int = 0
    spilled_registers: int = 0  # as AMD's compiler reports
    spilled_bytes: int = 0  # per thread, loads and stores, as ptxas reports
    scalar_registers: int = 0  # AMD: per wave
    threads: int | None = None  # per block, where the code fixes them

    @property
    def spills(self) -> int:
        """Zero where nothing spills."""
        return self.spill_loads + self.spill_stores + self.spilled_registers + self.spilled_bytes


@dataclass(frozen=True)
class Limits:
    """What one SM (NVIDIA) or compute unit (AMD) has."""

    shared_per_sm: int  # bytes
    max_warps: int
    max_blocks: int
    registers: int = 65536  # 32-bit, all lanes together
    warp: int = 32
    shared_reserved: int = SYSTEM_SHARED  # bytes per block
    max_registers: int = 255  # per thread

    @property
    def shared_per_block(self) -> int:
        """Bytes that one block may have (NVIDIA: with opt-in)."""
        return self.shared_per_sm - self.shared_reserved


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
# AMD: CDNA 3 and CDNA 4 ISA documents: 4 SIMDs of 64 lanes and 8 waves, 512 VGPRs per lane (ordinary and
# accumulation together); LDS 64 KiB, 160 KiB on CDNA 4.
LIMITS: dict[str, Limits] = {
    "sm_80": Limits(164 << 10, 64, 32),
    "sm_86": Limits(100 << 10, 48, 16),
    "sm_89": Limits(100 << 10, 48, 24),
    "sm_90": Limits(228 << 10, 64, 32),
    "sm_100": Limits(228 << 10, 64, 32),
    "sm_120": Limits(100 << 10, 48, 24),
    "gfx942": Limits(64 << 10, 32, 32, 4 * 64 * 512, 64, 0, 512),
    "gfx950": Limits(160 << 10, 32, 32, 4 * 64 * 512, 64, 0, 512),
}
_REGISTER_UNIT = 8  # per thread: registers are handed out in eights on both makers' machines
_PARTITIONS = 4  # each with a quarter of the registers; a warp lives in one


@dataclass(frozen=True)
class Occupancy:
    """How many blocks one SM holds at once, and what stops one more."""

    blocks: int
    warps: int
    limiter: str


def occupancy(limits: Limits, registers: int, shared: int, threads: int) -> Occupancy:
    """Blocks of ``threads`` threads, each with ``registers``, and ``shared`` bytes per block, on one SM."""
    warps = -(-threads // limits.warp)
    per_warp = -(-registers // _REGISTER_UNIT) * _REGISTER_UNIT * limits.warp
    fit = {
        "registers": limits.registers // _PARTITIONS // max(per_warp, 1) * _PARTITIONS // warps,
        "shared": limits.shared_per_sm // max(shared + limits.shared_reserved, 1),
        "warps": limits.max_warps // warps,
        "blocks": limits.max_blocks,
    }
    limiter = min(fit, key=fit.__getitem__)
    return Occupancy(fit[limiter], fit[limiter] * warps, limiter)


_PTXAS = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (\d+) registers(?:.*?(\d+) bytes smem)?"
)


def parse_ptxas(text: str) -> dict[str, Resources]:
    """Resources by kernel from what ``ptxas -v`` (``nvcc -Xptxas -v``) reports."""
    return {
        name: Resources(
            registers=int(registers),
            stack=int(stack),
            shared=int(shared or 0),
            spilled_bytes=int(stores) + int(loads),
        )
        for name, stack, stores, loads, registers, shared in _PTXAS.findall(text)
    }


def parse_amdgcn(text: str) -> dict[str, Resources]:
    """Resources by kernel from the metadata in AMD's assembly text (Triton's ``asm["amdgcn"]``)."""
    found: dict[str, Resources] = {}
    documents = re.findall(r"\.amdgpu_metadata\n(.*?)\.end_amdgpu_metadata", text, re.DOTALL)
    for document in documents:
        kernels = document.partition("amdhsa.kernels:")[2].partition("\namdhsa.")[0]
        for entry in re.split(r"\n  - ", kernels)[1:]:
            # A kernel's own keys are indented by four, those of its arguments more deeply.
            fields = dict(re.findall(r"(?:^|\n {4})\.(\w+):[ \t]+(\S+)", entry))
            numbers = {key: int(value) for key, value in fields.items() if value.isdecimal()}
            found[fields["name"]] = Resources(
                registers=numbers["vgpr_count"],
                stack=numbers["private_segment_fixed_size"],
                shared=numbers["group_segment_fixed_size"],
                spilled_registers=numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"],
                scalar_registers=numbers["sgpr_count"],
                threads=numbers.get("max_flat_workgroup_size"),
            )
    if not found:
        raise ValueError("no kernel metadata in this text")
    return found
