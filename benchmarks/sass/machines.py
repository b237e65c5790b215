"""What each instruction costs on each pipe, and how long its result takes: sm_80 (A100) and sm_90 (H100).

All costs are cycles per warp instruction on one of the SM's four sub-partitions. A pipe that the
sub-partitions share (memory) is charged four times what the SM needs. Sources:

    arithmetic   CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions": results per clock
                 and SM; 32 lanes * 4 sub-partitions / that number
    tensor       data sheets: 1024 (A100) and 2048 (H100) dense bf16 multiply-adds per clock and SM;
                 mma.sync reaches 62-65 % of an H100 (Luo et al. 2024, arXiv 2402.13499)
    memory       shared memory 128, L2 64 bytes per clock and SM (Jia et al. 2018, arXiv 1804.06826)
    latencies    round figures of the microbenchmarks in the same papers
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .flow import BLOCK_TENSOR, GROUP_TENSOR, TENSOR, WARP_TENSOR
from .listing import Instruction

NEVER = "@!PT"  # a predicate that's always false: the instruction takes its issue slot and nothing else


@dataclass(frozen=True)
class Machine:
    """Cycles per warp instruction and sub-partition, bytes per clock and SM."""

    name: str
    warp_mma: float  # a 16x8 tile over 32 bytes of K with mma.sync
    warp_mma_at_peak: float  # the same at the data sheet's rate
    fma: float  # float32 FADD, FMUL, FFMA
    integer_fma: float = 2  # IMAD: half of the FMA pipe can do it
    half: float = 1  # packed half precision
    alu: float = 2  # integer, logic, comparison, FMNMX, packing conversions
    special: float = 8  # MUFU and the conversions that aren't packing
    shuffle: float = 4
    shared_bytes: float = 128
    l2_bytes: float = 64

    # Cycles from the end of service by the pipe until the scoreboard is released.
    latency_shared: float = 23
    latency_shuffle: float = 20
    latency_special: float = 18
    latency_tensor: float = 18
    latency_global: float = 450
    latency_copy: float = 350  # cp.async
    latency_other: float = 12


MACHINES = {
    80: Machine("A100", warp_mma=8, warp_mma_at_peak=8, fma=2, half=2),  # packed bf16 at half of fp16's rate
    90: Machine("H100", warp_mma=6.35, warp_mma_at_peak=4, fma=1),
}

_GROUPS = {
    "float": "FADD FMUL FFMA FADD32I FMUL32I FFMA32I FADD2 FMUL2 FFMA2",
    "compare": "FMNMX FMNMX3 FSEL FSETP FSET FCHK",
    "mufu": "MUFU",
    "convert": "F2FP F2F F2I I2F I2FP FRND I2I",
    "half": "HFMA2 HADD2 HMUL2 HMNMX2 HSET2 HSETP2",
    "integer": "IMAD IDP IMUL ISETP IADD3 IADD VIADD VIADDMNMX VIMNMX IMNMX LOP3 LOP PLOP3 SHF SHL SHR LEA "
    "SEL PRMT IABS BMSK SGXT P2R R2P VOTE FLO POPC ISCADD",
    "move": "MOV CS2R",
    "spill": "LDL STL",
    "shared": "LDS LDSM STS STSM ATOMS",
    "shuffle": "SHFL",
    "global": "LDG STG LD ST RED REDG ATOM ATOMG LDGSTS UBLKCP UTMALDG UTMASTG UTMAREDG",
    "sync": "BAR DEPBAR LDGDEPBAR SYNCS MEMBAR WARPGROUP ERRBAR CCTL FENCE",
    "branch": "BRA BRX JMP EXIT BSSY BSYNC CALL RET WARPSYNC BREAK YIELD",
}
_GROUP_OF = {base: group for group, bases in _GROUPS.items() for base in bases.split()} | dict.fromkeys(
    TENSOR, "tensor"
)
_SPECIAL = frozenset(("MUFU", "F2F", "F2I", "I2F", "FRND", "I2I"))
_INTEGER_FMA = frozenset(("IMAD", "IDP", "IMUL"))
_MEMORY = frozenset(("spill", "shared", "global"))
_ALU = frozenset(("compare", "convert", "integer", "move"))
_K_BYTES = {"S8": 1, "U8": 1, "E4M3": 1, "E5M2": 1, "S4": 0.5, "U4": 0.5, "TF32": 4}


def group(instruction: Instruction) -> str:
    """The kind of work, for the instruction mix."""
    base = instruction.base
    if instruction.predicate == NEVER:
        return "other"
    if base == "IMAD" and ".MOV" in instruction.opcode:
        return "move"
    if base not in _GROUP_OF and (base.startswith("U") or base in ("R2UR", "S2UR", "VOTEU")):
        return "uniform"
    return _GROUP_OF.get(base, "other")


def memory_bytes(instruction: Instruction) -> int:
    """Bytes that a warp's memory instruction moves."""
    if instruction.base in ("LDSM", "STSM"):
        match = re.search(r"\.MT?88(?:\.(\d))?", instruction.opcode)
        return 128 * int((match and match[1]) or 1)
    parts = instruction.opcode.split(".")
    if vector := re.search(r"\.F32x(\d)", instruction.opcode):  # vector RED of sm_90
        return 128 * int(vector[1])
    for modifiers, per_lane in ((("128",), 16), (("64",), 8), (("U16", "S16"), 2), (("U8", "S8"), 1)):
        if any(modifier in parts for modifier in modifiers):
            return 32 * per_lane
    return 128


def products(instruction: Instruction) -> float:
    """A warp's share of a tensor-core instruction, in tiles of 16 x 8 over 32 bytes of K."""
    parts = instruction.opcode.split(".")
    if instruction.base in WARP_TENSOR and (match := re.search(r"\.168(\d+)", instruction.opcode)):
        size = next((size for name, size in _K_BYTES.items() if name in parts), 2)
        return int(match[1]) * size / 32
    if instruction.base in GROUP_TENSOR and (match := re.search(r"\.64x(\d+)x\d+", instruction.opcode)):
        return int(match[1]) / 8  # each of four warps has 16 of the 64 rows
    raise ValueError(f"no cost known for {instruction.opcode}")


def _group_tensor(instruction: Instruction, machine: Machine) -> dict[str, float]:
    """wgmma: 64 rows by n over 32 bytes of K; B, and A unless in registers, are read from shared memory."""
    tiles = products(instruction)
    rows = 0 if re.match(r"R\d+, R\d+", instruction.operands) else 64
    return {
        "tensor": machine.warp_mma_at_peak * tiles,
        "memory": (8 * tiles + rows) * 32 / machine.shared_bytes,
    }


def pipes(instruction: Instruction, machine: Machine) -> dict[str, float]:
    """Cycles on each pipe that the instruction uses; every instruction takes an issue slot."""
    base, kind = instruction.base, group(instruction)
    used: dict[str, float] = {"issue": 1}
    if instruction.predicate == NEVER:
        return used
    if base in WARP_TENSOR:
        used["tensor"] = machine.warp_mma * products(instruction)
    elif base in GROUP_TENSOR:
        used |= _group_tensor(instruction, machine)
    elif base in BLOCK_TENSOR:
        raise ValueError(f"no cost known for {instruction.opcode}")
    elif kind == "float":
        used["fma"] = machine.fma
    elif base in _INTEGER_FMA:
        used |= {"fma": machine.fma, "integer fma": machine.integer_fma}
    elif kind == "half":
        used["half"] = machine.half
    elif base in _SPECIAL:
        used["special"] = machine.special
    elif kind in _ALU:
        used["alu"] = machine.alu
    elif kind == "shuffle":
        used["memory"] = machine.shuffle
    elif kind in _MEMORY:
        used["memory"] = 4 * memory_bytes(instruction) / machine.shared_bytes
        if kind == "global":
            used["l2"] = 4 * memory_bytes(instruction) / machine.l2_bytes
    return used
