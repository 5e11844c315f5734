// Few rows of x: every weight row is read once, as it is stored, and multiplied with all of them. Bound by memory
// bandwidth; nothing is packed. Four weight rows go together, so that one load of x serves four products.
#include <algorithm>
#include <bit>

#include "cpu/buffer.h"
#include "cpu/drivers.h"
#include "cpu/rows.h"

namespace qk {
namespace {

constexpr int kRows = 4;

// The quantized rows of x, in the layout the dot kernels read.
struct Activations {
  int64_t k_padded, groups, act_groups;
  Buffer<int8_t> q;      // [M, k_padded]
  Buffer<int32_t> sums;  // [M, groups]: of q, for the shift or the zero points
  Buffer<float> scales;  // [M, act_groups]

  Activations(const Kernels& kernels, const Matrix& x, const Scheme& scheme)
      : k_padded(round_up(x.cols, 64)),
        groups(div_up(x.cols, scheme.acc_group(x.cols))),
        act_groups(scheme.act_groups(x.cols)),
        q(x.rows * k_padded),
        sums(x.rows * groups),
        scales(x.rows * act_groups) {
    const int64_t k = x.cols, group = scheme.acc_group(k);
    Buffer<float> floats(k);
    Buffer<int8_t> row(k_padded);
    for (int64_t m = 0; m < x.rows; ++m) {
      std::fill_n(row.get(), k_padded, int8_t{0});
      quantize_row(kernels, float_row(kernels, x, m, floats.get()), k, scheme.act_group(k), row.get(),
                   &scales[m * act_groups]);
      for (int64_t g = 0; g < groups; ++g) {
        sums[m * groups + g] = kernels.sum(&row[g * group], std::min(group, k - g * group));
      }
      int8_t* out = &q[m * k_padded];
      if (scheme.weight_bits == 8) {
        std::copy_n(row.get(), k_padded, out);
        continue;
      }
      for (int64_t i = 0; i < k_padded; i += 64) {  // blocks of 32 even values, then 32 odd ones
        for (int64_t j = 0; j < 32; ++j) {
          out[i + j] = row[i + 2 * j];
          out[i + 32 + j] = row[i + 2 * j + 1];
        }
      }
    }
  }
};

// Where the scales of integer group g lie: at g >> shift. Group sizes are powers of two, so their ratio is one; an
// operand with one scale per row always has index 0.
struct GroupShifts {
  int w, x;

  GroupShifts(const Scheme& scheme, int64_t k)
      : w(shift(scheme.group_size, scheme.acc_group(k))), x(shift(scheme.act_group_size, scheme.acc_group(k))) {}

  static int shift(int64_t group_size, int64_t acc_group) {
    return group_size == 0 ? 63 : std::countr_zero(static_cast<uint64_t>(group_size / acc_group));
  }
};

// Rule 4 of grouped schemes for one row of x and four rows of the weight. sums[g][r] are exact; where only one operand
// is grouped, the scale of the other one follows at the end.
template <bool WGrouped, bool XGrouped>
void scale_groups(const Weight& w, const Activations& x, const float* x_scales, const int64_t (&n)[kRows],
                  const GroupShifts& shifts, const int32_t* sums, float (&y)[kRows]) {
  const float* w_scales[kRows];
  for (int r = 0; r < kRows; ++r) w_scales[r] = w.scales + n[r] * w.groups;
  for (float& value : y) value = 0.0f;
  for (int64_t g = 0; g < x.groups; ++g) {
    for (int r = 0; r < kRows; ++r) {
      const float w_scale = WGrouped ? w_scales[r][g >> shifts.w] : 1.0f;
      const float scale = XGrouped ? w_scale * x_scales[g >> shifts.x] : w_scale;
      y[r] = y[r] + static_cast<float>(sums[g * kRows + r]) * scale;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if (!WGrouped) y[r] = y[r] * w_scales[r][0];
    if (!XGrouped) y[r] = y[r] * x_scales[0];
  }
}

// Turns the kernel's raw sums into exact ones: raw - offset * sum(x), offset being the shift of the bytes, 8 for
// symmetric nibbles, or the zero point. The raw sums may have wrapped modulo 2^32; the difference cannot.
void correct(const Weight& w, const Activations& x, int64_t m, const int64_t (&n)[kRows], int shift,
             const GroupShifts& shifts, int32_t* sums) {
  const int32_t* x_sums = &x.sums[m * x.groups];
  const auto subtract = [](int32_t& sum, int offset, int32_t x_sum) {
    const uint32_t correction = static_cast<uint32_t>(offset) * static_cast<uint32_t>(x_sum);
    sum = static_cast<int32_t>(static_cast<uint32_t>(sum) - correction);
  };
  if (w.zeros == nullptr) {
    for (int64_t g = 0; g < x.groups; ++g) {
      for (int r = 0; r < kRows; ++r) subtract(sums[g * kRows + r], shift, x_sums[g]);
    }
    return;
  }
  const uint8_t* zeros[kRows];
  for (int r = 0; r < kRows; ++r) zeros[r] = w.zeros + n[r] * w.groups;
  for (int64_t g = 0; g < x.groups; ++g) {
    for (int r = 0; r < kRows; ++r) subtract(sums[g * kRows + r], zeros[r][g >> shifts.w], x_sums[g]);
  }
}

void combine(const Weight& w, const Activations& x, int64_t m, const int64_t (&n)[kRows], int shift,
             const GroupShifts& shifts, int32_t* sums, float (&y)[kRows]) {
  const float* x_scales = &x.scales[m * x.act_groups];
  if (shift != 0 || w.zeros != nullptr) correct(w, x, m, n, shift, shifts, sums);
  const bool w_grouped = w.scheme.group_size != 0, x_grouped = w.scheme.act_group_size != 0;
  if (w_grouped && x_grouped) {
    scale_groups<true, true>(w, x, x_scales, n, shifts, sums, y);
  } else if (w_grouped) {
    scale_groups<true, false>(w, x, x_scales, n, shifts, sums, y);
  } else if (x_grouped) {
    scale_groups<false, true>(w, x, x_scales, n, shifts, sums, y);
  } else {
    for (int r = 0; r < kRows; ++r) y[r] = static_cast<float>(sums[r]) * (x_scales[0] * w.scales[n[r]]);
  }
}

// Writes y[M, count] (columns n0 .. n0 + count of the output) after adding the bias.
void store_columns(const Kernels& kernels, Buffer<float>& y, int64_t rows, int64_t count, int64_t n0, int64_t n,
                   const float* bias, Output out) {
  for (int64_t m = 0; m < rows; ++m) {
    float* row = &y[m * count];
    if (bias != nullptr) {
      for (int64_t j = 0; j < count; ++j) row[j] = row[j] + bias[n0 + j];
    }
    char* target = static_cast<char*>(out.data) + (m * n + n0) * size_of(out.dtype);
    kernels.from_float(row, count, out.dtype, target);
  }
}

}  // namespace

void int_dot(const Matrix& x, const Weight& w, const float* bias, Output out, const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const Scheme& scheme = w.scheme;
  const Activations activations(kernels, x, scheme);
  const int64_t group = scheme.acc_group(w.k);
  const int shift = scheme.weight_bits == 8 ? kernels.dot_shift : 8;
  const GroupShifts shifts(scheme, w.k);

  parallel(div_up(w.n, kRows), [&](int64_t begin, int64_t end) {
    const int64_t n0 = begin * kRows, count = std::min(end * kRows, w.n) - n0;
    Buffer<int32_t> sums(activations.groups * kRows);
    Buffer<float> y(x.rows * count);
    for (int64_t j = 0; j < count; j += kRows) {
      int64_t n[kRows];
      const uint8_t* rows[kRows];
      for (int r = 0; r < kRows; ++r) {
        n[r] = std::min(n0 + j + r, w.n - 1);  // the last block may repeat a row
        rows[r] = w.row(n[r]);
      }
      for (int64_t m = 0; m < x.rows; ++m) {
        const int8_t* q = &activations.q[m * activations.k_padded];
        if (scheme.weight_bits == 8) {
          kernels.dot_int8(q, reinterpret_cast<const int8_t* const*>(rows), w.k, group, sums.get());
        } else {
          kernels.dot_int4(q, rows, w.k, group, sums.get());
        }
        float values[kRows];
        combine(w, activations, m, n, shift, shifts, sums.get(), values);
        std::copy_n(values, std::min<int64_t>(kRows, count - j), &y[m * count + j]);
      }
    }
    store_columns(kernels, y, x.rows, count, n0, w.n, bias, out);
  });
}

void float_dot(const Matrix& x, const Weight& w, const float* bias, Output out, const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  Buffer<float> floats(x.rows * w.k);
  for (int64_t m = 0; m < x.rows; ++m) kernels.to_float(x.row(m), x.dtype, w.k, &floats[m * w.k]);

  parallel(w.n, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    Buffer<int8_t> integers(w.k);
    Buffer<float> row(w.k), y(x.rows * count);
    for (int64_t j = 0; j < count; ++j) {
      dequantize_row(kernels, w, begin + j, 0, w.k, integers.get(), row.get());
      for (int64_t m = 0; m < x.rows; ++m) y[m * count + j] = kernels.dot_float(&floats[m * w.k], row.get(), w.k);
    }
    store_columns(kernels, y, x.rows, count, begin, w.n, bias, out);
  });
}

}  // namespace qk
