// Products of int8 rows with a quantized weight, on raw pointers of the device, and the choice of their tiles.
#pragma once

#include <cuda_runtime.h>

#include "common/types.h"

namespace qk::cuda {

// How the second factor lies in memory. `across`: int8 [k, n], its rows run along n.
enum class Storage { int8, int4, int8_across };

// More than the log2 of any k: k >> kWholeRow is 0, the only group.
constexpr int kWholeRow = 30;

// log2 of a group size of a scheme, where 0 means the row.
// Groups of 16 are not supported (kernels/cuda_library.py).
constexpr int group_shift(int64_t group) { return group == 0 ? kWholeRow : (group == 32 ? 5 : (group == 64 ? 6 : 7)); }

// out[m, n] = x[m, k] times the weight [n, k], scaled; docs/numerics.md, rules 4, 5 and 6.
struct IntMatmulArgs {
  const int8_t* x;        // [m, x_stride]; for int4 in interleaved order
  const float* x_scales;  // [m, groups]
  const uint8_t* weight;  // rows of weight_stride bytes
  const float* scales;    // [n, groups]; null: none
  const uint8_t* zeros;   // as scales; null: 8, for int4
  Bias bias;              // [n]
  void* out;              // [m, n] of out_dtype
  DType out_dtype;
  int m, n, k;
  int64_t x_stride, weight_stride;
  int x_shift, w_shift;  // log2 of the values along k that share a scale; kWholeRow: all

  __host__ __device__ bool grouped() const { return x_shift != kWholeRow || w_shift != kWholeRow; }
};

// Sizes of the tile that a block computes.
enum class TileSize { rows16, square64, square128 };

struct TileChoice {
  TileSize size;
  bool aligned;  // whether rows of both factors start and end at multiples of 16 bytes
  const char* reason;
};

TileChoice choose_tile(const IntMatmulArgs& args, Storage storage, int processors);

cudaError_t int_matmul(const IntMatmulArgs& args, Storage storage, int processors, cudaStream_t stream);

}  // namespace qk::cuda
