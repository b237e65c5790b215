// The CPU kernels as torch operators, on the LibTorch stable ABI: one library for torch 2.10 and newer.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../cpu/kernels.h"
#include "problem.h"

namespace {

using torch::stable::Tensor;
using namespace pk::binding;

void check_lengths(const int64_t* ends, int64_t sequences, int64_t rows) {
  check(ends == nullptr ||
            (ends[0] == 0 && ends[sequences] == rows && std::is_sorted(ends, ends + sequences + 1)),
        "cu_seqlens must start at 0, not decrease, and end at the number of rows");
}

// What only memory that this processor reads can tell.
pk::Attention read(pk::Attention problem) {
  check_lengths(problem.cu_seqlens_q, problem.batch, problem.queries);
  check_lengths(problem.cu_seqlens_k, problem.batch, problem.keys);
  if (const int64_t* words = problem.dropout_seed_at) {
    problem.dropout_seed = static_cast<uint64_t>(words[0]);
    problem.dropout_first_key = words[1];
  }
  return problem;
}

pk::ThreadPool torch_threads() {
  const auto run = [](int threads, void* context, void (*body)(void*, int)) {
    torch::stable::parallel_for(0, threads, 1, [=](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) body(context, static_cast<int>(thread));
    });
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

void cpu_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                 const std::optional<Tensor>& q_offsets, const std::optional<Tensor>& key_mask,
                 const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                 const std::optional<Tensor>& dropout_seed, int64_t q_offset, bool is_causal, double scale,
                 double softcap, double dropout_p, Tensor out, Tensor lse) {
  pk::cpu::attention_forward(
      read(problem_of(query, key, value, q_offsets, key_mask, cu_seqlens_q, cu_seqlens_k, dropout_seed,
                      q_offset, is_causal, scale, softcap, dropout_p, out, lse)),
      torch_threads());
}

void cpu_backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& query,
                  const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                  const std::optional<Tensor>& q_offsets, const std::optional<Tensor>& key_mask,
                  const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                  const std::optional<Tensor>& dropout_seed, int64_t q_offset, bool is_causal, double scale,
                  double softcap, double dropout_p, Tensor dquery, Tensor dkey, Tensor dvalue) {
  const pk::Attention p =
      read(problem_of(query, key, value, q_offsets, key_mask, cu_seqlens_q, cu_seqlens_k, dropout_seed,
                      q_offset, is_causal, scale, softcap, dropout_p, out, lse));
  const bool packed = cu_seqlens_q.has_value();
  pk::AttentionGradient gradient{};
  gradient.dout = view_of(dout, query, packed, p.heads, p.queries, p.value_dim);
  if (dlse) gradient.dlse = lse_view_of(*dlse, query, packed, p.heads, p.queries);
  gradient.dquery = view_of(dquery, query, packed, p.heads, p.queries, p.dim);
  gradient.dkey = view_of(dkey, query, packed, p.kv_heads, p.keys, p.dim);
  gradient.dvalue = view_of(dvalue, query, packed, p.kv_heads, p.keys, p.value_dim);
  pk::cpu::attention_backward(p, gradient, torch_threads());
}

// Below so many, another thread isn't worth waking.
constexpr int64_t kNumbersPerThread = 1 << 15;

void cpu_rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse,
                Tensor out) {
  check(x.dim() == 4 && out.dim() == 4, "x must have four dimensions");
  pk::cpu::Rotation r{};
  r.length = x.size(1), r.heads = x.size(2), r.channels = x.size(3);
  for (int64_t i = 0; i < 4; ++i) check(out.size(i) == x.size(i), "out must have the shape of x");
  check(out.scalar_type() == x.scalar_type() && out.is_contiguous(), "out must be like x, and contiguous");
  check(r.channels <= 1 || x.stride(3) == 1, "channels must be contiguous");
  const int64_t last = cos.dim() - 1;
  check(last == 1 || (last == 2 && cos.size(0) == x.size(0)), "angles must be (L, R) or (B, L, R)");
  r.pairs = cos.size(last);
  check(cos.size(last - 1) == r.length && 2 * r.pairs <= r.channels, "angles don't fit x");
  check(sin.dim() == cos.dim() && sin.numel() == cos.numel(), "cos and sin must have one shape");
  for (const Tensor* angles : {&cos, &sin})
    check(angles->scalar_type() == lse_dtype(x) && angles->is_contiguous(),
          "angles have another dtype or are not contiguous");
  check(x.is_cpu() && cos.is_cpu() && sin.is_cpu() && out.is_cpu(), "tensors must be on the CPU");
  r.x = {x.data_ptr(), x.stride(0), x.stride(2), x.stride(1)};
  r.out = out.data_ptr(), r.cos = cos.data_ptr(), r.sin = sin.data_ptr();
  r.angles_batch_stride = last == 2 ? r.length * r.pairs : 0;
  r.interleaved = interleaved, r.inverse = inverse;
  const auto rotate = pk::cpu::instruction_set().kernels(dtype_of(x.scalar_type()))->rotate;
  const int64_t row = std::max<int64_t>(1, r.heads * r.channels);
  torch::stable::parallel_for(0, x.size(0) * r.length, std::max<int64_t>(1, kNumbersPerThread / row),
                              [&](int64_t begin, int64_t end) { rotate(r, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(perceiver_kernels, m) {
  m.def("cpu_forward(Tensor query, Tensor key, Tensor value, " PK_OPTIONS
        "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "cpu_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, " PK_OPTIONS "Tensor(a!) dquery, Tensor(b!) dkey, Tensor(c!) dvalue) -> ()");
  m.def("cpu_rotate(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(perceiver_kernels, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
  m.impl("cpu_rotate", TORCH_BOX(&cpu_rotate));
}
