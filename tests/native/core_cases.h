// What core_check computes with: random operands in guarded memory, and the comparison with the scalar kernels.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/api.h"
#include "cpu/isa.h"
#include "guarded.h"

namespace {

using qk::DType;

// splitmix64.
class Random {
 public:
  explicit Random(std::string_view seed) {
    for (const char c : seed) state_ = state_ * 31 + static_cast<unsigned char>(c);
  }

  // Uniform in [low, high].
  int integer(int low, int high) {
    state_ += 0x9e3779b97f4a7c15;
    uint64_t z = (state_ ^ state_ >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return low + static_cast<int>((z ^ z >> 31) % static_cast<uint64_t>(high - low + 1));
  }

  // In (-1, 1), with as many bits as `dtype` has: no conversion to it rounds.
  float unit(DType dtype) {
    const int bits = dtype == DType::float32 ? 24 : dtype == DType::float16 ? 11 : 8;
    return std::ldexp(static_cast<float>(integer(1 - (1 << bits), (1 << bits) - 1)), -bits);
  }

 private:
  uint64_t state_ = 0;
};

uint16_t half_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7e00;
  if (magnitude == 0x7f800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::fabs(x) * 0x1p24f));
  return static_cast<uint16_t>(sign | (magnitude - (112 << 23)) >> 13);
}

// A matrix in `dtype`, and its values.
struct Input {
  int64_t rows, cols;
  DType dtype;
  Guarded<char> data;
  std::vector<float> values;

  Input(int64_t rows, int64_t cols, DType dtype, Random& random, bool special)
      : rows(rows), cols(cols), dtype(dtype), data(rows * cols * qk::size_of(dtype)), values(rows * cols) {
    for (int64_t r = 0; r < rows; ++r) {
      float* row = &values[r * cols];
      const int exponent = dtype == DType::float16 ? 3 : random.integer(-20, 20);
      for (int64_t c = 0; c < cols; ++c) row[c] = std::ldexp(random.unit(dtype), exponent);
      if (special && r % 3 == 2) {
        constexpr float kSpecial[] = {NAN, 0.0f, INFINITY, 0x1p-24f, -INFINITY, -0.0f};
        row[random.integer(0, static_cast<int>(cols) - 1)] = kSpecial[r / 3 % 6];
      }
      if (special && r % 8 == 4) {  // a row of subnormals of float16, or one below the smallest scale
        for (int64_t c = 0; c < cols; ++c)
          row[c] = random.integer(-9, 9) * (dtype == DType::float16 ? 0x1p-24f : 0x1p-101f);
      }
    }
    for (int64_t i = 0; i < rows * cols; ++i) set(i, values[i]);
  }

  void set(int64_t i, float x) {
    values[i] = x;
    const uint16_t half = half_of(x);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const auto brain = static_cast<uint16_t>(bits >> 16);
    const void* source = dtype == DType::float32   ? static_cast<const void*>(&x)
                         : dtype == DType::float16 ? &half
                                                   : &brain;
    std::memcpy(data.get() + i * qk::size_of(dtype), source, qk::size_of(dtype));
  }

  qk::Matrix matrix() const { return {data.get(), dtype, rows, cols}; }
};

struct StoredWeight {
  qk::Scheme scheme;
  int64_t n, k;
  Guarded<uint8_t> qweight;
  Guarded<float> scales;
  Guarded<uint8_t> zeros;
  Guarded<float> minima;

  StoredWeight(const qk::Scheme& scheme, int64_t n, int64_t k, Random& random)
      : scheme(scheme),
        n(n),
        k(k),
        qweight(n * scheme.packed_features(k)),
        scales(n * scheme.weight_groups(k)),
        zeros(n * scheme.weight_groups(k)),
        minima(n * scheme.weight_groups(k)) {
    for (int64_t i = 0; i < n * scheme.packed_features(k); ++i) {
      qweight[i] = static_cast<uint8_t>(scheme.weight->in_place() ? random.integer(-128, 127) : random.integer(0, 255));
    }
    for (int64_t i = 0; i < n * scheme.weight_groups(k); ++i) {
      scales[i] = random.unit(DType::float32) * 0x1p-5f;
      zeros[i] = static_cast<uint8_t>(random.integer(0, 15));
      minima[i] = random.unit(DType::float32) * 0x1p-3f;
    }
  }

  qk::Weight weight() const { return {scheme, n, k, qweight.get(), scales.get(), third()}; }

  const void* third() const {
    if (scheme.has_min()) return minima.get();
    return scheme.symmetric() ? nullptr : zeros.get();
  }
};

// What an operator wrote. NaN has many encodings, of which none is promised: one stands for all.
class Output {
 public:
  Output(int64_t count, DType dtype) : count_(count), size_(qk::size_of(dtype)), dtype_(dtype), data_(count * size_) {}

  void* data() { return data_.get(); }
  float value(int64_t i) const { return reinterpret_cast<const float*>(data_.get())[i]; }

  uint32_t bits(int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, data_.get() + i * size_, size_);
    const uint32_t inf = dtype_ == DType::float32 ? 0x7f800000 : dtype_ == DType::bfloat16 ? 0x7f80 : 0x7c00;
    const uint32_t sign = dtype_ == DType::float32 ? 0x80000000 : 0x8000;
    return (bits & ~sign) > inf ? inf + 1 : bits;
  }

  // FNV-1a.
  uint64_t checksum() const {
    uint64_t hash = 0xcbf29ce484222325;
    for (int64_t i = 0; i < count_; ++i) {
      for (size_t byte = 0; byte < size_; ++byte) hash = (hash ^ (bits(i) >> 8 * byte & 255)) * 0x100000001b3;
    }
    return hash;
  }

 private:
  int64_t count_;
  size_t size_;
  DType dtype_;
  Guarded<char> data_;
};

// vdpbf16ps as the Intel manual defines it adds exact products in the order of the scalar kernels. Hardware may add
// them in another one.
#if defined(QK_EMULATED)
constexpr bool kBf16IsExact = true;
#else
constexpr bool kBf16IsExact = false;
#endif

class Checker {
 public:
  explicit Checker(std::string isa) : isa_(std::move(isa)) {}

  // compute(output) writes `count` elements that do not depend on the ISA.
  template <class F>
  void exact(const std::string& label, int64_t count, DType dtype, const F& compute) {
    Output actual(count, dtype), expected(count, dtype);
    run(compute, actual, expected);
    int64_t differing = 0;
    for (int64_t i = 0; i < count; ++i) differing += actual.bits(i) != expected.bits(i);
    std::printf("%s = %016llx\n", label.c_str(), static_cast<unsigned long long>(actual.checksum()));
    if (differing != 0) {
      fail(std::to_string(differing) + " of " + std::to_string(count) + " differ from the scalar kernels");
    }
  }

  // compute(output) writes floats, of which any ISA's have an error of up to bounds[i]. `bf16`: they are products of
  // the kernels for bfloat16, if the ISA has them.
  template <class F>
  void within(const std::string& label, const std::vector<double>& bounds, bool bf16, const F& compute) {
    const auto count = static_cast<int64_t>(bounds.size());
    Output actual(count, DType::float32), expected(count, DType::float32);
    run(compute, actual, expected);
    double worst = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      const double error = std::fabs(static_cast<double>(actual.value(i)) - expected.value(i));
      worst = std::isfinite(error) ? std::fmax(worst, error / (2 * bounds[i])) : INFINITY;
    }
    std::printf("%s: %.3f of the bound\n", label.c_str(), worst);
    if (bf16 && kBf16IsExact && isa_ == "avx512bf16" && worst != 0.0) fail("differs from the scalar kernels");
    if (worst > 1.0) fail("further from the scalar kernels than rounding explains");
  }

  bool failed() const { return failed_; }

 private:
  template <class F>
  void run(const F& compute, Output& actual, Output& expected) {
    qk::force_isa("scalar");
    compute(expected.data());
    qk::force_isa(isa_);
    compute(actual.data());
  }

  void fail(const std::string& why) {
    std::printf("  FAILED: %s\n", why.c_str());
    failed_ = true;
  }

  std::string isa_;
  bool failed_ = false;
};

// A bound of the error of float sums x . w of `terms` products in any order: the sum of magnitudes, which is at most
// |x| * |w|, times gamma (Higham, Accuracy and Stability, 3.1). Four more roundings: of the weight, of its scale, of
// the sum over groups and of the bias. Where x is bfloat16, sums may be rounded to either neighbour, and the gradient
// may round the weight to bfloat16 (docs/numerics.md).
double float_bound(DType x, bool gradient, int64_t terms, double magnitude) {
  const bool bf16 = x == DType::bfloat16;
  const double roundings = static_cast<double>(terms + 4) * (bf16 ? 0x1p-23 : 0x1p-24);
  const double relative = roundings / (1 - roundings), weight = bf16 && gradient ? 0x1p-8 : 0.0;
  return ((1 + relative) * (1 + weight) - 1) * magnitude + static_cast<double>(terms + 4) * 0x1p-149;
}

// Euclidean norms of the rows or columns of a [rows, cols] matrix.
std::vector<double> norms(const std::vector<float>& values, int64_t rows, int64_t cols, bool of_rows) {
  std::vector<double> squares(of_rows ? rows : cols);
  for (int64_t i = 0; i < rows * cols; ++i) squares[of_rows ? i / cols : i % cols] += double{values[i]} * values[i];
  for (double& square : squares) square = std::sqrt(square);
  return squares;
}

struct Shape {
  int64_t m, n, k;
  DType x, out;
};

const char* name_of(DType dtype) {
  return dtype == DType::float32 ? "float32" : dtype == DType::bfloat16 ? "bfloat16" : "float16";
}

// Around the edges of tiles, groups, vectors and blocks of all ISAs; few rows are computed by other kernels than many.
constexpr Shape kShapes[] = {
    {1, 1, 1, DType::float32, DType::float32},      {4, 33, 130, DType::bfloat16, DType::bfloat16},
    {7, 31, 33, DType::float16, DType::float16},    {13, 70, 161, DType::float32, DType::float32},
    {3, 9, 600, DType::float32, DType::float16},    {25, 17, 515, DType::bfloat16, DType::float32},
    {26, 35, 160, DType::float16, DType::bfloat16}, {9, 13, 1, DType::float32, DType::bfloat16},
    {5, 1, 37, DType::bfloat16, DType::float16},    {14, 531, 70, DType::bfloat16, DType::bfloat16},
    {390, 3, 35, DType::bfloat16, DType::bfloat16}, {45, 70, 161, DType::float32, DType::float32},
};

}  // namespace
