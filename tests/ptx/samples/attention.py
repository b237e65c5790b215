"""A small flash attention in Triton, causal from the bottom right, as something real to run and to break."""

import triton
import triton.language as tl


@triton.jit
def attention_sample(
    q, k, v, out, lse, queries, keys, scale_log2, q_stride, k_stride,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """softmax(q k^T) v for one block of queries of one head; strides are those of the heads."""
    i_block, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_q, o_d = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, DIM)
    m_q = o_q < queries
    p_q = q + i_head * q_stride + o_q[:, None] * DIM + o_d[None, :]
    # [BLOCK_Q, DIM]
    b_q = tl.load(p_q, mask=m_q[:, None], other=0.0)
    b_out = tl.zeros([BLOCK_Q, DIM], tl.float32)
    # [BLOCK_Q]
    b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    last = tl.minimum(keys, keys - queries + (i_block + 1) * BLOCK_Q)
    for start in tl.range(0, last, BLOCK_K, num_stages=STAGES):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < keys
        o_kd = i_head * k_stride + o_k[:, None] * DIM + o_d[None, :]
        # [BLOCK_K, DIM]
        b_k = tl.load(k + o_kd, mask=m_k[:, None], other=0.0)
        visible = (o_k[None, :] <= o_q[:, None] + keys - queries) & m_k[None, :]
        # [BLOCK_Q, BLOCK_K]
        b_score = tl.where(visible, tl.dot(b_q, tl.trans(b_k)) * scale_log2, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_score, 1))
        b_p = tl.exp2(b_score - b_new[:, None])
        b_shrink = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = tl.load(v + o_kd, mask=m_k[:, None], other=0.0)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None])
        b_max = b_new
    b_out = b_out / b_sum[:, None]
    p_out = out + i_head * q_stride + o_q[:, None] * DIM + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_q[:, None])
    tl.store(lse + i_head * queries + o_q, b_max + tl.log2(b_sum), mask=m_q)
