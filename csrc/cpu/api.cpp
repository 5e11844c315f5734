#include "cpu/api.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "cpu/buffer.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/rows.h"
#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qk {
namespace {

// Best first: of a16 schemes, then of a8 schemes.
const LinearDriver* const kDrivers[] = {
    &kFloatDot, &kFloatMatmul, &kTileDot, &kGroupDot, &kRowDot, &kTileGroups, &kIntMatmul,
};

// Columns that column_scales reads at a time.
constexpr int64_t kScaleColumns = 256;

// Rows with a scale for each group -> rows with one scale: the largest of those that count (rule 9). In place.
void ungroup(const Kernels& kernels, const QuantizedRows& x, int64_t group, int8_t* q, float* scales,
             const Parallel& parallel) {
  const int64_t groups = div_up(x.cols, group);
  limited_to_work(parallel, x.rows * x.cols)(x.rows, [&](int64_t begin, int64_t end) {
    Buffer<float> ones(group);
    std::fill_n(ones.get(), group, 1.0f);
    for (int64_t m = begin; m < end; ++m) {
      const int8_t* row = x.data + m * x.cols;
      const float* own = x.scales + m * groups;
      const auto is_zero = [&](int64_t g) {
        const int8_t* q0 = row + g * group;
        return !std::isnan(own[g]) &&
               std::all_of(q0, q0 + std::min(group, x.cols - g * group), [](int8_t v) { return v == 0; });
      };
      uint32_t largest = 0;  // as bits, which put NaN above all
      for (int64_t g = 0; g < groups; ++g) {
        if (!is_zero(g)) largest = std::max(largest, std::bit_cast<uint32_t>(own[g]));
      }
      scales[m] = largest == 0 ? 1.0f : std::bit_cast<float>(largest);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin_k = g * group, count = std::min(group, x.cols - begin_k);
        if (std::isnan(scales[m])) {
          std::fill_n(q + m * x.cols + begin_k, count, int8_t{0});
        } else {
          kernels.elementwise.requantize(row + begin_k, count, own[g] / scales[m], ones.get(),
                                         q + m * x.cols + begin_k);
        }
      }
    }
  });
}

}  // namespace

void quantize_activation(const Kernels& kernels, const Matrix& x, const Scheme& scheme, const float* x_scale, int8_t* q,
                         float* scales, const Parallel& parallel) {
  const int64_t groups = scheme.act_groups(x.cols);
  limited_to_work(parallel, x.rows * x.cols)(x.rows, [&](int64_t begin, int64_t end) {
    Buffer<float> floats(x.cols);
    for (int64_t m = begin; m < end; ++m) {
      if (x_scale != nullptr) {
        quantize_row_static(kernels, x, m, *x_scale, q + m * x.cols, scales + m, floats.get());
      } else {
        quantize_row(kernels, x, m, scheme.act_group(x.cols), q + m * x.cols, scales + m * groups, floats.get());
      }
    }
  });
}

void quantize_activation(const Matrix& x, const Scheme& scheme, const float* x_scale, int8_t* q, float* scales,
                         const Parallel& parallel) {
  quantize_activation(kernels(), x, scheme, x_scale, q, scales, parallel);
}

void dequantize_weight(const Weight& w, float* out, const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  limited_to_work(parallel, w.n * w.k)(w.n, [&](int64_t begin, int64_t end) {
    Buffer<int8_t> integers(w.k);
    for (int64_t n = begin; n < end; ++n) dequantize_row(kernels, w, n, 0, w.k, integers.get(), out + n * w.k);
  });
}

bool few_rows(const Kernels& kernels, const Scheme& scheme, int64_t m) {
  if (!scheme.int_activations()) return m <= kernels.dots.most_rows_float;
  const RowDot& dot = kernels.dots.of(*scheme.weight);
  return m <= (scheme.grouped() ? dot.most_rows_grouped : dot.most_rows);
}

const LinearDriver& choose_driver(const Kernels& kernels, const Scheme& scheme, int64_t m) {
  const LinearDriver* const* driver = kDrivers;
  while (!(*driver)->accepts(kernels, scheme, m)) ++driver;  // the last of a8 and of a16 schemes accept any m
  return **driver;
}

Choice choose_linear(const Scheme& scheme, int64_t m, int64_t n, int64_t k, int threads) {
  const LinearDriver& driver = choose_driver(kernels(), scheme, m);
  return {driver.name, driver.reason, useful_threads(threads, m * n * k)};
}

void linear(const Kernels& kernels, const LinearInput& x, const Weight& w, const Bias& bias, const Output& out,
            const Parallel& parallel) {
  const int64_t m = x.x.rows;
  if (m == 0 || w.n == 0) return;
  const BiasFloats floats(kernels, bias, w.n);
  const Parallel limited = limited_to_work(parallel, m * w.n * w.k);
  const LinearDriver& driver = choose_driver(kernels, w.scheme, m);
  driver.prepare(kernels, x, w, limited)->multiply(w, floats.get(), out, limited);
}

void linear(const Matrix& x, const Weight& w, Bias bias, void* out, DType out_dtype, const Parallel& parallel) {
  linear(kernels(), {.x = x, .x_scale = w.x_scale}, w, bias, {out, out_dtype}, parallel);
}

void linear_with_saved_input(const Kernels& kernels, const Matrix& x, const Weight& w, const Bias& bias,
                             const Output& out, int8_t* qx, float* x_scales, const Parallel& parallel) {
  const int64_t group = w.scheme.act_group_size, groups = w.scheme.act_groups(x.cols);
  Buffer<float> group_scales(group != 0 ? x.rows * groups : 0);
  float* const scales = group != 0 ? group_scales.get() : x_scales;
  quantize_activation(kernels, x, w.scheme, w.x_scale, qx, scales, parallel);
  linear(kernels, {x, qx, scales}, w, bias, out, parallel);
  if (group != 0) ungroup(kernels, {qx, scales, x.rows, x.cols}, group, qx, x_scales, parallel);
}

void linear_with_saved_input(const Matrix& x, const Weight& w, Bias bias, void* out, DType out_dtype, int8_t* qx,
                             float* x_scales, const Parallel& parallel) {
  linear_with_saved_input(kernels(), x, w, bias, {out, out_dtype}, qx, x_scales, parallel);
}

void linear_grad_input(const Matrix& grad_out, const Weight& w, void* out, DType out_dtype, const Parallel& parallel) {
  if (grad_out.rows == 0) return;
  float_matmul_grad_input(kernels(), grad_out, w, {out, out_dtype},
                          limited_to_work(parallel, grad_out.rows * w.n * w.k));
}

void column_scales(const Weight& w, float* out, const Parallel& parallel) {
  column_scales(kernels(), w, out, parallel);
}

void column_scales(const Kernels& kernels, const Weight& w, float* out, const Parallel& parallel) {
  limited_to_work(parallel, w.n * w.k)(div_up(w.k, kScaleColumns), [&](int64_t begin, int64_t end) {
    Buffer<int8_t> integers(kScaleColumns);
    Buffer<float> row(kScaleColumns);
    Buffer<uint32_t> absmax(kScaleColumns);
    for (int64_t k0 = begin * kScaleColumns; k0 < std::min(end * kScaleColumns, w.k); k0 += kScaleColumns) {
      const int64_t count = std::min(kScaleColumns, w.k - k0);
      std::fill_n(absmax.get(), count, 0u);
      for (int64_t n = 0; n < w.n; ++n) {
        dequantize_row(kernels, w, n, k0, count, integers.get(), row.get());
        kernels.elementwise.max_bits(row.get(), count, absmax.get());
      }
      for (int64_t i = 0; i < count; ++i) out[k0 + i] = int8_scale(absmax[i]);
    }
  });
}

void int_grad_input(const QuantizedRows& grad_out, const Weight& w, const float* column_scales, void* out,
                    DType out_dtype, const Parallel& parallel) {
  if (grad_out.rows == 0) return;
  const Parallel limited = limited_to_work(parallel, grad_out.rows * w.n * w.k);
  int_matmul_grad_input(kernels(), grad_out, w, column_scales, {out, out_dtype}, limited);
}

}  // namespace qk
