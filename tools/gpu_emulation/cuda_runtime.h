// Stands in for CUDA's header when the kernels are compiled for the host: qualifiers, types, and what of the C++ of
// kernels is no plain C++. What the kernels' own wrappers do is in emulator.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

using std::max;
using std::min;

// Each operation rounded once: the host is compiled without contraction.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __int2float_rn(int32_t v) { return static_cast<float>(v); }
inline float __uint2float_rn(uint32_t v) { return static_cast<float>(v); }
inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }
inline float __int_as_float(int32_t v) { return std::bit_cast<float>(v); }

// PTX ISA, Data Movement and Conversion: cvt.rni.s32.f32. NaN becomes 0, and what is out of range the nearest integer
// in it.
inline int __float2int_rn(float v) {
  if (v != v) return 0;
  const double rounded = std::nearbyint(static_cast<double>(v));
  return static_cast<int>(std::clamp(rounded, -2147483648.0, 2147483647.0));
}
