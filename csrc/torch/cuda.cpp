// The CUDA kernels as torch operators, on the LibTorch stable ABI: one library for torch 2.13 and newer. It
// links against no part of torch that only a CUDA build has, so it loads, and can be asked, on any machine.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cuda/launch.h"
#include "problem.h"

namespace {

using torch::stable::Tensor;
using namespace pk::binding;

void check_launch(pk::cuda::Failure failure) {
  STD_TORCH_CHECK(failure == nullptr, "perceiver_kernels: ", failure);
}

// Only strides that are used count.
void check_rows(const pk::View& view, const Tensor& t) {
  const bool packed = t.dim() == 3;
  const int64_t strides[] = {view.batch_stride, view.head_stride, view.row_stride};
  const int64_t sizes[] = {packed ? 1 : t.size(0), t.size(1), t.size(packed ? 0 : 2)};
  bool is_aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) is_aligned &= sizes[i] <= 1 || strides[i] % 8 == 0;
  check(is_aligned, "rows must begin at multiples of 16 bytes");
}

void check_limits(const pk::Attention& p, const Tensor& query, const Tensor& key, const Tensor& value,
                  const Tensor& out, const Tensor& lse) {
  check(p.dtype == pk::DType::kBFloat16 || p.dtype == pk::DType::kFloat16,
        "query must be bfloat16 or float16");
  check(p.dim % 8 == 0 && p.value_dim % 8 == 0, "head dims must be multiples of 8");
  check_rows(p.query, query);
  check_rows(p.key, key);
  check_rows(p.value, value);
  check_rows(p.out, out);
  check(lse.is_contiguous() && (!p.key_mask || p.key_mask_stride == 1 || p.keys <= 1),
        "lse and key_mask must be contiguous");
  const int64_t rows = (p.cu_seqlens_q ? p.longest_queries : p.queries) * (p.heads / p.kv_heads);
  const int64_t keys = p.cu_seqlens_q ? p.longest_keys : p.keys;
  check(p.longest_queries <= p.queries && p.longest_keys <= p.keys && rows + keys < int64_t{1} << 31 &&
            p.queries < int64_t{1} << 31,
        "rows of one key head and keys together are counted in 31 bits");
}

pk::cuda::Target target_of(const Tensor& query, int64_t shared_limit) {
  const auto device = query.get_device_index();
  return {device, static_cast<int>(shared_limit),
          torch::stable::accelerator::getCurrentStream(device).nativeHandle()};
}

std::vector<int64_t> device(int64_t index) {
  pk::cuda::Device found;
  check_launch(pk::cuda::find_device(static_cast<int>(index), &found));
  return {found.processors, found.shared_per_block, found.shared_per_processor};
}

std::string archs() { return PK_CUDA_ARCHS; }

std::vector<int64_t> forward_tile(ScalarType dtype, int64_t dim, int64_t rows, bool has_score,
                                  int64_t shared_limit) {
  pk::cuda::Tile tile;
  check_launch(pk::cuda::find_forward_tile(dtype_of(dtype), dim, rows, has_score, shared_limit, &tile));
  return {tile.block_m, tile.block_n, tile.threads, tile.shared_bytes};
}

void forward(const Tensor& query, const Tensor& key, const Tensor& value,
             const std::optional<Tensor>& q_offsets, const std::optional<Tensor>& key_mask,
             const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
             const std::optional<Tensor>& dropout_seed, int64_t q_offset, bool is_causal, double scale,
             double softcap, double dropout_p, int64_t longest_q, int64_t longest_k, int64_t shared_limit,
             std::optional<Tensor> part_outs, std::optional<Tensor> part_lses, Tensor out, Tensor lse) {
  pk::Attention p = problem_of(query, key, value, q_offsets, key_mask, cu_seqlens_q, cu_seqlens_k,
                               dropout_seed, q_offset, is_causal, scale, softcap, dropout_p, out, lse);
  p.longest_queries = longest_q;
  p.longest_keys = longest_k;
  check_limits(p, query, key, value, out, lse);
  pk::cuda::Parts parts{1, nullptr, nullptr};
  check(part_outs.has_value() == part_lses.has_value(), "part_outs and part_lses come together");
  if (part_outs) {
    parts.splits = static_cast<int>(part_outs->size(0));
    const int64_t rows = parts.splits * lse.numel();
    check(parts.splits > 1 && is_beside(*part_outs, query) && is_beside(*part_lses, query) &&
              part_outs->scalar_type() == ScalarType::Float &&
              part_lses->scalar_type() == ScalarType::Float && part_outs->is_contiguous() &&
              part_lses->is_contiguous() && part_outs->numel() == rows * p.value_dim &&
              part_lses->numel() == rows,
          "part_outs and part_lses must be float, contiguous and of the right size");
    parts.outs = part_outs->mutable_data_ptr<float>();
    parts.lses = part_lses->mutable_data_ptr<float>();
  }
  check_launch(pk::cuda::attention_forward(p, parts, target_of(query, shared_limit)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(perceiver_kernels, m) {
  m.def("cuda_archs() -> str");
  m.def("cuda_device(int index) -> int[]");
  m.def("cuda_forward_tile(ScalarType dtype, int dim, int rows, bool has_score, int shared_limit) -> int[]");
  m.def("cuda_forward(Tensor query, Tensor key, Tensor value, " PK_OPTIONS
        "int longest_q, int longest_k, int shared_limit, Tensor(c!)? part_outs, Tensor(d!)? part_lses, "
        "Tensor(a!) out, Tensor(b!) lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(perceiver_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_archs", TORCH_BOX(&archs));
  m.impl("cuda_device", TORCH_BOX(&device));
  m.impl("cuda_forward_tile", TORCH_BOX(&forward_tile));
}

STABLE_TORCH_LIBRARY_IMPL(perceiver_kernels, CUDA, m) { m.impl("cuda_forward", TORCH_BOX(&forward)); }
