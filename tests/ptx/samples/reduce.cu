// Sums, with most of what plain CUDA has: shared arrays, barriers, shuffles, atomics, constants, calls.
__constant__ float weights[4] = {1.0f, 2.0f, 3.0f, 4.0f};
__device__ int launches = 7;

__device__ __noinline__ float squared_plus(float x, const int* by) { return x * x + float(*by); }

extern "C" __global__ void weighted_sum(const float* x, float* out, int n) {
  extern __shared__ float values[];
  __shared__ float per_warp[32];
  const int t = threadIdx.x;
  float sum = 0.0f;
  for (int i = blockIdx.x * blockDim.x + t; i < n; i += gridDim.x * blockDim.x) sum += x[i] * weights[i & 3];
  values[t] = sum;
  __syncthreads();
  sum = values[t ^ 33];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (t % 32 == 0) per_warp[t / 32] = sum;
  __syncthreads();
  if (t < 32) {
    sum = t < blockDim.x / 32 ? per_warp[t] : 0.0f;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
    if (t == 0) atomicAdd(out, sum);
  }
  if (t == 0) atomicAdd(&launches, 1);
}

// A tree in shared memory: the last rounds of one warp have __syncwarp instead of __syncthreads.
extern "C" __global__ void tree_sum(const float* x, float* out) {
  __shared__ float s[128];
  const int t = threadIdx.x;
  s[t] = x[blockIdx.x * 128 + t];
  __syncthreads();
  for (int half = 64; half >= 32; half /= 2) {
    if (t < half) s[t] += s[t + half];
    __syncthreads();
  }
  if (t < 32) {
    for (int half = 16; half > 0; half /= 2) {
      const float other = t < half ? s[t + half] : 0.0f;
      __syncwarp();
      s[t] += other;
      __syncwarp();
    }
    if (t == 0) out[blockIdx.x] = s[0];
  }
}

// Two warps produce for two that consume, over named barriers 1 (full) and 2 (empty).
extern "C" __global__ void produce_consume(const float* x, float* out, int rounds) {
  __shared__ float s[64];
  const int t = threadIdx.x;
  for (int i = 0; i < rounds; ++i) {
    if (t < 64) {
      if (i > 0) asm volatile("bar.sync 2, 128;" ::: "memory");
      s[t] = x[i * 64 + t] * 2.0f;
      asm volatile("bar.arrive 1, 128;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 128;" ::: "memory");
      out[i * 64 + t - 64] = s[127 - t];
      if (i + 1 < rounds) asm volatile("bar.arrive 2, 128;" ::: "memory");
    }
  }
}

extern "C" __global__ void maths(double* d, float* f, const int* by, int n, long long m) {
  const int t = threadIdx.x;
  double x = d[t];
  f[t] = squared_plus(sinf(float(x)), by);
  x = sin(x) * n / m + double(m % n) + __popcll(m) + __clz(n) + __ffs(n) + __brev(n);
  switch (n) {
    case 1: x = exp(-fabs(x)); break;
    case 2: x += 3; break;
    case 3: x *= 7; break;
    case 4: x = sqrt(fabs(x)); break;
    case 5: x = log(1 + fabs(x)); break;
  }
  d[t] = x;
}
