"""Loads, stores, atomics and addresses in every space."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.findings import Unsupported
from ptx.machine import empty, launch
from ptx.snippets import HEADER, run

HINTS = [
    "",
    ".ca",
    ".cg",
    ".cs",
    ".lu",
    ".cv",
    ".nc",
    ".L1::evict_first",
    ".L1::no_allocate.L2::128B",
    ".volatile",
]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("u8", "u1"), ("s8", "i1"), ("u16", "u2"), ("s16", "i2"), ("u32", "u4")]
)
def test_narrow_loads_extend(kind: str, dtype: str) -> None:
    x = np.array([0, 1, 127, 128, 255, 5, 6, 200], np.uint8).repeat(4).view(dtype)
    out = empty(len(x), np.int32)
    code = f"""mul.wide.u32 %rd10, %r1, {x.itemsize}; add.u64 %rd10, %rd10, %rd1;
        ld.global.{kind} %r2, [%rd10];
        mul.wide.u32 %rd11, %r1, 4; add.u64 %rd11, %rd11, %rd2; st.global.u32 [%rd11], %r2;"""
    run(code, x, out, block=len(x))
    np.testing.assert_array_equal(out.array, x.astype(np.int64).astype(np.int32))


@pytest.mark.parametrize("hint", HINTS)
def test_vectors_and_hints(hint: str) -> None:
    x = np.arange(128, dtype=np.uint32)
    out = empty(128, np.uint32)
    form = "ld.volatile.global.v4.u32" if hint == ".volatile" else f"ld.global{hint}.v4.u32"
    code = f"""mul.wide.u32 %rd10, %r1, 16; add.u64 %rd11, %rd10, %rd1; add.u64 %rd12, %rd10, %rd2;
        {form} {{%r2, %r3, %r4, %r5}}, [%rd11]; st.global.cs.v2.u32 [%rd12], {{%r5, %r4}};
        st.global.wt.v2.b32 [%rd12+8], {{%r3, 7}};"""
    run(code, x, out)
    want = x.reshape(-1, 4)[:, ::-1].copy()
    want[:, 3] = 7
    np.testing.assert_array_equal(out.array.reshape(-1, 4), want)


def test_cache_policy_as_triton_writes_it() -> None:
    out = empty(32, np.uint32)
    code = """createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0;
        mul.wide.u32 %rd10, %r1, 4; add.u64 %rd11, %rd10, %rd1; add.u64 %rd12, %rd10, %rd2;
        ld.global.L1::evict_first.L2::cache_hint.b32 %r2, [%rd11], %rd9;
        st.global.L1::evict_last.L2::cache_hint.b32 [%rd12], %r2, %rd9;"""
    run(code, np.arange(32, dtype=np.uint32), out)
    np.testing.assert_array_equal(out.array, np.arange(32))


def test_generic_addresses_reach_every_space() -> None:
    out = empty((4, 32), np.uint32)
    code = """.local .align 4 .b8 mine[8]; mov.u64 %rd3, mine; cvta.local.u64 %rd4, %rd3;
        mov.u64 %rd5, smem; cvta.shared.u64 %rd6, %rd5; mul.wide.u32 %rd7, %r1, 4; add.u64 %rd6, %rd6, %rd7;
        add.u64 %rd8, %rd1, %rd7; mov.u64 %rd9, table; cvta.const.u64 %rd9, %rd9;
        st.u32 [%rd4+4], %r1; st.u32 [%rd6], %r1; add.u32 %r2, %r1, 100;
        and.b32 %r9, %r1, 1; setp.eq.u32 %p1, %r9, 0; selp.b64 %rd10, %rd6, %rd4, %p1;
        @!%p1 add.u64 %rd10, %rd10, 4;
        ld.u32 %r3, [%rd10]; ld.local.u32 %r4, [%rd3+4]; ld.u32 %r5, [%rd9+4];
        st.u32 [%rd8], %r3; st.u32 [%rd8+128], %r4; st.u32 [%rd8+256], %r5;
        isspacep.shared %p2, %rd6; isspacep.global %p3, %rd8; isspacep.local %p4, %rd8;
        selp.u32 %r6, 1, 0, %p2; selp.u32 %r7, 2, 0, %p3; selp.u32 %r8, 4, 0, %p4; or.b32 %r6, %r6, %r7;
        or.b32 %r6, %r6, %r8; cvta.to.shared.u64 %rd11, %rd6; cvt.u32.u64 %r10, %rd11;
        ld.shared.u32 %r11, [%r10];
        sub.u32 %r11, %r11, %r1; add.u32 %r6, %r6, %r11; st.global.u32 [%rd8+384], %r6;"""
    run(code, out, shared=128, outside=".const .align 4 .b8 table[8] = {1, 0, 0, 0, 2, 1, 0, 0};")
    thread = np.arange(32)
    np.testing.assert_array_equal(out.array, [thread, thread, np.full(32, 258), np.full(32, 3)])


def test_initialised_globals_and_their_addresses() -> None:
    out = np.zeros(3, np.uint32)
    globals_ = """.global .align 4 .u32 counter = 41;
        .global .align 4 .f32 real = 0f40000000;
        .global .align 8 .u64 link = generic(counter);"""
    code = """mov.u64 %rd5, counter; ld.global.u32 %r2, [%rd5]; add.u32 %r2, %r2, 1;
        st.global.u32 [%rd1], %r2; ld.global.u64 %rd6, [link];
        ld.u32 %r3, [%rd6]; st.global.u32 [%rd1+4], %r3;
        ld.global.f32 %f1, [real]; cvt.rzi.u32.f32 %r4, %f1; st.global.u32 [%rd1+8], %r4;"""
    run(code, out, block=1, outside=globals_)
    assert list(out) == [42, 41, 2]


@pytest.mark.parametrize(
    ("op", "start", "want"),
    [
        ("add.u32", 5, 5 + sum(range(64))),
        ("min.s32", 40, 0),
        ("max.u32", 7, 63),
        ("or.b32", 64, 127),
        ("and.b32", 0xFF, 0),
        ("xor.b32", 9, 9),
    ],
)
@pytest.mark.parametrize("form", ["atom", "red"])
def test_atomics_on_one_address(op: str, start: int, want: int, form: str) -> None:
    x = np.array([start], np.uint32)
    target = "%r2, [%rd1]" if form == "atom" else "[%rd1]"
    run(f"{form}.global.{op} {target}, %r1;", x, block=64)
    assert x[0] == want


def test_atomics_on_many_addresses() -> None:
    x = np.arange(64, dtype=np.uint32) // 2 * 1000
    code = "shr.u32 %r2, %r1, 1; mul.wide.u32 %rd10, %r2, 8; add.u64 %rd10, %rd10, %rd1; "
    run(code + "red.global.add.u32 [%rd10], %r1;", x, block=64)
    pair = np.arange(32) * 1000 + 4 * np.arange(32) + 1
    np.testing.assert_array_equal(x[::2], pair)
    np.testing.assert_array_equal(x[1::2], np.arange(32) * 1000)


def test_atomics_return_what_was_there() -> None:
    x = np.array([10], np.uint32)
    out = empty(64, np.uint32)
    store = "mul.wide.u32 %rd10, %r1, 4; add.u64 %rd10, %rd10, %rd2; st.global.u32 [%rd10], %r2;"
    run(
        "atom.relaxed.gpu.global.add.u32 %r2, [%rd1], 3;" + store,
        x,
        out,
        block=64,
    )
    assert sorted(out.array) == [10 + 3 * i for i in range(64)]
    x[0] = 0
    run("atom.global.cas.b32 %r2, [%rd1], 0, 99;" + store, x, out, block=64)
    assert sorted(out.array) == [0] + [99] * 63
    run("atom.global.exch.b32 %r2, [%rd1], %r1;" + store, x, out, block=64)
    assert sorted([*out.array, x[0]]) == sorted([99, *range(64)])
    x[0] = 0
    run("atom.global.inc.u32 %r2, [%rd1], 4;" + store, x, out, block=64)
    assert sorted(out.array) == sorted(i % 5 for i in range(64))
    run("atom.global.dec.u32 %r2, [%rd1], 4;" + store, np.array([3], np.uint32), out, block=5)
    assert sorted(out.array[:5]) == [0, 1, 2, 3, 4]


def test_float_atomics() -> None:
    x = np.zeros(64, np.float32)
    add = "cvt.rn.f32.u32 %f1, %r1; mul.wide.u32 %rd10, %r1, 4; add.u64 %rd10, %rd10, %rd1;"
    run(add + 2 * "red.global.add.f32 [%rd10], %f1;", x, block=64)
    np.testing.assert_array_equal(x, 2 * np.arange(64))
    x = np.ones(256, np.float32)
    add = add.replace(", 4;", ", 16;") + "mov.f32 %f2, 0f40000000;"
    run(add + 2 * "red.global.add.v4.f32 [%rd10], {%f1, %f2, %f1, %f2};", x, block=64)
    np.testing.assert_array_equal(x[::2], 1 + 2 * np.repeat(np.arange(64), 2))
    np.testing.assert_array_equal(x[1::2], 5)
    y = np.zeros(2, np.float16)
    run("cvt.rn.f16x2.f32 %r3, 0f3F800000, 0f40000000; red.global.add.noftz.f16x2 [%rd1], %r3;", y, block=1)
    assert list(y) == [2, 1]
    with pytest.raises(Unsupported, match="noftz"):
        run("red.global.add.f16x2 [%rd1], %r1;", y)


def test_parameters_of_every_kind() -> None:
    ptx = f"""{HEADER}
    .visible .entry k(.param .u64 .ptr .global .align 4 p, .param .u8 a, .param .s16 b, .param .f32 c,
        .param .f64 d, .param .align 8 .b8 s[16])
    {{ .reg .b64 %rd<8>; .reg .b32 %r<8>; .reg .b16 %h<3>; .reg .f32 %f<3>; .reg .f64 %fd<3>;
    ld.param.u64 %rd1, [p]; ld.param.u8 %h1, [a]; cvt.u32.u16 %r1, %h1; st.global.u32 [%rd1], %r1;
    ld.param.s16 %h2, [b]; cvt.s32.s16 %r2, %h2; st.global.u32 [%rd1+4], %r2;
    ld.param.f32 %f1, [c]; cvt.rzi.s32.f32 %r3, %f1; st.global.u32 [%rd1+8], %r3;
    ld.param.f64 %fd1, [d]; cvt.rzi.s32.f64 %r4, %fd1; st.global.u32 [%rd1+12], %r4;
    mov.b64 %rd2, s; ld.param.u32 %r5, [s+8]; st.global.u32 [%rd1+16], %r5; ret; }}"""
    out = empty(5, np.int32)
    struct = np.array([1, 2, 77, 4], np.uint32).tobytes()
    launch(ptx, "k", 1, 1, [out, 200, -3, 4.5, -6.5, struct])
    assert list(out.array) == [200, -3, 4, -6, 77]
    with pytest.raises(ValueError, match=r"\.u8"):
        launch(ptx, "k", 1, 1, [out, 1.5, -3, 4.5, -6.5, struct])


def test_a_struct_with_pointers() -> None:
    ptx = f"""{HEADER}
    .visible .entry k(.param .align 8 .b8 s[32])
    {{ .reg .b64 %rd<4>; .reg .b32 %r<4>;
    ld.param.u64 %rd1, [s]; ld.param.u64 %rd2, [s+8]; ld.param.u32 %r1, [s+16]; ld.param.u64 %rd3, [s+24];
    ld.global.u32 %r2, [%rd2]; add.u32 %r1, %r1, %r2; cvt.u32.u64 %r3, %rd3; add.u32 %r1, %r1, %r3;
    st.global.u32 [%rd1], %r1; ret; }}"""
    out = empty(1, np.uint32)
    launch(ptx, "k", 1, 1, [(out, np.array([30], np.uint32), np.array([12, 0], np.uint32).tobytes(), None)])
    assert list(out.array) == [42]


def test_a_grid_in_three_dimensions() -> None:
    out = empty((2, 3, 4, 6), np.uint32)
    code = """mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z; mov.u32 %r5, %nctaid.x;
        mov.u32 %r6, %nctaid.y; mad.lo.u32 %r7, %r4, %r6, %r3; mad.lo.u32 %r7, %r7, %r5, %r2;
        mov.u32 %r8, %tid.y; mad.lo.u32 %r9, %r8, 3, %r1; mad.lo.u32 %r10, %r7, 6, %r9;
        mul.wide.u32 %rd10, %r10, 4; add.u64 %rd10, %rd10, %rd1; st.global.u32 [%rd10], %r10;"""
    for lanes in (6, 30, 1000):
        out = empty((2, 3, 4, 6), np.uint32)
        report = run(code, out, grid=(4, 3, 2), block=(3, 2), max_lanes=lanes)
        np.testing.assert_array_equal(out.array.ravel(), np.arange(144))
        assert report.waves == {6: 24, 30: 5, 1000: 1}[lanes]


def test_torch_tensors_are_arguments() -> None:
    torch = pytest.importorskip("torch")
    whole = torch.zeros(8, 8, dtype=torch.int32)
    part = whole[2:4, 1:5]
    code = """shr.u32 %r2, %r1, 2; and.b32 %r3, %r1, 3; mad.lo.u32 %r4, %r2, 8, %r3;
        mul.wide.u32 %rd10, %r4, 4; add.u64 %rd10, %rd10, %rd1; st.global.u32 [%rd10], %r1;"""
    run(code, part, block=8)
    assert part.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert int(whole.sum()) == 28


def test_indexed_branches() -> None:
    out = empty(32, np.uint32)
    code = """and.b32 %r2, %r1, 3; mov.u32 %r3, 9; table: .branchtargets $a, $b, $c, $d;
        brx.idx %r2, table;
        $a: mov.u32 %r3, 10; bra $e; $b: mov.u32 %r3, 11; bra $e;
        $c: mov.u32 %r3, 12; bra $e; $d: mov.u32 %r3, 13;
        $e: mul.wide.u32 %rd10, %r1, 4; add.u64 %rd10, %rd10, %rd1; st.global.u32 [%rd10], %r3;"""
    run(code, out)
    np.testing.assert_array_equal(out.array, 10 + np.arange(32) % 4)


def test_loops_of_different_lengths_meet_again() -> None:
    """Lane i loops i times, then all shuffle together: that needs the paths to have met."""
    out = empty(32, np.uint32)
    code = """mov.u32 %r2, 0; mov.u32 %r3, 0;
        $loop: setp.ge.u32 %p1, %r2, %r1; @%p1 bra $done; add.u32 %r3, %r3, 2; add.u32 %r2, %r2, 1; bra $loop;
        $done: shfl.sync.idx.b32 %r4, %r3, 31, 31, -1; add.u32 %r3, %r3, %r4;
        mul.wide.u32 %rd10, %r1, 4; add.u64 %rd10, %rd10, %rd1; st.global.u32 [%rd10], %r3;"""
    run(code, out)
    np.testing.assert_array_equal(out.array, 2 * np.arange(32) + 62)
