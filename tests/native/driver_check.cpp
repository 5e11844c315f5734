// Whether the driver that choose_linear names is the one that runs, for `linear`, `linear_with_saved_input` and the
// cross entropy: a copy of the kernel table counts the calls of the micro-kernels, each of which belongs to one driver.
//
//     driver_check ISA    a line "driver: its reason" for each driver that ran; exits with 1 at the first that differs
#include <cstdio>
#include <exception>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cpu/api.h"
#include "cpu/drivers/drivers.h"
#include "cpu/isa.h"

namespace {

const qk::Parallel kOneThread = {1, nullptr};

const qk::Kernels* original;
std::set<std::string> ran;

// The kernel that `Get` finds in a table, and a note that the driver ran which calls it.
template <auto Get, class... Args>
void count(void (*&kernel)(Args...), const char* driver) {
  static const char* name;
  name = driver;
  if (kernel == nullptr) return;
  kernel = [](Args... args) {
    ran.insert(name);
    Get (*original)(args...);
  };
}

#define COUNT(table, path, driver) count<[](const qk::Kernels& k) { return k.path; }>(table.path, driver)

struct CountingTable {
  qk::Kernels table = *original;
  qk::GroupDotKernels groups = table.group_dots != nullptr ? *table.group_dots : qk::GroupDotKernels{};
  qk::NibbleKernels nibbles = table.nibbles != nullptr ? *table.nibbles : qk::NibbleKernels{};
  qk::Bf16Kernels bf16 = table.bf16 != nullptr ? *table.bf16 : qk::Bf16Kernels{};

  qk::TileRegisterKernels registers =
      table.tile_registers != nullptr ? *table.tile_registers : qk::TileRegisterKernels{};

  CountingTable() {
    COUNT(table, dots.int8.dot, "row_dot");
    COUNT(table, dots.int4.dot, "row_dot");
    COUNT(table, dots.dot_int8_x4, "row_dot");
    COUNT(table, tiles.int_tile, "int_matmul");
    COUNT(table, tiles.int_tile_grouped, "int_matmul");
    COUNT(table, tiles.float_tile, "float_matmul");
    if (table.dots.dot_float != nullptr) {
      table.dots.dot_float = [](const float* x, const float* w, int64_t n) {
        ran.insert("float_dot");
        return original->dots.dot_float(x, w, n);
      };
    }
    count<[](const qk::Kernels& k) { return k.group_dots->int8.dot; }>(groups.int8.dot, "group_dot");
    count<[](const qk::Kernels& k) { return k.group_dots->int4.dot; }>(groups.int4.dot, "group_dot");
    count<[](const qk::Kernels& k) { return k.nibbles->tile; }>(nibbles.tile, "int_matmul");
    count<[](const qk::Kernels& k) { return k.nibbles->tile_grouped; }>(nibbles.tile_grouped, "int_matmul");
    count<[](const qk::Kernels& k) { return k.bf16->tile; }>(bf16.tile, "float_matmul");
    count<[](const qk::Kernels& k) { return k.tile_registers->dot_tile; }>(registers.dot_tile, "tile_dot");
    count<[](const qk::Kernels& k) { return k.tile_registers->dot_tile_grouped; }>(registers.dot_tile_grouped,
                                                                                   "tile_groups");
    if (table.tile_registers != nullptr) table.tile_registers = &registers;
    if (table.group_dots != nullptr) table.group_dots = &groups;
    if (table.nibbles != nullptr) table.nibbles = &nibbles;
    if (table.bf16 != nullptr) table.bf16 = &bf16;
  }
};

class Check {
 public:
  // Whether `run`, a product with m rows of x, was computed by the driver that is named for it.
  template <class F>
  bool operator()(const std::string& what, const qk::Scheme& scheme, int64_t m, const F& run) {
    const qk::Choice choice = qk::choose_linear(scheme, m, 64, 64, 1);
    ran.clear();
    run();
    reasons_[choice.driver] = choice.reason;
    if (ran == std::set<std::string>{choice.driver}) return true;
    std::printf("%s of %s, M = %d: %s was named, but these ran:", what.c_str(), qk::name_of(scheme).c_str(),
                static_cast<int>(m), choice.driver);
    for (const std::string& name : ran) std::printf(" %s", name.c_str());
    std::printf("\n");
    return false;
  }

  void print() const {
    for (const auto& [driver, reason] : reasons_) std::printf("%s: %s\n", driver.c_str(), reason.c_str());
  }

 private:
  std::map<std::string, std::string> reasons_;
};

bool check(const qk::Kernels& table) {
  constexpr int64_t kN = 40, kK = 200;
  Check same;
  for (const char* name : {"w8a8", "w8a8-g32", "w8a8-ag64", "w4a8", "w4a8-g128", "w4a8-g32-asym-ag32", "w4a8-asym",
                           "w8a16", "w4a16-g64-asym", "w8a8-min", "w4a8-g32-min", "w4a16-g64-min"}) {
    const qk::Scheme scheme = qk::parse_scheme(name);
    std::vector<uint8_t> stored(kN * scheme.packed_features(kK), 0x12), zeros(kN * scheme.weight_groups(kK), 7);
    std::vector<float> scales(kN * scheme.weight_groups(kK), 0.5f);
    const void* third = scheme.symmetric() ? nullptr : zeros.data();
    if (scheme.has_min()) third = scales.data();
    const qk::Weight w(scheme, kN, kK, stored.data(), scales.data(), third);
    const qk::Bias bias = {nullptr, qk::DType::float32};
    for (const int64_t m : {1, 2, 3, 4, 5, 8, 12, 13, 16, 17, 24, 25, 32, 33, 64, 65, 130}) {
      for (const qk::DType dtype : {qk::DType::float32, qk::DType::bfloat16}) {
        const std::vector<float> x(m * kK, 1.5f);
        std::vector<float> out(m * (kN + kK)), lse(m), loss(m);
        const qk::Matrix rows = {x.data(), dtype, m, kK};
        const qk::Output to = {out.data(), qk::DType::float32};
        if (!same("linear", scheme, m, [&] { qk::linear(table, {rows}, w, bias, to, kOneThread); })) return false;
        const std::vector<int64_t> target(m, 3);
        const qk::CrossEntropyArgs args = {rows, target.data(), bias, nullptr, 0.0f, 0.0, 0.0, -100};
        if (!same("linear_cross_entropy", scheme, m,
                  [&] { qk::linear_cross_entropy(table, args, w, {loss.data(), lse.data(), nullptr}, kOneThread); })) {
          return false;
        }
        if (!scheme.int_activations()) continue;
        std::vector<int8_t> q(m * kK);
        std::vector<float> x_scales(m);
        if (!same("linear_with_saved_input", scheme, m, [&] {
              qk::linear_with_saved_input(table, rows, w, bias, to, q.data(), x_scales.data(), kOneThread);
            })) {
          return false;
        }
      }
    }
  }
  same.print();
  return true;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::fprintf(stderr, "usage: driver_check ISA\n");
    return 2;
  }
  qk::force_isa(argv[1]);
  original = &qk::kernels();
  const CountingTable counting;
  return check(counting.table) ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
