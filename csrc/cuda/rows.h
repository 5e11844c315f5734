// Launches of the row quantizations (rows.cu), on raw pointers of the device.
#pragma once

#include <cuda_runtime.h>

#include "common/types.h"

namespace qk::cuda {

// How a row of q lies in memory.
enum class Order {
  plain,        // k ascending
  interleaved,  // NOTE [interleaved] in int_matmul.cu; rows end at a multiple of 32, with zeros
};

struct RowsArgs {
  const void* x;         // [rows, cols] of dtype
  const float* factors;  // [cols], multiplied in before, or null
  int8_t* q;             // [rows, q_stride]
  float* scales;         // [rows, groups]
  int64_t rows, cols, q_stride;
  int group;  // values that share a scale: 0 (the row), 32, 64 or 128
  DType dtype;
  Order order;
  Random random;  // of stochastic rounding
};

cudaError_t quantize_rows(const RowsArgs& args, cudaStream_t stream);

// Rule 8 instead of rule 2, for whole rows in plain order.
cudaError_t quantize_rows_stochastic(const RowsArgs& args, cudaStream_t stream);

}  // namespace qk::cuda
