#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels.h"

namespace qk {
namespace {

struct Isa {
  const Kernels& (*kernels)();
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx512vnni() {
#if defined(QK_EMULATED_AVX512)
  return true;
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#endif
}

bool has_avx512bf16() {
#if defined(QK_EMULATED_AVX512)
  return true;
#else
  return has_avx512vnni() && __builtin_cpu_supports("avx512bf16");
#endif
}
#endif

// In ascending order of preference. An ISA file adds its line here and its table in cpu/kernels.h.
const Isa kIsas[] = {
    {scalar_kernels, [] { return true; }},
#if defined(__x86_64__)
    {avx2_kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
    {avx512vnni_kernels, has_avx512vnni},
    {avx512bf16_kernels, has_avx512bf16},
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

void force_isa(const std::string& name) { current().store(&find(name, "isa")); }

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

}  // namespace qk
