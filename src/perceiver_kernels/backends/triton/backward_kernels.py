"""The backward kernels: delta, then dk, dv and partial dq with keys stationary, then the sum of the parts.

One program owns a run of key blocks of one key head, loops over its query heads' packed rows, writes dk and dv once
and adds dq into a float32 slab of its own; the slabs are summed in order. No atomics: the same bits every time.
With P = exp(score - lse), Z the dropout factor and delta = rowsum(dout * out) - dlse::

    dV = (P * Z)^T dout    dP = Z * (dout V^T)    dS = P * (dP - delta) * score_grad
    dQ = scale * dS K      dK = scale * dS^T Q
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.primitives import (
    LOG2E,
    VARYING,
    add_weighted,
    dot_rows,
    kept,
    load_rows,
    offset_of,
    score,
    score_grad,
    sequence,
    store_rows,
    times,
    visible,
    zero_rows,
)


@triton.jit(do_not_specialize=VARYING)
def attention_delta(
    p_dout, p_out, p_dlse, p_lse, p_delta,
    stride_gb, stride_gh, stride_gm, stride_ob, stride_oh, stride_om, stride_eb, stride_eh, stride_em,
    row_blocks, heads, queries, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta (B, H, M) float32 = rowsum(dout * out) - dlse, and 0 in rows that see no key."""
    i_m, i_bh = tl.program_id(0) % row_blocks, (tl.program_id(0) // row_blocks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    # [BLOCK_M]
    o_i = i_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    m_i = o_i < queries
    m_i = m_i & (tl.load(p_lse + i_bh * queries + o_i, mask=m_i, other=float("-inf")) != float("-inf"))
    # [BLOCK_M, DV]
    b_dout = load_rows(p_dout + i_b * stride_gb + i_h * stride_gh + o_i * stride_gm, m_i, DV, DV0, DV1, True)
    b_out = load_rows(p_out + i_b * stride_ob + i_h * stride_oh + o_i * stride_om, m_i, DV, DV0, DV1, True)
    # [BLOCK_M]
    b_delta = tl.sum(b_dout[0].to(tl.float32) * b_out[0].to(tl.float32), 1)
    if DV1 > 0:
        b_delta += tl.sum(b_dout[1].to(tl.float32) * b_out[1].to(tl.float32), 1)
    if HAS_DLSE:
        b_delta -= tl.load(p_dlse + i_b * stride_eb + i_h * stride_eh + o_i * stride_em, mask=m_i, other=0.0)
    tl.store(p_delta + i_bh * queries + o_i, b_delta, mask=o_i < queries)


@triton.jit(do_not_specialize=VARYING)
def attention_backward(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_slabs, p_dk, p_dv, p_offsets, p_key_mask, p_cu_q, p_cu_k, p_seed,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_lb, stride_lh, stride_sr, stride_sb, stride_sh, runs, kv_heads, queries, keys, q_offset, run_blocks, scale,
    exponent, softcap, threshold, keep_factor,
    GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr,
    DV1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    IS_PACKED: tl.constexpr, HAS_DEAD_ROWS: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Slabs (runs, B, Hkv, D, rows) float32, dq transposed; rows that see none of a run's keys stay unwritten."""
    i_run, i_bh = tl.program_id(0) % runs, tl.program_id(0) // runs
    i_b, i_h = (i_bh // kv_heads).to(tl.int64), (i_bh % kv_heads).to(tl.int64)
    first_q, queries = sequence(p_cu_q, i_b, queries, IS_PACKED)
    first_k, keys = sequence(p_cu_k, i_b, keys, IS_PACKED)
    q_offset = offset_of(p_offsets, i_b, q_offset, queries, keys, IS_CAUSAL, HAS_OFFSETS)
    rows = queries * GROUP
    seen_by_any = keys
    if IS_CAUSAL:
        seen_by_any = tl.minimum(keys, q_offset + queries)

    p_q += i_b * stride_qb + first_q * stride_qm
    p_dout += i_b * stride_gb + first_q * stride_gm
    p_k += i_b * stride_kb + i_h * stride_kh + first_k * stride_kn
    p_v += i_b * stride_vb + i_h * stride_vh + first_k * stride_vn
    p_dk += i_b * stride_dkb + i_h * stride_dkh + first_k * stride_dkn
    p_dv += i_b * stride_dvb + i_h * stride_dvh + first_k * stride_dvn
    p_lse += i_b * stride_lb + first_q
    p_delta += i_b * stride_lb + first_q
    p_slabs += i_run.to(tl.int64) * stride_sr + i_b * stride_sb + i_h * stride_sh + first_q * (GROUP * D)
    if HAS_KEY_MASK:
        p_key_mask += first_k + (0 if IS_PACKED else i_b * keys)

    start = i_run * run_blocks * BLOCK_N
    for start_n in range(start, tl.minimum(start + run_blocks * BLOCK_N, keys), BLOCK_N):
        # [BLOCK_N]
        o_n = start_n + tl.arange(0, BLOCK_N)
        m_n = o_n < seen_by_any
        if HAS_KEY_MASK:
            m_n = m_n & (tl.load(p_key_mask + o_n, mask=m_n, other=0) != 0)
        # [BLOCK_N, D], [BLOCK_N, DV]
        b_k = load_rows(p_k + o_n.to(tl.int64) * stride_kn, m_n, D, D0, D1, True)
        b_v = load_rows(p_v + o_n.to(tl.int64) * stride_vn, m_n, DV, DV0, DV1, True)
        b_dk, b_dv = zero_rows(BLOCK_N, D0, D1), zero_rows(BLOCK_N, DV0, DV1)
        # Rows before `first` see none of these keys, rows from `full` on see all of them.
        first, full = 0, 0
        if IS_CAUSAL:
            first = tl.maximum(start_n - q_offset, 0) * GROUP // BLOCK_M * BLOCK_M
            full = tl.maximum(start_n + BLOCK_N - 1 - q_offset, 0) * GROUP
        if start_n + BLOCK_N > keys:
            full = rows
        full = tl.minimum(tl.cdiv(full, BLOCK_M) * BLOCK_M, rows)
        written = tl.where(start_n > start, rows, 0)  # the first block finds its slab unwritten
        # Two loops over one body: only the rows at the diagonal and the keys at the end carry mask code.
        for start_m in range(first, full, BLOCK_M):
            b_dk, b_dv = add_block(
                b_k, b_v, b_dk, b_dv, p_q, p_dout, p_lse, p_delta, p_slabs, p_seed, stride_qh, stride_qm, stride_gh,
                stride_gm, stride_lh, start_m, rows, written, i_b, i_h, o_n, m_n, q_offset, scale, exponent,
                softcap, threshold, keep_factor, GROUP, D, D0, D1, DV, DV0, DV1, BLOCK_M, True, IS_CAUSAL,
                HAS_DEAD_ROWS, HAS_KEY_MASK, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
        for start_m in range(tl.maximum(first, full), rows, BLOCK_M):
            b_dk, b_dv = add_block(
                b_k, b_v, b_dk, b_dv, p_q, p_dout, p_lse, p_delta, p_slabs, p_seed, stride_qh, stride_qm, stride_gh,
                stride_gm, stride_lh, start_m, rows, written, i_b, i_h, o_n, m_n, q_offset, scale, exponent,
                softcap, threshold, keep_factor, GROUP, D, D0, D1, DV, DV0, DV1, BLOCK_M, False, IS_CAUSAL,
                HAS_DEAD_ROWS, HAS_KEY_MASK, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
        store_rows(p_dk + o_n.to(tl.int64) * stride_dkn, times(b_dk, scale, D1), o_n < keys, D, D0, D1)
        store_rows(p_dv + o_n.to(tl.int64) * stride_dvn, b_dv, o_n < keys, DV, DV0, DV1)
        tl.debug_barrier()  # the next block adds to slab rows that other threads may have stored


@triton.jit
def add_block(
    b_k, b_v, b_dk, b_dv, p_q, p_dout, p_lse, p_delta, p_slabs, p_seed, stride_qh, stride_qm, stride_gh, stride_gm,
    stride_lh, start_m, rows, written, i_b, i_h, o_n, m_n, q_offset, scale, exponent, softcap, threshold, keep_factor,
    GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr,
    DV1: tl.constexpr, BLOCK_M: tl.constexpr, IS_EDGE: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_DEAD_ROWS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What ``BLOCK_M`` rows give to the gradients of ``BLOCK_N`` keys, and these keys to theirs.

    Scores are transposed, (BLOCK_N, BLOCK_M): P^T and dS^T stay in registers on their way into the next product.
    """
    IS_WIDE: tl.constexpr = b_k[0].dtype == tl.float32
    # [BLOCK_M]
    o_r = start_m + tl.arange(0, BLOCK_M)
    o_i, o_g = o_r // GROUP, i_h * GROUP + o_r % GROUP
    m_r = o_r < rows
    p_row = o_g * stride_lh + o_i
    b_lse = tl.load(p_lse + p_row, mask=m_r, other=float("-inf"))
    b_delta = tl.load(p_delta + p_row, mask=m_r, other=0.0)
    m_r = m_r & (b_lse != float("-inf"))
    b_lse = tl.where(m_r, b_lse, float("inf"))  # makes P = 0
    m_load = m_r if HAS_DEAD_ROWS else o_r < rows  # a dead row may hold anything; else the load needn't wait
    # [BLOCK_M, D], [BLOCK_M, DV]
    b_q = load_rows(p_q + o_g * stride_qh + o_i.to(tl.int64) * stride_qm, m_load, D, D0, D1, True)
    b_dout = load_rows(p_dout + o_g * stride_gh + o_i.to(tl.int64) * stride_gm, m_load, DV, DV0, DV1, True)

    # [BLOCK_N, BLOCK_M]
    b_s = dot_rows(b_k, b_q, D1, PRECISION)
    b_s = score(b_s, scale, softcap, IS_WIDE, HAS_SOFTCAP)
    if IS_WIDE:
        b_p = tl.exp2((b_s - b_lse[None, :]) * exponent)
    else:
        b_p = tl.exp2(b_s * exponent - (b_lse * LOG2E)[None, :])
    if IS_EDGE or HAS_KEY_MASK:
        m_s = m_n[:, None]
        if IS_EDGE and IS_CAUSAL:
            m_s = m_s & visible(o_i[None, :], o_n[:, None], q_offset)
        b_p = tl.where(m_s, b_p, 0.0)
    b_dp = dot_rows(b_v, b_dout, DV1, PRECISION)
    b_pz = b_p
    if HAS_DROPOUT:
        m_kept = kept(p_seed, i_b, o_g[None, :], o_i[None, :], o_n[:, None], threshold)
        b_dp = tl.where(m_kept, b_dp * keep_factor, 0.0)
        b_pz = tl.where(m_kept, b_p * keep_factor, 0.0)
    b_dv = add_weighted(b_dv, b_pz, b_dout, DV1, PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :]) * score_grad(b_s, softcap, HAS_SOFTCAP)
    if IS_EDGE or HAS_KEY_MASK:
        b_ds = tl.where(m_s, b_ds, 0.0)
    b_ds = b_ds.to(b_q[0].dtype)
    b_dk = add_weighted(b_dk, b_ds, b_q, D1, PRECISION)
    add_to_slab(p_slabs + o_r, b_k[0], b_ds, o_r, rows, written, 0, D, D0, PRECISION)
    if D1 > 0:
        add_to_slab(p_slabs + o_r, b_k[1], b_ds, o_r, rows, written, D0, D, D1, PRECISION)
    return b_dk, b_dv


@triton.jit
def add_to_slab(
    p_rows, b_k, b_ds, o_r, rows, written, FIRST: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq^T += k^T dS^T. Transposed like everything else here, so that no product asks for another layout of dS."""
    o_d = FIRST + tl.arange(0, SIZE)
    # [SIZE, BLOCK_M]
    p_slab = p_rows[None, :] + o_d.to(tl.int64)[:, None] * rows
    m_d = (o_d < D)[:, None]
    b_dq = tl.load(p_slab, mask=m_d & (o_r < written)[None, :], other=0.0)
    b_dq = tl.dot(tl.trans(b_k), b_ds, b_dq, input_precision=PRECISION)
    tl.store(p_slab, b_dq, mask=m_d & (o_r < rows)[None, :])


@triton.jit(do_not_specialize=VARYING)
def reduce_slabs(
    p_slabs, p_dq, p_offsets, p_cu_q, p_cu_k, stride_sr, stride_sb, stride_sh, stride_qb, stride_qh, stride_qm,
    row_blocks, kv_heads, queries, keys, q_offset, runs, run_keys, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, IS_CAUSAL: tl.constexpr,
    IS_PACKED: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    """dq = scale times the sum over runs, in their order, of the slab rows that a run has written."""
    i_m, i_bh, i_d = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks, tl.program_id(1)
    i_b, i_h = (i_bh // kv_heads).to(tl.int64), (i_bh % kv_heads).to(tl.int64)
    first_q, queries = sequence(p_cu_q, i_b, queries, IS_PACKED)
    _, keys = sequence(p_cu_k, i_b, keys, IS_PACKED)
    q_offset = offset_of(p_offsets, i_b, q_offset, queries, keys, IS_CAUSAL, HAS_OFFSETS)
    rows = queries * GROUP
    # [BLOCK_M], [BLOCK_D]
    o_r, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_i, o_g = o_r // GROUP, i_h * GROUP + o_r % GROUP
    m_r, m_d = o_r < rows, o_d < D
    p_slabs += i_b * stride_sb + i_h * stride_sh + first_q * (GROUP * D)
    # [BLOCK_D, BLOCK_M]
    p_slab = p_slabs + o_r[None, :] + o_d.to(tl.int64)[:, None] * rows
    b_dq = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    for i_run in range(0, tl.minimum(runs, tl.cdiv(keys, run_keys))):
        m_run = m_r
        if IS_CAUSAL:
            m_run = m_r & visible(o_i, i_run * run_keys, q_offset)
        b_dq += tl.load(p_slab, mask=m_d[:, None] & m_run[None, :], other=0.0)
        p_slab += stride_sr
    p_dq += i_b * stride_qb + first_q * stride_qm
    p_dq = p_dq + (o_g * stride_qh + o_i.to(tl.int64) * stride_qm)[:, None] + o_d[None, :]
    tl.store(p_dq, (tl.trans(b_dq) * scale).to(p_dq.dtype.element_ty), mask=m_r[:, None] & m_d[None, :])
