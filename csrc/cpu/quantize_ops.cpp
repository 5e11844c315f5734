// What training quantizes: weights anew in each step, and gradients, with stochastic rounding.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu/api.h"
#include "cpu/buffer.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/large_results.h"
#include "cpu/drivers/rows.h"
#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qk {
namespace {

// Random bits cost about this many multiply-adds a value.
constexpr int64_t kRandomWork = 16;

// Rows that are rounded and then transposed together, in blocks of so many columns: a block stays in L1, and each row
// of the result gets a whole cache line of it.
constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockColumns = 256;
static_assert(kBlockColumns % kPhiloxWords == 0);

// Rule 3 for a group.
struct Int4Group {
  float scale = 1.0f, inverse = 0.0f;
  int zero;
  bool finite;

  Int4Group(const Kernels& kernels, const float* w, int64_t count, bool symmetric) : zero(symmetric ? 8 : 0) {
    float low, high;
    kernels.elementwise.range(w, count, &low, &high);
    if (!symmetric) {
      low = std::min(low, 0.0f);
      high = std::max(high, 0.0f);
    }
    const float levels = symmetric ? -8.0f : 15.0f, span = !symmetric ? high - low : -low > high ? low : high;
    finite = std::isfinite(low) && std::isfinite(high) && std::isfinite(span);
    if (!finite || std::fabs(span) < kTinyRange) return;
    scale = span / levels;
    inverse = levels / span;
    if (!symmetric) zero = static_cast<int>(std::clamp((-low * inverse + kRoundMagic) - kRoundMagic, 0.0f, 15.0f));
  }
};

// Rule 16 for a group: codes from least to greatest, and the minimum that is added to them.
struct MinGroup {
  float scale = 1.0f, inverse = 0.0f, minimum;
  bool finite;

  MinGroup(const Kernels& kernels, const float* w, int64_t count, const WeightFormat& format) {
    float low, high;
    kernels.elementwise.range(w, count, &low, &high);
    low = low + 0.0f;  // of zeros the positive one
    const float span = high - low, levels = static_cast<float>(format.greatest_code - format.least_code);
    finite = std::isfinite(low) && std::isfinite(high) && std::isfinite(span);
    minimum = low;
    if (!finite || span < kTinyRange) return;
    scale = span / levels;
    inverse = levels / span;
    minimum = low - static_cast<float>(format.least_code) * scale;
  }
};

// Row `row` of a weight with minima.
bool quantize_row_min(const Kernels& kernels, const float* row, int64_t k, const Scheme& scheme, int8_t* codes,
                      float* scales, float* minima) {
  const WeightFormat& format = *scheme.weight;
  const int64_t group = scheme.weight_group(k);
  bool finite = true;
  for (int64_t k0 = 0; k0 < k; k0 += group, ++scales, ++minima) {
    const int64_t count = std::min(group, k - k0);
    const MinGroup range(kernels, row + k0, count, format);
    finite = finite && range.finite;
    *scales = range.scale;
    *minima = range.minimum;
    if (!range.finite) continue;
    kernels.elementwise.quantize_min(row + k0, count, range.minimum, range.inverse, format.least_code,
                                     format.greatest_code, codes + k0);
  }
  return finite;
}

}  // namespace

bool quantize_weight(const Matrix& w, const Scheme& scheme, void* qweight, float* scales, void* zeros,
                     const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const int64_t group = scheme.weight_group(w.cols), groups = scheme.weight_groups(w.cols);
  std::atomic<bool> finite{true};
  limited_to_work(parallel, w.rows * w.cols)(w.rows, [&](int64_t begin, int64_t end) {
    Buffer<float> floats(w.cols);
    Buffer<uint8_t> nibbles(scheme.weight->in_place() ? 0 : w.cols);
    for (int64_t n = begin; n < end; ++n) {
      auto* out = static_cast<uint8_t*>(qweight) + n * scheme.packed_features(w.cols);
      float* row_scales = scales + n * groups;
      if (scheme.has_min()) {
        auto* codes = reinterpret_cast<int8_t*>(scheme.weight->in_place() ? out : nibbles.get());
        const float* row = float_row(kernels, w, n, floats.get());
        float* row_minima = static_cast<float*>(zeros) + n * groups;
        if (!quantize_row_min(kernels, row, w.cols, scheme, codes, row_scales, row_minima)) {
          finite = false;
        } else if (!scheme.weight->in_place()) {
          kernels.elementwise.pack_int4(nibbles.get(), w.cols, out);
        }
        continue;
      }
      if (scheme.weight->in_place()) {
        quantize_row(kernels, w, n, group, reinterpret_cast<int8_t*>(out), row_scales, floats.get());
        if (std::any_of(row_scales, row_scales + groups, [](float s) { return std::isnan(s); })) finite = false;
        continue;
      }
      const float* row = float_row(kernels, w, n, floats.get());
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t k0 = g * group, count = std::min(group, w.cols - k0);
        const Int4Group range(kernels, row + k0, count, scheme.symmetric());
        if (!range.finite) finite = false;
        kernels.elementwise.quantize_int4(row + k0, count, range.inverse, range.zero, &nibbles[k0]);
        row_scales[g] = range.scale;
        if (zeros != nullptr) static_cast<uint8_t*>(zeros)[n * groups + g] = static_cast<uint8_t>(range.zero);
      }
      kernels.elementwise.pack_int4(nibbles.get(), w.cols, out);
    }
  });
  return finite;
}

void mask_clipped(const Matrix& grad, const Matrix& w, const Scheme& scheme, void* out, const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  map_pages(out, w.rows * w.cols * size_of(grad.dtype), parallel);
  const int64_t group = scheme.weight_group(w.cols);
  limited_to_work(parallel, w.rows * w.cols)(w.rows, [&](int64_t begin, int64_t end) {
    Buffer<float> floats(w.cols), masked(w.cols);
    for (int64_t n = begin; n < end; ++n) {
      const float* row = float_row(kernels, w, n, floats.get());
      kernels.elementwise.to_float(grad.row(n), grad.dtype, grad.cols, masked.get());
      for (int64_t k = 0; k < w.cols; k += group) {
        const int64_t count = std::min(group, w.cols - k);
        const Int4Group range(kernels, row + k, count, scheme.symmetric());
        kernels.elementwise.mask_clipped(row + k, count, range.inverse, range.zero, &masked[k]);
      }
      kernels.elementwise.from_float(masked.get(), grad.cols, grad.dtype,
                                     static_cast<char*>(out) + n * grad.cols * size_of(grad.dtype));
    }
  });
}

bool quantize_weight_scaled(const Matrix& w, const float* scales, const Scheme& scheme, void* qweight,
                            const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const int64_t group = scheme.weight_group(w.cols), groups = scheme.weight_groups(w.cols);
  std::atomic<bool> finite{true};
  limited_to_work(parallel, w.rows * w.cols)(w.rows, [&](int64_t begin, int64_t end) {
    Buffer<float> floats(w.cols);
    Buffer<uint8_t> nibbles(scheme.weight->in_place() ? 0 : w.cols);
    for (int64_t n = begin; n < end; ++n) {
      const float* row = float_row(kernels, w, n, floats.get());
      auto* out = static_cast<uint8_t*>(qweight) + n * scheme.packed_features(w.cols);
      const float* row_scales = scales + n * groups;
      if (std::isnan(int8_scale(kernels.elementwise.absmax_bits(row, w.cols))) ||
          !std::all_of(row_scales, row_scales + groups, [](float s) { return std::isfinite(s); })) {
        finite = false;
        continue;
      }
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t k0 = g * group, count = std::min(group, w.cols - k0);
        const float inverse = inverse_of(row_scales[g]);
        if (scheme.weight->in_place()) {
          kernels.elementwise.quantize_clamped(row + k0, count, inverse, reinterpret_cast<int8_t*>(out) + k0);
        } else {
          kernels.elementwise.quantize_int4(row + k0, count, inverse, scheme.weight->offset, &nibbles[k0]);
        }
      }
      if (!scheme.weight->in_place()) kernels.elementwise.pack_int4(nibbles.get(), w.cols, out);
    }
  });
  return finite;
}

void scale_gradient(const Matrix& grad, const Matrix& w, const float* scales, const Scheme& scheme, void* out,
                    float* grad_scales, const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const int64_t group = scheme.weight_group(w.cols), groups = scheme.weight_groups(w.cols);
  const int low = scheme.weight->least, high = scheme.weight->greatest;
  limited_to_work(parallel, w.rows * w.cols)(w.rows, [&](int64_t begin, int64_t end) {
    Buffer<float> floats(w.cols), masked(w.cols);
    for (int64_t n = begin; n < end; ++n) {
      const float* row = float_row(kernels, w, n, floats.get());
      kernels.elementwise.to_float(grad.row(n), grad.dtype, grad.cols, masked.get());
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t k0 = g * group, count = std::min(group, w.cols - k0);
        const float inverse = inverse_of(scales[n * groups + g]);
        const float sum = kernels.elementwise.scale_gradient(row + k0, count, inverse, low, high, &masked[k0]);
        grad_scales[n * groups + g] = sum * static_cast<float>(1.0 / std::sqrt(static_cast<double>(count * high)));
      }
      kernels.elementwise.from_float(masked.get(), grad.cols, grad.dtype,
                                     static_cast<char*>(out) + n * grad.cols * size_of(grad.dtype));
    }
  });
}

void quantize_rows_stochastic(const Matrix& x, const float* column_factors, Random random, int8_t* q, float* scales,
                              const Parallel& parallel) {
  quantize_rows_stochastic(kernels(), x, column_factors, random, q, scales, parallel);
}

void quantize_rows_stochastic(const Kernels& kernels, const Matrix& x, const float* column_factors, Random random,
                              int8_t* q, float* scales, const Parallel& parallel) {
  limited_to_work(parallel, kRandomWork * x.rows * x.cols)(x.rows, [&](int64_t begin, int64_t end) {
    Buffer<float> floats(x.cols), folded(x.cols);
    for (int64_t m = begin; m < end; ++m) {
      const float* row = float_row(kernels, x, m, floats.get());
      if (column_factors != nullptr) {
        kernels.elementwise.scale_each(row, column_factors, x.cols, folded.get());
        row = folded.get();
      }
      const uint32_t bits = kernels.elementwise.absmax_bits(row, x.cols);
      scales[m] = int8_scale(bits);
      int8_t* out = q + m * x.cols;
      if (const float inverse = int8_inverse(bits); inverse != 0.0f) {
        kernels.elementwise.round_stochastic(row, x.cols, inverse, PhiloxRow(random, m), 0, out);
      } else {
        std::memset(out, 0, x.cols);
      }
    }
  });
}

void quantize_columns_stochastic(const Matrix& x, const float* row_factors, Random random, int8_t* q, float* scales,
                                 const Parallel& parallel) {
  quantize_columns_stochastic(kernels(), x, row_factors, random, q, scales, parallel);
}

void quantize_columns_stochastic(const Kernels& kernels, const Matrix& x, const float* row_factors, Random random,
                                 int8_t* q, float* scales, const Parallel& parallel) {
  const Parallel limited = limited_to_work(parallel, kRandomWork * x.rows * x.cols);
  const auto folded = [&](int64_t m, int64_t c0, int64_t count, float* out) {
    kernels.elementwise.to_float(x.at(m, c0), x.dtype, count, out);
    if (row_factors != nullptr) kernels.elementwise.scale(out, count, row_factors[m], out);
  };

  const int64_t blocks = div_up(x.cols, kBlockColumns);
  Buffer<float> inverse(x.cols);
  limited(blocks, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlockColumns, last = std::min(end * kBlockColumns, x.cols);
    Buffer<float> floats(last - first);
    Buffer<uint32_t> max(last - first);
    std::fill_n(max.get(), last - first, 0u);
    for (int64_t m = 0; m < x.rows; ++m) {
      folded(m, first, last - first, floats.get());
      kernels.elementwise.max_bits(floats.get(), last - first, max.get());
    }
    for (int64_t c = first; c < last; ++c) {
      scales[c] = int8_scale(max[c - first]);
      inverse[c] = int8_inverse(max[c - first]);
    }
  });

  limited(div_up(x.rows, kBlockRows), [&](int64_t begin, int64_t end) {
    Buffer<float> floats(kBlockColumns);
    Buffer<int8_t> rounded(kBlockRows * kBlockColumns);
    for (int64_t m0 = begin * kBlockRows; m0 < std::min(end * kBlockRows, x.rows); m0 += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, x.rows - m0);
      for (int64_t c0 = 0; c0 < x.cols; c0 += kBlockColumns) {
        const int64_t count = std::min(kBlockColumns, x.cols - c0);
        for (int64_t r = 0; r < rows; ++r) {
          folded(m0 + r, c0, count, floats.get());
          kernels.elementwise.scale_each(floats.get(), &inverse[c0], count, floats.get());
          kernels.elementwise.round_stochastic(floats.get(), count, 1.0f, PhiloxRow(random, m0 + r), c0,
                                               &rounded[r * kBlockColumns]);
        }
        kernels.elementwise.transpose(rounded.get(), kBlockColumns, rows, count, q + c0 * x.rows + m0, x.rows);
      }
    }
  });
  for (int64_t c = 0; c < x.cols; ++c) {
    if (std::isnan(scales[c])) std::memset(q + c * x.rows, 0, x.rows);
  }
}

}  // namespace qk
