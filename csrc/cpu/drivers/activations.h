// Rows of x as integers, for the drivers that lay them out anew.
#pragma once

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/patches.h"
#include "cpu/drivers/rows.h"

namespace qk {

// Reads rows of x with a scale for each `group` values: quantizes them, unless that has been done, or gathers patches.
// Each thread has its own.
class IntRows {
 public:
  IntRows(const Kernels& kernels, const LinearInput& input, int64_t group)
      : kernels_(kernels),
        input_(input),
        group_(group),
        groups_(input.x.cols == 0 ? 1 : div_up(input.x.cols, group)),  // a row without columns has a scale, too
        floats_(input.scales == nullptr && input.patches == nullptr ? input.x.cols : 0),
        integers_(input.scales == nullptr ? input.x.cols + kPatchSlack : 0) {}

  int64_t groups() const { return groups_; }

  // The integers of row m; its scales go to scales[groups()].
  const int8_t* operator()(int64_t m, float* scales) {
    if (input_.index != nullptr) m = input_.index[m];
    if (input_.scales != nullptr) {  // q is null where x has no columns
      std::copy_n(input_.scales + m * groups_, groups_, scales);
      return input_.q + m * input_.x.cols;
    }
    if (input_.patches != nullptr) {
      *scales = input_.patches->scale(m);
      return reinterpret_cast<const int8_t*>(input_.patches->row(m, reinterpret_cast<char*>(integers_.get())));
    }
    if (input_.x_scale != nullptr) {
      quantize_row_static(kernels_, input_.x, m, *input_.x_scale, integers_.get(), scales, floats_.get());
    } else {
      quantize_row(kernels_, input_.x, m, group_, integers_.get(), scales, floats_.get());
    }
    return integers_.get();
  }

 private:
  const Kernels& kernels_;
  const LinearInput& input_;
  int64_t group_, groups_;
  Buffer<float> floats_;
  Buffer<int8_t> integers_;
};

// Calls f(begin, end) for ranges of the rows of x: by several threads only where there is enough to do for them.
template <class F>
void quantize_rows_parallel(const Matrix& x, const Parallel& parallel, const F& f) {
  constexpr int64_t kMinValues = kMinWorkPerThread / 4;
  if (x.rows * x.cols < kMinValues) {
    f(0, x.rows);
  } else {
    parallel(x.rows, f);
  }
}

// What belongs to groups of `stored_group` k, such as scales, for each of `groups` groups of `group` k, which are as
// large or parts of them.
template <class T, class U>
void expand_groups(const T* stored, int64_t stored_group, int64_t group, int64_t groups, U* out, int64_t stride = 1) {
  if (stored_group <= group) {
    for (int64_t g = 0; g < groups; ++g) out[g * stride] = stored[g];
    return;
  }
  for (int64_t g = 0, end = stored_group; g < groups; ++g) {
    if (g * group >= end) ++stored, end += stored_group;
    out[g * stride] = *stored;
  }
}

// A row of x as dot kernels read it: padded with zeros, and in blocks of x_block values, those at even places first
// (1: as it is). Each thread has its own.
class DotLayout {
 public:
  DotLayout(int64_t k, int64_t k_padded, int64_t x_block)
      : k_(k), k_padded_(k_padded), block_(x_block), padded_(x_block > 1 ? k_padded : 0) {}

  void operator()(const int8_t* q, int8_t* out) {
    int8_t* const values = block_ > 1 ? padded_.get() : out;
    std::fill(std::copy_n(q, k_, values), values + k_padded_, int8_t{0});
    if (block_ == 1) return;
    for (int64_t i = 0; i < k_padded_; i += block_) {
      for (int64_t j = 0; j < block_ / 2; ++j) {
        out[i + j] = values[i + 2 * j];
        out[i + block_ / 2 + j] = values[i + 2 * j + 1];
      }
    }
  }

 private:
  int64_t k_, k_padded_, block_;
  Buffer<int8_t> padded_;
};

}  // namespace qk
