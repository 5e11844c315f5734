// Grouped schemes on CPUs with tile registers, any number of rows of x. The weight takes the place of A, so that its
// rows are copied or unpacked as they are stored; a tile of sums leaves the tile registers after each group, and its
// scaled totals stay in vector registers for as many groups as a chunk of the depth has.
//
// A chunk of kBlockRows rows of the weight lies in L1 and meets the panels of a block of x. Of such a block kMostPanels
// are enough to pay for unpacking the weight; as much of their depth as L2 holds meets all rows of the weight before
// the rest of it does, and the totals wait in memory.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/cache.h"
#include "cpu/drivers/activations.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/minima.h"

namespace qk {
namespace {

constexpr int64_t kBlockRows = 2 * kTileRows;  // rows of the weight
constexpr int64_t kChunkDepth = 512;           // of the depth, a multiple of all group sizes
constexpr int64_t kPad = 64;                   // keeps the rows of a chunk out of each other's cache sets
constexpr int64_t kMostPanels = 16;
constexpr int64_t kL2PerBlock = 2;  // a block of x takes this part of L2

// kBlockRows rows of the weight: a chunk of their integers, and the scales of all groups of the sums. Past the end the
// last row is repeated.
class TileWeightBlock {
 public:
  static constexpr int64_t kStride = kChunkDepth + kPad;

  TileWeightBlock(const Kernels& kernels, const Weight& w, int64_t groups)
      : kernels_(kernels),
        w_(w),
        groups_(groups),
        group_(w.scheme.acc_group(w.k)),
        q_(kBlockRows * kStride),
        scales_(w.scheme.group_size != 0 ? kBlockRows * groups : 0) {}

  void load_scales(int64_t n0) {
    if (w_.scheme.group_size == 0) return;
    for (int64_t r = 0; r < kBlockRows; ++r) {
      const float* stored = w_.scales + std::min(n0 + r, w_.n - 1) * w_.groups;
      expand_groups(stored, w_.group, group_, groups_, &scales_[r * groups_]);
    }
  }

  // Columns [k0, k0 + kChunkDepth); those of [begin, end) are read before the rows below.
  void load_chunk(int64_t n0, int64_t k0, int64_t begin, int64_t end) {
    const int64_t count = std::min(kChunkDepth, w_.k - k0), padded = round_up(count, group_);
    const bool last = k0 + kChunkDepth >= end;
    const int64_t next_row = last ? kBlockRows : 0, next_k = last ? begin : k0 + kChunkDepth;
    for (int64_t r = 0; r < kBlockRows; ++r) {
      const int64_t n = std::min(n0 + r, w_.n - 1);
      const uint8_t* next = w_.row(std::min(n + next_row, w_.n - 1)) + w_.scheme.packed_features(next_k);
      for (int64_t i = 0; i < w_.scheme.packed_features(kChunkDepth); i += 64) __builtin_prefetch(next + i, 0, 2);
      int8_t* q = &q_[r * kStride];
      if (const int8_t* stored = integer_row(kernels_, w_, n, k0, count, q); stored != q) std::memcpy(q, stored, count);
      std::memset(q + count, 0, padded - count);
    }
  }

  const int8_t* integers() const { return q_.get(); }
  const float* scales() const { return w_.scheme.group_size != 0 ? scales_.get() : nullptr; }

 private:
  const Kernels& kernels_;
  const Weight& w_;
  int64_t groups_, group_;
  Buffer<int8_t> q_;      // [kBlockRows, kStride]
  Buffer<float> scales_;  // [kBlockRows, groups]
};

// Totals of kBlockRows rows of the weight and panels [first, last) of x, to their place in the result.
class StoreTotals {
 public:
  StoreTotals(const Kernels& kernels, const Weight& w, const XSums& x_sums, const float* bias, Output out, int64_t rows)
      : kernels_(kernels), w_(w), minima_(kernels, x_sums, kTileRows), bias_(bias), out_(out), rows_(rows) {
    std::fill_n(col_scales_, kBlockRows, 1.0f);
  }

  void operator()(const float* row_scales, int64_t n0, int64_t first, int64_t last, const float* totals) {
    const auto cols = static_cast<int>(std::min(kBlockRows, w_.n - n0));
    if (w_.scheme.group_size == 0) std::copy_n(w_.scales + n0, cols, col_scales_);
    if (bias_ != nullptr) std::copy_n(bias_ + n0, cols, bias_block_);
    for (int64_t panel = first; panel < last; ++panel, totals += kBlockRows * kTileRows) {
      const uint32_t* sources[kBlockRows];
      for (int64_t r = 0; r < kBlockRows; ++r) sources[r] = reinterpret_cast<const uint32_t*>(totals + r * kTileRows);
      kernels_.panels.interleave(sources, kBlockRows, kTileRows, tile_);
      const int64_t m0 = panel * kTileRows, valid = std::min<int64_t>(kTileRows, rows_ - m0);
      kernels_.tiles.store_float(reinterpret_cast<const float*>(tile_),
                                 {
                                     .row_scales = row_scales + m0,
                                     .col_scales = col_scales_,
                                     .bias = bias_ != nullptr ? bias_block_ : nullptr,
                                     .minima = minima_(w_, n0, m0, valid),
                                     .rows = static_cast<int>(valid),
                                     .cols = cols,
                                     .out = out_.at(m0, n0, w_.n),
                                     .stride = out_.row_stride(w_.n),
                                     .dtype = out_.dtype,
                                 });
    }
  }

 private:
  const Kernels& kernels_;
  const Weight& w_;
  MinimaTile minima_;
  const float* bias_;
  Output out_;
  int64_t rows_;
  alignas(64) float col_scales_[kBlockRows], bias_block_[kBlockRows] = {};
  alignas(64) uint32_t tile_[kTileRows * kBlockRows];
};

// Panels of kTileRows rows of x, and what belongs to their groups.
class TileGroupsOperand : public LinearOperand {
 public:
  TileGroupsOperand(const Kernels& kernels, const LinearInput& input, const Weight& w, const Parallel& parallel)
      : kernels_(kernels),
        rows_(input.x.rows),
        units_(round_up(w.k, kMaxGroup) / kernels.panels.unit),
        groups_(div_up(w.k, w.scheme.acc_group(w.k))),
        panels_(div_up(rows_, kTileRows)),
        data_(panels_ * units_ * kTileRows),
        group_scales_(w.scheme.act_group_size != 0 ? panels_ * groups_ * kTileRows : 0),
        row_scales_(panels_ * kTileRows),
        x_sums_(kernels, w, rows_) {
    parallel(panels_, [&](int64_t begin, int64_t end) { pack(input, w.scheme, begin, end); });
  }

  void multiply(const Weight& w, const float* bias, const Output& out, const Parallel& parallel) const override;

 private:
  // Panels [begin, end).
  void pack(const LinearInput& input, const Scheme& scheme, int64_t begin, int64_t end) {
    const int64_t k = input.x.cols, group = scheme.acc_group(k), act_group = scheme.act_group(k);
    const bool x_grouped = scheme.act_group_size != 0;
    IntRows read(kernels_, input, act_group);
    Buffer<uint32_t> integers(kTileRows * units_);
    Buffer<float> scales(read.groups());
    const uint32_t* sources[kTileRows];
    for (int64_t panel = begin; panel < end; ++panel) {
      std::memset(integers.get(), 0, kTileRows * units_ * sizeof(uint32_t));
      for (int64_t i = 0; i < kTileRows; ++i) {
        const int64_t m = panel * kTileRows + i;
        sources[i] = &integers[i * units_];
        std::fill_n(scales.get(), read.groups(), 0.0f);
        if (m < rows_) {
          const int8_t* q = read(m, scales.get());
          x_sums_.set(m, q, scales.get());
          std::memcpy(&integers[i * units_], q, k);
        }
        row_scales_[m] = x_grouped ? 1.0f : scales[0];
        if (!x_grouped) continue;
        expand_groups(scales.get(), act_group, group, groups_, &group_scales_[panel * groups_ * kTileRows + i],
                      kTileRows);
      }
      kernels_.panels.interleave(sources, kTileRows, units_, &data_[panel * units_ * kTileRows]);
    }
  }

  const Kernels& kernels_;
  int64_t rows_, units_, groups_, panels_;
  Buffer<uint32_t> data_;       // [panels, units, kTileRows]
  Buffer<float> group_scales_;  // [panels, groups, kTileRows], grouped activations only
  Buffer<float> row_scales_;    // [panels, kTileRows]: 1 where the group scales hold it
  XSums x_sums_;
};

void TileGroupsOperand::multiply(const Weight& w, const float* bias, const Output& out,
                                 const Parallel& parallel) const {
  const Kernels& kernels = kernels_;
  const bool x_grouped = w.scheme.act_group_size != 0;
  const int64_t group = w.scheme.acc_group(w.k), block_panels = std::min(kMostPanels, panels_);
  const int64_t fits = l2_bytes() / kL2PerBlock / (block_panels * kTileRows);  // of the depth, a byte each
  const int64_t depth = std::max(fits / kChunkDepth * kChunkDepth, kChunkDepth);
  const int64_t block_totals = block_panels * kBlockRows * kTileRows;

  parallel(div_up(w.n, kBlockRows), [&](int64_t begin, int64_t end) {
    const TileState state(kernels, group);
    TileWeightBlock block(kernels, w, groups_);
    Buffer<float> totals((depth < w.k ? end - begin : 1) * block_totals);
    StoreTotals store(kernels, w, x_sums_, bias, out, rows_);
    for (int64_t first = 0; first < panels_; first += block_panels) {
      const int64_t last = std::min(first + block_panels, panels_);
      for (int64_t k_begin = 0; k_begin < w.k; k_begin += depth) {
        const int64_t k_end = std::min(k_begin + depth, w.k);
        for (int64_t b = begin; b < end; ++b) {
          const int64_t n0 = b * kBlockRows;
          float* const block_total = &totals[depth < w.k ? (b - begin) * block_totals : 0];
          if (k_begin == 0) std::fill_n(block_total, block_totals, 0.0f);
          block.load_scales(n0);
          for (int64_t k0 = k_begin; k0 < k_end; k0 += kChunkDepth) {
            block.load_chunk(n0, k0, k_begin, k_end);
            const int64_t g0 = k0 / group;
            kernels.tile_registers->dot_tile_grouped({
                .groups = div_up(std::min(kChunkDepth, w.k - k0), group),
                .group = group,
                .w = block.integers(),
                .stride = TileWeightBlock::kStride,
                .panels = last - first,
                .x = &data_[(first * units_ + k0 / kernels.panels.unit) * kTileRows],
                .x_stride = units_ * kTileRows,
                .w_scales = block.scales() != nullptr ? block.scales() + g0 : nullptr,
                .row_groups = groups_,
                .x_scales = x_grouped ? &group_scales_[(first * groups_ + g0) * kTileRows] : nullptr,
                .x_scales_stride = groups_ * kTileRows,
                .totals = block_total,
            });
          }
          if (k_end == w.k) store(row_scales_.get(), n0, first, last, block_total);
        }
      }
    }
  });
}

}  // namespace

const LinearDriver kTileGroups = {
    .name = "tile_groups",
    .reason =
        "many rows of x and a grouped scheme: the rows of the weight are the rows of tiles, whose sums are scaled "
        "group by group",
    .accepts =
        [](const Kernels& kernels, const Scheme& scheme, int64_t) {
          return kernels.tile_registers != nullptr && scheme.int_activations() && scheme.grouped();
        },
    .prepare = prepare<TileGroupsOperand>,
};

}  // namespace qk
