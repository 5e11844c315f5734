// Products of bfloat16 or float16 rows with a quantized weight, on raw pointers of the device.
#pragma once

#include <cuda_runtime.h>

#include "common/types.h"

namespace qk::cuda {

// Rows up to which a product is bound by the bytes of the weight.
constexpr int kFewRows = 16;

// out[m, n] = x[m, k] times the weight [n, k] + bias; docs/numerics.md, `a16` schemes.
struct FloatMatmulArgs {
  const void* x;  // [m, k] of dtype
  DType dtype;    // bfloat16 or float16
  const uint8_t* weight;
  const float* scales;   // [n, groups]
  const uint8_t* zeros;  // as scales; null: 8, for 4 bits
  Bias bias;             // [n]
  void* out;             // [m, n] of out_dtype
  DType out_dtype;
  int m, n, k, bits, w_shift;
  int slice;     // k that a block multiplies
  float* parts;  // [slices, m, n], added afterwards; null: a block multiplies all of k
};

// How a product is divided: k of a slice, and why.
struct Slices {
  int size;
  const char* reason;
};

Slices choose_slices(const FloatMatmulArgs& args, int processors);

// Uses slice and parts of args.
cudaError_t float_matmul(const FloatMatmulArgs& args, cudaStream_t stream);

// M == 1, and all rows start at multiples of 16 bytes.
bool is_float_row(const FloatMatmulArgs& args);

cudaError_t float_row(const FloatMatmulArgs& args, int processors, cudaStream_t stream);

}  // namespace qk::cuda
