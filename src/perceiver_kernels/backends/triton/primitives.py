"""The verbs that the kernels are written in: places, rows, products, scores, dropout.

Prefixes say where a value lives: ``i_`` program index, ``o_`` offsets, ``p_`` pointer, ``m_`` mask, ``b_``
on-chip block, whose shape stands on the line above it. Addresses are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # where a row's maximum starts: finite, so that no -inf meets another

VARYING = [
    "row_blocks", "heads", "kv_heads", "queries", "keys", "q_offset", "splits", "runs", "threshold",
]  # fmt: skip
"""Sizes that change from call to call: no kernel is compiled anew where one becomes 1 or a multiple of 16."""


@triton.jit
def sequence(p_cu_seqlens, i_b, length, IS_PACKED: tl.constexpr):
    """First row and length of example ``i_b``: row 0 of its own (B, ...) slice, or its place in the pack."""
    if IS_PACKED:
        first = tl.load(p_cu_seqlens + i_b)
        return first, (tl.load(p_cu_seqlens + i_b + 1) - first).to(tl.int32)
    return tl.zeros((), tl.int64), length


@triton.jit
def offset_of(p_offsets, i_b, q_offset, queries, keys, IS_CAUSAL: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    """``q_offset`` of the example, cut to [-queries, keys], where it still matters and 32 bits hold it."""
    if not IS_CAUSAL:
        return keys
    if HAS_OFFSETS:
        return tl.minimum(tl.maximum(tl.load(p_offsets + i_b), -queries), keys).to(tl.int32)
    return q_offset


@triton.jit
def visible(o_i, o_j, q_offset):
    """The one visibility rule, in a shape that broadcasts: key j is seen by query i iff j <= q_offset + i."""
    return o_j <= q_offset + o_i


# A head dim lies on chip as one or two blocks, powers of two: 64, 64 + 64, 64 + 32. Two shorten what is live
# at once, and waste less than padding to one. A (rows, D) block is a tuple of these parts.


@triton.jit
def load_rows(p_rows, m_rows, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, IS_MASKED: tl.constexpr):
    """(rows, D0), (rows, D1): zeros past the head dim and, where masked, in rows that ``m_rows`` hides."""
    if D1 == 0:
        return (load_part(p_rows, m_rows, 0, D, D0, IS_MASKED),)
    else:
        return (
            load_part(p_rows, m_rows, 0, D, D0, IS_MASKED),
            load_part(p_rows, m_rows, D0, D, D1, IS_MASKED),
        )


@triton.jit
def load_part(
    p_rows, m_rows, FIRST: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, IS_MASKED: tl.constexpr
):
    o_d = FIRST + tl.arange(0, SIZE)
    p = p_rows[:, None] + o_d[None, :]
    if IS_MASKED:
        if FIRST + SIZE > D:
            return tl.load(p, mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0)
        else:
            return tl.load(p, mask=m_rows[:, None], other=0.0)
    elif FIRST + SIZE > D:
        return tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def store_rows(p_rows, b_rows, m_rows, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    store_part(p_rows, b_rows[0], m_rows, 0, D, D0)
    if D1 > 0:
        store_part(p_rows, b_rows[1], m_rows, D0, D, D1)


@triton.jit
def store_part(p_rows, b_part, m_rows, FIRST: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr):
    o_d = FIRST + tl.arange(0, SIZE)
    p = p_rows[:, None] + o_d[None, :]
    tl.store(p, b_part.to(p.dtype.element_ty), mask=m_rows[:, None] & (o_d < D)[None, :])


@triton.jit
def zero_rows(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    if D1 == 0:
        return (tl.zeros((ROWS, D0), tl.float32),)
    else:
        return (tl.zeros((ROWS, D0), tl.float32), tl.zeros((ROWS, D1), tl.float32))


@triton.jit
def times(b_rows, factor, D1: tl.constexpr):
    """Rows times a factor that broadcasts."""
    if D1 == 0:
        return (b_rows[0] * factor,)
    else:
        return (b_rows[0] * factor, b_rows[1] * factor)


@triton.jit
def seen_rows(b_rows, m_rows, D1: tl.constexpr):
    """Zeros in the rows that ``m_rows`` hides, whatever they hold."""
    if D1 == 0:
        return (tl.where(m_rows[:, None], b_rows[0], 0.0),)
    else:
        return (tl.where(m_rows[:, None], b_rows[0], 0.0), tl.where(m_rows[:, None], b_rows[1], 0.0))


@triton.jit
def plus(b_a, b_b, D1: tl.constexpr):
    if D1 == 0:
        return (b_a[0] + b_b[0],)
    else:
        return (b_a[0] + b_b[0], b_a[1] + b_b[1])


@triton.jit
def dot_rows(b_a, b_b, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b^T: each row of a with each row of b."""
    b_s = tl.dot(b_a[0], tl.trans(b_b[0]), input_precision=PRECISION)
    if D1 > 0:
        b_s = tl.dot(b_a[1], tl.trans(b_b[1]), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def add_weighted(b_sum, b_weights, b_rows, D1: tl.constexpr, PRECISION: tl.constexpr):
    """sum + weights @ rows."""
    b_weights = b_weights.to(b_rows[0].dtype)
    if D1 == 0:
        return (tl.dot(b_weights, b_rows[0], b_sum[0], input_precision=PRECISION),)
    else:
        return (
            tl.dot(b_weights, b_rows[0], b_sum[0], input_precision=PRECISION),
            tl.dot(b_weights, b_rows[1], b_sum[1], input_precision=PRECISION),
        )


@triton.jit
def tanh(x):
    """To float32's own precision: near 0 the exponentials would cancel."""
    x2 = x * x
    near = x * (
        1.0
        + x2 * (-0.33333333 + x2 * (0.13333147 + x2 * (-0.05391115 + x2 * (0.02120866 - x2 * 0.00602131))))
    )
    z = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - z) / (1.0 + z)
    return tl.where(tl.abs(x) < 0.55, near, tl.where(x < 0.0, -far, far))


@triton.jit
def score(b_s, scale, softcap, IS_WIDE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """From q . k to what the exponent's factor is applied to.

    The natural score where it has to be formed anyway (softcap) or in full (float32); else q . k as it is:
    its factor joins the exponent's in one multiplication.
    """
    if HAS_SOFTCAP:
        return softcap * tanh((b_s * scale) * (1.0 / softcap))  # scale / softcap may overflow
    if IS_WIDE:
        return b_s * scale
    return b_s


@triton.jit
def times_score_grad(b_ds, b_s, softcap, HAS_SOFTCAP: tl.constexpr):
    """Times the derivative of the soft cap, from its result ``b_s``."""
    if HAS_SOFTCAP:
        b_t = b_s / softcap
        return b_ds * (1.0 - b_t * b_t)
    return b_ds


@triton.jit
def kept(p_seed, i_b, o_h, o_i, o_j, threshold):
    """Which entries dropout keeps: the first word of Philox4x32-10 at (b, h, i, j) against the threshold.

    At ``p_seed`` lie the seed and what key 0 is called.
    """
    o_i, o_j = tl.broadcast(o_i, o_j + tl.load(p_seed + 1).to(tl.int32))
    o_h, _ = tl.broadcast(o_h.to(tl.int32), o_i)
    o_b = tl.zeros_like(o_i) + i_b.to(tl.int32)
    word, _, _, _ = tl.philox(tl.load(p_seed), o_b, o_h, o_i, o_j)
    return word >= threshold.to(tl.uint32, bitcast=True)
