// Which instruction sets were compiled, and which one this processor gets.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef PK_HAS_AMX_SET
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace pk::cpu {

#define PK_DECLARE(isa)              \
  namespace isa {                    \
  const Kernels* kernels(DType);     \
  extern const Internals kInternals; \
  }
#ifdef PK_HAS_EMULATED_SET
PK_DECLARE(emulated)
PK_DECLARE(emulated_amx)
#endif
PK_DECLARE(baseline)
#ifdef PK_HAS_X86_SETS
PK_DECLARE(avx2)

namespace {
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace
#endif
#ifdef PK_HAS_AVX512_SETS
PK_DECLARE(avx512)
PK_DECLARE(avx512_bf16)

namespace {
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512cd");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// AMD's processors multiply pairs of bfloat16 at twice the rate of float32 numbers. An Intel one (Sapphire
// Rapids' family) has been measured: there attention takes 1.7 times as long with them as without.
bool avx512_bf16_pays() { return __builtin_cpu_is("amd"); }
}  // namespace
#endif
#ifdef PK_HAS_AMX_SET
PK_DECLARE(amx)

namespace {
// Linux saves a process's tiles only once it was asked to; from then on it refuses signal stacks that are too
// small for them. Asked once: CPUID costs microseconds in a virtual machine.
bool has_amx() {
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool usable = [] {
    unsigned a, b, c, d = 0;
    return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBFloat16) && (d & kTiles) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return usable;
}
}  // namespace
#endif

extern const InstructionSet kInstructionSets[] = {
#ifdef PK_HAS_EMULATED_SET
    {"emulated", [] { return true; }, emulated::kernels, &emulated::kInternals},
    {"emulated_amx", [] { return true; }, emulated_amx::kernels, &emulated_amx::kInternals},
#endif
    {"baseline", [] { return true; }, baseline::kernels, &baseline::kInternals},
#ifdef PK_HAS_X86_SETS
    {"avx2", has_avx2, avx2::kernels, &avx2::kInternals},
#endif
#ifdef PK_HAS_AVX512_SETS
    {"avx512", has_avx512, avx512::kernels, &avx512::kInternals},
    {"avx512_bf16", has_avx512_bf16, avx512_bf16::kernels, &avx512_bf16::kInternals, avx512_bf16_pays},
#endif
#ifdef PK_HAS_AMX_SET
    {"amx", has_amx, amx::kernels, &amx::kInternals},
#endif
    {nullptr, nullptr, nullptr, nullptr},
};

const InstructionSet& instruction_set() {
  // Read at every call: tests switch within one process, and getenv costs nothing beside a kernel.
  const char* wanted = std::getenv("PERCEIVER_KERNELS_ISA");
  const bool is_named = wanted && *wanted;
  const InstructionSet* best = nullptr;
  for (const InstructionSet* set = kInstructionSets; set->name; ++set)
    if ((is_named ? std::strcmp(wanted, set->name) == 0 : set->pays()) && set->supported()) best = set;
  if (!best) {
    std::string names;
    for (const InstructionSet* set = kInstructionSets; set->name; ++set)
      if (set->supported()) names += std::string(names.empty() ? "" : ", ") + set->name;
    throw std::invalid_argument("PERCEIVER_KERNELS_ISA is \"" + std::string(wanted) +
                                "\"; this build runs on this processor with: " + names);
  }
  return *best;
}

}  // namespace pk::cpu
