"""Every kind of finding is found, and the correct kernel beside it is not blamed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from ptx.findings import Finding, Unsupported
from ptx.lanes import Array
from ptx.machine import empty, launch
from ptx.snippets import module, run

# %rd10: this thread's word of the first argument; %r10: of shared memory.
SELF = """
    mul.wide.u32 %rd10, %r1, 4;
    add.u64 %rd10, %rd10, %rd1;
    mov.u32 %r11, smem;
    shl.b32 %r10, %r1, 2;
    add.u32 %r10, %r10, %r11;
"""
GLOBAL = SELF.replace("    mov.u32 %r11, smem;\n", "").replace("    add.u32 %r10, %r10, %r11;\n", "")
NEXT = "xor.b32 %r12, %r10, {};"  # the word of another thread


def finds(kind: str, message: str, body: str, *args: Any, **options: Any) -> Finding:
    with pytest.raises(Finding, match=message) as caught:
        run(body, *args, **options)
    assert caught.value.kind == kind
    assert caught.value.line > 0
    return caught.value


def words(n: int = 64) -> Array:
    return np.arange(n, dtype=np.uint32)


# Memory


def test_out_of_bounds_names_the_place() -> None:
    body = GLOBAL + "add.u32 %r2, %r1, 7;\nst.global.u32 [%rd10], %r2;"
    run(body, words(64), block=64)
    finding = finds("out-of-bounds", "global", body, words(40), block=64)
    assert "st.global.u32" in finding.text
    assert finding.thread == (40, 0, 0)
    assert finding.block == (0, 0, 0)


def test_out_of_bounds_read_just_before_and_after() -> None:
    body = "ld.global.u32 %r2, [%rd1+{}];"
    run(body.format(0), words(4), block=1)
    finds("out-of-bounds", "global", body.format(16), words(4), block=1)
    finds("out-of-bounds", "global", body.format(-4), words(4), block=1)


def test_a_view_covers_only_itself() -> None:
    base = words(64).reshape(8, 8)
    run("ld.global.u32 %r2, [%rd1+28];", base[2:4, :4].T.T, base, block=1)
    finds("out-of-bounds", "global", "ld.global.u32 %r2, [%rd1+16];", base[2:4, :4], block=1)
    finds("out-of-bounds", "global", "ld.global.u32 %r2, [%rd1+-4];", base[2:4, :4], block=1)


@pytest.mark.parametrize("where", ["shared", "local"])
def test_out_of_bounds_of_private_memory(where: str) -> None:
    local = ".local .align 16 .b8 mine[64];\n mov.u64 %rd9, mine;\n"
    setup = local if where == "local" else "mov.u64 %rd9, smem;\n"
    body = setup + f"st.{where}.u32 [%rd9+{{}}], %r1;"
    run(body.format(60), words(), block=1, shared=64, grid=2)
    finds("out-of-bounds", where, body.format(64), words(), block=1, shared=64, grid=2)


def test_misaligned() -> None:
    finds("misaligned", "8-byte", "ld.global.v2.u32 {%r2, %r3}, [%rd1+4];", words(), block=1)
    finds(
        "misaligned", "4-byte", "mov.u32 %r2, smem; st.shared.u32 [%r2+2], %r1;", words(), block=1, shared=64
    )


@pytest.mark.parametrize("shared", [True, False])
def test_unwritten_memory(shared: bool) -> None:
    if shared:
        finds("uninitialised", "shared", SELF + "ld.shared.u32 %r2, [%r10];", words(), shared=256)
        run(SELF + "st.shared.u32 [%r10], %r1; ld.shared.u32 %r2, [%r10];", words(), shared=256)
    else:
        finds("uninitialised", "global", GLOBAL + "ld.global.u32 %r2, [%rd10];", empty(64, np.uint32))
        run(GLOBAL + "st.global.u32 [%rd10], %r1; ld.global.u32 %r2, [%rd10];", empty(64, np.uint32))


def test_shared_memory_is_forgotten_between_blocks() -> None:
    body = "mov.u32 %r3, %ctaid.x; setp.eq.u32 %p1, %r3, 0;" + SELF
    body += "@%p1 st.shared.u32 [%r10], %r1; ld.shared.u32 %r2, [%r10];"
    for lanes in (32, 64):  # in one wave and in two
        finding = finds("uninitialised", "shared", body, words(), shared=256, grid=2, max_lanes=lanes)
        assert finding.block == (1, 0, 0)


def test_uninitialised_register() -> None:
    finds("uninitialised", "register %r5", "add.u32 %r2, %r1, %r5;", words())
    body = "setp.lt.u32 %p1, %r1, {}; @%p1 mov.u32 %r5, 1; add.u32 %r2, %r1, %r5;"
    finding = finds("uninitialised", "register %r5", body.format(31), words())
    assert finding.thread == (31, 0, 0)
    run(body.format(32), words())


def test_store_to_constant_memory() -> None:
    table = ".const .align 4 .b8 table[4] = {1, 0, 0, 0};"
    body = "mov.u64 %rd5, table; cvta.const.u64 %rd6, %rd5; ld.u32 %r2, [%rd6]; st.global.u32 [%rd1], %r2;"
    out = words(1)
    run(body, out, block=1, outside=table)
    assert out[0] == 1
    finds(
        "out-of-bounds",
        "const",
        "mov.u64 %rd5, table; cvta.const.u64 %rd6, %rd5; st.u32 [%rd6], %r1;",
        words(),
        outside=table,
    )


# Races in shared memory


@pytest.mark.parametrize("apart", [4, 128])  # another lane of the warp; another warp
@pytest.mark.parametrize("barrier", ["", "bar.warp.sync 0xffffffff;", "bar.sync 0;"])
def test_read_of_what_another_thread_wrote(apart: int, barrier: str) -> None:
    body = SELF + "st.shared.u32 [%r10], %r1;" + barrier + NEXT.format(apart) + "ld.shared.u32 %r2, [%r12];"
    if barrier == "bar.sync 0;" or ("warp" in barrier and apart == 4):
        run(body, words(), block=64, shared=256)
    else:
        finds("race", "reads what thread", body, words(), block=64, shared=256)


@pytest.mark.parametrize("apart", [4, 128])
@pytest.mark.parametrize("barrier", ["", "bar.warp.sync 0xffffffff;", "bar.sync 0;"])
def test_overwrite_of_what_another_thread_read(apart: int, barrier: str) -> None:
    first = (
        SELF + "st.shared.u32 [%r10], %r1; bar.sync 0;" + NEXT.format(apart) + "ld.shared.u32 %r2, [%r12];"
    )
    body = first + barrier + "st.shared.u32 [%r10], %r2;"
    if barrier == "bar.sync 0;" or ("warp" in barrier and apart == 4):
        run(body, words(), block=64, shared=256)
    else:
        finds("race", "overwrites what", body, words(), block=64, shared=256)


@pytest.mark.parametrize("readers", ["1", "7", "39"])
def test_overwrite_of_what_many_read(readers: str) -> None:
    """All threads up to `readers` read word 0, then the first overwrites it."""
    body = f"""
        mov.u32 %r10, smem; setp.eq.u32 %p1, %r1, 0; setp.le.u32 %p2, %r1, {readers};
        @%p1 st.shared.u32 [%r10], %r1; bar.sync 0; @%p2 ld.shared.u32 %r2, [%r10];
        {{}} @%p1 st.shared.u32 [%r10], %r1;"""
    finds("race", "overwrites what", body.format(""), words(), block=64, shared=4)
    run(body.format("bar.sync 0;"), words(), block=64, shared=4)
    if readers != "39":
        run(body.format("bar.warp.sync -1;"), words(), block=64, shared=4)
    else:
        finds("race", "overwrites what", body.format("bar.warp.sync -1;"), words(), block=64, shared=4)


def test_two_threads_write() -> None:
    finds("race", "different values", "st.shared.u32 [smem], %r1;", words(), shared=4)
    run("st.shared.u32 [smem], 5;", words(), shared=4)  # the same value: compilers do that
    later = "setp.eq.u32 %p1, %r1, {}; @%p1 st.shared.u32 [smem], %r1;"
    body = later.format(0) + later.format(1)
    finds("race", "overwrites what thread 0 wrote", body, words(), shared=4)
    run(later.format(0) + "bar.sync 0;" + later.format(1), words(), shared=4)


def test_bytes_of_one_word_are_apart() -> None:
    run("mov.u32 %r3, smem; add.u32 %r3, %r3, %r1; st.shared.u8 [%r3], %r1;", words(), shared=32)


def test_shuffles_order_no_memory() -> None:
    body = SELF + "st.shared.u32 [%r10], %r1; shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;" + NEXT.format(4)
    finds("race", "reads what", body + "ld.shared.u32 %r2, [%r12];", words(), shared=256)


def test_atomics_meet_without_a_race() -> None:
    start = "setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [smem], 0; {} atom.shared.add.u32 %r2, [smem], 1;"
    run(start.format("bar.sync 0;"), words(), block=64, shared=4)
    finds("race", "overwrites", start.format(""), words(), block=64, shared=4)
    finds(
        "race",
        "reads",
        start.format("bar.sync 0;") + "ld.shared.u32 %r3, [smem];",
        words(),
        block=64,
        shared=4,
    )


def test_float_sums_of_several_threads_have_no_order() -> None:
    one = "setp.eq.u32 %p1, %r1, {}; cvt.rn.f32.u32 %f1, %r1; @%p1 red.global.add.f32 [%rd1], %f1;"
    once = "cvt.rn.f32.u32 %f1, %r1; red.global.add.f32 [%rd1], %f1;"
    x = np.zeros(1, np.float32)
    finds("race", "several threads add floats", once, x, block=32)
    finds("race", "overwrites what thread 0 wrote", one.format(0) + one.format(40), x, block=64)
    finds("race", "block", one.format(0), x, grid=2)
    run(one.format(0) + "bar.sync 0;" + one.format(40), x, block=64)  # a barrier gives them one


# Races in global memory


def test_blocks_that_write_one_address() -> None:
    body = "mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 {}"
    for lanes in (32, 64):
        options: dict[str, Any] = {"grid": 2, "max_lanes": lanes}
        finds(
            "race",
            "different values|block 0 wrote",
            body.format("st.global.u32 [%rd1], %r2;"),
            words(),
            **options,
        )
        out = words()
        run(body.format("red.global.add.u32 [%rd1], 5;"), out, **options)
        assert out[0] == 10


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("writer", [0, 1])
def test_a_block_that_reads_what_another_wrote(lanes: int, writer: int) -> None:
    body = f"mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, {writer}; setp.eq.and.u32 %p2, %r1, 0, %p1;"
    body += "@%p2 st.global.u32 [%rd1], 7; bar.sync 0; @!%p1 ld.global.u32 %r3, [%rd1];"
    finds("race", "block", body, words(), grid=2, max_lanes=lanes)
    run(body, words(), grid=1)


def test_a_block_overwrites_what_another_read_long_before() -> None:
    """The writer's own later read must not hide the other block's."""
    body = """setp.eq.u32 %p1, %r1, 0; mov.u32 %r2, %ctaid.x; setp.eq.and.u32 %p2, %r2, 1, %p1;
        bar.sync 0; @%p1 ld.global.u32 %r3, [%rd1]; bar.sync 0; @%p2 st.global.u32 [%rd1], 5;"""
    for lanes in (32, 64):
        finds("race", "block|other threads read", body, words(), grid=2, max_lanes=lanes)


def test_an_arrival_orders_only_what_came_before_it() -> None:
    body = """setp.ge.u32 %p1, %r1, 32; @%p1 bra $consume;
        st.shared.u32 [smem], 1; bar.arrive 1, 64; st.shared.u32 [smem+4], 2; ret;
        $consume: bar.sync 1, 64; ld.shared.u32 %r2, [smem{}];"""
    run(body.format(""), words(), block=64, shared=8)
    finds("race", "reads what", body.format("+4"), words(), block=64, shared=8)


def test_threads_of_a_block_in_global_memory() -> None:
    body = GLOBAL + "st.global.u32 [%rd10], %r1; {} xor.b64 %rd11, %rd10, 4; ld.global.u32 %r2, [%rd11];"
    finds("race", "reads what", body.format(""), words())
    run(body.format("bar.sync 0;"), words())


# cp.async

COPY = SELF + "cp.async.ca.shared.global [%r10], [%rd10], 4; cp.async.commit_group;"


def test_copy_is_read_before_the_wait() -> None:
    read = "ld.shared.u32 %r2, [%r10];"
    finds("cp-async", "its own cp.async", COPY + read, words(), shared=256)
    finds("cp-async", "its own cp.async", COPY + "bar.sync 0;" + read, words(), shared=256)
    finds("cp-async", "its own cp.async", COPY + "cp.async.wait_group 1;" + read, words(), shared=256)
    run(COPY + "cp.async.wait_group 0;" + read, words(), shared=256)
    run(COPY + "cp.async.wait_all;" + read, words(), shared=256)


def test_copy_is_read_by_another_thread() -> None:
    read = NEXT.format(4) + "ld.shared.u32 %r2, [%r12];"
    finds("race", "reads what", COPY + "cp.async.wait_group 0;" + read, words(), shared=256)
    finds(
        "cp-async",
        "thread 1's cp.async",
        COPY + "bar.sync 0; cp.async.wait_group 1;" + read,
        words(),
        shared=256,
    )
    finds("race", "reads what", COPY + "bar.sync 0; cp.async.wait_group 0;" + read, words(), shared=256)
    run(COPY + "cp.async.wait_group 0; bar.sync 0;" + read, words(), shared=256)


def test_copy_overwrites_what_is_read() -> None:
    body = SELF + "st.shared.u32 [%r10], %r1; bar.sync 0;" + NEXT.format(4) + "ld.shared.u32 %r2, [%r12];"
    copy = "cp.async.ca.shared.global [%r10], [%rd10], 4; cp.async.wait_all;"
    finds("race", "overwrites what", body + copy, words(), shared=256)
    run(body + "bar.sync 0;" + copy, words(), shared=256)


def test_groups_arrive_in_order() -> None:
    body = SELF + "".join(
        f"cp.async.ca.shared.global [%r10+{128 * i}], [%rd10+{128 * i}], 4; cp.async.commit_group;"
        for i in range(3)
    )
    for keep in (0, 1, 2):
        for i in range(3):
            read = f"cp.async.wait_group {keep}; ld.shared.u32 %r2, [%r10+{128 * i}];"
            if i < 3 - keep:
                run(body + read, words(96), shared=384)
            else:
                finds("cp-async", "not delivered", body + read, words(96), shared=384)


def test_copy_fills_with_zeros() -> None:
    for size in (0, 1, 3, 4):
        out = empty(32, np.uint32)
        body = (
            SELF
            + f"mov.u32 %r5, {size}; cp.async.ca.shared.global [%r10], [%rd10], 4, %r5; cp.async.wait_all;"
        )
        body += "ld.shared.u32 %r2, [%r10]; mul.wide.u32 %rd11, %r1, 4; add.u64 %rd11, %rd11, %rd2;"
        run(body + "st.global.u32 [%rd11], %r2;", words() * 0x01010101 + 0x04030201, out, shared=128)
        want = (words(32) * 0x01010101 + 0x04030201) & np.uint32((1 << 8 * size) - 1)
        np.testing.assert_array_equal(out.array, want)


def test_copy_of_nothing_may_point_anywhere() -> None:
    body = SELF + "cp.async.ca.shared.global [%r10], [%rd10+4096], 4, {}; cp.async.wait_all;"
    run("mov.u32 %r5, 0;" + body.format("%r5"), words(), shared=256)
    run("setp.eq.u32 %p1, %r1, %r1;" + body.format("%p1"), words(), shared=256)
    finds("out-of-bounds", "global", "mov.u32 %r5, 1;" + body.format("%r5"), words(), shared=256)
    finds("out-of-bounds", "global", "setp.ne.u32 %p1, %r1, %r1;" + body.format("%p1"), words(), shared=256)


# Control flow


def test_barrier_in_divergent_control_flow() -> None:
    body = "setp.lt.u32 %p1, %r1, {}; @%p1 bra $skip; bar.sync 0;\n$skip:"
    finds("barrier", "only some lanes", body.format(5), words(), block=64)
    finds("barrier", "never come", body.format(32) + "bar.sync 1;", words(), block=64)
    finds("barrier", "different barriers", body.format(32) + "bar.sync 0;", words(), block=64)
    run(body.format(64), words(), block=64)
    run(
        "setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;", words(), block=64
    )  # exited threads are not waited for


def test_diverged_shuffle() -> None:
    body = "setp.lt.u32 %p1, %r1, 16; @%p1 bra $skip; shfl.sync.{} %r2, %r1, {};\n$skip:"
    finds("warp", "membermask names lanes", body.format("bfly.b32", "1, 31, 0xffffffff"), words())
    run(body.format("bfly.b32", "1, 31, 0xffff0000"), words())
    finds("warp", "not here", body.format("bfly.b32", "16, 31, 0xffff0000"), words())
    finds("warp", "own membermask", body.format("bfly.b32", "1, 31, 0xfffe0000"), words())


@pytest.mark.parametrize(
    "instruction",
    [
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [smem];",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4}, {%r3,%r3}, {%r3},"
        "{%f0,%f0,%f0,%f0};",
    ],
)
def test_diverged_warp_at_an_aligned_instruction(instruction: str) -> None:
    start = (
        "mov.f32 %f0, 0f00000000; mov.u32 %r3, 0; st.shared.v4.u32 [smem], {%r3, %r3, %r3, %r3}; bar.sync 0;"
    )

    def body(lanes: int) -> str:
        return start + f"setp.lt.u32 %p1, %r1, {lanes}; @%p1 bra $skip; {instruction}\n$skip:"

    finds("warp", "only some lanes", body(5), words(), shared=16)
    run(body(0), words(), shared=16)
    run(body(32), words(), shared=16, block=64)


def test_uniform_branch_that_diverges() -> None:
    finds("divergence", "disagree", "setp.lt.u32 %p1, %r1, 5; @%p1 bra.uni $end;\n$end:", words())


def test_trap_and_endless_loops() -> None:
    finds("trap", "trapped", "setp.eq.u32 %p1, %r1, 9; @%p1 trap;", words())
    finds("endless", "still running", "$again: bra $again;", words(), limit=1000)


# Refusals and reports


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("frobnicate.u32 %r2, %r1;", "frobnicate"),
        ("add.frob.u32 %r2, %r1, 1;", "frob"),
        ("ld.global.frob.u32 %r2, [%rd1];", "frob"),
        ("cp.async.bulk.shared.global [%r1], [%rd1], 16;", "bulk"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r2}, {%r3}, {%r4}, {%r5};", "m16n8k"),
        ("add.u32 %rd5, %r1, 1;", "64-bit register"),
        ("mov.u32 %r2, nowhere;", "nowhere"),
        ("bra $nowhere;", "label"),
    ],
)
def test_what_the_machine_does_not_know(code: str, named: str) -> None:
    with pytest.raises(Unsupported, match=re.escape(named)):
        run(code, words())


def test_collecting_goes_on_after_findings() -> None:
    body = (
        SELF
        + "st.shared.u32 [%r10], %r1;"
        + NEXT.format(4)
        + "ld.shared.u32 %r2, [%r12]; add.u32 %r2, %r3, %r2;"
    )
    report = run(body + "st.global.u32 [%rd10+4096], %r2;", words(), shared=256, collect=True)
    assert [finding.kind for finding in report.findings] == ["race", "uninitialised", "out-of-bounds"]
    for finding in report.findings:
        assert finding.kernel == "k"
        assert finding.thread is not None


def test_arguments_are_checked() -> None:
    ptx = module("", 2)
    with pytest.raises(ValueError, match="2 parameters, given 1"):
        launch(ptx, "k", 1, 1, [words()])
    with pytest.raises(KeyError, match="no kernel"):
        launch(ptx, "other", 1, 1, [words()])
