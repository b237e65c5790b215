// The CPU kernels as torch operators, on the LibTorch stable ABI: one library for torch 2.10 and newer.
// Python has checked every argument (spec.py); the checks here only keep a direct call from touching foreign
// memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>

#include "../attention.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool condition, const char* what) { STD_TORCH_CHECK(condition, "perceiver_kernels: ", what); }

pk::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return pk::DType::kFloat32;
    case ScalarType::BFloat16:
      return pk::DType::kBFloat16;
    case ScalarType::Half:
      return pk::DType::kFloat16;
    case ScalarType::Double:
      return pk::DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "perceiver_kernels: query has a dtype without a CPU kernel");
  }
}

// (batch, head, row, channel), or (row, head, channel) in the packed form.
pk::View view_of(const Tensor& t, const Tensor& query, bool packed, int64_t heads, int64_t rows,
                 int64_t channels) {
  check(t.is_cpu() && t.scalar_type() == query.scalar_type(), "tensors differ in device or dtype");
  check(t.dim() == (packed ? 3 : 4), "a tensor has the wrong number of dimensions");
  check(t.size(1) == heads && t.size(packed ? 0 : 2) == rows && t.size(packed ? 2 : 3) == channels &&
            (packed || t.size(0) == query.size(0)),
        "tensor shapes don't fit together");
  check(channels == 1 || t.stride(t.dim() - 1) == 1, "channels must be contiguous");
  return {t.data_ptr(), packed ? 0 : t.stride(0), t.stride(1), packed ? t.stride(0) : t.stride(2)};
}

// (batch, head, row), or (head, row) in the packed form.
pk::View lse_view_of(const Tensor& t, bool packed, int64_t heads, int64_t rows, ScalarType dtype) {
  check(t.is_cpu() && t.scalar_type() == dtype && t.dim() == (packed ? 2 : 3), "lse has the wrong type");
  check(t.size(t.dim() - 2) == heads && t.size(t.dim() - 1) == rows, "lse has the wrong shape");
  return {t.data_ptr(), packed ? 0 : t.stride(0), t.stride(t.dim() - 2), t.stride(t.dim() - 1)};
}

const int64_t* int64s(const std::optional<Tensor>& t, int64_t count) {
  if (!t) return nullptr;
  check(t->is_cpu() && t->scalar_type() == ScalarType::Long && t->is_contiguous() && t->numel() == count,
        "q_offsets, cu_seqlens and dropout_seed must be contiguous int64 tensors of the right length");
  return t->const_data_ptr<int64_t>();
}

const int64_t* cumulative_lengths(const std::optional<Tensor>& t, int64_t sequences, int64_t rows) {
  const int64_t* ends = int64s(t, sequences + 1);
  if (!ends) return nullptr;
  check(ends[0] == 0 && ends[sequences] == rows && std::is_sorted(ends, ends + sequences + 1),
        "cu_seqlens must start at 0, not decrease, and end at the number of rows");
  return ends;
}

ScalarType lse_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

pk::Attention problem_of(const Tensor& query, const Tensor& key, const Tensor& value,
                         const std::optional<Tensor>& q_offsets, const std::optional<Tensor>& key_mask,
                         const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                         const std::optional<Tensor>& dropout_seed, int64_t q_offset, bool is_causal,
                         double scale, double softcap, double dropout_p, const Tensor& out,
                         const Tensor& lse) {
  const bool packed = cu_seqlens_q.has_value();
  check(packed == cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k come together");
  check(query.dim() == (packed ? 3 : 4) && key.dim() == query.dim() && value.dim() == query.dim(),
        "query, key and value have the wrong number of dimensions");
  const int row = packed ? 0 : 2, channel = packed ? 2 : 3;
  pk::Attention p{};
  p.dtype = dtype_of(query);
  p.batch = packed ? cu_seqlens_q->numel() - 1 : query.size(0);
  p.heads = query.size(1);
  p.kv_heads = key.size(1);
  p.queries = query.size(row);
  p.keys = key.size(row);
  p.dim = query.size(channel);
  p.value_dim = value.size(channel);
  check(p.kv_heads > 0 && p.heads > 0 && p.heads % p.kv_heads == 0, "key heads must divide query heads");
  check(p.dim > 0 && p.value_dim > 0, "head dims must be at least 1");
  check(dropout_p >= 0 && dropout_p < 1, "dropout_p must be in [0, 1)");
  p.query = view_of(query, query, packed, p.heads, p.queries, p.dim);
  p.key = view_of(key, query, packed, p.kv_heads, p.keys, p.dim);
  p.value = view_of(value, query, packed, p.kv_heads, p.keys, p.value_dim);
  p.out = view_of(out, query, packed, p.heads, p.queries, p.value_dim);
  p.lse = lse_view_of(lse, packed, p.heads, p.queries, lse_dtype(query));
  p.q_offset = is_causal ? q_offset : pk::kNoCausality;
  p.q_offsets = is_causal ? int64s(q_offsets, p.batch) : nullptr;
  if (key_mask) {
    check(key_mask->is_cpu() && key_mask->scalar_type() == ScalarType::Bool &&
              key_mask->dim() == (packed ? 1 : 2) && key_mask->size(key_mask->dim() - 1) == p.keys &&
              (packed || key_mask->size(0) == p.batch),
          "key_mask must be a bool tensor over the keys");
    p.key_mask = static_cast<const bool*>(key_mask->const_data_ptr());
    p.key_mask_batch_stride = packed ? 0 : key_mask->stride(0);
    p.key_mask_stride = key_mask->stride(key_mask->dim() - 1);
  }
  p.cu_seqlens_q = cumulative_lengths(cu_seqlens_q, p.batch, p.queries);
  p.cu_seqlens_k = cumulative_lengths(cu_seqlens_k, p.batch, p.keys);
  p.scale = scale;
  p.softcap = softcap;
  p.dropout_p = dropout_p;
  if (const int64_t* words = int64s(dropout_seed, 2)) {
    p.dropout_seed = static_cast<uint64_t>(words[0]);
    p.dropout_first_key = words[1];
  }
  return p;
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
      problem_of(query, key, value, q_offsets, key_mask, cu_seqlens_q, cu_seqlens_k, dropout_seed, q_offset,
                 is_causal, scale, softcap, dropout_p, out, lse),
      torch_threads());
}

void cpu_backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& query,
                  const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
                  const std::optional<Tensor>& q_offsets, const std::optional<Tensor>& key_mask,
                  const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                  const std::optional<Tensor>& dropout_seed, int64_t q_offset, bool is_causal, double scale,
                  double softcap, double dropout_p, Tensor dquery, Tensor dkey, Tensor dvalue) {
  const pk::Attention p = problem_of(query, key, value, q_offsets, key_mask, cu_seqlens_q, cu_seqlens_k,
                                     dropout_seed, q_offset, is_causal, scale, softcap, dropout_p, out, lse);
  const bool packed = cu_seqlens_q.has_value();
  pk::AttentionGradient gradient{};
  gradient.dout = view_of(dout, query, packed, p.heads, p.queries, p.value_dim);
  if (dlse) gradient.dlse = lse_view_of(*dlse, packed, p.heads, p.queries, lse_dtype(query));
  gradient.dquery = view_of(dquery, query, packed, p.heads, p.queries, p.dim);
  gradient.dkey = view_of(dkey, query, packed, p.kv_heads, p.keys, p.dim);
  gradient.dvalue = view_of(dvalue, query, packed, p.kv_heads, p.keys, p.value_dim);
  pk::cpu::attention_backward(p, gradient, torch_threads());
}

}  // namespace

#define PK_OPTIONS                                                                                          \
  "Tensor? q_offsets, Tensor? key_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? dropout_seed, " \
  "int q_offset, bool is_causal, float scale, float softcap, float dropout_p, "

STABLE_TORCH_LIBRARY_FRAGMENT(perceiver_kernels, m) {
  m.def("cpu_forward(Tensor query, Tensor key, Tensor value, " PK_OPTIONS
        "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "cpu_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, " PK_OPTIONS "Tensor(a!) dquery, Tensor(b!) dkey, Tensor(c!) dvalue) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(perceiver_kernels, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
}
