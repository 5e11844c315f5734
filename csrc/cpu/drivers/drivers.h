// The products, for any ISA: matrix drivers (any number of rows) and row-dot drivers (few rows).
//
// NOTE [one table]. An entry point of the core (cpu/api.h) reads qk::kernels() once and hands that table down to all
// it calls: another thread may force another ISA meanwhile, whose panels are laid out otherwise.
#pragma once

#include <memory>

#include "cpu/api.h"
#include "cpu/kernels/kernels.h"

namespace qk {

struct Output {
  void* data;  // row-major, contiguous
  DType dtype;
  bool stream = false;  // stored past the caches, see NOTE [stream] in stream.h
};

// x is quantized to int8 and multiplied with the weight's integers; bias [n] may be null. a8 schemes. Both drivers
// give the same bits.
void int_matmul(const Kernels& kernels, const Matrix& x, const Weight& w, const float* bias, Output out,
                const Parallel& parallel);
void int_dot(const Kernels& kernels, const Matrix& x, const Weight& w, const float* bias, Output out,
             const Parallel& parallel);

// x quantized and packed, for int_matmul with several weights of one scheme and k.
class IntOperand {
 public:
  IntOperand(const Kernels& kernels, const Matrix& x, const Weight& w, const Parallel& parallel);
  ~IntOperand();

  // int_matmul(kernels, x, w, ...)
  void multiply(const Weight& w, const float* bias, Output out, const Parallel& parallel) const;

 private:
  struct Packed;
  const Kernels& kernels_;
  std::unique_ptr<Packed> packed_;
};

// The same through kernels that multiply tiles of the stored weight, for at most 4 * dot_tile_rows rows of x; whether
// int_dot leaves the product to it.
bool takes_tile_dot(const Kernels& kernels, const Scheme& scheme, int64_t rows);
void int_tile_dot(const Kernels& kernels, const Matrix& x, const Weight& w, const float* bias, Output out,
                  const Parallel& parallel);

// The same for grouped schemes, through kernels that read the weight row by row; int_dot leaves them to it where the
// ISA has such kernels.
void int_group_dot(const Kernels& kernels, const Matrix& x, const Weight& w, const float* bias, Output out,
                   const Parallel& parallel);

// The same for x that is quantized already, as quantize_activation does it: scales [M, act_groups].
void int_matmul_stored(const Kernels& kernels, const QuantizedRows& x, const Weight& w, const float* bias, Output out,
                       const Parallel& parallel);

// x in panels for the tile registers, for products with several grouped weights of one scheme and k; whether int_matmul
// leaves a product to it.
bool takes_tile_groups(const Kernels& kernels, const Scheme& scheme);
class TileOperand {
 public:
  TileOperand(const Kernels& kernels, const Matrix& x, const Weight& w, const Parallel& parallel);
  TileOperand(const Kernels& kernels, const QuantizedRows& x, const Weight& w,
              const Parallel& parallel);  // quantized already
  ~TileOperand();

  void multiply(const Weight& w, const float* bias, Output out, const Parallel& parallel) const;

 private:
  struct Panels;
  const Kernels& kernels_;
  std::unique_ptr<Panels> panels_;
};

// grad_out [M, n] times the weight's integers, without its scales -> [M, k]. Grouped weights are requantized to one
// scale a column, column_scales [k]; null for others. Any scheme.
void int_matmul_grad_input(const Kernels& kernels, const QuantizedRows& grad_out, const Weight& w,
                           const float* column_scales, Output out, const Parallel& parallel);

// Products with the dequantized weight in float: x [M, k] -> [M, n] ...
void float_matmul(const Kernels& kernels, const Matrix& x, const Weight& w, const float* bias, Output out,
                  const Parallel& parallel);
void float_dot(const Kernels& kernels, const Matrix& x, const Weight& w, const float* bias, Output out,
               const Parallel& parallel);
// ... and grad_out [M, n] -> [M, k].
void float_matmul_grad_input(const Kernels& kernels, const Matrix& grad_out, const Weight& w, Output out,
                             const Parallel& parallel);

// The functions of these names in cpu/api.h, with a given table.
Choice choose_linear(const Kernels& kernels, const Scheme& scheme, int64_t m, int64_t n, int64_t k, int threads);
void column_scales(const Kernels& kernels, const Weight& w, float* out, const Parallel& parallel);

}  // namespace qk
