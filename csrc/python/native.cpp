// Build facts, machine probes, and single steps of the C++ kernels for pytest.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/plan.h"
#include "../score.h"

namespace py = pybind11;
using pk::cpu::instruction_set;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
py::array_t<T> map(void (*function)(const T*, T*, int64_t), const Array<T>& x) {
  py::array_t<T> y(x.request().shape);
  function(x.data(), y.mutable_data(), x.size());
  return y;
}

pk::DType dtype_of(const std::string& name) {
  if (name == "float32") return pk::DType::kFloat32;
  if (name == "bfloat16") return pk::DType::kBFloat16;
  if (name == "float16") return pk::DType::kFloat16;
  if (name == "float64") return pk::DType::kFloat64;
  throw std::invalid_argument("dtype must be float32, bfloat16, float16 or float64, got \"" + name + "\"");
}

py::dict build_info() {
  std::vector<std::string> compiled;
  for (const pk::cpu::InstructionSet* set = pk::cpu::kInstructionSets; set->name; ++set)
    compiled.push_back(set->name);
  py::dict info;
  info["version"] = PK_VERSION;
  info["compiled"] = compiled;
  info["isa"] = instruction_set().name;
  return info;
}

// Runs body(thread) on all threads at once; returns the seconds until the last one is done.
template <class Body>
double timed(int threads, const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) pool.emplace_back([&, t] { body(t); });
  for (std::thread& thread : pool) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
}

double fma_peak(const std::string& dtype_name, int threads) {
  check_threads(threads);
  const pk::DType dtype = dtype_of(dtype_name);
  const auto loop = instruction_set().internals->fma_loop;
  py::gil_scoped_release release;
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    std::vector<double> operations(threads);
    const double seconds = timed(threads, [&](int t) { operations[t] = loop(dtype, 2000000); });
    double total = 0;
    for (double o : operations) total += o;
    best = std::max(best, total / seconds / 1e9);
  }
  return best;
}

double read_bandwidth(int threads, int64_t bytes) {
  check_threads(threads);
  if (bytes < 1 << 20)
    throw std::invalid_argument("bytes must be at least 1 MiB, got " + std::to_string(bytes));
  const auto loop = instruction_set().internals->read_loop;
  py::gil_scoped_release release;
  std::vector<char> data(static_cast<size_t>(bytes), 1);
  const int64_t share = bytes / threads;
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    std::vector<uint64_t> sums(threads);
    const double seconds = timed(threads, [&](int t) { sums[t] = loop(data.data() + t * share, share); });
    best = std::max(best, static_cast<double>(share) * threads / seconds / 1e9);
  }
  return best;
}

// a and b hold dtype's bit patterns: float32, or uint16 for the 16-bit types.
py::array_t<float> matmul(const std::string& dtype_name, const py::array& a, const py::array& b) {
  const pk::DType dtype = dtype_of(dtype_name);
  const py::ssize_t item = dtype == pk::DType::kFloat32 ? 4 : 2;
  if (dtype == pk::DType::kFloat64)
    throw std::invalid_argument("dtype must have at most 32 bits, got \"float64\"");
  if (a.ndim() != 2 || b.ndim() != 2 || a.shape(1) != b.shape(0) || a.itemsize() != item ||
      b.itemsize() != item || !(a.flags() & b.flags() & py::array::c_style))
    throw std::invalid_argument(
        "a and b must be contiguous matrices of dtype's width that can be multiplied");
  py::array_t<float> c({a.shape(0), b.shape(1)});
  instruction_set().internals->matmul(dtype, a.data(), b.data(), c.mutable_data(), a.shape(0), b.shape(1),
                                      a.shape(1));
  return c;
}

// The (kv_head, first row, rows, keys, keys_per_split, splits) of every block.
py::list plan(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys, int64_t dim,
              int64_t value_dim, int64_t q_offset, bool backward) {
  pk::Attention p{};
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.queries = queries;
  p.keys = keys;
  p.dim = dim;
  p.value_dim = value_dim;
  p.q_offset = q_offset;
  py::list blocks;
  for (const auto& block : (backward ? pk::cpu::plan_backward(p) : pk::cpu::plan_forward(p)).blocks)
    blocks.append(py::make_tuple(block.rows.sequence.index, block.rows.kv_head, block.rows.first_row,
                                 block.rows.rows, block.keys, block.keys_per_split, block.splits));
  return blocks;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def("build_info", build_info);
  m.def("fma_peak", fma_peak, py::arg("dtype"), py::arg("threads"), "GFLOP/s of multiply-adds on registers.");
  m.def("read_bandwidth", read_bandwidth, py::arg("threads"), py::arg("bytes") = int64_t{1} << 29,
        "GB/s of reads.");

  m.def("exp2", [](const Array<float>& x) { return map(instruction_set().internals->exp2, x); });
  m.def("exp2_double",
        [](const Array<double>& x) { return map(instruction_set().internals->exp2_double, x); });
  m.def("tanh", [](const Array<float>& x) { return map(instruction_set().internals->tanh, x); });
  m.def("tanh_double",
        [](const Array<double>& x) { return map(instruction_set().internals->tanh_double, x); });
  m.def("matmul", matmul, py::arg("dtype"), py::arg("a"), py::arg("b"));
  m.def("philox", &pk::philox, py::arg("seed"), py::arg("b"), py::arg("h"), py::arg("i"), py::arg("j"));
  m.def("dropout_threshold", &pk::dropout_threshold);
  m.def("visible_keys", &pk::visible_keys, py::arg("q_offset"), py::arg("i"), py::arg("keys"));
  m.def("plan", plan, py::arg("batch"), py::arg("heads"), py::arg("kv_heads"), py::arg("queries"),
        py::arg("keys"), py::arg("dim"), py::arg("value_dim"), py::arg("q_offset"), py::arg("backward"));
}
