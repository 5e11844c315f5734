// Few rows of x and a grouped weight: rows of the weight are read in streams (NOTE [streams] in row_dot.cpp), as they
// are stored, with their scales and zero points; the groups of kCombinedRows rows are then scaled and added side by
// side. Bound by memory bandwidth; nothing is packed.
#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/rows.h"

namespace qk {
namespace {

// Rows of x are quantized by several threads only if there are as many values as this.
constexpr int64_t kMinParallelValues = 1 << 16;
constexpr int64_t kNibbleBlock = 128;  // see GroupDotKernels

// The quantized rows of x.
struct GroupedRows {
  int64_t k_padded, groups, groups_padded, act_groups;
  Buffer<int8_t> q;            // [M, k_padded]
  Buffer<int32_t> sums;        // [M, groups_padded]: of q
  Buffer<float> scales;        // [M, act_groups]
  Buffer<float> group_scales;  // [M, groups_padded], grouped activations only

  GroupedRows(const Kernels& kernels, const Matrix& x, const Scheme& scheme, const Parallel& parallel)
      : k_padded(round_up(x.cols, kernels.group_dots->k_step)),
        groups(div_up(x.cols, scheme.acc_group(x.cols))),
        groups_padded(round_up(div_up(k_padded, scheme.acc_group(x.cols)), 16)),
        act_groups(scheme.act_groups(x.cols)),
        q(x.rows * k_padded),
        sums(x.rows * groups_padded),
        scales(x.rows * act_groups),
        group_scales(scheme.act_group_size != 0 ? x.rows * groups_padded : 0) {
    const auto quantize = [&](int64_t begin, int64_t end) { quantize_rows(kernels, x, scheme, begin, end); };
    if (x.rows * x.cols < kMinParallelValues) {
      quantize(0, x.rows);
    } else {
      parallel(x.rows, quantize);
    }
  }

 private:
  void quantize_rows(const Kernels& kernels, const Matrix& x, const Scheme& scheme, int64_t begin, int64_t end) {
    const int64_t k = x.cols, group = scheme.acc_group(k), act_group = scheme.act_group(k);
    Buffer<float> floats(k);
    Buffer<int8_t> row(k_padded);
    for (int64_t m = begin; m < end; ++m) {
      std::fill_n(row.get() + k, k_padded - k, int8_t{0});
      float* row_scales = &scales[m * act_groups];
      quantize_row(kernels, x, m, act_group, row.get(), row_scales, floats.get());
      int32_t* row_sums = &sums[m * groups_padded];
      for (int64_t g = 0; g < groups; ++g) row_sums[g] = kernels.sum(&row[g * group], std::min(group, k - g * group));
      std::fill(row_sums + groups, row_sums + groups_padded, 0);
      if (scheme.act_group_size != 0) {
        float* expanded = &group_scales[m * groups_padded];
        for (int64_t g = 0; g < groups; ++g) expanded[g] = row_scales[g * group / act_group];
        std::fill(expanded + groups, expanded + groups_padded, 0.0f);
      }
      int8_t* out = &q[m * k_padded];
      if (scheme.weight_bits == 8) {
        std::copy_n(row.get(), k_padded, out);
        continue;
      }
      for (int64_t i = 0; i < k_padded; i += kNibbleBlock) {
        for (int64_t j = 0; j < kNibbleBlock / 2; ++j) {
          out[i + j] = row[i + 2 * j];
          out[i + kNibbleBlock / 2 + j] = row[i + 2 * j + 1];
        }
      }
    }
  }
};

// The scales and zero points of kCombinedRows rows of the weight for each group of the sums: as they are stored, or
// repeated where several groups of the sums share one.
class RowGroups {
 public:
  RowGroups(const Weight& w, int64_t groups)
      : w_(w),
        groups_(groups),
        group_(w.scheme.acc_group(w.k)),
        stored_(w.groups == groups),
        scales_(stored_ ? 0 : kCombinedRows * groups),
        zeros_(stored_ || w.zeros == nullptr ? 0 : kCombinedRows * groups) {}

  // Row r is row n[r] of the weight.
  void load(const int64_t (&n)[kCombinedRows]) {
    for (int r = 0; r < kCombinedRows; ++r) {
      const int64_t at = n[r] * w_.groups;
      if (w_.scheme.group_size != 0) scale_rows_[r] = expand(w_.scales + at, &scales_[r * groups_]);
      if (w_.zeros != nullptr) zero_rows_[r] = expand(w_.zeros + at, &zeros_[r * groups_]);
    }
  }

  const float* const* scales() const { return w_.scheme.group_size != 0 ? scale_rows_ : nullptr; }
  const uint8_t* const* zeros() const { return w_.zeros != nullptr ? zero_rows_ : nullptr; }

 private:
  template <class T>
  const T* expand(const T* stored, T* expanded) const {
    if (stored_) return stored;
    for (int64_t g = 0; g < groups_; ++g) expanded[g] = stored[g * group_ / w_.group];
    return expanded;
  }

  const Weight& w_;
  int64_t groups_, group_;
  bool stored_;
  Buffer<float> scales_;
  Buffer<uint8_t> zeros_;
  const float* scale_rows_[kCombinedRows];
  const uint8_t* zero_rows_[kCombinedRows];
};

}  // namespace

void int_group_dot(const Kernels& kernels, const Matrix& x, const Weight& w, const float* bias, Output out,
                   const Parallel& parallel) {
  const GroupDotKernels& dots = *kernels.group_dots;
  const Scheme& scheme = w.scheme;
  const bool int4 = scheme.weight_bits == 4, w_grouped = scheme.group_size != 0, x_grouped = scheme.act_group_size != 0;
  const GroupedRows rows(kernels, x, scheme, parallel);
  const int64_t stride = rows.groups_padded, row_sums = kCombinedRows * stride;
  constexpr int kTogether = kCombinedRows / kGroupDotStreams;  // rows of a stream

  parallel(div_up(w.n, kCombinedRows), [&](int64_t begin, int64_t end) {
    const int64_t n_begin = begin * kCombinedRows, count = std::min(end * kCombinedRows, w.n) - n_begin;
    const int64_t stream = (end - begin) * kTogether;  // rows from one stream to the next, see NOTE [streams]
    RowGroups groups(w, rows.groups);
    Buffer<int32_t> sums(kGroupDotRows * row_sums);  // [rows of x, kCombinedRows, groups_padded]
    Buffer<float> y(x.rows * count);
    for (int64_t j = 0; j < stream; j += kTogether) {
      // Rows i * kGroupDotStreams + s are row j + i of stream s.
      int64_t n[kCombinedRows];
      const uint8_t* w_rows[kCombinedRows];
      for (int64_t r = 0; r < kCombinedRows; ++r) {
        n[r] = std::min(n_begin + r % kGroupDotStreams * stream + j + r / kGroupDotStreams, w.n - 1);
        w_rows[r] = w.row(n[r]);
      }
      groups.load(n);
      for (int64_t m0 = 0, done; m0 < x.rows; m0 += done) {
        done = x.rows - m0 >= kGroupDotRows ? kGroupDotRows : 1;
        for (int64_t r = 0; r < kCombinedRows; r += kGroupDotStreams) {
          (int4 ? dots.dot_int4 : dots.dot_int8)({
              .x = &rows.q[m0 * rows.k_padded],
              .x_stride = rows.k_padded,
              .rows = static_cast<int>(done),
              .w = &w_rows[r],
              .k = w.k,
              .group = scheme.acc_group(w.k),
              .sums = &sums[r * stride],
              .sums_stride = stride,
          });
        }
        for (int64_t i = 0; i < done; ++i) {
          const int64_t m = m0 + i;
          float values[kCombinedRows];
          dots.combine(
              {
                  .groups = rows.groups,
                  .sums = &sums[i * row_sums],
                  .sums_stride = stride,
                  .zeros = groups.zeros(),
                  .zero = int4 ? 8 : kernels.dot_shift,
                  .x_sums = &rows.sums[m * stride],
                  .w_scales = groups.scales(),
                  .x_scales = x_grouped ? &rows.group_scales[m * stride] : nullptr,
              },
              values);
          for (int r = 0; r < kCombinedRows; ++r) {
            float value = values[r];
            if (!w_grouped) value = value * w.scales[n[r]];
            if (!x_grouped) value = value * rows.scales[m];
            if (bias != nullptr) value = value + bias[n[r]];
            y[m * count + n[r] - n_begin] = value;
          }
        }
      }
    }
    for (int64_t m = 0; m < x.rows; ++m) {
      char* target = static_cast<char*>(out.data) + (m * w.n + n_begin) * size_of(out.dtype);
      kernels.from_float(&y[m * count], count, out.dtype, target);
    }
  });
}

}  // namespace qk
