// The products, for any instruction set.
//
// NOTE [drivers]. A driver computes a product with the micro-kernels of one table (cpu/kernels/kernels.h). Forward
// products have several: cpu/api.cpp lists them, best first, and the first that accepts a product runs it. `linear`,
// `linear_with_saved_input`, the cross entropy and `explain` all ask choose_driver, so they speak of the same one.
// All drivers of an a8 scheme give the same bits.
//
// NOTE [one table]. An entry point of the core (cpu/api.h) reads qk::kernels() once and hands that table down to all
// it calls: another thread may force another ISA meanwhile, whose panels are laid out otherwise.
#pragma once

#include <memory>

#include "cpu/api.h"
#include "cpu/buffer.h"
#include "cpu/kernels/kernels.h"

namespace qk {

struct Output {
  void* data;  // row-major
  DType dtype;
  bool nontemporal = false;  // stored past the caches, see NOTE [large results] in large_results.h
  int64_t stride = 0;        // elements from one row to the next; 0: rows are contiguous

  int64_t row_stride(int64_t cols) const { return stride != 0 ? stride : cols; }
  void* at(int64_t m, int64_t n, int64_t cols) const {
    return static_cast<char*>(data) + (m * row_stride(cols) + n) * size_of(dtype);
  }
};

struct Patches;  // cpu/drivers/patches.h

// x [M, k] of a forward product. If it has been quantized before, as quantize_activation does it, its integers and
// scales [M, act_groups] are given too; drivers of a8 schemes then read these. With an index (of a8 schemes only) row m
// is row index[m] of what is given. Patches are rows of integers, too. x_scale: of a8s
// schemes, else null.
struct LinearInput {
  Matrix x;
  const int8_t* q = nullptr;
  const float* scales = nullptr;
  const int64_t* index = nullptr;
  const Patches* patches = nullptr;
  const float* x_scale = nullptr;
};

// x as one driver reads it, for products with weights of one scheme and one k.
class LinearOperand {
 public:
  virtual ~LinearOperand() = default;

  // x times w [n, k], plus bias [n] if it is not null.
  virtual void multiply(const Weight& w, const float* bias, const Output& out, const Parallel& parallel) const = 0;
};

struct LinearDriver {
  const char* name;
  const char* reason;  // why no other driver is better for what it accepts
  bool (*accepts)(const Kernels& kernels, const Scheme& scheme, int64_t m);
  // w gives the scheme and k. The operand may point to x.
  std::unique_ptr<LinearOperand> (*prepare)(const Kernels& kernels, const LinearInput& x, const Weight& w,
                                            const Parallel& parallel);
};

template <class Operand>
std::unique_ptr<LinearOperand> prepare(const Kernels& kernels, const LinearInput& x, const Weight& w,
                                       const Parallel& parallel) {
  return std::make_unique<Operand>(kernels, x, w, parallel);
}

// Whether the row dots are faster than what packs the weight (RowDot::most_rows).
bool few_rows(const Kernels& kernels, const Scheme& scheme, int64_t m);

extern const LinearDriver kTileDot, kGroupDot, kRowDot, kTileGroups, kIntMatmul, kFloatDot, kFloatMatmul;

// The driver of products with m rows of x.
const LinearDriver& choose_driver(const Kernels& kernels, const Scheme& scheme, int64_t m);

// grad_out [M, n] times the weight's integers, without its scales -> [M, k]. Grouped weights are requantized to one
// scale a column, column_scales [k]; null for others. Any scheme.
void int_matmul_grad_input(const Kernels& kernels, const QuantizedRows& grad_out, const Weight& w,
                           const float* column_scales, Output out, const Parallel& parallel);

// grad_out [M, n] times the dequantized weight, in float -> [M, k].
void float_matmul_grad_input(const Kernels& kernels, const Matrix& grad_out, const Weight& w, const Output& out,
                             const Parallel& parallel);

// A bias as drivers read it.
class BiasFloats {
 public:
  BiasFloats(const Kernels& kernels, const Bias& bias, int64_t n)
      : given_(bias.data != nullptr), floats_(given_ ? n : 0) {
    if (given_) kernels.elementwise.to_float(bias.data, bias.dtype, n, floats_.get());
  }

  // Or null: none was given.
  const float* get() const { return given_ ? floats_.get() : nullptr; }

 private:
  bool given_;
  Buffer<float> floats_;
};

// The functions of these names in cpu/api.h, with a given table.
void quantize_activation(const Kernels& kernels, const Matrix& x, const Scheme& scheme, const float* x_scale, int8_t* q,
                         float* scales, const Parallel& parallel);
void linear(const Kernels& kernels, const LinearInput& x, const Weight& w, const Bias& bias, const Output& out,
            const Parallel& parallel);
void linear_with_saved_input(const Kernels& kernels, const Matrix& x, const Weight& w, const Bias& bias,
                             const Output& out, int8_t* qx, float* x_scales, const Parallel& parallel);
void linear_cross_entropy(const Kernels& kernels, const CrossEntropyArgs& args, const Weight& w,
                          const CrossEntropyResult& result, const Parallel& parallel);
void column_scales(const Kernels& kernels, const Weight& w, float* out, const Parallel& parallel);
void quantize_rows_stochastic(const Kernels& kernels, const Matrix& x, const float* column_factors, Random random,
                              int8_t* q, float* scales, const Parallel& parallel);
void quantize_columns_stochastic(const Kernels& kernels, const Matrix& x, const float* row_factors, Random random,
                                 int8_t* q, float* scales, const Parallel& parallel);

}  // namespace qk
