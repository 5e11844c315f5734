#include "cpu/drivers/rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace qk {

namespace {

constexpr uint32_t kInf = 0x7f800000;

}  // namespace

float int8_scale(uint32_t absmax_bits) {
  if (absmax_bits >= kInf) return std::numeric_limits<float>::quiet_NaN();
  return absmax_bits < kTinyBits ? 1.0f : std::bit_cast<float>(absmax_bits) / 127.0f;
}

float int8_inverse(uint32_t absmax_bits) {
  return absmax_bits < kTinyBits || absmax_bits >= kInf ? 0.0f : 127.0f / std::bit_cast<float>(absmax_bits);
}

namespace {

// `absmax` and `quantize` are the kernels for values of this type.
template <class Value, class Absmax, class Quantize>
void quantize_values(const Value* x, int64_t k, int64_t group, int8_t* q, float* scales, Absmax absmax,
                     Quantize quantize) {
  for (int64_t begin = 0; begin < k; begin += group, ++scales) {
    const int64_t count = std::min(group, k - begin);
    const uint32_t bits = absmax(x + begin, count);
    *scales = int8_scale(bits);
    if (const float inverse = int8_inverse(bits); inverse != 0.0f) {
      quantize(x + begin, count, inverse, q + begin);
    } else {
      std::memset(q + begin, 0, count);
    }
  }
}

}  // namespace

void quantize_row(const Kernels& kernels, const float* x, int64_t k, int64_t group, int8_t* q, float* scales) {
  quantize_values(x, k, group, q, scales, kernels.elementwise.absmax_bits, kernels.elementwise.quantize);
}

void quantize_row(const Kernels& kernels, const Matrix& x, int64_t m, int64_t group, int8_t* q, float* scales,
                  float* scratch) {
  if (x.dtype == DType::bfloat16 && kernels.elementwise.quantize_bf16 != nullptr) {
    const auto* row = static_cast<const uint16_t*>(x.row(m));
    quantize_values(row, x.cols, group, q, scales, kernels.elementwise.absmax_bits_bf16,
                    kernels.elementwise.quantize_bf16);
  } else {
    quantize_row(kernels, float_row(kernels, x, m, scratch), x.cols, group, q, scales);
  }
}

uint32_t absmax_bits(const Kernels& kernels, const Matrix& x, float* scratch) {
  if (x.dtype == DType::bfloat16 && kernels.elementwise.absmax_bits_bf16 != nullptr)
    return kernels.elementwise.absmax_bits_bf16(static_cast<const uint16_t*>(x.data), x.cols);
  return kernels.elementwise.absmax_bits(float_row(kernels, x, 0, scratch), x.cols);
}

void quantize_values(const Kernels& kernels, const Matrix& x, float inverse, int8_t* q, float* scratch) {
  if (x.dtype == DType::bfloat16 && kernels.elementwise.quantize_bf16 != nullptr) {
    kernels.elementwise.quantize_bf16(static_cast<const uint16_t*>(x.data), x.cols, inverse, q);
  } else {
    kernels.elementwise.quantize(float_row(kernels, x, 0, scratch), x.cols, inverse, q);
  }
}

float inverse_of(float scale) { return std::fabs(scale) >= kTinyRange ? 1.0f / scale : 0.0f; }

bool quantize_values_clamped(const Kernels& kernels, const Matrix& x, float inverse, int8_t* q, float* scratch) {
  const bool halves = x.dtype == DType::bfloat16 && kernels.elementwise.quantize_clamped_bf16 != nullptr;
  const uint32_t bits =
      halves ? kernels.elementwise.quantize_clamped_bf16(static_cast<const uint16_t*>(x.data), x.cols, inverse, q)
             : kernels.elementwise.quantize_clamped(float_row(kernels, x, 0, scratch), x.cols, inverse, q);
  return bits < kInf;
}

void quantize_row_static(const Kernels& kernels, const Matrix& x, int64_t m, float x_scale, int8_t* q, float* scale,
                         float* scratch) {
  *scale = x_scale;
  if (quantize_values_clamped(kernels, {x.row(m), x.dtype, 1, x.cols}, inverse_of(x_scale), q, scratch)) return;
  *scale = std::numeric_limits<float>::quiet_NaN();
  std::memset(q, 0, x.cols);
}

const float* float_row(const Kernels& kernels, const Matrix& x, int64_t m, float* scratch) {
  if (x.dtype == DType::float32) return static_cast<const float*>(x.row(m));
  kernels.elementwise.to_float(x.row(m), x.dtype, x.cols, scratch);
  return scratch;
}

const int8_t* integer_row(const Kernels& kernels, const Weight& w, int64_t n, int64_t k0, int64_t count,
                          int8_t* scratch) {
  const uint8_t* row = w.row(n);
  if (w.scheme.weight->in_place()) return reinterpret_cast<const int8_t*>(row) + k0;
  if (w.zeros == nullptr) {
    kernels.elementwise.unpack_int4(row + k0 / 2, count, w.scheme.stored_zero(), scratch);
    return scratch;
  }
  const uint8_t* zeros = w.zeros + n * w.groups + k0 / w.group;
  const int64_t first = std::min(round_up(k0, w.group) - k0, count);  // of a group that begins before k0
  if (first > 0) kernels.elementwise.unpack_int4(row + k0 / 2, first, *zeros++, scratch);
  kernels.elementwise.unpack_int4_groups(row + (k0 + first) / 2, count - first, w.group, zeros, scratch + first);
  return scratch;
}

void dequantize_row(const Kernels& kernels, const Weight& w, int64_t n, int64_t k0, int64_t count, int8_t* scratch,
                    float* out) {
  const int8_t* q = integer_row(kernels, w, n, k0, count, scratch);
  const float* scale = w.scales + n * w.groups + k0 / w.group;
  const float* minimum = w.minima != nullptr ? w.minima + n * w.groups + k0 / w.group : nullptr;
  for (int64_t k = k0, end = k0 / w.group * w.group; k < k0 + count; k = end, ++scale) {
    end = std::min(end + w.group, k0 + count);
    if (minimum != nullptr) {
      kernels.elementwise.dequantize_min(q + (k - k0), end - k, *scale, *minimum++, out + (k - k0));
    } else {
      kernels.elementwise.dequantize(q + (k - k0), end - k, *scale, out + (k - k0));
    }
  }
}

}  // namespace qk
