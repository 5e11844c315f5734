// Few rows of x: every weight row is read once, as it is stored, and multiplied with all of them. Bound by memory
// bandwidth; nothing is packed. Four weight rows go together, so that one load of x serves four products.
//
// NOTE [read streams]. The rows that go together are not neighbours: a thread reads its part of the weight as four
// streams, a quarter of the part apart. Prefetchers follow long streams across pages, and memory delivers more to
// several of them than to one; rows side by side would be four short streams that end every time a row does.
#include <algorithm>
#include <bit>

#include "cpu/buffer.h"
#include "cpu/drivers/activations.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/minima.h"
#include "cpu/drivers/rows.h"

namespace qk {
namespace {

constexpr int kWeightRows = 4;
constexpr int kXRows = 4;         // at most, for one call of a dot kernel
constexpr int64_t kPadding = 64;  // see RowDotKernels

// kWeightRows rows of the weight, with the scales and the zero points of each group of the sums.
class DotWeightRows {
 public:
  const uint8_t* rows[kWeightRows];
  const float* scales[kWeightRows];

  DotWeightRows(const Kernels& kernels, const Weight& w, int64_t groups)
      : kernels_(kernels),
        w_(w),
        group_(w.scheme.acc_group(w.k)),
        groups_(groups),
        group_scales_(w.scheme.group_size != 0 ? groups * kWeightRows : 0),
        group_zeros_(w.zeros != nullptr ? groups * kWeightRows : 0),
        expanded_(groups * kWeightRows) {}

  // Rows n0 + r * stride; past the end the last one is repeated.
  void load(int64_t n0, int64_t stride) {
    int64_t n[kWeightRows];
    for (int r = 0; r < kWeightRows; ++r) {
      n[r] = std::min(n0 + r * stride, w_.n - 1);
      rows[r] = w_.row(n[r]);
      scales[r] = w_.scales + n[r] * w_.groups;
    }
    if (w_.scheme.group_size != 0) {
      for (int r = 0; r < kWeightRows; ++r) expand(scales[r], reinterpret_cast<float*>(&expanded_[r * groups_]));
      interleave(group_scales_.get());
    }
    if (w_.zeros != nullptr) {
      for (int r = 0; r < kWeightRows; ++r) expand(w_.zeros + n[r] * w_.groups, &expanded_[r * groups_]);
      interleave(group_zeros_.get());
    }
  }

  // [groups, kWeightRows]; null: one scale for the row, or no zero points.
  const float* group_scales() const { return w_.scheme.group_size != 0 ? group_scales_.get() : nullptr; }
  const int32_t* group_zeros() const { return w_.zeros != nullptr ? group_zeros_.get() : nullptr; }

 private:
  template <class T, class U>
  void expand(const T* stored, U* out) const {
    expand_groups(stored, w_.group, group_, groups_, out);
  }

  void interleave(void* panel) {
    const uint32_t* sources[kWeightRows];
    for (int r = 0; r < kWeightRows; ++r) sources[r] = &expanded_[r * groups_];
    kernels_.panels.interleave(sources, kWeightRows, groups_, static_cast<uint32_t*>(panel));
  }

  const Kernels& kernels_;
  const Weight& w_;
  int64_t group_, groups_;
  Buffer<float> group_scales_;
  Buffer<int32_t> group_zeros_;
  Buffer<uint32_t> expanded_;
};

// The quantized rows of x, in the layout the dot kernels read. What belongs to a group stands there kWeightRows times,
// once for each row of the weight.
class RowDotOperand : public LinearOperand {
 public:
  RowDotOperand(const Kernels& kernels, const LinearInput& input, const Weight& w, const Parallel& parallel)
      : kernels_(kernels),
        rows_(input.x.rows),
        k_padded_(round_up(w.k, kPadding)),
        groups_(div_up(w.k, w.scheme.acc_group(w.k))),
        act_groups_(w.scheme.act_groups(w.k)),
        takes_x4_(kernels.dots.dot_int8_x4 != nullptr && w.scheme.weight->in_place() && !w.scheme.grouped() &&
                  rows_ >= kXRows),
        q_(rows_ * k_padded_),
        wide_(takes_x4_ && kernels.dots.x4_bytes == 2 ? rows_ * k_padded_ : 0),
        sums_(rows_ * groups_ * kWeightRows),
        scales_(rows_ * act_groups_),
        group_scales_(w.scheme.act_group_size != 0 ? rows_ * groups_ * kWeightRows : 0),
        x_sums_(kernels, w, rows_) {
    quantize_rows_parallel(input.x, parallel,
                           [&](int64_t begin, int64_t end) { quantize(input, w.scheme, begin, end); });
  }

  void multiply(const Weight& w, const float* bias, const Output& out, const Parallel& parallel) const override;

 private:
  void quantize(const LinearInput& input, const Scheme& scheme, int64_t m_begin, int64_t m_end) {
    const int64_t k = input.x.cols, group = scheme.acc_group(k), act_group = scheme.act_group(k);
    IntRows read(kernels_, input, act_group);
    DotLayout arrange(k, k_padded_, kernels_.dots.of(*scheme.weight).x_block);
    for (int64_t m = m_begin; m < m_end; ++m) {
      float* row_scales = &scales_[m * act_groups_];
      const int8_t* row = read(m, row_scales);
      x_sums_.set(m, row, row_scales);
      for (int64_t g = 0; g < groups_; ++g) {
        const int64_t begin = g * group, at = (m * groups_ + g) * kWeightRows;
        std::fill_n(&sums_[at], kWeightRows, kernels_.elementwise.sum(row + begin, std::min(group, k - begin)));
      }
      if (scheme.act_group_size != 0) {
        for (int r = 0; r < kWeightRows; ++r)
          expand_groups(row_scales, act_group, group, groups_, &group_scales_[m * groups_ * kWeightRows + r],
                        kWeightRows);
      }
      int8_t* out = &q_[m * k_padded_];
      arrange(row, out);
      if (takes_x4_ && kernels_.dots.x4_bytes == 2) std::copy_n(out, k_padded_, &wide_[m * k_padded_]);
    }
  }

  // The sums of rows m, m + 1, ... of x with kWeightRows rows of the weight; returns how many rows it did.
  int64_t dot(const Weight& w, const DotWeightRows& rows, int64_t m, int32_t* sums) const {
    const int8_t* q = &q_[m * k_padded_];
    if (takes_x4_ && rows_ - m >= kXRows) {
      const void* block = kernels_.dots.x4_bytes == 1 ? static_cast<const void*>(q) : &wide_[m * k_padded_];
      kernels_.dots.dot_int8_x4(block, k_padded_, rows.rows, w.k, sums);
      return kXRows;
    }
    kernels_.dots.of(*w.scheme.weight).dot(q, rows.rows, w.k, w.scheme.acc_group(w.k), sums);
    return 1;
  }

  // y[r] from the sums of row m of x with kWeightRows rows of the weight: rule 4.
  void finish(const Weight& w, const DotWeightRows& rows, int64_t m, const int32_t* sums,
              float (&y)[kWeightRows]) const {
    const bool w_grouped = w.scheme.group_size != 0, x_grouped = w.scheme.act_group_size != 0;
    const float x_scale = scales_[m * act_groups_];
    const int zero = w.scheme.stored_zero() + kernels_.dots.of(*w.scheme.weight).shift;
    const int32_t* x_sums = &sums_[m * groups_ * kWeightRows];
    if (!w_grouped && !x_grouped) {
      for (int r = 0; r < kWeightRows; ++r) {
        const auto offset = static_cast<uint32_t>(w.zeros != nullptr ? rows.group_zeros()[r] : zero);
        const uint32_t sum = static_cast<uint32_t>(sums[r]) - offset * static_cast<uint32_t>(x_sums[r]);
        y[r] = static_cast<float>(static_cast<int32_t>(sum)) * (x_scale * rows.scales[r][0]);
      }
      return;
    }
    kernels_.dots.combine(
        {
            .groups = groups_,
            .sums = sums,
            .zeros = rows.group_zeros(),
            .zero = zero,
            .x_sums = x_sums,
            .w_scales = rows.group_scales(),
            .x_scales = x_grouped ? &group_scales_[m * groups_ * kWeightRows] : nullptr,
        },
        y);
    for (int r = 0; r < kWeightRows; ++r) {
      if (!w_grouped) y[r] = y[r] * rows.scales[r][0];
      if (!x_grouped) y[r] = y[r] * x_scale;
    }
  }

  const Kernels& kernels_;
  int64_t rows_, k_padded_, groups_, act_groups_;
  bool takes_x4_;               // blocks of kXRows rows take dot_int8_x4
  Buffer<int8_t> q_;            // [M, k_padded]
  Buffer<int16_t> wide_;        // [M, k_padded]: the same, where dot_int8_x4 takes int16
  Buffer<int32_t> sums_;        // [M, groups, kWeightRows]: of q, for the shift or the zero points
  Buffer<float> scales_;        // [M, act_groups]
  Buffer<float> group_scales_;  // [M, groups, kWeightRows], grouped activations only
  XSums x_sums_;
};

// Writes y[M, count] (columns n0 .. n0 + count of the output) after adding the bias.
void store_columns(const Kernels& kernels, Buffer<float>& y, int64_t rows, int64_t count, int64_t n0, int64_t n,
                   const float* bias, Output out) {
  for (int64_t m = 0; m < rows; ++m) {
    float* row = &y[m * count];
    if (bias != nullptr) {
      for (int64_t j = 0; j < count; ++j) row[j] = row[j] + bias[n0 + j];
    }
    void* target = out.at(m, n0, n);
    kernels.elementwise.from_float(row, count, out.dtype, target);
  }
}

void RowDotOperand::multiply(const Weight& w, const float* bias, const Output& out, const Parallel& parallel) const {
  parallel(div_up(w.n, kWeightRows), [&](int64_t begin, int64_t end) {
    const int64_t n0 = begin * kWeightRows, count = std::min(end * kWeightRows, w.n) - n0;
    DotWeightRows rows(kernels_, w, groups_);
    Buffer<int32_t> sums(kXRows * groups_ * kWeightRows);
    Buffer<float> y(rows_ * count);
    const int64_t apart = end - begin;  // see NOTE [read streams]
    for (int64_t j = 0; j < apart; ++j) {
      rows.load(n0 + j, apart);
      for (int64_t m = 0; m < rows_;) {
        const int64_t done = dot(w, rows, m, sums.get());
        for (int64_t i = 0; i < done; ++i, ++m) {
          float values[kWeightRows];
          finish(w, rows, m, &sums[i * groups_ * kWeightRows], values);
          for (int64_t r = 0; r < kWeightRows && j + r * apart < count; ++r) y[m * count + j + r * apart] = values[r];
        }
      }
    }
    add_minima(kernels_, x_sums_, w, n0, rows_, count, y.get());
    store_columns(kernels_, y, rows_, count, n0, w.n, bias, out);
  });
}

class FloatDotOperand : public LinearOperand {
 public:
  FloatDotOperand(const Kernels& kernels, const LinearInput& input, const Weight&, const Parallel&)
      : kernels_(kernels), rows_(input.x.rows), floats_(input.x.rows * input.x.cols) {
    kernels.elementwise.to_float(input.x.data, input.x.dtype, input.x.rows * input.x.cols, floats_.get());
  }

  void multiply(const Weight& w, const float* bias, const Output& out, const Parallel& parallel) const override {
    parallel(w.n, [&](int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      Buffer<int8_t> integers(w.k);
      Buffer<float> row(w.k), y(rows_ * count);
      for (int64_t j = 0; j < count; ++j) {
        dequantize_row(kernels_, w, begin + j, 0, w.k, integers.get(), row.get());
        for (int64_t m = 0; m < rows_; ++m)
          y[m * count + j] = kernels_.dots.dot_float(&floats_[m * w.k], row.get(), w.k);
      }
      store_columns(kernels_, y, rows_, count, begin, w.n, bias, out);
    });
  }

 private:
  const Kernels& kernels_;
  int64_t rows_;
  Buffer<float> floats_;  // [M, k]
};

}  // namespace

const LinearDriver kRowDot = {
    .name = "row_dot",
    .reason = "few rows of x: each row of the weight is read once, as it is stored, and nothing is packed",
    .accepts = [](const Kernels& kernels, const Scheme& scheme,
                  int64_t m) { return scheme.int_activations() && few_rows(kernels, scheme, m); },
    .prepare = prepare<RowDotOperand>,
};

const LinearDriver kFloatDot = {
    .name = "float_dot",
    .reason = "few rows of x: each row of the weight is read once and made float, and nothing is packed",
    .accepts = [](const Kernels& kernels, const Scheme& scheme,
                  int64_t m) { return !scheme.int_activations() && few_rows(kernels, scheme, m); },
    .prepare = prepare<FloatDotOperand>,
};

}  // namespace qk
