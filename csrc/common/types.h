// Plain data shared by the core and its two bindings: dtypes, schemes, views of matrices and quantized weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#define QK_API __attribute__((visibility("default")))

namespace qk {

enum class DType { float32, bfloat16, float16 };

constexpr size_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// |qx| <= 127 and -128 <= qw <= 127, so |sum qx * qw| <= 131072 * 127 * 128 = 2^31 - 2^24. Sums of shifted operands
// may wrap on the way (NOTE [shift] in cpu/kernels/kernels.h).
constexpr int64_t kMaxReduction = 131072;

// The integers of a weight in memory, the twin of qkernels/formats/weight_format.py. A stored value is the integer that
// is multiplied plus `offset`, or plus the zero point of its group; of a weight with minima it is that integer itself.
//
// A format is added here, in scheme.cpp (its name), by kernels that read its rows (integer_row in cpu/drivers/rows.cpp)
// and, to be fast for few rows of x, by dots (RowDotKernels, GroupDotKernels in cpu/kernels/kernels.h).
struct WeightFormat {
  int bits;             // of a stored value; the first of a byte lies in its low bits
  int least, greatest;  // that rounding gives a weight without zero points; a stored byte may also be -128
  int offset;
  int least_code, greatest_code;  // of what a weight with minima is rounded to
  bool has_zeros;                 // groups may have zero points
  int64_t least_group;            // the smallest size of a group

  int per_byte() const { return 8 / bits; }
  bool in_place() const { return bits == 8 && offset == 0; }  // the bytes of a row are its integers
};

inline constexpr WeightFormat kInt8Weight = {8, -127, 127, 0, -127, 127, false, 16};
inline constexpr WeightFormat kInt4Weight = {4, -8, 7, 8, 0, 15, true, 32};

// What the third tensor of a weight holds for each group: a zero point is subtracted from the stored integer, a minimum
// is added to the product of integer and scale.
enum class Zeros { none, points, minima };

// The twin of qkernels/formats/scheme.py: a group size of 0 means one group per row.
struct Scheme {
  const WeightFormat* weight;
  int act_bits;
  int64_t group_size;
  int64_t act_group_size;
  Zeros zeros = Zeros::none;
  bool static_activations = false;  // one calibrated scale for all activations (a8s)

  bool int_activations() const { return act_bits == 8; }
  bool symmetric() const { return zeros == Zeros::none; }
  bool has_min() const { return zeros == Zeros::minima; }
  // One scale a row is all that makes numbers of the integers, so that gradients can fold it.
  bool row_scaled() const { return group_size == 0 && !has_min(); }
  // The stored value of the integer 0, where groups have no zero points of their own.
  int stored_zero() const { return has_min() ? 0 : weight->offset; }
  // Bytes of `groups` elements of the third tensor.
  int64_t zeros_bytes(int64_t groups) const { return groups * static_cast<int64_t>(has_min() ? sizeof(float) : 1); }
  bool grouped() const { return group_size != 0 || act_group_size != 0; }
  int64_t weight_group(int64_t k) const { return group_size != 0 ? group_size : k; }
  int64_t act_group(int64_t k) const { return act_group_size != 0 ? act_group_size : k; }
  // Elements summed in integers before a scale is applied: the finer of the two groupings.
  int64_t acc_group(int64_t k) const {
    if (group_size == 0 || act_group_size == 0) return grouped() ? group_size + act_group_size : k;
    return group_size < act_group_size ? group_size : act_group_size;
  }
  int64_t weight_groups(int64_t k) const { return div_up(k, weight_group(k)); }
  int64_t act_groups(int64_t k) const { return div_up(k, act_group(k)); }
  int64_t packed_features(int64_t k) const { return div_up(k, weight->per_byte()); }
};

// Reads a canonical scheme name. Throws std::invalid_argument for anything else.
QK_API Scheme parse_scheme(std::string_view name);

// The scheme of an operator's argument: `QuantScheme.code` of qkernels/formats/scheme.py. Throws std::invalid_argument
// for a number that is no code.
QK_API Scheme scheme_of(int64_t code);

// The canonical name.
QK_API std::string name_of(const Scheme& scheme);

// A row-major float matrix with contiguous rows.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows, cols;

  const void* at(int64_t r, int64_t c) const {
    return static_cast<const char*>(data) + (r * cols + c) * size_of(dtype);
  }
  const void* row(int64_t r) const { return at(r, 0); }
};

struct Bias {
  const void* data;  // [n], or null: no bias
  DType dtype;
};

// A row-major int8 matrix with contiguous rows and a scale for each row.
struct QuantizedRows {
  const int8_t* data;
  const float* scales;
  int64_t rows, cols;
};

// Where stochastic rounding takes its bits from (common/philox.h): streams of one seed are independent. The rows to be
// rounded may be some of a larger matrix, whose row first_row is their first.
struct Random {
  uint64_t seed;
  uint32_t rng_stream;
  int64_t first_row = 0;
};

// The canonical storage of a weight [n, k] (docs/formats.md).
struct Weight {
  // zeros: what scheme.zeros says, or null.
  Weight(const Scheme& scheme, int64_t n, int64_t k, const void* qweight, const float* scales, const void* zeros)
      : scheme(scheme),
        n(n),
        k(k),
        group(scheme.weight_group(k)),
        groups(scheme.weight_groups(k)),
        row_bytes(scheme.packed_features(k)),
        qweight(static_cast<const uint8_t*>(qweight)),
        scales(scales),
        zeros(scheme.has_min() ? nullptr : static_cast<const uint8_t*>(zeros)),
        minima(scheme.has_min() ? static_cast<const float*>(zeros) : nullptr) {}

  const uint8_t* row(int64_t i) const { return qweight + i * row_bytes; }

  // Rows [begin, begin + count) as a weight.
  Weight rows(int64_t begin, int64_t count) const {
    Weight part = *this;
    part.n = count;
    part.qweight = row(begin);
    part.scales += begin * groups;
    if (zeros != nullptr) part.zeros += begin * groups;
    if (minima != nullptr) part.minima += begin * groups;
    return part;
  }

  Scheme scheme;
  int64_t n, k;
  int64_t group, groups;  // along k
  int64_t row_bytes;
  const uint8_t* qweight;          // int8 [n, k], or nibbles [n, ceil(k / 2)] with even k in the low one
  const float* scales;             // [n, groups]
  const uint8_t* zeros;            // zero points [n, groups], or null: there are none
  const float* minima;             // [n, groups], or null: there are none
  const float* x_scale = nullptr;  // [1], of the activations of a8s schemes where they are read; else null
};

// The weights [experts, n, k] of a fused layer of experts: the storages of all, one after the other.
struct ExpertWeights {
  Weight operator[](int64_t e) const {
    const int64_t rows = e * n, groups = scheme.weight_groups(k);
    return {scheme,
            n,
            k,
            qweight + rows * scheme.packed_features(k),
            scales + rows * groups,
            zeros != nullptr ? static_cast<const char*>(zeros) + scheme.zeros_bytes(rows * groups) : nullptr};
  }

  Scheme scheme;
  int64_t experts, n, k;
  const uint8_t* qweight;
  const float* scales;
  const void* zeros;               // as the constructor of a Weight takes them
  const float* x_scale = nullptr;  // as of a Weight
};

// `rows` rows that are sorted by their expert: those of expert e end before row ends[e], and begin where those of the
// one before end. The ends ascend from 0 to at most `rows`; rows past the last end belong to no expert.
struct ExpertRows {
  const int64_t* ends;
  int64_t experts, rows;

  int64_t begin(int64_t e) const { return e > 0 ? ends[e - 1] : 0; }
  int64_t count(int64_t e) const { return ends[e] - begin(e); }
  int64_t used() const { return experts > 0 ? ends[experts - 1] : 0; }
};

}  // namespace qk
