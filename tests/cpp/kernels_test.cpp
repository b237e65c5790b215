// The CPU kernels against the specification in scalar doubles, without torch: what sanitizers and emulators
// can run. Every instruction set that this processor has, or the one that PERCEIVER_KERNELS_ISA names. Inputs
// that no kernel may look at are NaN.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/score.h"

namespace {

using pk::Attention;
using pk::DType;

struct Case {
  const char* name;
  int64_t batch = 2, heads = 4, kv_heads = 4, queries = 33, keys = 101, dim = 24, value_dim = 24;
  int64_t shift = 0;  // of q_offset, from keys - queries
  bool is_causal = true, offset_per_example = false, masked = false, transposed = false, dlse = true;
  double scale = 0.25, softcap = 0, dropout_p = 0;
  std::vector<std::pair<int64_t, int64_t>> lengths = {};  // the packed form: queries, keys of each sequence
};

const Case kCases[] = {
    {.name = "ragged"},
    {.name = "no_dlse", .kv_heads = 2, .dlse = false},
    {.name = "row_blocks", .batch = 1, .heads = 8, .kv_heads = 1, .queries = 150, .keys = 40, .dim = 8},
    {.name = "split", .batch = 1, .heads = 1, .kv_heads = 1, .queries = 20, .keys = 3001},
    {.name = "panels", .heads = 2, .kv_heads = 1, .queries = 70, .keys = 300, .dim = 40, .value_dim = 72},
    {.name = "decode", .queries = 1, .keys = 2100, .dim = 64, .value_dim = 64},
    {.name = "decode_grouped", .heads = 12, .kv_heads = 2, .queries = 1, .keys = 333, .masked = true},
    {.name = "decode_8_rows", .heads = 8, .kv_heads = 1, .queries = 1, .keys = 130, .dim = 80, .softcap = 2},
    {.name = "decode_5_rows", .queries = 5, .keys = 66, .dim = 1, .value_dim = 7, .transposed = true},
    {.name = "decode_rows", .queries = 3, .keys = 70, .dim = 33, .value_dim = 17, .transposed = true},
    {.name = "square", .queries = 65, .keys = 65},
    {.name = "more_queries_than_keys", .queries = 70, .keys = 13},
    {.name = "one_key", .queries = 6, .keys = 1, .dim = 1, .value_dim = 1},
    {.name = "no_keys", .queries = 6, .keys = 0},
    {.name = "no_queries", .queries = 0},
    {.name = "odd_dims", .dim = 7, .value_dim = 19, .transposed = true},
    {.name = "wide", .batch = 1, .heads = 2, .kv_heads = 2, .dim = 136, .value_dim = 200},
    {.name = "not_causal", .is_causal = false},
    {.name = "masked", .masked = true},
    {.name = "dead_rows", .shift = -90},
    {.name = "all_dead", .shift = -500},
    {.name = "past_the_end", .shift = 1000},
    {.name = "per_example", .batch = 3, .offset_per_example = true, .masked = true},
    {.name = "negative_scale", .scale = -0.3},
    {.name = "softcap", .softcap = 1.5},
    {.name = "dropout", .heads = 6, .kv_heads = 2, .dropout_p = 0.4},
    {.name = "dropout_decode", .queries = 2, .keys = 130, .dropout_p = 0.4},
    {.name = "packed",
     .heads = 6,
     .kv_heads = 3,
     .masked = true,
     .transposed = true,
     .softcap = 2,
     .dropout_p = 0.2,
     .lengths = {{5, 40}, {0, 7}, {33, 33}, {4, 0}, {17, 3}, {1, 90}}},
    {.name = "packed_decode", .kv_heads = 1, .lengths = {{1, 40}, {1, 33}, {0, 6}, {1, 0}, {1, 1}}},
};

struct Limit {
  DType dtype;
  const char* name;
  int bytes;
  double error;  // relative, in the Euclidean norm
};
constexpr Limit kLimits[] = {
    {DType::kFloat32, "float32", 4, 2e-6},
    {DType::kBFloat16, "bfloat16", 2, 1e-2},
    {DType::kFloat16, "float16", 2, 1.5e-3},
    {DType::kFloat64, "float64", 8, 3e-14},
};
constexpr double kLseError = 5e-6;  // of half precision

// Inputs are multiples of 1/64 below 4: exact in every dtype.
void write(char* to, DType dtype, double value) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  if (dtype == DType::kFloat64) std::memcpy(to, &value, 8);
  if (dtype == DType::kFloat32) std::memcpy(to, &single, 4);
  if (dtype == DType::kFloat16 && value != 0)
    bits = (bits >> 16 & 0x8000) << 16 | ((bits & 0x7fffffff) - 0x38000000) << 3;
  const uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::kBFloat16 || dtype == DType::kFloat16) std::memcpy(to, &half, 2);
}

double read(const char* from, DType dtype) {
  if (dtype == DType::kFloat64) {
    double value;
    std::memcpy(&value, from, 8);
    return value;
  }
  uint32_t bits = 0;
  std::memcpy(&bits, from, dtype == DType::kFloat32 ? 4 : 2);
  if (dtype == DType::kFloat16) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return std::numeric_limits<double>::quiet_NaN();  // no result here is infinite
    const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return bits >> 15 ? -size : size;
  }
  if (dtype == DType::kBFloat16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A (batch, head, row, channel) tensor without a byte to spare, beside its values in doubles. If transposed,
// (batch, row, head, channel) in memory, with a gap behind each row of channels.
struct Tensor {
  DType dtype;
  int64_t bytes, channels, pitch, size;
  std::unique_ptr<char[]> data;
  pk::View view;
  std::vector<double> values;

  Tensor(DType type, int64_t element, int64_t batch, int64_t heads, int64_t rows, int64_t row_channels,
         bool transposed)
      : dtype(type), bytes(element), channels(row_channels), pitch(channels + (transposed ? 3 : 0)) {
    const int64_t all = batch * heads * rows;
    size = all ? (all - 1) * pitch + channels : 0;
    data.reset(new char[size * bytes]);
    std::memset(data.get(), 0xff, size * bytes);  // NaN in every dtype
    view = {data.get(), batch > 1 ? heads * rows * pitch : 0, transposed ? pitch : rows * pitch,
            transposed ? heads * pitch : pitch};
    values.resize(size);
  }
  void fill(std::mt19937& random) {
    for (int64_t i = 0; i < size; ++i) {
      if (in_gap(i)) continue;
      values[i] = (static_cast<int>(random() % 255) - 127) / 64.0;
      write(data.get() + i * bytes, dtype, values[i]);
    }
  }
  int64_t at(int64_t b, int64_t h, int64_t row) const {
    return b * view.batch_stride + h * view.head_stride + row * view.row_stride;
  }
  bool in_gap(int64_t i) const { return i % pitch >= channels; }
  void hide(int64_t b, int64_t h, int64_t row) {
    std::memset(data.get() + at(b, h, row) * bytes, 0xff, channels * bytes);
  }
};

struct Problem {
  Attention p{};
  pk::AttentionGradient gradient{};
  std::vector<Tensor> t;  // query, key, value, dout, dlse, out, lse, dquery, dkey, dvalue
  std::vector<int64_t> offsets, ends_q, ends_k;
  std::unique_ptr<bool[]> mask;
  int64_t sequences;

  Problem(const Case& c, const Limit& limit) {
    const bool packed = !c.lengths.empty();
    int64_t batch = c.batch, queries = c.queries, keys = c.keys;
    sequences = packed ? static_cast<int64_t>(c.lengths.size()) : batch;
    std::mt19937 random(7);
    if (packed) {
      batch = 1;
      queries = keys = 0;
      ends_q = ends_k = {0};
      for (const auto& [m, n] : c.lengths) {
        ends_q.push_back(queries += m);
        ends_k.push_back(keys += n);
        offsets.push_back(n - m + c.shift);
      }
    } else if (c.offset_per_example) {
      for (int64_t b = 0; b < batch; ++b) offsets.push_back(keys - queries + 50 * b - 100);
    }
    const auto add = [&](int64_t heads, int64_t rows, int64_t channels, bool narrow) -> Tensor& {
      const bool statistic = !narrow;
      const DType type = statistic && limit.dtype != DType::kFloat64 ? DType::kFloat32 : limit.dtype;
      const int64_t element = type == limit.dtype ? limit.bytes : 4;
      return t.emplace_back(type, element, batch, heads, rows, channels, c.transposed);
    };
    add(c.heads, queries, c.dim, true).fill(random);
    add(c.kv_heads, keys, c.dim, true).fill(random);
    add(c.kv_heads, keys, c.value_dim, true).fill(random);
    add(c.heads, queries, c.value_dim, true).fill(random);
    add(c.heads, queries, 1, false).fill(random);
    add(c.heads, queries, c.value_dim, true);
    add(c.heads, queries, 1, false);
    add(c.heads, queries, c.dim, true);
    add(c.kv_heads, keys, c.dim, true);
    add(c.kv_heads, keys, c.value_dim, true);

    p.dtype = limit.dtype;
    p.batch = sequences;
    p.heads = c.heads;
    p.kv_heads = c.kv_heads;
    p.queries = queries;
    p.keys = keys;
    p.dim = c.dim;
    p.value_dim = c.value_dim;
    p.query = t[0].view;
    p.key = t[1].view;
    p.value = t[2].view;
    p.out = t[5].view;
    p.lse = t[6].view;
    gradient = {t[3].view, t[4].view, t[7].view, t[8].view, t[9].view};
    if (!c.dlse) gradient.dlse.data = nullptr;
    p.q_offset = c.is_causal ? keys - queries + c.shift : pk::kNoCausality;
    p.q_offsets = offsets.empty() ? nullptr : offsets.data();
    if (packed) {
      p.cu_seqlens_q = ends_q.data();
      p.cu_seqlens_k = ends_k.data();
    }
    if (c.masked) {  // every second byte, the last example sees nothing
      mask.reset(new bool[batch * keys * 2]);
      for (int64_t i = 0; i < batch * keys * 2; ++i)
        mask[i] = i % 2 == 0 && random() % 3 != 0 && (packed || i < (batch - 1) * keys * 2);
      p.key_mask = mask.get();
      p.key_mask_stride = 2;
      p.key_mask_batch_stride = packed ? 0 : keys * 2;
    }
    p.scale = c.scale;
    p.softcap = c.softcap;
    p.dropout_p = c.dropout_p;
    p.dropout_seed = 0x123456789abcdef;
    p.dropout_first_key = 0xfffffff0;  // the counter wraps
  }

  // The specification, into `values` of the outputs; hides the inputs that it had no use for.
  void solve() {
    const auto& [query, key, value, dout, dlse, out, lse, dquery, dkey, dvalue] =
        std::tie(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9]);
    for (int64_t b = 0; b < sequences; ++b) {
      const bool packed = p.cu_seqlens_q;
      const int64_t q0 = packed ? ends_q[b] : 0, k0 = packed ? ends_k[b] : 0, entry = packed ? 0 : b;
      const int64_t queries = packed ? ends_q[b + 1] - q0 : p.queries;
      const int64_t keys = packed ? ends_k[b + 1] - k0 : p.keys;
      const int64_t offset = p.q_offsets ? p.q_offsets[b] : p.q_offset;
      std::vector<bool> used(keys);
      for (int64_t h = 0; h < p.heads; ++h)
        for (int64_t i = 0; i < queries; ++i) {
          const int64_t kv = h / (p.heads / p.kv_heads);
          const double* q = &query.values[query.at(entry, h, q0 + i)];
          const int64_t at_o = out.at(entry, h, q0 + i), at_l = lse.at(entry, h, q0 + i);
          const double* g = &dout.values[at_o];
          double *o = &out.values[at_o], *dq = &dquery.values[query.at(entry, h, q0 + i)];
          std::vector<int64_t> seen;
          std::vector<double> y, probability, factor;
          double top = -INFINITY, sum = 0;
          for (int64_t j = 0; j < keys && j <= offset + i; ++j) {
            if (p.key_mask && !p.key_mask[entry * p.key_mask_batch_stride + (k0 + j) * p.key_mask_stride])
              continue;
            const double* k = &key.values[key.at(entry, kv, k0 + j)];
            double x = 0;
            for (int64_t c = 0; c < p.dim; ++c) x += q[c] * k[c];
            x *= p.scale;
            seen.push_back(j);
            used[j] = true;
            y.push_back(p.softcap ? p.softcap * std::tanh(x / p.softcap) : x);
            top = std::fmax(top, y.back());
            const uint32_t bits = pk::philox(p.dropout_seed, b, h, i, p.dropout_first_key + j);
            const bool kept = !p.dropout_p || bits >= pk::dropout_threshold(p.dropout_p);
            factor.push_back(kept ? 1 / (1 - p.dropout_p) : 0);
          }
          for (double logit : y) sum += std::exp(logit - top);
          lse.values[at_l] = seen.empty() ? -INFINITY : top + std::log(sum);
          if (seen.empty())
            for (Tensor* rows : {&query, &dout, &dlse}) rows->hide(entry, h, q0 + i);
          double delta = gradient.dlse.data ? -dlse.values[at_l] : 0;
          for (size_t x = 0; x < seen.size(); ++x) {
            probability.push_back(std::exp(y[x] - lse.values[at_l]));
            const double* v = &value.values[value.at(entry, kv, k0 + seen[x])];
            for (int64_t c = 0; c < p.value_dim; ++c) {
              o[c] += probability[x] * factor[x] * v[c];
              delta += probability[x] * factor[x] * v[c] * g[c];
            }
          }
          for (size_t x = 0; x < seen.size(); ++x) {
            const int64_t at_k = key.at(entry, kv, k0 + seen[x]), at_v = value.at(entry, kv, k0 + seen[x]);
            double dp = 0;
            for (int64_t c = 0; c < p.value_dim; ++c) {
              dp += g[c] * value.values[at_v + c] * factor[x];
              dvalue.values[at_v + c] += probability[x] * factor[x] * g[c];
            }
            double ds = probability[x] * (dp - delta) * p.scale;
            if (p.softcap) ds *= pk::softcap_grad(y[x], 1 / p.softcap);
            for (int64_t c = 0; c < p.dim; ++c) {
              dq[c] += ds * key.values[at_k + c];
              dkey.values[at_k + c] += ds * q[c];
            }
          }
        }
      for (int64_t j = 0; j < keys; ++j)
        for (int64_t h = 0; h < p.kv_heads && !used[j]; ++h)
          for (Tensor* rows : {&key, &value}) rows->hide(entry, h, k0 + j);
    }
  }

  std::vector<std::string> run(int threads) {
    const auto spawn = [](int count, void* context, void (*body)(void*, int)) {
      std::vector<std::thread> pool;
      for (int thread = 0; thread < count; ++thread) pool.emplace_back(body, context, thread);
      for (std::thread& thread : pool) thread.join();
    };
    std::vector<std::string> bits;
    for (size_t x = 5; x < t.size(); ++x) std::memset(t[x].data.get(), 0xff, t[x].size * t[x].bytes);
    pk::cpu::attention_forward(p, {threads, spawn});
    pk::cpu::attention_backward(p, gradient, {threads, spawn});
    for (size_t x = 5; x < t.size(); ++x) bits.emplace_back(t[x].data.get(), t[x].size * t[x].bytes);
    return bits;
  }
};

// Relative error of what a kernel wrote, infinite if it wrote into a gap; infinite values must agree, and
// zeros where all should be zero.
double error_of(const Tensor& t) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < t.size; ++i) {
    const double got = read(t.data.get() + i * t.bytes, t.dtype), want = t.values[i];
    if (t.in_gap(i) && !std::isnan(got)) return INFINITY;
    if (t.in_gap(i) || got == want) continue;
    difference += (got - want) * (got - want);
  }
  for (double want : t.values) norm += std::isfinite(want) ? want * want : 0;
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

int check(const char* isa, const Case& c, const Limit& limit, int* checks, double* worst) {
  constexpr const char* kNames[] = {"out", "lse", "dquery", "dkey", "dvalue"};
  Problem problem(c, limit);
  problem.solve();
  const std::vector<std::string> alone = problem.run(1);
  int failures = 0;
  for (int x = 0; x < 5; ++x, ++*checks) {
    const bool rounded = problem.t[5 + x].dtype == limit.dtype;  // lse is float32 at least
    const double error = error_of(problem.t[5 + x]), allowed = rounded ? limit.error : kLseError;
    *worst = std::fmax(*worst, error / allowed);
    if (error <= allowed) continue;
    std::printf("%s %s %s: %s is off by %.2e, at most %.2e is allowed\n", isa, limit.name, c.name, kNames[x],
                error, allowed);
    ++failures;
  }
  if (problem.run(3) != alone) {
    std::printf("%s %s %s: three threads give other bits than one\n", isa, limit.name, c.name);
    ++failures;
  }
  return failures;
}

// Rows of a rotation there and back, in buffers that end where the numbers do.
int check_rotation(const pk::cpu::InstructionSet& set, const Limit& limit, int* checks) {
  const DType angle_dtype = limit.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int angle_bytes = limit.dtype == DType::kFloat64 ? 8 : 4;
  int failures = 0;
  for (int64_t pairs : {1, 5, 16, 19, 32})
    for (int64_t others : {0, 3})
      for (int way = 0; way < 4; ++way, ++*checks) {
        constexpr int64_t kBatch = 2, kLength = 3, kHeads = 2, kRows = kBatch * kLength;
        const int64_t channels = 2 * pairs + others, numbers = kRows * kHeads * channels;
        std::vector<char> x(numbers * limit.bytes), out(numbers * limit.bytes, '\xff');
        std::vector<char> cos(kRows * pairs * angle_bytes), sin(cos.size());
        pk::cpu::Rotation r{};
        r.length = kLength, r.heads = kHeads, r.channels = channels, r.pairs = pairs;
        r.x = {x.data(), kLength * kHeads * channels, channels, kHeads * channels};
        r.out = out.data(), r.cos = cos.data(), r.sin = sin.data();
        r.angles_batch_stride = kLength * pairs;
        r.interleaved = way & 1, r.inverse = way & 2;
        std::mt19937 draw(static_cast<unsigned>(way));
        const auto number = [&] { return static_cast<int>(draw() % 255) / 64.0 - 2; };
        for (int64_t i = 0; i < numbers; ++i) write(x.data() + i * limit.bytes, limit.dtype, number());
        for (int64_t i = 0; i < kRows * pairs; ++i) {
          write(cos.data() + i * angle_bytes, angle_dtype, number());
          write(sin.data() + i * angle_bytes, angle_dtype, number());
        }
        set.kernels(limit.dtype)->rotate(r, 0, kRows);

        double difference = 0, norm = 0;
        for (int64_t i = 0; i < numbers; ++i) {
          const int64_t channel = i % channels, row = i / channels / kHeads;
          const int64_t pair = r.interleaved ? channel / 2 : channel % pairs;
          const bool turned = channel < 2 * pairs, second = r.interleaved ? channel % 2 : channel >= pairs;
          const int64_t other = i + (second ? -1 : 1) * (r.interleaved ? 1 : pairs);
          double want = read(x.data() + i * limit.bytes, limit.dtype);
          if (turned) {
            const int64_t angle = (row * pairs + pair) * angle_bytes;
            const double sign = second == r.inverse ? -1 : 1;
            want = want * read(cos.data() + angle, angle_dtype) +
                   sign * read(x.data() + other * limit.bytes, limit.dtype) *
                       read(sin.data() + angle, angle_dtype);
          }
          const double got = read(out.data() + i * limit.bytes, limit.dtype);
          difference += (got - want) * (got - want);
          norm += want * want;
        }
        if (std::sqrt(difference / norm) <= limit.error) continue;
        std::printf("%s %s rotation: %d pairs, %d others, way %d: off by %.2e\n", set.name, limit.name,
                    static_cast<int>(pairs), static_cast<int>(others), way, std::sqrt(difference / norm));
        ++failures;
      }
  return failures;
}

}  // namespace

int main() {
  const char* named = std::getenv("PERCEIVER_KERNELS_ISA");
  const std::string wanted = named ? named : "";
  int failures = 0, sets = 0;
  for (const pk::cpu::InstructionSet* set = pk::cpu::kInstructionSets; set->name; ++set) {
    if (!set->supported() || (!wanted.empty() && wanted != set->name)) continue;
    setenv("PERCEIVER_KERNELS_ISA", set->name, 1);
    ++sets;
    int checks = 0;
    double worst = 0;
    for (const Limit& limit : kLimits) {
      for (const Case& c : kCases) failures += check(set->name, c, limit, &checks, &worst);
      failures += check_rotation(*set, limit, &checks);
    }
    std::printf("%s: %d checks, errors up to %.2f of what is allowed\n", set->name, checks, worst);
  }
  if (sets == 0) std::printf("no instruction set named \"%s\" can run here\n", wanted.c_str());
  std::printf(failures || !sets ? "FAILED\n" : "passed\n");
  return failures || !sets;
}
