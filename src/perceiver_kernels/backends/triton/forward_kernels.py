"""The forward kernel, split over keys, and the kernel that merges the splits.

One program owns ``BLOCK_M`` packed rows of one key head (its query heads' rows are interleaved, so that they
share each load of K and V) and one run of key blocks. Algorithm: Dao et al. 2022 (arXiv 2205.14135), with the
softmax in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.primitives import (
    LN2,
    LOWEST,
    VARYING,
    add_weighted,
    dot_rows,
    kept,
    load_rows,
    offset_of,
    plus,
    score,
    sequence,
    store_rows,
    times,
    visible,
    zero_rows,
)


@triton.jit(do_not_specialize=VARYING)
def attention_forward(
    p_q, p_k, p_v, p_out, p_lse, p_offsets, p_key_mask, p_cu_q, p_cu_k, p_seed, stride_qb, stride_qh,
    stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_os, stride_ob,
    stride_oh, stride_om, stride_ls, stride_lb, stride_lh, row_blocks, kv_heads, queries, keys, q_offset,
    scale, exponent, softcap, threshold, keep_factor, GROUP: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_PACKED: tl.constexpr,
    IS_NEGATIVE: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_bh, i_s = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks, tl.program_id(1)
    i_b, i_h = (i_bh // kv_heads).to(tl.int64), (i_bh % kv_heads).to(tl.int64)
    first_q, queries = sequence(p_cu_q, i_b, queries, IS_PACKED)
    first_k, keys = sequence(p_cu_k, i_b, keys, IS_PACKED)
    q_offset = offset_of(p_offsets, i_b, q_offset, queries, keys, IS_CAUSAL, HAS_OFFSETS)
    if i_m * BLOCK_M >= queries * GROUP:
        return

    # Keys that some query of the example sees, that some row of this block sees, that all of them see.
    first_i, last_i = (
        i_m * BLOCK_M // GROUP,
        tl.minimum((i_m + 1) * BLOCK_M - 1, queries * GROUP - 1) // GROUP,
    )
    seen_by_any, seen, seen_by_all = keys, keys, keys
    if IS_CAUSAL:
        seen_by_any = tl.minimum(keys, q_offset + queries)
        seen = tl.minimum(keys, q_offset + last_i + 1)
        seen_by_all = tl.minimum(keys, q_offset + first_i + 1)
    split_keys = tl.cdiv(tl.cdiv(keys, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    start = i_s * split_keys
    stop = tl.minimum(start + split_keys, seen)
    full = tl.minimum(tl.maximum(seen_by_all, 0) // BLOCK_N * BLOCK_N, stop)

    # [BLOCK_M]
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_i, o_g = o_r // GROUP, i_h * GROUP + o_r % GROUP
    m_r = o_i < queries
    p_q += i_b * stride_qb + first_q * stride_qm
    # [BLOCK_M, D]
    b_q = load_rows(p_q + o_g * stride_qh + o_i.to(tl.int64) * stride_qm, m_r, D, D0, D1, True)
    if IS_NEGATIVE:  # the maximum is taken before the scale, whose sign goes into q
        b_q = times(b_q, -1.0, D1)
    # [BLOCK_N]
    o_j = tl.arange(0, BLOCK_N).to(tl.int64)
    p_k += i_b * stride_kb + i_h * stride_kh + first_k * stride_kn
    p_v += i_b * stride_vb + i_h * stride_vh + first_k * stride_vn
    p_k, p_v = p_k + o_j * stride_kn, p_v + o_j * stride_vn
    if HAS_KEY_MASK:
        p_key_mask += first_k + (0 if IS_PACKED else i_b * keys)

    # [BLOCK_M], [BLOCK_M, LANES], [BLOCK_M, DV]: the sums of a row's lanes meet after the loop
    LANES: tl.constexpr = 8
    b_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    b_sum = tl.zeros((BLOCK_M, LANES), tl.float32)
    b_out = zero_rows(BLOCK_M, DV0, DV1)
    # Two loops over one body: only the blocks at the diagonal and at the end carry mask code.
    for start_n in range(start, full, BLOCK_N):
        b_max, b_sum, b_out = attend_block(
            b_q, b_max, b_sum, b_out, p_k, p_v, p_key_mask, p_seed, stride_kn, stride_vn, start_n, i_b, o_g,
            o_i, q_offset, seen_by_any, scale, exponent, softcap, threshold, D, D0, D1, DV, DV0, DV1, BLOCK_M,
            BLOCK_N, LANES, False, IS_CAUSAL, HAS_KEY_MASK, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    for start_n in range(tl.maximum(start, full), stop, BLOCK_N):
        b_max, b_sum, b_out = attend_block(
            b_q, b_max, b_sum, b_out, p_k, p_v, p_key_mask, p_seed, stride_kn, stride_vn, start_n, i_b, o_g,
            o_i, q_offset, seen_by_any, scale, exponent, softcap, threshold, D, D0, D1, DV, DV0, DV1, BLOCK_M,
            BLOCK_N, LANES, True, IS_CAUSAL, HAS_KEY_MASK, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
        )  # fmt: skip

    b_sum = tl.sum(b_sum, 1)
    m_dead = b_sum == 0.0
    b_sum = tl.where(m_dead, 1.0, b_sum)
    b_out = times(b_out, (keep_factor / b_sum)[:, None], DV1)
    b_lse = tl.where(m_dead, float("-inf"), (b_max + tl.log2(b_sum)) * LN2)
    p_out += i_s.to(tl.int64) * stride_os + i_b * stride_ob + first_q * stride_om
    store_rows(p_out + o_g * stride_oh + o_i.to(tl.int64) * stride_om, b_out, m_r, DV, DV0, DV1)
    p_lse += i_s.to(tl.int64) * stride_ls + i_b * stride_lb + first_q
    tl.store(p_lse + o_g * stride_lh + o_i, b_lse, mask=m_r)


@triton.jit
def attend_block(
    b_q, b_max, b_sum, b_out, p_k, p_v, p_key_mask, p_seed, stride_kn, stride_vn, start_n, i_b, o_g, o_i,
    q_offset, seen_by_any, scale, exponent, softcap, threshold, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr, IS_EDGE: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax. Keys that nobody sees count as zero: they may hold anything."""
    IS_MASKED: tl.constexpr = IS_EDGE or HAS_KEY_MASK
    # [BLOCK_N]
    o_n = start_n + tl.arange(0, BLOCK_N)
    m_n = o_n < seen_by_any
    if HAS_KEY_MASK:
        m_n = m_n & (tl.load(p_key_mask + o_n, mask=m_n, other=0) != 0)
    # [BLOCK_N, D]
    b_k = load_rows(p_k + tl.cast(start_n, tl.int64) * stride_kn, m_n, D, D0, D1, IS_MASKED)
    # [BLOCK_M, BLOCK_N]
    b_s = dot_rows(b_q, b_k, D1, PRECISION)
    b_s = score(b_s, scale, softcap, b_q[0].dtype == tl.float32, HAS_SOFTCAP)
    if IS_MASKED:
        m_s = m_n[None, :]
        if IS_EDGE and IS_CAUSAL:
            m_s = m_s & visible(o_i[:, None], o_n[None, :], q_offset)
        b_s = tl.where(m_s, b_s, float("-inf"))

    # [BLOCK_M]
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * exponent)
    b_decay = tl.exp2(b_max - b_new_max)[:, None]
    # [BLOCK_M, BLOCK_N]
    b_p = tl.exp2(b_s * exponent - b_new_max[:, None])
    b_sum = b_sum * b_decay + tl.sum(tl.reshape(b_p, (BLOCK_M, BLOCK_N // LANES, LANES)), 1)
    if HAS_DROPOUT:
        b_p = tl.where(kept(p_seed, i_b, o_g[:, None], o_i[:, None], o_n[None, :], threshold), b_p, 0.0)
    # [BLOCK_N, DV]
    b_v = load_rows(p_v + tl.cast(start_n, tl.int64) * stride_vn, m_n, DV, DV0, DV1, IS_MASKED)
    b_out = add_weighted(times(b_out, b_decay, DV1), b_p, b_v, DV1, PRECISION)
    return b_new_max, b_sum, b_out


@triton.jit(do_not_specialize=VARYING)
def combine_splits(
    p_parts, p_part_lses, p_out, p_lse, stride_ob, stride_oh, stride_om, heads, queries, splits,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge a row's partial results over disjoint keys; one program owns a row.

    parts (splits, B, H, M, DV) and part_lses (splits, B, H, M) float32, contiguous. Rows without a key in a
    split come with lse -inf and weigh nothing.
    """
    STEP: tl.constexpr = 16 if DV0 + DV1 <= 128 else 8  # what a warp's registers hold
    i_row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    i_bh, i_m = i_row // queries, i_row % queries
    p_parts += i_row * DV
    p_part_lses += i_row
    # [BLOCK_S]: all splits
    o_s = tl.arange(0, BLOCK_S)
    b_lses = tl.load(p_part_lses + o_s * rows, mask=o_s < splits, other=float("-inf"))
    b_max = tl.maximum(tl.max(b_lses, 0), LOWEST)
    b_sum = tl.sum(tl.exp(b_lses - b_max), 0)
    is_dead = b_sum == 0.0
    b_sum = tl.where(is_dead, 1.0, b_sum)

    # [STEP], [STEP, DV]
    o_s = tl.arange(0, STEP).to(tl.int64)
    b_out = zero_rows(STEP, DV0, DV1)
    for start_s in range(0, splits, STEP):
        o_split = start_s + o_s
        m_s = o_split < splits
        b_weight = (
            tl.exp(tl.load(p_part_lses + o_split * rows, mask=m_s, other=float("-inf")) - b_max) / b_sum
        )
        b_part = load_rows(p_parts + o_split * rows * DV, m_s, DV, DV0, DV1, True)
        b_out = plus(b_out, times(b_part, b_weight[:, None], DV1), DV1)
    p_out += (i_bh // heads) * stride_ob + (i_bh % heads) * stride_oh + i_m * stride_om
    store_sum(p_out, b_out[0], 0, DV, DV0)
    if DV1 > 0:
        store_sum(p_out, b_out[1], DV0, DV, DV1)
    tl.store(p_lse + i_row, tl.where(is_dead, float("-inf"), b_max + tl.log(b_sum)))


@triton.jit
def store_sum(p_row, b_rows, FIRST: tl.constexpr, DV: tl.constexpr, SIZE: tl.constexpr):
    o_dv = FIRST + tl.arange(0, SIZE)
    tl.store(p_row + o_dv, tl.sum(b_rows, 0).to(p_row.dtype.element_ty), mask=o_dv < DV)
