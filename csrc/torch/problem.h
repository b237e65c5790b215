// From the operators' arguments to the problem struct, for every device. Python has checked every argument
// (spec.py); the checks here only keep a direct call from touching foreign memory.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "../attention.h"

#define PK_OPTIONS                                                                                          \
  "Tensor? q_offsets, Tensor? key_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? dropout_seed, " \
  "int q_offset, bool is_causal, float scale, float softcap, float dropout_p, "

namespace pk::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(bool condition, const char* what) {
  STD_TORCH_CHECK(condition, "perceiver_kernels: ", what);
}

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "perceiver_kernels: query has a dtype without a kernel");
  }
}

inline bool is_beside(const Tensor& t, const Tensor& query) {
  return t.is_cpu() == query.is_cpu() && t.get_device_index() == query.get_device_index();
}

// (batch, head, row, channel), or (row, head, channel) in the packed form.
inline View view_of(const Tensor& t, const Tensor& query, bool packed, int64_t heads, int64_t rows,
                    int64_t channels) {
  check(is_beside(t, query) && t.scalar_type() == query.scalar_type(), "tensors differ in device or dtype");
  check(t.dim() == (packed ? 3 : 4), "a tensor has the wrong number of dimensions");
  check(t.size(1) == heads && t.size(packed ? 0 : 2) == rows && t.size(packed ? 2 : 3) == channels &&
            (packed || t.size(0) == query.size(0)),
        "tensor shapes don't fit together");
  check(channels == 1 || t.stride(t.dim() - 1) == 1, "channels must be contiguous");
  return {t.data_ptr(), packed ? 0 : t.stride(0), t.stride(1), packed ? t.stride(0) : t.stride(2)};
}

inline ScalarType lse_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// (batch, head, row), or (head, row) in the packed form.
inline View lse_view_of(const Tensor& t, const Tensor& query, bool packed, int64_t heads, int64_t rows) {
  check(is_beside(t, query) && t.scalar_type() == lse_dtype(query) && t.dim() == (packed ? 2 : 3),
        "lse has the wrong type");
  check(t.size(t.dim() - 2) == heads && t.size(t.dim() - 1) == rows && (packed || t.size(0) == query.size(0)),
        "lse has the wrong shape");
  return {t.data_ptr(), packed ? 0 : t.stride(0), t.stride(t.dim() - 2), t.stride(t.dim() - 1)};
}

inline const int64_t* int64s(const std::optional<Tensor>& t, const Tensor& query, int64_t count) {
  if (!t) return nullptr;
  check(is_beside(*t, query) && t->scalar_type() == ScalarType::Long && t->is_contiguous() &&
            t->numel() == count,
        "q_offsets, cu_seqlens and dropout_seed must be contiguous int64 tensors of the right length");
  return t->const_data_ptr<int64_t>();
}

inline Attention problem_of(const Tensor& query, const Tensor& key, const Tensor& value,
                            const std::optional<Tensor>& q_offsets, const std::optional<Tensor>& key_mask,
                            const std::optional<Tensor>& cu_seqlens_q,
                            const std::optional<Tensor>& cu_seqlens_k,
                            const std::optional<Tensor>& dropout_seed, int64_t q_offset, bool is_causal,
                            double scale, double softcap, double dropout_p, const Tensor& out,
                            const Tensor& lse) {
  const bool packed = cu_seqlens_q.has_value();
  check(packed == cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k come together");
  check(query.dim() == (packed ? 3 : 4) && key.dim() == query.dim() && value.dim() == query.dim(),
        "query, key and value have the wrong number of dimensions");
  const int row = packed ? 0 : 2, channel = packed ? 2 : 3;
  Attention p{};
  p.dtype = dtype_of(query.scalar_type());
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
  p.lse = lse_view_of(lse, query, packed, p.heads, p.queries);
  p.q_offset = is_causal ? q_offset : kNoCausality;
  p.q_offsets = is_causal ? int64s(q_offsets, query, p.batch) : nullptr;
  if (key_mask) {
    check(is_beside(*key_mask, query) && key_mask->scalar_type() == ScalarType::Bool &&
              key_mask->dim() == (packed ? 1 : 2) && key_mask->size(key_mask->dim() - 1) == p.keys &&
              (packed || key_mask->size(0) == p.batch),
          "key_mask must be a bool tensor over the keys");
    p.key_mask = static_cast<const bool*>(key_mask->const_data_ptr());
    p.key_mask_batch_stride = packed ? 0 : key_mask->stride(0);
    p.key_mask_stride = key_mask->stride(key_mask->dim() - 1);
  }
  p.cu_seqlens_q = int64s(cu_seqlens_q, query, p.batch + 1);
  p.cu_seqlens_k = int64s(cu_seqlens_k, query, p.batch + 1);
  p.scale = scale;
  p.softcap = softcap;
  p.dropout_p = dropout_p;
  p.dropout_seed_at = int64s(dropout_seed, query, 2);
  return p;
}

}  // namespace pk::binding
