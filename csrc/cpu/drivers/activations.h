// Rows of x as integers, for the drivers that pack them: quantized when they are read, or before.
#pragma once

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/drivers/rows.h"

namespace qk {

// Rows of x, quantized on the way. Each thread has its own.
class QuantizeRows {
 public:
  QuantizeRows(const Kernels& kernels, const Scheme& scheme, const Matrix& x)
      : kernels_(kernels), x_(x), act_group_(scheme.act_group(x.cols)), floats_(x.cols), q_(x.cols) {}

  int64_t scales() const { return div_up(x_.cols, act_group_); }  // of a row

  // The integers of row m, with its scales.
  const int8_t* operator()(int64_t m, float* scales) {
    quantize_row(kernels_, x_, m, act_group_, q_.get(), scales, floats_.get());
    return q_.get();
  }

 private:
  const Kernels& kernels_;
  const Matrix& x_;
  int64_t act_group_;
  Buffer<float> floats_;
  Buffer<int8_t> q_;
};

// Rows that are quantized already, with `groups` scales each.
class StoredRows {
 public:
  explicit StoredRows(const QuantizedRows& rows, int64_t groups = 1) : rows_(rows), groups_(groups) {}

  int64_t scales() const { return groups_; }

  const int8_t* operator()(int64_t m, float* scales) const {
    std::copy_n(rows_.scales + m * groups_, groups_, scales);
    return rows_.data + m * rows_.cols;
  }

 private:
  const QuantizedRows& rows_;
  int64_t groups_;
};

}  // namespace qk
