// What CUDA's own headers compile to: packed halves, cooperative groups, pipelines, maths, assert.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cassert>

namespace cg = cooperative_groups;

extern "C" __global__ void halves(const __half2* a, const __nv_bfloat162* b, __half2* out_a, __nv_bfloat162* out_b,
                                  int n) {
  assert(n > 0);
  const int t = threadIdx.x;
  const __half2 x = a[t], y = a[t + 32];
  const __nv_bfloat162 u = b[t], v = b[t + 32];
  out_a[t] = __hfma2_relu(x, y, x);
  out_a[t + 32] = __hmax2_nan(x, y);
  out_a[t + 64] = h2exp2(x);
  out_a[t + 96] = __hmul2_sat(x, y);
  out_a[t + 128] = h2tanh(x);
  out_b[t] = __hfma2(u, v, u);
  out_b[t + 32] = __hmin2(u, v);
  out_b[t + 64] = __hsub2(u, v);
  out_b[t + 96] = h2exp(u);
  out_b[t + 128] = __habs2(u);
}

extern "C" __global__ void groups(int* out) {
  __shared__ int s[64];
  const int t = threadIdx.x;
  auto tile = cg::tiled_partition<8>(cg::this_thread_block());
  out[t] = cg::reduce(tile, t, cg::plus<int>());
  s[t] = out[t];
  tile.sync();
  out[t + 64] = s[t ^ 1];
  out[t + 128] = __syncthreads_count(t % 3 == 0) + __syncthreads_or(t == 5) * 1000;
  const unsigned odd = __ballot_sync(~0u, t & 1);
  out[t + 192] = __popc(odd) + __any_sync(~0u, t == 70) + __reduce_add_sync(~0u, t % 32);
  out[t + 256] = int(__shfl_xor_sync(~0u, (long long)t << 33, 3) >> 33);
  if (t % 2) {
    auto active = cg::coalesced_threads();
    out[t + 320] = active.thread_rank() * 100 + active.size();
  } else {
    out[t + 320] = -1;
  }
}

extern "C" __global__ void pipeline(const float4* in, float4* out, int rounds) {
  __shared__ float4 s[2][64];
  const int t = threadIdx.x;
  __pipeline_memcpy_async(&s[0][t], in + t, 16);
  __pipeline_commit();
  for (int i = 0; i < rounds; ++i) {
    if (i + 1 < rounds) __pipeline_memcpy_async(&s[(i + 1) & 1][t], in + (i + 1) * 64 + t, 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    out[i * 64 + t] = s[i & 1][63 - t];
    __syncthreads();
  }
}

extern "C" __global__ void functions(const float* x, float* out) {
  const int t = threadIdx.x;
  const float z = x[t];
  float* o = out + t * 12;
  o[0] = __expf(z);
  o[1] = __fdividef(z, 3.0f);
  o[2] = tanhf(z);
  o[3] = erff(z);
  o[4] = powf(fabsf(z), 1.5f);
  o[5] = log1pf(fabsf(z));
  o[6] = __frcp_rn(z + 50.0f);
  o[7] = rsqrtf(fabsf(z));
  o[8] = fmodf(z, 0.25f);
  o[9] = cbrtf(z);
  o[10] = lgammaf(fabsf(z) + 3.0f);
  o[11] = cosf(z * 1e6f);
}
