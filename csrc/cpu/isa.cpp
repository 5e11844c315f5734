#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace qk {
namespace {

struct Isa {
  const Kernels& (*kernels)();
  bool (*supported)();
};

#if defined(__x86_64__)
#if defined(QK_EMULATED)  // tests/native/emulation computes what this CPU lacks
#define QK_CPU_HAS(feature) true
#else
#define QK_CPU_HAS(feature) (__builtin_cpu_supports(feature) != 0)  // by the CPU and the OS
#endif

// Bits of CPUID for the names that clang 16 does not know. The registers of these features are those of AVX2.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool has_avxvnni() {
#if defined(QK_EMULATED)
  return true;
#else
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & bit_AVXVNNI) != 0;
#endif
}

bool has_avx2() { return QK_CPU_HAS("avx2") && QK_CPU_HAS("fma") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && QK_CPU_HAS("avx512f") && QK_CPU_HAS("avx512bw") && QK_CPU_HAS("avx512vl") &&
         QK_CPU_HAS("avx512dq");
}

bool has_avx512vnni() { return has_avx512() && QK_CPU_HAS("avx512vnni"); }

bool has_avx512bf16() { return has_avx512vnni() && QK_CPU_HAS("avx512bf16"); }

// Linux hands out the tile registers, 8 KB of state for each thread, only to processes that ask for them.
bool has_amx() {
#if defined(QK_EMULATED)
  return true;
#elif defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25, kBf16 = 1u << 22;  // CPUID leaf 7, EDX
  constexpr unsigned kNeeded = kTile | kInt8 | kBf16;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (!has_avx512bf16() || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  static const bool permitted =
      (edx & kNeeded) == kNeeded && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
// Old kernel headers lack these names, so the bits are given as numbers.
bool has_dotprod() { return (getauxval(AT_HWCAP) & (1ul << 20)) != 0; }  // HWCAP_ASIMDDP
#endif

// In ascending order of preference. An ISA file adds its line here and its table in cpu/kernels/kernels.h. avxvnni goes
// before avx512, whose vpmaddwd and vpaddd on twice the lanes do half the 8-bit products a cycle; no CPU has just these
// two.
const Isa kIsas[] = {
    {scalar_kernels, [] { return true; }},
#if defined(__x86_64__)
    {avx2_kernels, has_avx2},
    {avx512_kernels, has_avx512},
    {avxvnni_kernels, [] { return has_avx2() && has_avxvnni(); }},
    {avx512vnni_kernels, has_avx512vnni},
    {avx512bf16_kernels, has_avx512bf16},
    {amx_kernels, has_amx},
#elif defined(__aarch64__)
    {neon_dotprod_kernels, has_dotprod},
    {neon_i8mm_kernels, [] { return has_dotprod() && (getauxval(AT_HWCAP2) & (1ul << 13)) != 0; }},  // HWCAP2_I8MM
#endif
};

std::string list(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Kernels& find(const std::string& name, const char* origin) {
  for (const Isa& isa : kIsas) {
    if (name != isa.kernels().name) continue;
    if (!isa.supported()) {
      throw std::invalid_argument(std::string(origin) + ": this CPU does not support '" + name + "'; it supports " +
                                  list(supported_isas()));
    }
    return isa.kernels();
  }
  throw std::invalid_argument(std::string(origin) + ": unknown ISA '" + name + "'; this build has " +
                              list(compiled_isas()));
}

const Kernels& initial() {
  const char* forced = std::getenv("QKERNELS_ISA");
  return find(forced != nullptr && *forced != '\0' ? forced : supported_isas().back(), "QKERNELS_ISA");
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{&initial()};
  return table;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) names.push_back(isa.kernels().name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) names.push_back(isa.kernels().name);
  }
  return names;
}

std::string current_isa() { return kernels().name; }

void force_isa(const std::string& name) { current().store(&find(name, "isa"), std::memory_order_release); }

const Kernels& kernels() { return *current().load(std::memory_order_acquire); }

}  // namespace qk
