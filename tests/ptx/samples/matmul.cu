// C = A B^T, A (rows, depth), B (columns, depth), 16-bit in, f32 out; cp.async in two stages, ldmatrix, mma.sync.
// One block of four warps makes a 64 x 32 tile, a warp 16 x 32 of it. depth is a multiple of 32.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int kRows = 64, kColumns = 32, kDepth = 32, kPitch = kDepth + 8;

__device__ inline unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

__device__ inline void copy16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ inline void ldmatrix4(unsigned (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

template <typename T>
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
__device__ inline void mma<__half>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<__nv_bfloat16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename T>
__device__ void matmul(const T* a, const T* b, float* c, int rows, int columns, int depth) {
  __shared__ alignas(16) T as[2][kRows][kPitch];
  __shared__ alignas(16) T bs[2][kColumns][kPitch];
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int row0 = blockIdx.x * kRows, column0 = blockIdx.y * kColumns;

  auto load = [&](int stage, int k0) {
    for (int i = t; i < kRows * 4; i += 128) {
      const int r = i / 4, k = i % 4 * 8;
      copy16(&as[stage][r][k], a + size_t(row0 + r) * depth + k0 + k, row0 + r < rows);
    }
    const int r = t / 4, k = t % 4 * 8;
    copy16(&bs[stage][r][k], b + size_t(column0 + r) * depth + k0 + k, column0 + r < columns);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  float acc[4][4] = {};
  load(0, 0);
  for (int k0 = 0, stage = 0; k0 < depth; k0 += kDepth, stage ^= 1) {
    if (k0 + kDepth < depth) {
      load(stage ^ 1, k0 + kDepth);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    for (int k = 0; k < kDepth; k += 16) {
      unsigned fa[4], fb[2][4];
      ldmatrix4(fa, &as[stage][warp * 16 + lane % 16][k + lane / 16 * 8]);
      for (int j = 0; j < 2; ++j) ldmatrix4(fb[j], &bs[stage][j * 16 + lane % 16][k + lane / 16 * 8]);
      for (int j = 0; j < 4; ++j) mma<T>(acc[j], fa, fb[j / 2][j % 2], fb[j / 2][j % 2 + 2]);
    }
    __syncthreads();
  }
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int r = row0 + warp * 16 + lane / 4 + i / 2 * 8, column = column0 + j * 8 + lane % 4 * 2 + i % 2;
      if (r < rows && column < columns) c[size_t(r) * columns + column] = acc[j][i];
    }
  }
}

extern "C" __global__ void matmul_f16(const __half* a, const __half* b, float* c, int rows, int columns, int depth) {
  matmul(a, b, c, rows, columns, depth);
}

extern "C" __global__ void matmul_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int rows, int columns,
                                       int depth) {
  matmul(a, b, c, rows, columns, depth);
}
