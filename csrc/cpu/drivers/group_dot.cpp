// Few rows of x and a grouped weight: rows of the weight are read in streams (NOTE [read streams] in row_dot.cpp), as
// they are stored, with their scales and zero points; the groups of kCombinedRows rows are then scaled and added side
// by side. Bound by memory bandwidth; nothing is packed.
#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/drivers/activations.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/minima.h"
#include "cpu/drivers/rows.h"

namespace qk {
namespace {

// The scales and zero points of kCombinedRows rows of the weight for each group of the sums: as they are stored, or
// repeated where several groups of the sums share one.
class GroupDotWeightGroups {
 public:
  GroupDotWeightGroups(const Weight& w, int64_t groups)
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
    expand_groups(stored, w_.group, group_, groups_, expanded);
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

// The quantized rows of x.
class GroupDotOperand : public LinearOperand {
 public:
  GroupDotOperand(const Kernels& kernels, const LinearInput& input, const Weight& w, const Parallel& parallel)
      : kernels_(kernels),
        rows_(input.x.rows),
        k_padded_(round_up(w.k, kernels.group_dots->k_step)),
        groups_(div_up(w.k, w.scheme.acc_group(w.k))),
        groups_padded_(round_up(div_up(k_padded_, w.scheme.acc_group(w.k)), 16)),
        act_groups_(w.scheme.act_groups(w.k)),
        q_(rows_ * k_padded_),
        sums_(rows_ * groups_padded_),
        scales_(rows_ * act_groups_),
        group_scales_(w.scheme.act_group_size != 0 ? rows_ * groups_padded_ : 0),
        x_sums_(kernels, w, rows_) {
    quantize_rows_parallel(input.x, parallel,
                           [&](int64_t begin, int64_t end) { quantize(input, w.scheme, begin, end); });
  }

  void multiply(const Weight& w, const float* bias, const Output& out, const Parallel& parallel) const override;

 private:
  void quantize(const LinearInput& input, const Scheme& scheme, int64_t m_begin, int64_t m_end) {
    const int64_t k = input.x.cols, group = scheme.acc_group(k), act_group = scheme.act_group(k);
    IntRows read(kernels_, input, act_group);
    DotLayout arrange(k, k_padded_, kernels_.group_dots->of(*scheme.weight).x_block);
    for (int64_t m = m_begin; m < m_end; ++m) {
      float* row_scales = &scales_[m * act_groups_];
      const int8_t* row = read(m, row_scales);
      x_sums_.set(m, row, row_scales);
      int32_t* row_sums = &sums_[m * groups_padded_];
      for (int64_t g = 0; g < groups_; ++g)
        row_sums[g] = kernels_.elementwise.sum(row + g * group, std::min(group, k - g * group));
      std::fill(row_sums + groups_, row_sums + groups_padded_, 0);
      if (scheme.act_group_size != 0) {
        float* expanded = &group_scales_[m * groups_padded_];
        expand_groups(row_scales, act_group, group, groups_, expanded);
        std::fill(expanded + groups_, expanded + groups_padded_, 0.0f);
      }
      arrange(row, &q_[m * k_padded_]);
    }
  }

  const Kernels& kernels_;
  int64_t rows_, k_padded_, groups_, groups_padded_, act_groups_;
  Buffer<int8_t> q_;            // [M, k_padded]
  Buffer<int32_t> sums_;        // [M, groups_padded]: of q
  Buffer<float> scales_;        // [M, act_groups]
  Buffer<float> group_scales_;  // [M, groups_padded], grouped activations only
  XSums x_sums_;
};

void GroupDotOperand::multiply(const Weight& w, const float* bias, const Output& out, const Parallel& parallel) const {
  const GroupDotKernels& dots = *kernels_.group_dots;
  const Scheme& scheme = w.scheme;
  const auto dot = dots.of(*scheme.weight).dot;
  const bool w_grouped = scheme.group_size != 0, x_grouped = scheme.act_group_size != 0;
  const int64_t stride = groups_padded_, row_sums = kCombinedRows * stride;
  constexpr int kTogether = kCombinedRows / kGroupDotStreams;  // rows of a stream

  parallel(div_up(w.n, kCombinedRows), [&](int64_t begin, int64_t end) {
    const int64_t n_begin = begin * kCombinedRows, count = std::min(end * kCombinedRows, w.n) - n_begin;
    const int64_t apart = (end - begin) * kTogether;  // rows from one stream to the next, see NOTE [read streams]
    GroupDotWeightGroups groups(w, groups_);
    Buffer<int32_t> sums(kGroupDotRows * row_sums);  // [rows of x, kCombinedRows, groups_padded]
    Buffer<float> y(rows_ * count);
    for (int64_t j = 0; j < apart; j += kTogether) {
      // Rows i * kGroupDotStreams + s are row j + i of stream s.
      int64_t n[kCombinedRows];
      const uint8_t* w_rows[kCombinedRows];
      for (int64_t r = 0; r < kCombinedRows; ++r) {
        n[r] = std::min(n_begin + r % kGroupDotStreams * apart + j + r / kGroupDotStreams, w.n - 1);
        w_rows[r] = w.row(n[r]);
      }
      groups.load(n);
      for (int64_t m0 = 0, done; m0 < rows_; m0 += done) {
        done = rows_ - m0 >= kGroupDotRows ? kGroupDotRows : 1;
        for (int64_t r = 0; r < kCombinedRows; r += kGroupDotStreams) {
          dot({
              .x = &q_[m0 * k_padded_],
              .x_stride = k_padded_,
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
                  .groups = groups_,
                  .sums = &sums[i * row_sums],
                  .sums_stride = stride,
                  .zeros = groups.zeros(),
                  .zero = scheme.stored_zero() + kernels_.dots.of(*scheme.weight).shift,
                  .x_sums = &sums_[m * stride],
                  .w_scales = groups.scales(),
                  .x_scales = x_grouped ? &group_scales_[m * stride] : nullptr,
              },
              values);
          for (int r = 0; r < kCombinedRows; ++r) {
            float value = values[r];
            if (!w_grouped) value = value * w.scales[n[r]];
            if (!x_grouped) value = value * scales_[m];
            y[m * count + n[r] - n_begin] = value;
          }
        }
      }
    }
    add_minima(kernels_, x_sums_, w, n_begin, rows_, count, y.get());
    for (int64_t m = 0; m < rows_; ++m) {
      float* const row = &y[m * count];
      if (bias != nullptr) {
        for (int64_t j = 0; j < count; ++j) row[j] = row[j] + bias[n_begin + j];
      }
      kernels_.elementwise.from_float(row, count, out.dtype, out.at(m, n_begin, w.n));
    }
  });
}

}  // namespace

const LinearDriver kGroupDot = {
    .name = "group_dot",
    .reason =
        "few rows of x and a grouped scheme: each row of the weight is read once, as it is stored, and the groups "
        "of 16 rows are scaled side by side",
    .accepts =
        [](const Kernels& kernels, const Scheme& scheme, int64_t m) {
          return kernels.group_dots != nullptr && scheme.int_activations() && scheme.grouped() &&
                 few_rows(kernels, scheme, m);
        },
    .prepare = prepare<GroupDotOperand>,
};

}  // namespace qk
