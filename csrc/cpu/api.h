// The operators of the core, on raw pointers. The bindings (ops.cpp, native.cpp) check shapes and dtypes; what is said
// about arguments here is assumed.
#pragma once

#include "cpu/parallel.h"

namespace qk {

// q: int8 [rows, cols]; scales: float32 [rows, act_groups]. a8 schemes. x_scale: [1] for a8s schemes, else null.
QK_API void quantize_activation(const Matrix& x, const Scheme& scheme, const float* x_scale, int8_t* q, float* scales,
                                const Parallel& parallel);

// out: float32 [n, k].
QK_API void dequantize_weight(const Weight& w, float* out, const Parallel& parallel);

// How `linear` computes a product: a pure function of its arguments and the ISA in use.
struct Choice {
  const char* driver;  // its name and the reason for it, NOTE [drivers] in cpu/drivers/drivers.h
  const char* reason;
  int threads;
};

QK_API Choice choose_linear(const Scheme& scheme, int64_t m, int64_t n, int64_t k, int threads);

// x [M, k] -> out [M, n].
QK_API void linear(const Matrix& x, const Weight& w, Bias bias, void* out, DType out_dtype, const Parallel& parallel);

// `linear` of an a8 scheme that also returns x as the gradient of the weight needs it: int8 qx [M, k] with a scale for
// each row, x_scales [M]. Under an activation group the integers are made anew for one scale a row.
QK_API void linear_with_saved_input(const Matrix& x, const Weight& w, Bias bias, void* out, DType out_dtype, int8_t* qx,
                                    float* x_scales, const Parallel& parallel);

// grad_out [M, n] -> out [M, k], in float.
QK_API void linear_grad_input(const Matrix& grad_out, const Weight& w, void* out, DType out_dtype,
                              const Parallel& parallel);

// out: float32 [k], one int8 scale for each column of the dequantized weight: its largest magnitude / 127 (rule 1).
QK_API void column_scales(const Weight& w, float* out, const Parallel& parallel);

// A gradient that is quantized already, [M, n] with n <= kMaxReduction and the scales of an ungrouped weight folded in
// -> out [M, k]. column_scales: those of the weight if it is grouped, else null.
QK_API void int_grad_input(const QuantizedRows& grad_out, const Weight& w, const float* column_scales, void* out,
                           DType out_dtype, const Parallel& parallel);

// The products of experts, each of which multiplies its own rows as `linear` would, to the bit for a8 schemes.
struct GroupedLinearArgs {
  Matrix x;              // [T, k]
  const int64_t* index;  // [rows.rows], in [0, T): the row of x that each row multiplies; null: as many rows as x has
  ExpertRows rows;
  Bias bias;  // [experts, n]
};

// out [rows, n]; 0 in rows that belong to no expert. Every row of x is quantized once.
QK_API void grouped_linear(const GroupedLinearArgs& args, const ExpertWeights& w, void* out, DType out_dtype,
                           const Parallel& parallel);

// The gradient of such products: [rows.rows, n] in float. With `random` it is rounded to int8 (docs/numerics.md, rule
// 12).
struct GroupedGradient {
  Matrix grad_out;
  ExpertRows rows;
  const Random* random;  // or null: floats are multiplied
};

// -> out [rows, k]; 0 in rows that belong to no expert. column_scales [experts, k]: those of the weights if they are
// grouped and the gradient is rounded, else null.
QK_API void grouped_linear_grad_input(const GroupedGradient& grad, const ExpertWeights& w, const float* column_scales,
                                      void* out, DType out_dtype, const Parallel& parallel);

// x [T, k] with one scale a row, index as in grouped_linear -> out [experts, n, k]; 0 for experts without rows.
QK_API void grouped_linear_grad_weight(const GroupedGradient& grad, const QuantizedRows& x, const int64_t* index,
                                       void* out, DType out_dtype, const Parallel& parallel);

struct CrossEntropyArgs {
  Matrix hidden;
  const int64_t* target;  // [M], in [0, n) or ignore_index
  Bias bias;              // of the logits
  const int64_t* dither;  // [M], in [0, 2^32): see docs/numerics.md; not read without a gradient
  float softcap;          // 0: none
  double z_loss, label_smoothing;
  int64_t ignore_index;
};

struct CrossEntropyResult {
  float* loss;         // [M]
  float* lse;          // [M]: log of the sum of the exponentials of the logits
  float* grad_hidden;  // [M, k]: of each row's loss, or null: not wanted
};

// Images [batch, height, width, channels], or with channels first: [batch, channels, height, width].
struct Images {
  const void* data;
  DType dtype;
  int64_t batch, height, width, channels;
  bool channels_first;
};

// How the kernel of a convolution moves over images.
struct ConvGeometry {
  int64_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width;
  int64_t left, right, top, bottom;  // columns and rows of zeros around each image
  int64_t groups;                    // of channels, and of output channels

  int64_t out_height(int64_t height) const {
    return (top + height + bottom - dilation_height * (kernel_height - 1) - 1) / stride_height + 1;
  }
  int64_t out_width(int64_t width) const {
    return (left + width + right - dilation_width * (kernel_width - 1) - 1) / stride_width + 1;
  }
};

// Convolution of x with w [n, kernel_height * kernel_width * channels / groups], whose columns are channels last ->
// out [batch, out_height, out_width, n]. a8 schemes without activation groups: one scale for each image, or the
// given one of the weight's x_scale.
QK_API void conv(const Images& x, const ConvGeometry& geometry, const Weight& w, Bias bias, void* out, DType out_dtype,
                 const Parallel& parallel);

// The cross entropy of the logits of each row of hidden, 0 for ignored rows. n <= 2^31; no softcap together with
// label smoothing.
QK_API void linear_cross_entropy(const CrossEntropyArgs& args, const Weight& w, const CrossEntropyResult& result,
                                 const Parallel& parallel);

// The canonical storage of w [n, k]; zeros [n, groups] for asymmetric schemes, else null. False if w, or the range of a
// group, is not finite: what was written is then of no use.
QK_API bool quantize_weight(const Matrix& w, const Scheme& scheme, void* qweight, float* scales, void* zeros,
                            const Parallel& parallel);

// out [n, k] = grad where quantizing w to 4 bits clamps nothing, else 0. It has the dtype of grad.
QK_API void mask_clipped(const Matrix& grad, const Matrix& w, const Scheme& scheme, void* out,
                         const Parallel& parallel);

// qweight of w [n, k] for given scales [n, groups]: the rounded quotients, clamped. Symmetric schemes. False if w or a
// scale is not finite.
QK_API bool quantize_weight_scaled(const Matrix& w, const float* scales, const Scheme& scheme, void* qweight,
                                   const Parallel& parallel);

// Backward of `quantize_weight_scaled` (learned step size): out [n, k], of the dtype of grad, is the gradient of w:
// grad where nothing was clamped, else 0. grad_scales [n, groups] is that of the scales (rule 11).
QK_API void scale_gradient(const Matrix& grad, const Matrix& w, const float* scales, const Scheme& scheme, void* out,
                           float* grad_scales, const Parallel& parallel);

// Stochastic rounding of x [rows, cols] to int8 with a scale for each row: q [rows, cols], scales [rows]. Column c is
// multiplied by column_factors[c] before; null: by nothing.
QK_API void quantize_rows_stochastic(const Matrix& x, const float* column_factors, Random random, int8_t* q,
                                     float* scales, const Parallel& parallel);

// The same for each column: q [cols, rows], scales [cols]. Row r is multiplied by row_factors[r] before, or null.
QK_API void quantize_columns_stochastic(const Matrix& x, const float* row_factors, Random random, int8_t* q,
                                        float* scales, const Parallel& parallel);

}  // namespace qk
