// The rules of docs/numerics.md that kernels share. Each product, sum and quotient is rounded on its own.
#pragma once

#include "common/rules.h"
#include "common/types.h"
#include "cuda/device.cuh"

namespace qk::cuda {

constexpr uint32_t kInfBits = 0x7f800000;
constexpr uint32_t kNanBits = 0x7fc00000;

__device__ __forceinline__ uint32_t magnitude_bits(float v) { return __float_as_uint(v) & 0x7fffffffu; }

// Rule 1: what a range makes of its values. `inverse` is 0 where q must be 0.
struct Range {
  float scale, inverse;

  __device__ explicit Range(uint32_t absmax_bits) {
    const float absmax = __uint_as_float(absmax_bits);
    const bool finite = absmax_bits < kInfBits, usable = finite && absmax_bits >= kTinyBits;
    scale = usable ? __fdiv_rn(absmax, 127.0f) : (finite ? 1.0f : __uint_as_float(kNanBits));
    inverse = usable ? __fdiv_rn(127.0f, absmax) : 0.0f;
  }
};

__device__ __forceinline__ int clamp_int8(int q) { return q < -127 ? -127 : (q > 127 ? 127 : q); }

// Rule 2. A NaN or Inf comes with inverse 0, and NaN converts to 0.
__device__ __forceinline__ int round_nearest(float v, float inverse) {
  return clamp_int8(__float2int_rn(__fmul_rn(v, inverse)));
}

// Rule 8, for one value and its random word.
__device__ __forceinline__ int round_stochastic(float v, float inverse, uint32_t random) {
  const float scaled = inverse == 0.0f ? 0.0f : __fmul_rn(v, inverse);
  const float floor = floorf(scaled), u = __fmul_rn(__uint2float_rn(random >> 8), 0x1p-24f);
  return clamp_int8(static_cast<int>(floor) + (u < __fsub_rn(scaled, floor) ? 1 : 0));
}

// Rule 5: bfloat16 by integers, for the conversion of the hardware flushes subnormals.
__device__ __forceinline__ uint16_t bfloat16_bits(float v) {
  const uint32_t bits = __float_as_uint(v);
  if ((bits & 0x7fffffffu) > kInfBits) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ __forceinline__ float bfloat16_value(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

// Element i of a vector of floats of any type.
__device__ __forceinline__ float load_float(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::bfloat16 ? bfloat16_value(bits) : float16_value(bits);
}

__device__ __forceinline__ void store_float(void* data, int64_t i, DType dtype, float v) {
  if (dtype == DType::float32) {
    static_cast<float*>(data)[i] = v;
  } else {
    static_cast<uint16_t*>(data)[i] = dtype == DType::bfloat16 ? bfloat16_bits(v) : float16_bits(v);
  }
}

}  // namespace qk::cuda
