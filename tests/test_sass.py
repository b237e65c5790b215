"""The engine that prices kernels by their machine code: parsing, flow, issue, occupancy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.sass import (  # noqa: E402
    LIMITS,
    occupancy,
    parse_amdgcn,
    parse_ptxas,
)
from benchmarks.sass.flow import dominators, graph, natural_loops, tensor_loops  # noqa: E402
from benchmarks.sass.issue import cycles_per_iteration  # noqa: E402
from benchmarks.sass.listing import NO_BARRIER, Instruction, parse_sass, parse_usage  # noqa: E402
from benchmarks.sass.machines import MACHINES, group, memory_bytes, pipes  # noqa: E402
from benchmarks.sass.price import LoopReport, price_loop  # noqa: E402

pytestmark = pytest.mark.cpu_only("compiled there")

A100, H100 = MACHINES[80], MACHINES[90]
HMMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"


def ins(
    text: str, stall: int = 1, write: int = NO_BARRIER, read: int = NO_BARRIER, wait: Sequence[int] = ()
) -> str:
    """An instruction with its control fields, for ``listing``."""
    mask = sum(1 << barrier for barrier in wait)
    high = (stall | write << 5 | read << 8 | mask << 11) << 41
    return f"{text} ; /* 0x{0x7918:016x} */\n /* 0x{high:016x} */"


def listing(*lines: str, arch: int = 80) -> tuple[Instruction, ...]:
    """Instructions, 16 bytes each, through the parser of cuobjdump's format. Plain text: a stall of one."""
    rows = [line if "/*" in line else ins(line) for line in lines]
    text = "\n".join(f"        /*{16 * index:04x}*/  {row}" for index, row in enumerate(rows))
    functions = parse_sass(f"\tcode for sm_{arch}\n\t\tFunction : kernel\n{text}\n")
    assert list(functions) == [(arch, "kernel")]
    return tuple(functions[arch, "kernel"])


def loop(*lines: str) -> tuple[Instruction, ...]:
    """A loop around these instructions, as execution sees it."""
    return listing(*lines, "@P0 BRA 0x0")


# Parsing


def test_instruction_fields() -> None:
    text = """
	code for sm_80
		Function : first
	.headerflags	@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00000a0000017a02 */
                                                                           /* 0x000fe40000000f00 */
        /*0010*/                   S2R R18, SR_CTAID.Y ;                   /* 0x0000000000127919 */
                                                                           /* 0x000ea80000002600 */
        /*0020*/              @!P2 IADD3.X R3, R18, 0x10, RZ, P1, !PT ;    /* 0x0000001012037810 */
                                                                           /* 0x004fe20000ffe4ff */
		Function : second
        /*0000*/                   EXIT ;                                  /* 0x000000000000794d */
                                                                           /* 0x000fea0003800000 */
"""
    functions = parse_sass(text)
    assert list(functions) == [(80, "first"), (80, "second")]
    move, special, add = functions[80, "first"]
    assert (move.opcode, move.operands, move.stall, move.waits) == ("MOV", "R1, c[0x0][0x28]", 2, ())
    assert (special.base, special.stall, special.write_barrier, special.read_barrier) == ("S2R", 4, 2, 7)
    assert (add.address, add.predicate, add.opcode, add.base) == (0x20, "@!P2", "IADD3.X", "IADD3")
    assert add.waits == (2,)
    assert add.write_barrier == add.read_barrier == NO_BARRIER
    assert [each.opcode for each in functions[80, "second"]] == ["EXIT"]


def test_control_fields_survive_the_way_through_a_listing() -> None:
    (one,) = listing(ins("LDS R0, [R1]", stall=11, write=3, read=5, wait=(0, 4)))
    assert (one.stall, one.write_barrier, one.read_barrier, one.waits) == (11, 3, 5, (0, 4))


def test_branch_targets() -> None:
    code = listing("BRA 0x0", "@P1 BRA P2, 0x20", "BRA `(.L_x_1)", "EXIT")
    assert [each.target for each in code] == [0, 0x20, None, None]


def test_usage_of_a_library_with_two_architectures() -> None:
    line = "  REG:{} STACK:8 SHARED:2048 LOCAL:0 CONSTANT[0]:360 TEXTURE:0"
    text = f"arch = sm_80\n Function f:\n{line.format(10)}\narch = sm_90\n Function f:\n{line.format(12)}\n"
    usage = parse_usage(text)
    assert usage[80, "f"]["REG"] == 10
    assert usage[90, "f"]["REG"] == 12
    assert usage[90, "f"]["STACK"] == 8


def test_ptxas_report() -> None:
    text = """ptxas info    : Compiling entry function 'f' for 'sm_80'
ptxas info    : Function properties for f
    16 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 2048 bytes smem, 360 bytes cmem[0]
ptxas info    : Function properties for g
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, 360 bytes cmem[0]
"""
    found = parse_ptxas(text)
    assert (found["f"].registers, found["f"].stack, found["f"].shared, found["f"].spills) == (
        32,
        16,
        2048,
        64,
    )
    assert (found["g"].registers, found["g"].shared, found["g"].spills) == (10, 0, 0)


def test_amdgcn_metadata() -> None:
    text = """\t.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     4
    .args:
      - .name:           not_the_kernel
        .offset:         0
    .group_segment_fixed_size: 1024
    .max_flat_workgroup_size: 256
    .name:           kernel
    .private_segment_fixed_size: 12
    .sgpr_count:     33
    .sgpr_spill_count: 1
    .vgpr_count:     228
    .vgpr_spill_count: 2
amdhsa.version:
  - 1
  - 2
...
\t.end_amdgpu_metadata
"""
    found = parse_amdgcn(text)
    assert list(found) == ["kernel"]
    kernel = found["kernel"]
    assert (kernel.registers, kernel.scalar_registers, kernel.stack, kernel.shared) == (228, 33, 12, 1024)
    assert (kernel.spills, kernel.threads) == (3, 256)
    with pytest.raises(ValueError, match="no kernel metadata"):
        parse_amdgcn("s_endpgm")


# Control flow


NESTED = (
    "MOV R0, RZ",  # 0x00
    "IADD3 R1, R1, 0x1, RZ",  # 0x10: outer loop
    "LDSM.16.M88.4 R8, [R0]",  # 0x20: inner loop
    "@P1 BRA 0x60",  # 0x30: over the mask
    "FSEL R3, R3, RZ, P2",  # 0x40: cold
    "FSEL R3, R3, RZ, P2",  # 0x50: cold
    HMMA,  # 0x60
    "@P3 BRA 0x20",  # 0x70: back to the inner loop
    "@P4 BRA 0x10",  # 0x80: back to the outer loop
    "EXIT",  # 0x90
    "BRA 0xa0",  # 0xa0: padding, never reached
)


def test_blocks_and_edges() -> None:
    flow = graph(listing(*NESTED))
    assert flow.blocks == [(0, 1), (1, 2), (2, 4), (4, 6), (6, 8), (8, 9), (9, 10), (10, 11)]
    assert flow.successors == [[1], [2], [4, 3], [4], [2, 5], [1, 6], [], [7]]
    assert flow.predecessors[2] == [1, 4]


def test_dominators() -> None:
    found = dominators(graph(listing(*NESTED)))
    assert found[4] == {0, 1, 2, 4}  # the cold block 3 can be jumped over
    assert found[6] == {0, 1, 2, 4, 5, 6}
    assert found[7] == set()


def test_natural_loops() -> None:
    flow = graph(listing(*NESTED))
    assert natural_loops(flow, dominators(flow)) == {2: ({2, 3, 4}, {4}), 1: ({1, 2, 3, 4, 5}, {5})}


def test_only_the_innermost_tensor_loop_counts_and_its_mask_is_cold() -> None:
    (found,) = tensor_loops(listing(*NESTED))
    assert found.address == 0x20
    assert [each.base for each in found.roles[0]] == ["LDSM", "BRA", "HMMA", "BRA"]
    assert [each.base for each in found.cold] == ["FSEL", "FSEL"]


def test_conditional_loads_and_products_are_hot() -> None:
    for middle in ("LDGSTS.E.128 [R0], [R2.64]", HMMA):
        (found,) = tensor_loops(listing(HMMA, "@P1 BRA 0x30", middle, "@P0 BRA 0x0", "EXIT"))
        assert middle.split(maxsplit=1)[0] in [each.opcode for each in found.roles[0]][2:]
        assert not found.cold


def roles(first: str, second: str, *work: str) -> list[Instruction]:
    """A loop in which half of the warps do ``work`` and meet the others at barriers."""
    end = 0x50 + 0x10 * len(work)
    return listing(
        HMMA, f"@!P4 BRA {end - 0x10:#x}", *work, first, f"BRA {end:#x}", second, HMMA, "@P0 BRA 0x0", "EXIT"
    )


def test_warps_that_meet_at_named_barriers_have_roles() -> None:
    (found,) = tensor_loops(roles("BAR.SYNC 0x1, 0x100", "BAR.ARV 0x1, 0x100", "FADD R0, R0, R1"))
    own = [[each.opcode for each in role][2:-2] for role in found.roles]
    assert own == [["FADD", "BAR.SYNC", "BRA"], ["BAR.ARV"]]
    assert not found.cold
    (found,) = tensor_loops(roles("BAR.SYNC 0x0", "NOP", "FADD R0, R0, R1"))
    assert (len(found.roles), len(found.cold)) == (1, 4)


@pytest.mark.parametrize("second", ["0x2", "0x1"])
def test_roles_under_two_predicates(second: str) -> None:
    """With one barrier for both, who arrives at it first must also be who arrives at it later."""
    code = listing(
        HMMA, "@!P4 BRA 0x40", "BAR.ARV 0x1, 0x100", "BRA 0x50", "BAR.SYNC 0x1, 0x100",
        "@P5 BRA 0x80", f"BAR.ARV {second}, 0x100", "BRA 0x90", f"BAR.SYNC {second}, 0x100",
        "@P0 BRA 0x0", "EXIT",
    )  # fmt: skip
    (found,) = tensor_loops(code)
    own = [[each.opcode for each in role if each.base == "BAR"] for role in found.roles]
    arrive, wait = "BAR.ARV", "BAR.SYNC"
    assert own == ([[arrive, wait], [wait, arrive]] if second == "0x2" else [[arrive] * 2, [wait] * 2])


def test_roles_wait_for_one_another() -> None:
    """One works for 500 cycles and says so, without a barrier in between; the other waits."""
    (found,) = tensor_loops(roles("BAR.ARV 0x1, 0x100", "BAR.SYNC 0x1, 0x100", *[ins("NOP", stall=5)] * 100))
    one = cycles_per_iteration(found.roles, A100, 2, 2)
    assert one == pytest.approx(500 + 5 + 5, abs=2)
    with pytest.raises(ValueError, match="1 warps of a block can't have 2 roles"):
        cycles_per_iteration(found.roles, A100, 2, 1)
    (found,) = tensor_loops(roles("BAR.SYNC 0x1, 0x100", "BAR.SYNC 0x2, 0x100"))
    with pytest.raises(RuntimeError, match="every warp waits at a barrier"):
        cycles_per_iteration(found.roles, A100, 2, 2)


def test_a_loop_without_products_is_no_tensor_loop() -> None:
    assert tensor_loops(listing("FADD R0, R0, R1", "@P0 BRA 0x0", "EXIT")) == []


def test_sibling_loops_and_loops_with_two_latches() -> None:
    code = listing(HMMA, "@P0 BRA 0x0", "FADD R0, R0, R1", HMMA, "@P1 BRA 0x20", HMMA, "@P2 BRA 0x20", "EXIT")
    first, second = tensor_loops(code)
    assert (first.address, len(first.roles[0])) == (0, 2)
    assert (second.address, len(second.roles[0]), len(second.cold)) == (0x20, 5, 0)


@pytest.mark.parametrize("branch", ["BRA P1, 0x0", "BRA.DIV UR4, 0x0", "BRA !UP0, 0x0", "@!P3 BRA 0x0"])
def test_conditional_branches_fall_through(branch: str) -> None:
    assert graph(listing(HMMA, branch, "EXIT")).successors[0] == [0, 1]


def test_unconditional_branches_do_not() -> None:
    assert graph(listing("BRA 0x20", "NOP", "EXIT")).successors == [[2], [2], []]
    assert graph(listing("@PT BRA 0x20", "NOP", "EXIT")).successors == [[2], [2], []]


# What an instruction costs


@pytest.mark.parametrize(
    ("text", "pipe", "cost"),
    [
        (HMMA, "tensor", 8),
        ("HMMA.1688.F32 R4, R8, R12, R4", "tensor", 4),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", "tensor", 8),
        ("IMMA.16832.S8.S8 R4, R8, R12, R4", "tensor", 8),
        ("FFMA R0, R1, R2, R3", "fma", 2),
        ("FMNMX R0, R1, R2, !PT", "alu", 2),
        ("F2FP.BF16.PACK_AB R0, R1, R2", "alu", 2),
        ("MUFU.EX2 R0, R1", "special", 8),
        ("SHFL.BFLY PT, R0, R1, 0x1, 0x1f", "memory", 4),
        ("LDSM.16.M88.4 R4, [R0]", "memory", 16),
        ("LDSM.16.MT88.2 R4, [R0]", "memory", 8),
        ("LDS.64 R4, [R0]", "memory", 8),
        ("STS.U16 [R0], R4", "memory", 2),
        ("LDG.E.LTC128B.64 R4, [R2.64]", "l2", 16),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R0], [R2.64]", "l2", 32),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R4", "l2", 8),
    ],
)
def test_port_costs_on_sm_80(text: str, pipe: str, cost: float) -> None:
    (one,) = listing(text)
    used = pipes(one, A100)
    assert used[pipe] == cost
    assert used["issue"] == 1


def test_port_costs_on_sm_90() -> None:
    wgmma, from_registers, reduction, fma = listing(
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
        "HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24",
        "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4",
        "FFMA R0, R1, R2, R3",
        arch=90,
    )
    assert pipes(wgmma, H100) == {"issue": 1, "tensor": 64, "memory": 48}
    assert pipes(from_registers, H100)["memory"] == 32
    assert memory_bytes(reduction) == 512
    assert pipes(fma, H100)["fma"] == 1


def test_an_instruction_that_never_executes_costs_its_issue_slot_only() -> None:
    (one,) = listing("@!PT LDS RZ, [RZ]")
    assert pipes(one, A100) == {"issue": 1}
    assert group(one) == "other"


def test_groups() -> None:
    texts = {
        "IMAD.MOV.U32 R0, RZ, RZ, R1": "move",
        "IMAD R0, R1, R2, R3": "integer",
        "UIADD3 UR4, UR4, 1": "uniform",
    }
    texts |= {
        "LDL R0, [R1]": "spill",
        HMMA: "tensor",
        "BAR.SYNC 0x0": "sync",
        "FSETP.GT P0, R1, R2": "compare",
    }
    for text, kind in texts.items():
        assert group(listing(text)[0]) == kind


# The issue model. The loops are long so that what a loop's branch costs doesn't matter.


def fraction(*body: str, warps: int = 2, block: int | None = None) -> float:
    """Of the tensor peak, on sm_80."""
    return report(*body, warps=warps, block=block).simulated or 0.0


def report(*body: str, warps: int = 2, block: int | None = None, machine: int = 80) -> LoopReport:
    (found,) = tensor_loops(listing(*body, "@P0 BRA 0x0", "EXIT"))
    return price_loop(found, MACHINES[machine], warps, block or warps)


def test_products_alone_reach_the_peak() -> None:
    assert fraction(*[HMMA] * 64) == pytest.approx(1.0, abs=0.01)
    assert fraction(*[HMMA] * 64, warps=1) == pytest.approx(1.0, abs=0.02)


def test_mma_sync_does_not_reach_the_peak_of_sm_90() -> None:
    assert report(*[HMMA] * 64, machine=90).simulated == pytest.approx(4 / 6.35, abs=0.01)


@pytest.mark.parametrize(
    ("filler", "count", "want", "limiter"),
    [
        ("FFMA R0, R1, R2, R3", 2, 1.0, "tensor"),
        ("FFMA R0, R1, R2, R3", 8, 8 / 16, "fma"),
        ("FMNMX R0, R1, R2, !PT", 6, 8 / 12, "alu"),
        ("MUFU.EX2 R0, R1", 2, 8 / 16, "special"),
        ("LDSM.16.M88.4 R4, [R0]", 1, 8 / 16, "memory"),
        ("LDL R0, [R1]", 3, 8 / 12, "memory"),
        ("NOP", 15, 8 / 16, "issue"),
    ],
)
def test_what_other_pipes_take(filler: str, count: int, want: float, limiter: str) -> None:
    found = report(*[HMMA, *[filler] * count] * 32)
    assert found.limiter == limiter
    assert found.bound == pytest.approx(want, rel=0.01)
    assert found.simulated == pytest.approx(want, rel=0.04)


def test_the_simulation_never_beats_its_bound() -> None:
    found = report(*[HMMA, "MUFU.EX2 R0, R1", "FADD R0, R1, R2", "SHFL.BFLY PT, R0, R1, 0x1, 0x1f"] * 16)
    assert found.simulated is not None
    assert found.bound is not None
    assert 0.5 < found.simulated <= found.bound


def test_a_dependency_chain_lowers_it_and_other_warps_hide_it() -> None:
    chain = [HMMA, ins("SHFL.BFLY PT, R0, R1, 0x1, 0x1f", write=0), ins("FADD R1, R0, R1", wait=(0,))] * 16
    alone, four = fraction(*chain, warps=1), fraction(*chain, warps=4)
    # One warp: the shuffle's 4 + 20 cycles, then add and product, an issue slot each.
    assert alone == pytest.approx(8 / 26, abs=0.02)
    assert four > 0.9


def test_stall_counts_bind_one_warp() -> None:
    body = [ins(HMMA, stall=15)] * 32
    assert fraction(*body, warps=1) == pytest.approx(8 / 15, abs=0.02)
    assert report(*body).single_warp == pytest.approx(8 / 15, abs=0.02)
    assert fraction(*body, warps=2) > 0.95


def test_waiting_for_the_newest_copy_costs_its_latency() -> None:
    def with_copies(left: int) -> float:
        copy = ["LDGSTS.E.BYPASS.128 [R0], [R2.64]", "LDGDEPBAR"]
        return fraction(*copy, f"DEPBAR.LE SB0, 0x{left:x}", *[HMMA] * 64, warps=1)

    assert with_copies(1) > 0.95
    assert with_copies(0) == pytest.approx(512 / (512 + 350 + 32), abs=0.03)


def test_waiting_for_the_newest_warpgroup_product() -> None:
    def with_products(left: int) -> float:
        product = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0"
        work = ["FFMA R0, R1, R2, R3"] * 30
        found = report(product, f"WARPGROUP.DEPBAR.LE gsb0, 0x{left:x}", *work, warps=1, machine=90)
        return found.simulated or 0.0

    # The product takes 32 cycles and 18 to tell; the work 30, the rest of the loop 7.
    assert with_products(1) > 0.7
    assert with_products(0) == pytest.approx(32 / (32 + 18 + 30 + 7), abs=0.01)


def test_barriers_tie_the_warps_of_a_block() -> None:
    body = [
        "BAR.SYNC 0x0",
        *[HMMA] * 8,
        ins("SHFL.BFLY PT, R0, R1, 0x1, 0x1f", write=0),
        ins("NOP", wait=(0,)),
    ]
    tied, apart = fraction(*body, warps=2, block=2), fraction(*body, warps=2, block=1)
    assert tied < 0.95 * apart


def test_a_barrier_takes_its_time() -> None:
    assert fraction("BAR.SYNC 0x0", *[HMMA] * 8, warps=1) == pytest.approx(64 / (25 + 57 + 6), abs=0.02)


def test_operands_are_held_until_they_are_read() -> None:
    body = [HMMA, ins("STS.128 [R0], R4", read=1), ins("NOP", wait=(1,))]
    assert fraction(*body, warps=1) == pytest.approx(8 / (1 + 16 + 4 + 7), abs=0.01)


def test_a_pipe_accepts_little_ahead_of_its_service() -> None:
    # 64 cycles of MUFU. The first product can go when the last MUFU has got in, two ahead of its service.
    assert fraction(*["MUFU.EX2 R0, R1"] * 8, *[HMMA] * 8, warps=1) == pytest.approx(
        64 / (49 + 57 + 6), abs=0.02
    )


def test_loads_share_the_l2_bandwidth() -> None:
    loads = [ins("LDG.E.128 R4, [R2.64]", write=barrier) for barrier in range(4)]
    found = report(*loads, *[HMMA] * 7, ins(HMMA, wait=range(4)), warps=8)
    assert found.limiter == "l2"
    assert found.simulated == pytest.approx(0.5, abs=0.03)


def test_cycles_scale_with_warps() -> None:
    body = loop(*[HMMA] * 32)
    one, four = (cycles_per_iteration([body], A100, warps, warps) for warps in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.03)


# Occupancy


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks", "limiter"),
    [
        ("sm_80", 255, 0, 128, 2, "registers"),
        ("sm_80", 168, 0, 128, 3, "registers"),
        ("sm_80", 169, 0, 128, 2, "registers"),
        ("sm_80", 96, 0, 128, 5, "registers"),
        ("sm_80", 128, 0, 256, 2, "registers"),
        ("sm_80", 104, 0, 32, 16, "registers"),
        ("sm_80", 32, 0, 1024, 2, "registers"),
        ("sm_80", 16, 0, 1024, 2, "warps"),
        ("sm_80", 24, 0, 32, 32, "blocks"),
        ("sm_80", 64, 80 << 10, 128, 2, "shared"),
        ("sm_80", 64, 82 << 10, 128, 1, "shared"),
        ("sm_80", 64, 164 << 10, 128, 0, "shared"),
        ("sm_86", 64, 49 << 10, 128, 2, "shared"),
        ("sm_86", 24, 0, 1024, 1, "warps"),
        ("sm_90", 64, 113 << 10, 128, 2, "shared"),
        ("sm_120", 64, 100 << 10, 128, 0, "shared"),
        ("gfx942", 256, 0, 256, 2, "registers"),
        ("gfx942", 512, 0, 256, 1, "registers"),
        ("gfx942", 64, 40 << 10, 256, 1, "shared"),
        ("gfx950", 64, 40 << 10, 256, 4, "shared"),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, threads: int, blocks: int, limiter: str) -> None:
    found = occupancy(LIMITS[arch], registers, shared, threads)
    assert (found.blocks, found.limiter) == (blocks, limiter)
    assert found.warps == blocks * threads // LIMITS[arch].warp
