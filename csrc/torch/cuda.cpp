// The CUDA kernels as torch operators, on the LibTorch stable ABI: one library for torch 2.10 and newer. It
// links against no part of torch that only a CUDA build has, so it loads, and can be asked, on any machine;
// torch's current stream is therefore an argument.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
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
void check_rows(std::initializer_list<Tensor> tensors) {
  for (const Tensor& t : tensors) {
    bool is_aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
    for (int64_t i = 0; i + 1 < t.dim(); ++i) is_aligned &= t.size(i) <= 1 || t.stride(i) % 8 == 0;
    check(is_aligned, "rows must begin at multiples of 16 bytes");
  }
}

void check_limits(const pk::Attention& p, const std::optional<Tensor>& key_mask) {
  check(p.dtype == pk::DType::kBFloat16 || p.dtype == pk::DType::kFloat16,
        "query must be bfloat16 or float16");
  check(p.dim % 8 == 0 && p.value_dim % 8 == 0, "head dims must be multiples of 8");
  check(!key_mask || key_mask->is_contiguous(), "key_mask must be contiguous");
  const int64_t rows = (p.cu_seqlens_q ? p.longest_queries : p.queries) * (p.heads / p.kv_heads);
  const int64_t keys = p.cu_seqlens_q ? p.longest_keys : p.keys;
  constexpr int64_t kMost = (int64_t{1} << 31) - (int64_t{1} << 24);  // tiles reach beyond the last of them
  check(p.longest_queries <= p.queries && p.longest_keys <= p.keys && rows + keys <= kMost &&
            p.queries <= kMost,
        "rows of one key head and keys together are counted in 31 bits");
}

// A workspace of the caller's.
template <class Number>
Number* buffer_of(Tensor& t, const Tensor& query, ScalarType type, int64_t count) {
  check(is_beside(t, query) && t.scalar_type() == type && t.is_contiguous() && t.numel() == count,
        "a workspace must be contiguous and of the right type and size");
  return static_cast<Number*>(t.mutable_data_ptr());
}

pk::cuda::Kind kind_of(int64_t arch, int64_t shared_limit) {
  return {static_cast<int>(arch), static_cast<int>(shared_limit)};
}

pk::cuda::Target target_of(const Tensor& query, const pk::cuda::Kind& kind, int64_t stream) {
  return {query.get_device_index(), kind, reinterpret_cast<void*>(stream)};
}

// Makes a device the current one, until the end of the scope; a negative index is that one.
class OnDevice {
 public:
  explicit OnDevice(int64_t index) {
    if (index >= 0) guard_.emplace(static_cast<torch::stable::accelerator::DeviceIndex>(index));
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

std::vector<int64_t> device(int64_t index) {
  int count = 0;
  check_launch(pk::cuda::count_devices(&count));
  check(index < count, "there is no such GPU");
  const OnDevice here(index);
  pk::cuda::Device found;
  check_launch(pk::cuda::find_device(&found));
  return {found.processors, found.shared_per_block, found.shared_per_processor, found.arch};
}

std::string archs() { return PK_CUDA_ARCHS; }

std::vector<int64_t> forward_tile(ScalarType dtype, int64_t dim, int64_t rows, bool has_score, int64_t arch,
                                  int64_t shared_limit) {
  pk::cuda::Tile tile;
  check_launch(
      pk::cuda::find_forward_tile(dtype_of(dtype), dim, rows, has_score, kind_of(arch, shared_limit), &tile));
  return {tile.block_m, tile.block_n, tile.threads, tile.shared_bytes};
}

std::vector<int64_t> backward_tile(ScalarType dtype, int64_t dim, bool has_score, int64_t arch,
                                   int64_t shared_limit) {
  pk::cuda::Tile tile;
  check_launch(
      pk::cuda::find_backward_tile(dtype_of(dtype), dim, has_score, kind_of(arch, shared_limit), &tile));
  return {tile.block_m, tile.block_n, tile.threads, tile.shared_bytes, tile.tile_bytes, tile.slab_floats};
}

void forward(const Tensor& query, const Tensor& key, const Tensor& value,
             const std::optional<Tensor>& q_offsets, const std::optional<Tensor>& key_mask,
             const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
             const std::optional<Tensor>& dropout_seed, int64_t q_offset, bool is_causal, double scale,
             double softcap, double dropout_p, int64_t longest_q, int64_t longest_k, int64_t arch,
             int64_t shared_limit, int64_t stream, std::optional<Tensor> part_outs,
             std::optional<Tensor> part_lses, Tensor out, Tensor lse) {
  pk::Attention p = problem_of(query, key, value, q_offsets, key_mask, cu_seqlens_q, cu_seqlens_k,
                               dropout_seed, q_offset, is_causal, scale, softcap, dropout_p, out, lse);
  p.longest_queries = longest_q;
  p.longest_keys = longest_k;
  check_limits(p, key_mask);
  check_rows({query, key, value, out});
  check(lse.is_contiguous(), "lse must be contiguous");
  const pk::cuda::Kind kind = kind_of(arch, shared_limit);
  check(part_outs.has_value() == part_lses.has_value(), "part_outs and part_lses come together");
  pk::cuda::Parts parts{1, nullptr, nullptr};
  if (part_outs) {
    parts.splits = static_cast<int>(part_outs->size(0));
    const int64_t rows = parts.splits * lse.numel();
    parts.outs = buffer_of<float>(*part_outs, query, ScalarType::Float, rows * p.value_dim);
    parts.lses = buffer_of<float>(*part_lses, query, ScalarType::Float, rows);
  }
  const OnDevice here(query.get_device_index());
  check_launch(pk::cuda::attention_forward(p, parts, target_of(query, kind, stream)));
}

void backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& query, const Tensor& key,
              const Tensor& value, const Tensor& out, const Tensor& lse,
              const std::optional<Tensor>& q_offsets, const std::optional<Tensor>& key_mask,
              const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
              const std::optional<Tensor>& dropout_seed, int64_t q_offset, bool is_causal, double scale,
              double softcap, double dropout_p, int64_t longest_q, int64_t longest_k, int64_t arch,
              int64_t shared_limit, int64_t stream, int64_t runs, Tensor tiles, Tensor slabs, Tensor dquery,
              Tensor dkey, Tensor dvalue) {
  pk::Attention p = problem_of(query, key, value, q_offsets, key_mask, cu_seqlens_q, cu_seqlens_k,
                               dropout_seed, q_offset, is_causal, scale, softcap, dropout_p, out, lse);
  p.longest_queries = longest_q;
  p.longest_keys = longest_k;
  check_limits(p, key_mask);
  check_rows({query, key, value, out, dout, dquery, dkey, dvalue});
  const bool packed = cu_seqlens_q.has_value();
  pk::AttentionGradient gradient{};
  gradient.dout = view_of(dout, query, packed, p.heads, p.queries, p.value_dim);
  if (dlse) gradient.dlse = lse_view_of(*dlse, query, packed, p.heads, p.queries);
  gradient.dquery = view_of(dquery, query, packed, p.heads, p.queries, p.dim);
  gradient.dkey = view_of(dkey, query, packed, p.kv_heads, p.keys, p.dim);
  gradient.dvalue = view_of(dvalue, query, packed, p.kv_heads, p.keys, p.value_dim);

  const pk::cuda::Kind kind = kind_of(arch, shared_limit);
  pk::cuda::Tile tile;
  check_launch(pk::cuda::find_backward_tile(p.dtype, std::max(p.dim, p.value_dim),
                                            softcap > 0 || dropout_p > 0, kind, &tile));
  const int64_t row_tiles = pk::cuda::count_row_tiles(p, tile.block_m);
  check(runs >= 1, "runs must be at least 1");
  const pk::cuda::Workspace workspace{
      static_cast<int>(runs), buffer_of<void>(tiles, query, ScalarType::Byte, row_tiles * tile.tile_bytes),
      buffer_of<float>(slabs, query, ScalarType::Float, runs * row_tiles * tile.slab_floats)};
  const OnDevice here(query.get_device_index());
  check_launch(pk::cuda::attention_backward(p, gradient, workspace, target_of(query, kind, stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(perceiver_kernels, m) {
  m.def("cuda_archs() -> str");
  m.def("cuda_device(int index) -> int[]");
  m.def(
      "cuda_forward_tile(ScalarType dtype, int dim, int rows, bool has_score, int arch, int shared_limit) -> "
      "int[]");
  m.def("cuda_backward_tile(ScalarType dtype, int dim, bool has_score, int arch, int shared_limit) -> int[]");
  m.def("cuda_forward(Tensor query, Tensor key, Tensor value, " PK_OPTIONS
        "int longest_q, int longest_k, int arch, int shared_limit, int stream, "
        "Tensor(c!)? part_outs, Tensor(d!)? part_lses, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "cuda_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, " PK_OPTIONS
      "int longest_q, int longest_k, int arch, int shared_limit, int stream, int runs, "
      "Tensor(d!) tiles, Tensor(e!) slabs, Tensor(a!) dquery, Tensor(b!) dkey, Tensor(c!) dvalue) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(perceiver_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_archs", TORCH_BOX(&archs));
  m.impl("cuda_device", TORCH_BOX(&device));
  m.impl("cuda_forward_tile", TORCH_BOX(&forward_tile));
  m.impl("cuda_backward_tile", TORCH_BOX(&backward_tile));
}

STABLE_TORCH_LIBRARY_IMPL(perceiver_kernels, CUDA, m) {
  m.impl("cuda_forward", TORCH_BOX(&forward));
  m.impl("cuda_backward", TORCH_BOX(&backward));
}
