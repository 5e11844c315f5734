// One row at a time: quantizing activations, and reading a stored weight as integers or floats.
#pragma once

#include "cpu/kernels/kernels.h"

namespace qk {

// The scale of values whose largest magnitude has these bits (docs/numerics.md, rule 1).
float int8_scale(uint32_t absmax_bits);

// What they are multiplied with: 127 / absmax, or 0 where all integers are 0.
float int8_inverse(uint32_t absmax_bits);

// Quantizes a float row x[k] in groups (docs/numerics.md, rules 1 and 2): int8 q[k] and scales[ceil(k / group)].
void quantize_row(const Kernels& kernels, const float* x, int64_t k, int64_t group, int8_t* q, float* scales);

// The same for row m of x; `scratch` holds a row of floats.
void quantize_row(const Kernels& kernels, const Matrix& x, int64_t m, int64_t group, int8_t* q, float* scales,
                  float* scratch);

// The largest bits of |x| in a matrix of one row, and its integers for a given inverse scale; `scratch` holds the row
// as floats.
uint32_t absmax_bits(const Kernels& kernels, const Matrix& x, float* scratch);
void quantize_values(const Kernels& kernels, const Matrix& x, float inverse, int8_t* q, float* scratch);

// The same for an inverse that the range of x did not give: clamped (rule 13). False if x holds Inf or NaN.
bool quantize_values_clamped(const Kernels& kernels, const Matrix& x, float inverse, int8_t* q, float* scratch);

// Quantizes row m of x with a scale given for all rows (rule 13): int8 q[cols], and the row's scale, which is NaN
// instead if the row holds NaN or Inf. `scratch` holds a row of floats.
void quantize_row_static(const Kernels& kernels, const Matrix& x, int64_t m, float x_scale, int8_t* q, float* scale,
                         float* scratch);

// What values are multiplied with to be rounded to a given scale; 0 where the scale counts as 0 (rule 11).
float inverse_of(float scale);

// Row m of x as float: x itself, or a conversion into scratch[cols].
const float* float_row(const Kernels& kernels, const Matrix& x, int64_t m, float* scratch);

// The integers that columns [k0, k0 + count) of weight row n are multiplied as. k0 is even. Returns the stored row
// (8 bits) or unpacks into scratch[count].
const int8_t* integer_row(const Kernels& kernels, const Weight& w, int64_t n, int64_t k0, int64_t count,
                          int8_t* scratch);

// The same columns as float: integer * scale, plus the minimum if there is one. `scratch` holds count integers.
void dequantize_row(const Kernels& kernels, const Weight& w, int64_t n, int64_t k0, int64_t count, int8_t* scratch,
                    float* out);

}  // namespace qk
