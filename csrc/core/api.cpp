#include "core/api.h"

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/drivers.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace qk {
namespace {

// Up to this many rows, packing the weight costs more than it saves over reading its rows in place.
constexpr int64_t kMaxDotRows = 4;

// Below this many multiply-adds a thread, starting it costs more than it saves.
constexpr int64_t kMinWorkPerThread = int64_t{1} << 18;

Parallel limit(const Parallel& parallel, int64_t work) {
  const int64_t useful = std::max<int64_t>(work / kMinWorkPerThread, 1);
  return {static_cast<int>(std::min<int64_t>(parallel.num_threads, useful)), parallel.run};
}

}  // namespace

void quantize_activation(const Matrix& x, const Scheme& scheme, int8_t* q, float* scales, const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const int64_t groups = scheme.act_groups(x.cols);
  limit(parallel, x.rows * x.cols)(x.rows, [&](int64_t begin, int64_t end) {
    Buffer<float> floats(x.cols);
    for (int64_t m = begin; m < end; ++m) {
      const float* row = float_row(kernels, x, m, floats.get());
      quantize_row(kernels, row, x.cols, scheme.act_group(x.cols), q + m * x.cols, scales + m * groups);
    }
  });
}

void dequantize_weight(const Weight& w, float* out, const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  limit(parallel, w.n * w.k)(w.n, [&](int64_t begin, int64_t end) {
    Buffer<int8_t> integers(w.k);
    for (int64_t n = begin; n < end; ++n) dequantize_row(kernels, w, n, 0, w.k, integers.get(), out + n * w.k);
  });
}

void linear(const Matrix& x, const Weight& w, Bias bias, void* out, DType out_dtype, const Parallel& parallel) {
  if (x.rows == 0 || w.n == 0) return;
  Buffer<float> bias_floats(bias.data != nullptr ? w.n : 0);
  if (bias.data != nullptr) kernels().to_float(bias.data, bias.dtype, w.n, bias_floats.get());
  const float* bias_data = bias.data != nullptr ? bias_floats.get() : nullptr;
  const bool integer = w.scheme.int_activations(), few_rows = x.rows <= kMaxDotRows;
  const auto driver = integer ? (few_rows ? int_dot : int_matmul) : (few_rows ? float_dot : float_matmul);
  driver(x, w, bias_data, {out, out_dtype}, limit(parallel, x.rows * w.n * w.k));
}

void linear_grad_input(const Matrix& grad_out, const Weight& w, void* out, DType out_dtype, const Parallel& parallel) {
  if (grad_out.rows == 0) return;
  float_matmul_grad_input(grad_out, w, {out, out_dtype}, limit(parallel, grad_out.rows * w.n * w.k));
}

}  // namespace qk
