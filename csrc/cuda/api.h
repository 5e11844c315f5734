// What the operators on CUDA tensors compute, on raw pointers of the device: the twin of cpu/api.h. Arguments are
// checked by the caller.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "common/types.h"

namespace qk::cuda {

// Where kernels run, and memory for the time of a call. Nothing waits for the device.
struct Device {
  cudaStream_t stream;
  int processors;
  void* (*allocate)(size_t bytes, void* context);  // at a multiple of 16 bytes
  void* context;
};

// q: int8 [rows, cols]; scales: float32 [rows, act_groups].
cudaError_t quantize_activation(const Matrix& x, const Scheme& scheme, int8_t* q, float* scales, const Device& device);

// q: int8 [rows, cols]; scales: float32 [rows]; factors: [cols] or null.
cudaError_t quantize_rows_stochastic(const Matrix& x, const float* factors, const Random& random, int8_t* q,
                                     float* scales, const Device& device);

// out: [x.rows, weight.n] of out_dtype. x of `a16` schemes is bfloat16 or float16.
cudaError_t linear(const Matrix& x, const Weight& weight, const Bias& bias, void* out, DType out_dtype,
                   const Device& device);

// The same for a8 schemes without groups of activations, and x as it was multiplied: q [rows, cols], scales [rows].
cudaError_t linear_with_saved_input(const Matrix& x, const Weight& weight, const Bias& bias, void* out, DType out_dtype,
                                    int8_t* q, float* scales, const Device& device);

// out: [grad.rows, weight.k]; column_scales: [weight.k] for grouped weights, else null.
cudaError_t int_grad_input(const QuantizedRows& grad, const Weight& weight, const float* column_scales, void* out,
                           DType out_dtype, const Device& device);

}  // namespace qk::cuda
