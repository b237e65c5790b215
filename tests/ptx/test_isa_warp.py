"""Warp instructions against loops over lanes written from the manual's pseudocode."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
import pytest

from ptx.lanes import Array
from ptx.snippets import evaluate
from ptx.test_isa_int import bits


def shuffle(values: Array, mode: str, b: Array, c: Array) -> tuple[Array, Array]:
    result, found = values.copy(), np.zeros(len(values), np.uint32)
    for thread in range(len(values)):
        lane, base = thread % 32, thread // 32 * 32
        by, clamp, segment = int(b[thread]) & 31, int(c[thread]) & 31, int(c[thread]) >> 8 & 31
        high = lane & segment | clamp & ~segment
        low = lane & segment
        other, good = {
            "up": (lane - by, lane - by >= high),
            "down": (lane + by, lane + by <= high),
            "bfly": (lane ^ by, (lane ^ by) <= high),
            "idx": (low | by & ~segment, (low | by & ~segment) <= high),
        }[mode]
        found[thread] = good
        result[thread] = values[base + (other if good else lane)]
    return result, found


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("segment", [0, 16, 24])
@pytest.mark.parametrize("by", [0, 1, 5, 16, 31])
def test_shuffles(mode: str, segment: int, by: int) -> None:
    values = bits("u32", 0, 64)
    c = segment << 8 | (0 if mode == "up" else 31)
    want, found = shuffle(values, mode, np.full(64, by), np.full(64, c))
    got = evaluate(f"shfl.sync.{mode}.b32 %d|%P0, %a0, {by}, {c}, 0xffffffff;", [values])
    np.testing.assert_array_equal(got, want)
    code = f"shfl.sync.{mode}.b32 %r9|%P0, %a0, {by}, {c}, -1; selp.u32 %d, 1, 0, %P0;"
    np.testing.assert_array_equal(evaluate(code, [values]), found)


def test_shuffle_by_a_register() -> None:
    values, b = bits("u32", 0, 64), bits("u32", 1, 64)
    want, _ = shuffle(values, "idx", b, np.full(64, 31))
    np.testing.assert_array_equal(evaluate("shfl.sync.idx.b32 %d, %a0, %a1, 31, -1;", [values, b]), want)


def test_votes() -> None:
    rows = [np.zeros(32), np.ones(32), np.arange(32) % 3 == 0, np.arange(32) == 7]
    x = np.concatenate(rows).astype(np.uint32)
    per_warp = x.reshape(4, 32)
    wants: dict[str, Any] = {"all": per_warp.all(1), "any": per_warp.any(1)}
    wants["uni"] = per_warp.all(1) | ~per_warp.any(1)
    start = "setp.ne.u32 %P1, %a0, 0;"
    for mode, want in wants.items():
        code = f"{start} vote.sync.{mode}.pred %P0, %P1, -1; selp.u32 %d, 1, 0, %P0;"
        np.testing.assert_array_equal(evaluate(code, [x]), np.repeat(want, 32))
        code = code.replace("%P0, %P1", "%P0, !%P1")
        other = {"all": ~per_warp.any(1), "any": ~per_warp.all(1), "uni": wants["uni"]}[mode]
        np.testing.assert_array_equal(evaluate(code, [x]), np.repeat(other, 32))
    ballots = [sum(int(v) << i for i, v in enumerate(row)) for row in per_warp]
    got = evaluate(f"{start} vote.sync.ballot.b32 %d, %P1, -1;", [x])
    np.testing.assert_array_equal(got, np.repeat(np.array(ballots, np.uint32), 32))


def test_vote_of_some_lanes() -> None:
    """Lanes 0 to 15 vote among themselves; the others have left."""
    x = np.arange(32, dtype=np.uint32)
    code = """mov.u32 %d, 77; setp.ge.u32 %P1, %r1, 16; @%P1 bra $out;
        setp.lt.u32 %P2, %a0, 4; vote.sync.ballot.b32 %d, %P2, 0xffff;
        activemask.b32 %r5; sub.u32 %d, %r5, %d;
        $out:"""
    np.testing.assert_array_equal(evaluate(code, [x]), np.where(x < 16, 0xFFFF - 0xF, 77))


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_redux(kind: str) -> None:
    x = bits("u32", 3, 96)
    typed = x.view(np.int32 if kind == "s32" else np.uint32).reshape(3, 32)
    for op, want in (("add", typed.sum(1, dtype=typed.dtype)), ("min", typed.min(1)), ("max", typed.max(1))):
        got = evaluate(f"redux.sync.{op}.{kind} %d, %a0, -1;", [x]).view(typed.dtype)
        np.testing.assert_array_equal(got, np.repeat(want, 32))
    for op, fn in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        want = np.array([functools.reduce(fn, row) for row in x.reshape(3, 32)])
        np.testing.assert_array_equal(evaluate(f"redux.sync.{op}.b32 %d, %a0, -1;", [x]), np.repeat(want, 32))


def test_match() -> None:
    x = (np.arange(64, dtype=np.uint32) * 7 % 5).astype(np.uint32)
    x[32:] = 4
    rows = x.reshape(2, 32)
    want = [sum(1 << i for i in range(32) if row[i] == v) for row in rows for v in row]
    np.testing.assert_array_equal(evaluate("match.any.sync.b32 %d, %a0, -1;", [x]), want)
    got = evaluate("match.all.sync.b32 %d|%P0, %a0, -1;", [x])
    np.testing.assert_array_equal(got, np.repeat(np.array([0, 0xFFFFFFFF], np.uint32), 32))


def test_block_reductions() -> None:
    x = np.arange(64, dtype=np.uint32)
    start = "setp.lt.u32 %P1, %a0, 40;"
    assert (evaluate(f"{start} bar.red.popc.u32 %d, 0, %P1;", [x]) == 40).all()
    for how, want in (("and", 0), ("or", 1)):
        got = evaluate(f"{start} bar.red.{how}.pred %P0, 0, %P1; selp.u32 %d, 1, 0, %P0;", [x])
        assert (got == want).all()
