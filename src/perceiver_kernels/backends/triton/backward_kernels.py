"""The backward kernels: row statistics, then dk, dv and parts of dq with keys stationary, then dq.

One program owns a run of key blocks of one key head, loops over the rows of its query heads, writes dk and
dv once and adds dq into a float32 slab of its own; the slabs are summed in order. No atomics: the same bits
every time. Rows go by tiles of ``BLOCK_M`` queries of one head, in the statistics and in the slabs too; the
last tile of a head is filled up with rows that weigh nothing. With P = exp(score - lse), Z the dropout factor
and delta = rowsum(dout * out) - dlse::

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
    seen_rows,
    sequence,
    store_part,
    store_rows,
    times,
    times_score_grad,
    visible,
    zero_rows,
)

TALL_DIM = tl.constexpr(128)  # up to here dq goes transposed: see `add_to_slab`


@triton.jit
def tile_of(i_b, i_h, first_q, stride_tb, stride_th, BLOCK_M: tl.constexpr, IS_PACKED: tl.constexpr):
    """Number of an example's and head's first tile; packed, every sequence may waste a part of one."""
    i_tile = i_b * stride_tb + i_h * stride_th
    if IS_PACKED:
        i_tile += first_q // BLOCK_M + i_b
    return i_tile


@triton.jit(do_not_specialize=VARYING)
def attention_delta(
    p_dout, p_out, p_lse, p_dlse, p_shift, p_delta, p_cu_q, stride_gb, stride_gh, stride_gm, stride_ob,
    stride_oh, stride_om, stride_lb, stride_lh, stride_eb, stride_eh, stride_em, stride_tb, stride_th,
    row_blocks, heads, queries, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, BLOCK_M: tl.constexpr,
    IS_WIDE: tl.constexpr, IS_PACKED: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """Per row, by tiles: delta = rowsum(dout * out) - dlse; the exponent's shift: lse, in base 2 unless wide.

    Rows that see no key, and those that fill up a tile, get delta 0 and shift inf: there P = 0.
    """
    i_m, i_bh = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    first_q, queries = sequence(p_cu_q, i_b, queries, IS_PACKED)
    if i_m * BLOCK_M >= queries:
        return
    # [BLOCK_M]
    o_i = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = first_q + o_i
    m_i = o_i < queries
    b_lse = tl.load(p_lse + i_b * stride_lb + i_h * stride_lh + o_row, mask=m_i, other=float("-inf"))
    m_i = m_i & (b_lse != float("-inf"))
    # [BLOCK_M, DV]
    b_dout = load_rows(
        p_dout + i_b * stride_gb + i_h * stride_gh + o_row * stride_gm, m_i, DV, DV0, DV1, True
    )
    b_out = load_rows(p_out + i_b * stride_ob + i_h * stride_oh + o_row * stride_om, m_i, DV, DV0, DV1, True)
    # [BLOCK_M]
    b_delta = tl.sum(b_dout[0].to(tl.float32) * b_out[0].to(tl.float32), 1)
    if DV1 > 0:
        b_delta += tl.sum(b_dout[1].to(tl.float32) * b_out[1].to(tl.float32), 1)
    if HAS_DLSE:
        b_delta -= tl.load(
            p_dlse + i_b * stride_eb + i_h * stride_eh + o_row * stride_em, mask=m_i, other=0.0
        )
    if not IS_WIDE:
        b_lse *= LOG2E
    o_tile = tile_of(i_b, i_h, first_q, stride_tb, stride_th, BLOCK_M, IS_PACKED) * BLOCK_M + o_i
    tl.store(p_shift + o_tile, tl.where(m_i, b_lse, float("inf")))
    tl.store(p_delta + o_tile, b_delta)


@triton.jit(do_not_specialize=VARYING)
def attention_backward(
    p_q, p_k, p_v, p_dout, p_shift, p_delta, p_slabs, p_dk, p_dv, p_offsets, p_key_mask, p_cu_q, p_cu_k,
    p_seed, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_tb, stride_th, stride_sr, runs, kv_heads, queries, keys, q_offset, scale, exponent,
    softcap, threshold, keep_factor, GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_PACKED: tl.constexpr, HAS_DEAD_ROWS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Slabs (runs, tiles, D0 + D1, BLOCK_M) float32, see ``add_to_slab``; tiles that see no key of a run's
    first block stay unwritten."""
    i_run, i_bh = tl.program_id(0) % runs, tl.program_id(0) // runs
    i_b, i_h = (i_bh // kv_heads).to(tl.int64), (i_bh % kv_heads).to(tl.int64)
    first_q, queries = sequence(p_cu_q, i_b, queries, IS_PACKED)
    first_k, keys = sequence(p_cu_k, i_b, keys, IS_PACKED)
    q_offset = offset_of(p_offsets, i_b, q_offset, queries, keys, IS_CAUSAL, HAS_OFFSETS)
    seen_by_any = keys
    if IS_CAUSAL:
        seen_by_any = tl.minimum(keys, q_offset + queries)

    p_k += i_b * stride_kb + i_h * stride_kh + first_k * stride_kn
    p_v += i_b * stride_vb + i_h * stride_vh + first_k * stride_vn
    p_dk += i_b * stride_dkb + i_h * stride_dkh + first_k * stride_dkn
    p_dv += i_b * stride_dvb + i_h * stride_dvh + first_k * stride_dvn
    p_q += i_b * stride_qb + first_q * stride_qm
    p_dout += i_b * stride_gb + first_q * stride_gm
    p_slabs += i_run.to(tl.int64) * stride_sr
    if HAS_KEY_MASK:
        p_key_mask += first_k + (0 if IS_PACKED else i_b * keys)

    run_keys = tl.cdiv(tl.cdiv(keys, BLOCK_N), runs) * BLOCK_N
    start = i_run * run_keys
    for start_n in range(start, tl.minimum(start + run_keys, keys), BLOCK_N):
        # [BLOCK_N]
        o_n = start_n + tl.arange(0, BLOCK_N)
        m_n = o_n < seen_by_any
        if HAS_KEY_MASK:
            m_n = m_n & (tl.load(p_key_mask + o_n, mask=m_n, other=0) != 0)
        # [BLOCK_N, D], [BLOCK_N, DV]
        b_k = load_rows(p_k + o_n.to(tl.int64) * stride_kn, m_n, D, D0, D1, True)
        b_v = load_rows(p_v + o_n.to(tl.int64) * stride_vn, m_n, DV, DV0, DV1, True)
        b_dk, b_dv = zero_rows(BLOCK_N, D0, D1), zero_rows(BLOCK_N, DV0, DV1)
        # Queries before `first` see none of these keys, those from `full` on see all of them.
        first, full = 0, 0
        if IS_CAUSAL:
            first = tl.maximum(start_n - q_offset, 0) // BLOCK_M * BLOCK_M
            full = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - q_offset, 0), BLOCK_M) * BLOCK_M
        if start_n + BLOCK_N > keys:
            full = queries
        full = tl.minimum(full, queries)
        for i_g in range(GROUP):
            i_head = i_h * GROUP + i_g
            i_tile = tile_of(i_b, i_head, first_q, stride_tb, stride_th, BLOCK_M, IS_PACKED)
            # Two loops over one body: only the rows at the diagonal and the keys at the end carry mask code.
            for start_m in range(first, full, BLOCK_M):
                b_dk, b_dv = add_tile(
                    b_k, b_v, b_dk, b_dv, p_q + i_head * stride_qh, p_dout + i_head * stride_gh, p_shift,
                    p_delta, p_slabs, p_seed, stride_qm, stride_gm, i_b, i_head, i_tile, start_m, queries,
                    start_n - start, o_n, m_n, q_offset, scale, exponent, softcap, threshold, keep_factor, D,
                    D0, D1, DV, DV0, DV1, BLOCK_M, True, IS_CAUSAL, HAS_DEAD_ROWS, HAS_KEY_MASK, HAS_SOFTCAP,
                    HAS_DROPOUT, WARPS, PRECISION,
                )  # fmt: skip
            for start_m in range(tl.maximum(first, full), queries, BLOCK_M):
                b_dk, b_dv = add_tile(
                    b_k, b_v, b_dk, b_dv, p_q + i_head * stride_qh, p_dout + i_head * stride_gh, p_shift,
                    p_delta, p_slabs, p_seed, stride_qm, stride_gm, i_b, i_head, i_tile, start_m, queries,
                    start_n - start, o_n, m_n, q_offset, scale, exponent, softcap, threshold, keep_factor, D,
                    D0, D1, DV, DV0, DV1, BLOCK_M, False, IS_CAUSAL, HAS_DEAD_ROWS, HAS_KEY_MASK, HAS_SOFTCAP,
                    HAS_DROPOUT, WARPS, PRECISION,
                )  # fmt: skip
        # The same rows, by way of a zero that compilers can't see: kept over the loops they cost 8 registers.
        o_n = start_n + tl.minimum(queries, 0) + tl.arange(0, BLOCK_N)
        m_n = o_n < seen_by_any
        if HAS_KEY_MASK:
            m_n = m_n & (tl.load(p_key_mask + o_n, mask=m_n, other=0) != 0)
        b_dk, b_dv = seen_rows(times(b_dk, scale, D1), m_n, D1), seen_rows(b_dv, m_n, DV1)
        store_rows(p_dk + o_n.to(tl.int64) * stride_dkn, b_dk, o_n < keys, D, D0, D1)
        store_rows(p_dv + o_n.to(tl.int64) * stride_dvn, b_dv, o_n < keys, DV, DV0, DV1)
        tl.debug_barrier()  # the next block adds to slab tiles that other threads may have stored


@triton.jit
def add_tile(
    b_k, b_v, b_dk, b_dv, p_q, p_dout, p_shift, p_delta, p_slabs, p_seed, stride_qm, stride_gm, i_b, i_head,
    i_tile, start_m, queries, keys_done, o_n, m_n, q_offset, scale, exponent, softcap, threshold, keep_factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr,
    DV1: tl.constexpr, BLOCK_M: tl.constexpr, IS_EDGE: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_DEAD_ROWS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a tile of rows gives to the gradients of ``BLOCK_N`` keys, and these keys to its own.

    Scores are transposed, (BLOCK_N, BLOCK_M): P^T and dS^T stay in registers until the next product.
    """
    IS_WIDE: tl.constexpr = b_k[0].dtype == tl.float32
    # [BLOCK_M]
    o_i = start_m + tl.arange(0, BLOCK_M)
    p_row = i_tile * BLOCK_M + start_m + tl.arange(0, BLOCK_M)
    b_shift = tl.load(p_shift + p_row)
    b_delta = tl.load(p_delta + p_row)
    m_i = o_i < queries
    if HAS_DEAD_ROWS:  # they may hold anything
        m_i = m_i & (b_shift != float("inf"))
    # [BLOCK_M, D], [BLOCK_M, DV]
    b_q = load_rows(p_q + o_i.to(tl.int64) * stride_qm, m_i, D, D0, D1, True)
    b_dout = load_rows(p_dout + o_i.to(tl.int64) * stride_gm, m_i, DV, DV0, DV1, True)

    # [BLOCK_N, BLOCK_M]
    b_dp = dot_rows(b_v, b_dout, DV1, PRECISION)
    b_s = dot_rows(b_k, b_q, D1, PRECISION)
    b_s = score(b_s, scale, softcap, IS_WIDE, HAS_SOFTCAP)
    if IS_WIDE:
        b_p = tl.exp2((b_s - b_shift[None, :]) * exponent)
    else:
        b_p = tl.exp2(b_s * exponent - b_shift[None, :])
    if IS_EDGE or HAS_KEY_MASK:
        m_s = m_n[:, None]
        if IS_EDGE and IS_CAUSAL:
            m_s = m_s & visible(o_i[None, :], o_n[:, None], q_offset)
        b_p = tl.where(m_s, b_p, 0.0)
    b_pz = b_p
    if HAS_DROPOUT:
        m_kept = kept(p_seed, i_b, i_head, o_i[None, :], o_n[:, None], threshold)
        b_dp = tl.where(m_kept, b_dp * keep_factor, 0.0)
        b_pz = tl.where(m_kept, b_p * keep_factor, 0.0)
    b_dv = add_weighted(b_dv, b_pz, b_dout, DV1, PRECISION)
    b_ds = times_score_grad(b_p * (b_dp - b_delta[None, :]), b_s, softcap, HAS_SOFTCAP)
    if IS_EDGE or HAS_KEY_MASK:
        b_ds = tl.where(m_s, b_ds, 0.0)
    b_ds = b_ds.to(b_q[0].dtype)
    b_dk = add_weighted(b_dk, b_ds, b_q, D1, PRECISION)
    p_slab = p_slabs + (i_tile + start_m // BLOCK_M) * ((D0 + D1) * BLOCK_M)
    add_to_slab(p_slab, b_k[0], b_ds, keys_done, D0 + D1 <= TALL_DIM, WARPS, PRECISION)
    if D1 > 0:
        add_to_slab(p_slab + D0 * BLOCK_M, b_k[1], b_ds, keys_done, D0 + D1 <= TALL_DIM, WARPS, PRECISION)
    return b_dk, b_dv


@triton.jit
def add_to_slab(
    p_slab, b_k, b_ds, keys_done, TALL: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr
):
    """dq += dS k, one tile of one part of the head dim.

    Tall, that is transposed like everything else here, no product asks for another layout of dS. Wide, all
    products share out the head dim among the warps (Triton goes by the longer side of this one): otherwise
    dk and dv of long heads don't fit into registers. Stored in the order in which the accumulators of the
    tensor cores lie in the threads, four numbers each: nothing is moved.
    """
    SIZE: tl.constexpr = b_k.shape[1]
    BLOCK_M: tl.constexpr = b_ds.shape[1]
    if TALL:
        ROWS: tl.constexpr = WARPS if WARPS * 16 < SIZE else SIZE // 16  # of warps
        # [SIZE, BLOCK_M]
        b_dq = tl.dot(tl.trans(b_k), b_ds, input_precision=PRECISION)
        b_dq = tl.reshape(b_dq, (SIZE // 16 // ROWS, ROWS, 2, 8, BLOCK_M // 8, 4, 2))
        b_dq = tl.permute(b_dq, (0, 4, 1, 3, 5, 2, 6))
    else:
        COLUMNS: tl.constexpr = WARPS if WARPS * 8 < SIZE else SIZE // 8  # of warps
        # [BLOCK_M, SIZE]
        b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=PRECISION)
        b_dq = tl.reshape(b_dq, (BLOCK_M // 16, 2, 8, SIZE // 8 // COLUMNS, COLUMNS, 4, 2))
        b_dq = tl.permute(b_dq, (0, 3, 4, 2, 5, 1, 6))
    # [SIZE * BLOCK_M]
    b_dq = tl.reshape(b_dq, (SIZE * BLOCK_M,))
    p_slab += tl.arange(0, SIZE * BLOCK_M)
    m_done = tl.zeros((SIZE * BLOCK_M,), tl.int32) + keys_done > 0  # before that, the slab holds nothing
    tl.store(p_slab, b_dq + tl.load(p_slab, mask=m_done, other=0.0))


@triton.jit(do_not_specialize=VARYING)
def reduce_slabs(
    p_slabs, p_dq, p_offsets, p_cu_q, p_cu_k, stride_sr, stride_qb, stride_qh, stride_qm, stride_tb,
    stride_th, row_blocks, heads, queries, keys, q_offset, runs, scale, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_PACKED: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    """dq = scale times the sum over runs, in their order, of the slab tiles that a run has written."""
    i_m, i_bh = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    first_q, queries = sequence(p_cu_q, i_b, queries, IS_PACKED)
    if i_m * BLOCK_M >= queries:
        return
    _, keys = sequence(p_cu_k, i_b, keys, IS_PACKED)
    q_offset = offset_of(p_offsets, i_b, q_offset, queries, keys, IS_CAUSAL, HAS_OFFSETS)
    run_keys = tl.maximum(tl.cdiv(tl.cdiv(keys, BLOCK_N), runs), 1) * BLOCK_N
    written = tl.minimum(runs, tl.cdiv(keys, run_keys))
    if IS_CAUSAL:  # by the runs whose first key the tile's last row may see
        written = tl.minimum(written, tl.cdiv(tl.maximum(q_offset + (i_m + 1) * BLOCK_M, 0), run_keys))
    i_tile = tile_of(i_b, i_h, first_q, stride_tb, stride_th, BLOCK_M, IS_PACKED) + i_m
    p_slab = p_slabs + i_tile * ((D0 + D1) * BLOCK_M)
    # [BLOCK_M]
    o_i = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    p_row = p_dq + i_b * stride_qb + i_h * stride_qh + (first_q + o_i) * stride_qm
    TALL: tl.constexpr = D0 + D1 <= TALL_DIM
    reduce_part(p_slab, stride_sr, written, p_row, o_i < queries, scale, 0, D, D0, BLOCK_M, TALL, WARPS)
    if D1 > 0:
        p_slab += D0 * BLOCK_M
        reduce_part(p_slab, stride_sr, written, p_row, o_i < queries, scale, D0, D, D1, BLOCK_M, TALL, WARPS)


@triton.jit
def reduce_part(
    p_slab, stride_sr, written, p_row, m_i, scale,
    FIRST: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, TALL: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    p_slab += tl.arange(0, SIZE * BLOCK_M)
    b_dq = tl.zeros((SIZE * BLOCK_M,), tl.float32)
    for _ in range(written):
        b_dq += tl.load(p_slab)
        p_slab += stride_sr
    # The order of `add_to_slab`, undone: [BLOCK_M, SIZE]
    if TALL:
        ROWS: tl.constexpr = WARPS if WARPS * 16 < SIZE else SIZE // 16
        b_dq = tl.reshape(b_dq, (SIZE // 16 // ROWS, BLOCK_M // 8, ROWS, 8, 4, 2, 2))
        b_dq = tl.reshape(tl.permute(b_dq, (1, 4, 6, 0, 2, 5, 3)), (BLOCK_M, SIZE))
    else:
        COLUMNS: tl.constexpr = WARPS if WARPS * 8 < SIZE else SIZE // 8
        b_dq = tl.reshape(b_dq, (BLOCK_M // 16, SIZE // 8 // COLUMNS, COLUMNS, 8, 4, 2, 2))
        b_dq = tl.reshape(tl.permute(b_dq, (0, 5, 3, 1, 2, 4, 6)), (BLOCK_M, SIZE))
    store_part(p_row, b_dq * scale, m_i, FIRST, D, SIZE)
