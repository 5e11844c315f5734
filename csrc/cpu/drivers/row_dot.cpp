// Few rows of x: every weight row is read once, as it is stored, and multiplied with all of them. Bound by memory
// bandwidth; nothing is packed. Four weight rows go together, so that one load of x serves four products.
//
// NOTE [streams]. The rows that go together are not neighbours: a thread reads its part of the weight as four streams,
// a quarter of the part apart. Prefetchers follow long streams across pages, and memory delivers more to several of
// them than to one; rows side by side would be four short streams that end every time a row does.
#include <algorithm>
#include <bit>

#include "cpu/buffer.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/rows.h"

namespace qk {
namespace {

constexpr int kRows = 4;   // of the weight
constexpr int kXRows = 4;  // of x, at most, for one call of a dot kernel

// Rows of x are quantized by several threads only if there are as many values as this.
constexpr int64_t kMinParallelValues = 1 << 16;

// The quantized rows of x, in the layout the dot kernels read. What belongs to a group stands there kRows times, once
// for each row of the weight.
struct Activations {
  int64_t k_padded, groups, act_groups;
  Buffer<int8_t> q;            // [M, k_padded]
  Buffer<int16_t> wide;        // [M, k_padded]: the same, where dot_int8_x4 takes int16
  Buffer<int32_t> sums;        // [M, groups, kRows]: of q, for the shift or the zero points
  Buffer<float> scales;        // [M, act_groups]
  Buffer<float> group_scales;  // [M, groups, kRows], grouped activations only

  Activations(const Kernels& kernels, const Matrix& x, const Scheme& scheme, const Parallel& parallel)
      : k_padded(round_up(x.cols, 64)),
        groups(div_up(x.cols, scheme.acc_group(x.cols))),
        act_groups(scheme.act_groups(x.cols)),
        q(x.rows * k_padded),
        wide(wants_wide(kernels, x, scheme) ? x.rows * k_padded : 0),
        sums(x.rows * groups * kRows),
        scales(x.rows * act_groups),
        group_scales(scheme.act_group_size != 0 ? x.rows * groups * kRows : 0) {
    if (x.rows * x.cols < kMinParallelValues) {
      quantize(kernels, x, scheme, 0, x.rows);
    } else {
      parallel(x.rows, [&](int64_t begin, int64_t end) { quantize(kernels, x, scheme, begin, end); });
    }
  }

  // Whether blocks of kXRows rows of x take dot_int8_x4.
  static bool takes_x4(const Kernels& kernels, const Scheme& scheme) {
    return kernels.dot_int8_x4 != nullptr && scheme.weight_bits == 8 && !scheme.grouped();
  }

 private:
  static bool wants_wide(const Kernels& kernels, const Matrix& x, const Scheme& scheme) {
    return takes_x4(kernels, scheme) && kernels.x4_bytes == 2 && x.rows >= kXRows;
  }

  void quantize(const Kernels& kernels, const Matrix& x, const Scheme& scheme, int64_t m_begin, int64_t m_end) {
    const int64_t k = x.cols, group = scheme.acc_group(k), act_group = scheme.act_group(k);
    Buffer<float> floats(k);
    Buffer<int8_t> row(k_padded);
    for (int64_t m = m_begin; m < m_end; ++m) {
      std::fill_n(row.get(), k_padded, int8_t{0});
      float* row_scales = &scales[m * act_groups];
      quantize_row(kernels, float_row(kernels, x, m, floats.get()), k, act_group, row.get(), row_scales);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g * group, at = (m * groups + g) * kRows;
        std::fill_n(&sums[at], kRows, kernels.sum(&row[begin], std::min(group, k - begin)));
        if (scheme.act_group_size != 0) std::fill_n(&group_scales[at], kRows, row_scales[begin / act_group]);
      }
      int8_t* out = &q[m * k_padded];
      if (scheme.weight_bits == 8) {
        std::copy_n(row.get(), k_padded, out);
        if (wants_wide(kernels, x, scheme)) std::copy_n(row.get(), k_padded, &wide[m * k_padded]);
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

// kRows rows of the weight, with the scales and the zero points of each group of the sums.
class WeightRows {
 public:
  const uint8_t* rows[kRows];
  const float* scales[kRows];

  WeightRows(const Kernels& kernels, const Weight& w, int64_t groups)
      : kernels_(kernels),
        w_(w),
        groups_(groups),
        repeat_(w.scheme.group_size != 0 ? w.group / w.scheme.acc_group(w.k) : groups),
        group_scales_(w.scheme.group_size != 0 ? groups * kRows : 0),
        group_zeros_(w.zeros != nullptr ? groups * kRows : 0),
        expanded_(groups * kRows) {}

  // Rows n0 + r * stride; past the end the last one is repeated.
  void load(int64_t n0, int64_t stride) {
    int64_t n[kRows];
    for (int r = 0; r < kRows; ++r) {
      n[r] = std::min(n0 + r * stride, w_.n - 1);
      rows[r] = w_.row(n[r]);
      scales[r] = w_.scales + n[r] * w_.groups;
    }
    if (w_.scheme.group_size != 0) {
      for (int r = 0; r < kRows; ++r) expand(scales[r], r);
      interleave(reinterpret_cast<uint32_t*>(group_scales_.get()));
    }
    if (w_.zeros != nullptr) {
      for (int r = 0; r < kRows; ++r) expand(w_.zeros + n[r] * w_.groups, r);
      interleave(reinterpret_cast<uint32_t*>(group_zeros_.get()));
    }
  }

  // [groups, kRows]; null: one scale for the row, or no zero points.
  const float* group_scales() const { return w_.scheme.group_size != 0 ? group_scales_.get() : nullptr; }
  const int32_t* group_zeros() const { return w_.zeros != nullptr ? group_zeros_.get() : nullptr; }

 private:
  static uint32_t bits(float value) { return std::bit_cast<uint32_t>(value); }
  static uint32_t bits(uint8_t value) { return value; }

  // expanded[r][g] = the value of row r that group g of the sums takes: repeat_ of them share one.
  template <class T>
  void expand(const T* values, int r) {
    uint32_t* row = &expanded_[r * groups_];
    if (repeat_ == 1) {
      for (int64_t g = 0; g < groups_; ++g) row[g] = bits(values[g]);
      return;
    }
    for (int64_t g = 0; g < groups_; g += repeat_) {
      std::fill(row + g, row + std::min(g + repeat_, groups_), bits(*values++));
    }
  }

  void interleave(uint32_t* panel) {
    const uint32_t* sources[kRows];
    for (int r = 0; r < kRows; ++r) sources[r] = &expanded_[r * groups_];
    kernels_.interleave(sources, kRows, groups_, panel);
  }

  const Kernels& kernels_;
  const Weight& w_;
  int64_t groups_, repeat_;
  Buffer<float> group_scales_;
  Buffer<int32_t> group_zeros_;
  Buffer<uint32_t> expanded_;
};

// The sums of rows m, m + 1, ... of x, of which `left` are left, with kRows rows of the weight; returns how many it
// did.
int64_t dot(const Kernels& kernels, const Weight& w, const WeightRows& rows, const Activations& x, int64_t left,
            int64_t m, int32_t* sums) {
  const int8_t* q = &x.q[m * x.k_padded];
  const int64_t group = w.scheme.acc_group(w.k);
  if (w.scheme.weight_bits == 4) {
    kernels.dot_int4(q, rows.rows, w.k, group, sums);
    return 1;
  }
  const auto* bytes = reinterpret_cast<const int8_t* const*>(rows.rows);
  if (left >= kXRows && Activations::takes_x4(kernels, w.scheme)) {
    const void* block = kernels.x4_bytes == 1 ? static_cast<const void*>(q) : &x.wide[m * x.k_padded];
    kernels.dot_int8_x4(block, x.k_padded, bytes, w.k, sums);
    return kXRows;
  }
  kernels.dot_int8(q, bytes, w.k, group, sums);
  return 1;
}

// y[r] from the sums of row m of x with kRows rows of the weight: rule 4.
void finish(const Kernels& kernels, const Weight& w, const WeightRows& rows, const Activations& x, int64_t m,
            const int32_t* sums, float (&y)[kRows]) {
  const bool w_grouped = w.scheme.group_size != 0, x_grouped = w.scheme.act_group_size != 0;
  const float x_scale = x.scales[m * x.act_groups];
  const int zero = w.scheme.weight_bits == 8 ? kernels.dot_shift : 8;
  const int32_t* x_sums = &x.sums[m * x.groups * kRows];
  if (!w_grouped && !x_grouped) {
    for (int r = 0; r < kRows; ++r) {
      const auto offset = static_cast<uint32_t>(w.zeros != nullptr ? rows.group_zeros()[r] : zero);
      const uint32_t sum = static_cast<uint32_t>(sums[r]) - offset * static_cast<uint32_t>(x_sums[r]);
      y[r] = static_cast<float>(static_cast<int32_t>(sum)) * (x_scale * rows.scales[r][0]);
    }
    return;
  }
  kernels.combine(
      {
          .groups = x.groups,
          .sums = sums,
          .zeros = rows.group_zeros(),
          .zero = zero,
          .x_sums = x_sums,
          .w_scales = rows.group_scales(),
          .x_scales = x_grouped ? &x.group_scales[m * x.groups * kRows] : nullptr,
      },
      y);
  for (int r = 0; r < kRows; ++r) {
    if (!w_grouped) y[r] = y[r] * rows.scales[r][0];
    if (!x_grouped) y[r] = y[r] * x_scale;
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

void int_dot(const Kernels& kernels, const Matrix& x, const Weight& w, const float* bias, Output out,
             const Parallel& parallel) {
  if (takes_tile_dot(kernels, w.scheme, x.rows)) return int_tile_dot(kernels, x, w, bias, out, parallel);
  if (kernels.group_dots != nullptr && w.scheme.grouped()) return int_group_dot(kernels, x, w, bias, out, parallel);
  const Activations activations(kernels, x, w.scheme, parallel);

  parallel(div_up(w.n, kRows), [&](int64_t begin, int64_t end) {
    const int64_t n0 = begin * kRows, count = std::min(end * kRows, w.n) - n0;
    WeightRows rows(kernels, w, activations.groups);
    Buffer<int32_t> sums(kXRows * activations.groups * kRows);
    Buffer<float> y(x.rows * count);
    const int64_t stream = end - begin;
    for (int64_t j = 0; j < stream; ++j) {
      rows.load(n0 + j, stream);
      for (int64_t m = 0; m < x.rows;) {
        const int64_t done = dot(kernels, w, rows, activations, x.rows - m, m, sums.get());
        for (int64_t i = 0; i < done; ++i, ++m) {
          float values[kRows];
          finish(kernels, w, rows, activations, m, &sums[i * activations.groups * kRows], values);
          for (int64_t r = 0; r < kRows && j + r * stream < count; ++r) y[m * count + j + r * stream] = values[r];
        }
      }
    }
    store_columns(kernels, y, x.rows, count, n0, w.n, bias, out);
  });
}

void float_dot(const Kernels& kernels, const Matrix& x, const Weight& w, const float* bias, Output out,
               const Parallel& parallel) {
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
