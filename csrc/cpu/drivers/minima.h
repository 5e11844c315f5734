// The minima of a `-min` weight in a forward product (docs/numerics.md, rule 16). Drivers multiply its codes as they do
// the integers of any weight, and what is then lacking of output (m, n) is
//     sum over groups g, ascending, of sums[m][g] * minima[n][g],
// where sums[m][g] is the sum of row m of x over group g: of its integers, times their scale, or of its floats.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/drivers/activations.h"
#include "cpu/drivers/drivers.h"

namespace qk {

// The sums of the groups of x; none for a weight without minima.
class XSums {
 public:
  // `used`: the driver multiplies codes, and not the dequantized weight.
  XSums(const Kernels& kernels, const Weight& w, int64_t rows, bool used = true)
      : kernels_(kernels),
        k_(w.k),
        group_(w.scheme.acc_group(w.k)),
        groups_(used && w.minima != nullptr ? div_up(w.k, group_) : 0),
        act_group_(w.scheme.act_group(w.k)),
        sums_(rows * groups_) {}

  bool any() const { return groups_ != 0; }
  int64_t groups() const { return groups_; }
  int64_t group() const { return group_; }
  const float* row(int64_t m) const { return &sums_[m * groups_]; }

  // Row m of integers, whose scales [act groups] are given. One thread for a row.
  void set(int64_t m, const int8_t* q, const float* scales) {
    float* const sums = &sums_[m * groups_];
    for (int64_t g = 0, k0 = 0; g < groups_; ++g, k0 += group_) {
      const auto sum = static_cast<float>(kernels_.elementwise.sum(q + k0, std::min(group_, k_ - k0)));
      sums[g] = sum * scales[k0 / act_group_];
    }
  }

  // Row m of floats.
  void set(int64_t m, const float* x) {
    float* const sums = &sums_[m * groups_];
    for (int64_t g = 0, k0 = 0; g < groups_; ++g, k0 += group_) {
      constexpr int64_t kLanes = 8;
      float lanes[kLanes] = {};
      const int64_t end = std::min(k0 + group_, k_);
      for (int64_t k = k0; k + kLanes <= end; k += kLanes) {
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] += x[k + i];
      }
      for (int64_t i = 0; i < (end - k0) % kLanes; ++i) lanes[i] += x[end - 1 - i];
      sums[g] = std::accumulate(lanes, lanes + kLanes, 0.0f);
    }
  }

 private:
  const Kernels& kernels_;
  int64_t k_, group_, groups_, act_group_;
  Buffer<float> sums_;  // [rows, groups]
};

// The minima of as many rows of a weight as a tile has columns, and their products with rows of x. Each thread has its
// own.
class MinimaTile {
 public:
  // For up to `rows` rows of x at a time.
  MinimaTile(const Kernels& kernels, const XSums& x, int64_t rows)
      : kernels_(kernels),
        x_(x),
        nr_(kernels.tiles.nr),
        panel_(x.groups() * nr_),
        tile_(x.any() ? rows * nr_ : 0),
        sources_(x.any() ? nr_ : 0) {}

  // The products of rows [m0, m0 + rows) of x with the minima of rows n0 and following of w: [rows, nr]; null if it has
  // none.
  const float* operator()(const Weight& w, int64_t n0, int64_t m0, int64_t rows) {
    if (!x_.any()) return nullptr;
    if (const float* const first = w.minima + n0 * w.groups; first != loaded_) load(w, n0), loaded_ = first;
    kernels_.tiles.minima_tile(x_.groups(), x_.row(m0), x_.groups(), rows, panel_.get(), tile_.get());
    return tile_.get();
  }

 private:
  void load(const Weight& w, int64_t n0) {
    const bool stored = w.groups == x_.groups();
    if (!stored && expanded_.empty()) expanded_.resize(nr_ * x_.groups());
    for (int64_t j = 0; j < nr_; ++j) {
      const float* minima = w.minima + std::min(n0 + j, w.n - 1) * w.groups;
      if (!stored) {
        float* const expanded = &expanded_[j * x_.groups()];
        expand_groups(minima, w.group, x_.group(), x_.groups(), expanded);
        minima = expanded;
      }
      sources_[j] = reinterpret_cast<const uint32_t*>(minima);
    }
    kernels_.panels.interleave(sources_.data(), static_cast<int>(nr_), x_.groups(),
                               reinterpret_cast<uint32_t*>(panel_.get()));
  }

  const Kernels& kernels_;
  const XSums& x_;
  int64_t nr_;
  Buffer<float> panel_;          // [groups, nr]
  Buffer<float> tile_;           // [rows, nr]
  std::vector<float> expanded_;  // [nr, groups], where groups of the sums are parts of those of the weight
  std::vector<const uint32_t*> sources_;
  const float* loaded_ = nullptr;  // where the minima of the panel are stored
};

// Adds the minima of columns n0 to n0 + count of the products of w to y [rows, count].
inline void add_minima(const Kernels& kernels, const XSums& x, const Weight& w, int64_t n0, int64_t rows, int64_t count,
                       float* y) {
  if (!x.any()) return;
  const int64_t nr = kernels.tiles.nr;
  MinimaTile minima(kernels, x, rows);
  for (int64_t j0 = 0; j0 < count; j0 += nr) {
    const float* const tile = minima(w, n0 + j0, 0, rows);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t j = j0; j < std::min(j0 + nr, count); ++j)
        y[m * count + j] = y[m * count + j] + tile[m * nr + j - j0];
    }
  }
}

}  // namespace qk
