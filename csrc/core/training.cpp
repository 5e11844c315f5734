// What training quantizes: gradients and weights, with stochastic rounding.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/api.h"
#include "core/threads.h"
#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace qk {
namespace {

// Random bits cost about this many multiply-adds a value.
constexpr int64_t kRandomWork = 16;

// Rows that are rounded and then transposed together, in blocks of so many columns: a block stays in L1, and each row
// of the result gets a whole cache line of it.
constexpr int64_t kRows = 64;
constexpr int64_t kColumns = 256;
static_assert(kColumns % kPhiloxWords == 0);

}  // namespace

void quantize_rows(const Matrix& x, const float* column_factors, Random random, int8_t* q, float* scales,
                   const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  limit(parallel, kRandomWork * x.rows * x.cols)(x.rows, [&](int64_t begin, int64_t end) {
    Buffer<float> floats(x.cols), folded(x.cols);
    for (int64_t m = begin; m < end; ++m) {
      const float* row = float_row(kernels, x, m, floats.get());
      if (column_factors != nullptr) {
        kernels.scale_each(row, column_factors, x.cols, folded.get());
        row = folded.get();
      }
      const uint32_t bits = kernels.absmax_bits(row, x.cols);
      scales[m] = int8_scale(bits);
      int8_t* out = q + m * x.cols;
      if (const float inverse = int8_inverse(bits); inverse != 0.0f) {
        kernels.round_stochastic(row, x.cols, inverse, PhiloxRow(random, m), 0, out);
      } else {
        std::memset(out, 0, x.cols);
      }
    }
  });
}

void quantize_columns(const Matrix& x, const float* row_factors, Random random, int8_t* q, float* scales,
                      const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const Parallel limited = limit(parallel, kRandomWork * x.rows * x.cols);
  const auto folded = [&](int64_t m, int64_t c0, int64_t count, float* out) {
    kernels.to_float(x.at(m, c0), x.dtype, count, out);
    if (row_factors != nullptr) kernels.scale(out, count, row_factors[m], out);
  };

  const int64_t blocks = div_up(x.cols, kColumns);
  Buffer<float> inverse(x.cols);
  limited(blocks, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns, last = std::min(end * kColumns, x.cols);
    Buffer<float> floats(last - first);
    Buffer<uint32_t> max(last - first);
    std::fill_n(max.get(), last - first, 0u);
    for (int64_t m = 0; m < x.rows; ++m) {
      folded(m, first, last - first, floats.get());
      kernels.max_bits(floats.get(), last - first, max.get());
    }
    for (int64_t c = first; c < last; ++c) {
      scales[c] = int8_scale(max[c - first]);
      inverse[c] = int8_inverse(max[c - first]);
    }
  });

  limited(div_up(x.rows, kRows), [&](int64_t begin, int64_t end) {
    Buffer<float> floats(kColumns);
    Buffer<int8_t> rounded(kRows * kColumns);
    for (int64_t m0 = begin * kRows; m0 < std::min(end * kRows, x.rows); m0 += kRows) {
      const int64_t rows = std::min(kRows, x.rows - m0);
      for (int64_t c0 = 0; c0 < x.cols; c0 += kColumns) {
        const int64_t count = std::min(kColumns, x.cols - c0);
        for (int64_t r = 0; r < rows; ++r) {
          folded(m0 + r, c0, count, floats.get());
          kernels.scale_each(floats.get(), &inverse[c0], count, floats.get());
          kernels.round_stochastic(floats.get(), count, 1.0f, PhiloxRow(random, m0 + r), c0, &rounded[r * kColumns]);
        }
        kernels.transpose(rounded.get(), kColumns, rows, count, q + c0 * x.rows + m0, x.rows);
      }
    }
  });
  for (int64_t c = 0; c < x.cols; ++c) {
    if (std::isnan(scales[c])) std::memset(q + c * x.rows, 0, x.rows);
  }
}

}  // namespace qk
