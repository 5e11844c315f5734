// Grouped schemes on CPUs with tile registers, any number of rows of x. The weight takes the place of A, so that its
// rows are copied or unpacked as they are stored; a tile of sums leaves the tile registers after each group, and its
// scaled totals stay in vector registers for as many groups as a chunk of the depth has.
//
// A chunk of kBlock rows of the weight lies in L1 and meets the panels of a block of x. Of such a block kMostPanels are
// enough to pay for unpacking the weight; as much of their depth as L2 holds meets all rows of the weight before the
// rest of it does, and the totals wait in memory.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/drivers/activations.h"
#include "cpu/cache.h"
#include "cpu/drivers/drivers.h"

namespace qk {
namespace {

constexpr int64_t kBlock = 2 * kTileRows;  // rows of the weight
constexpr int64_t kChunk = 512;            // of the depth, a multiple of all group sizes
constexpr int64_t kMaxGroup = 128;
constexpr int64_t kPad = 64;  // keeps the rows of a chunk out of each other's cache sets
constexpr int64_t kMostPanels = 16;
constexpr int64_t kL2PerBlock = 2;  // a block of x takes this part of L2

}  // namespace

// Panels of kTileRows rows of x, and what belongs to their groups.
struct TileOperand::Panels {
  int64_t rows, units, groups, panels;
  Buffer<uint32_t> data;       // [panels, units, kTileRows]
  Buffer<float> group_scales;  // [panels, groups, kTileRows], grouped activations only
  Buffer<float> row_scales;    // [panels, kTileRows]: 1 where the group scales hold it

  Panels(const Kernels& kernels, const Weight& w, int64_t rows)
      : rows(rows),
        units(round_up(w.k, kMaxGroup) / kernels.unit),
        groups(div_up(w.k, w.scheme.acc_group(w.k))),
        panels(div_up(rows, kTileRows)),
        data(panels * units * kTileRows),
        group_scales(w.scheme.act_group_size != 0 ? panels * groups * kTileRows : 0),
        row_scales(panels * kTileRows) {}

  // Panels [begin, end) of the rows that `read` gives.
  template <class Read>
  void pack(const Kernels& kernels, const Weight& w, Read&& read, int64_t begin, int64_t end) {
    const int64_t k = w.k, group = w.scheme.acc_group(k);
    const bool x_grouped = w.scheme.act_group_size != 0;
    Buffer<uint32_t> integers(kTileRows * units);
    Buffer<float> scales(read.scales());
    const uint32_t* sources[kTileRows];
    for (int64_t panel = begin; panel < end; ++panel) {
      std::memset(integers.get(), 0, kTileRows * units * sizeof(uint32_t));
      for (int64_t i = 0; i < kTileRows; ++i) {
        const int64_t m = panel * kTileRows + i;
        sources[i] = &integers[i * units];
        std::fill_n(scales.get(), read.scales(), 0.0f);
        auto* q = reinterpret_cast<int8_t*>(&integers[i * units]);
        if (m < rows) std::memcpy(q, read(m, scales.get()), k);
        row_scales[m] = x_grouped ? 1.0f : scales[0];
        if (!x_grouped) continue;
        for (int64_t g = 0, at = panel * groups * kTileRows + i; g < groups; ++g, at += kTileRows) {
          group_scales[at] = scales[g * group / w.scheme.act_group_size];
        }
      }
      kernels.interleave(sources, kTileRows, units, &data[panel * units * kTileRows]);
    }
  }
};

namespace {

// kBlock rows of the weight: a chunk of their integers, and the scales of all groups of the sums. Past the end the last
// row is repeated.
class WeightBlock {
 public:
  static constexpr int64_t kStride = kChunk + kPad;

  WeightBlock(const Kernels& kernels, const Weight& w, int64_t groups)
      : kernels_(kernels),
        w_(w),
        groups_(groups),
        group_(w.scheme.acc_group(w.k)),
        q_(kBlock * kStride),
        scales_(w.scheme.group_size != 0 ? kBlock * groups : 0) {}

  void load_scales(int64_t n0) {
    if (w_.scheme.group_size == 0) return;
    const int64_t repeat = w_.group / group_;
    for (int64_t r = 0; r < kBlock; ++r) {
      const float* stored = w_.scales + std::min(n0 + r, w_.n - 1) * w_.groups;
      float* row = &scales_[r * groups_];
      if (repeat == 1) std::copy_n(stored, groups_, row);
      for (int64_t g = 0; repeat > 1 && g < groups_; g += repeat)
        std::fill(row + g, row + std::min(g + repeat, groups_), *stored++);
    }
  }

  // Columns [k0, k0 + kChunk); those of [begin, end) are read before the rows below.
  void load_chunk(int64_t n0, int64_t k0, int64_t begin, int64_t end) {
    const int64_t count = std::min(kChunk, w_.k - k0), padded = round_up(count, group_);
    const bool last = k0 + kChunk >= end;
    const int64_t next_row = last ? kBlock : 0, next_k = last ? begin : k0 + kChunk;
    for (int64_t r = 0; r < kBlock; ++r) {
      const int64_t n = std::min(n0 + r, w_.n - 1);
      const uint8_t* next = w_.row(std::min(n + next_row, w_.n - 1)) + w_.scheme.packed_features(next_k);
      for (int64_t i = 0; i < w_.scheme.packed_features(kChunk); i += 64) __builtin_prefetch(next + i, 0, 2);
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
  Buffer<int8_t> q_;      // [kBlock, kStride]
  Buffer<float> scales_;  // [kBlock, groups]
};

// Totals of kBlock rows of the weight and panels [first, last) of x, to their place in the result.
class Store {
 public:
  Store(const Kernels& kernels, const Weight& w, const float* bias, Output out, int64_t rows)
      : kernels_(kernels), w_(w), bias_(bias), out_(out), rows_(rows) {
    std::fill_n(col_scales_, kBlock, 1.0f);
  }

  void operator()(const float* row_scales, int64_t n0, int64_t first, int64_t last, const float* totals) {
    const auto cols = static_cast<int>(std::min(kBlock, w_.n - n0));
    if (w_.scheme.group_size == 0) std::copy_n(w_.scales + n0, cols, col_scales_);
    if (bias_ != nullptr) std::copy_n(bias_ + n0, cols, bias_block_);
    for (int64_t panel = first; panel < last; ++panel, totals += kBlock * kTileRows) {
      const uint32_t* sources[kBlock];
      for (int64_t r = 0; r < kBlock; ++r) sources[r] = reinterpret_cast<const uint32_t*>(totals + r * kTileRows);
      kernels_.interleave(sources, kBlock, kTileRows, tile_);
      const int64_t m0 = panel * kTileRows;
      kernels_.store_float(reinterpret_cast<const float*>(tile_),
                           {
                               .row_scales = row_scales + m0,
                               .col_scales = col_scales_,
                               .bias = bias_ != nullptr ? bias_block_ : nullptr,
                               .rows = static_cast<int>(std::min<int64_t>(kTileRows, rows_ - m0)),
                               .cols = cols,
                               .out = static_cast<char*>(out_.data) + (m0 * w_.n + n0) * size_of(out_.dtype),
                               .stride = w_.n,
                               .dtype = out_.dtype,
                           });
    }
  }

 private:
  const Kernels& kernels_;
  const Weight& w_;
  const float* bias_;
  Output out_;
  int64_t rows_;
  alignas(64) float col_scales_[kBlock], bias_block_[kBlock] = {};
  alignas(64) uint32_t tile_[kTileRows * kBlock];
};

}  // namespace

bool takes_tile_groups(const Kernels& kernels, const Scheme& scheme) {
  return kernels.dot_tile_grouped != nullptr && scheme.grouped();
}

TileOperand::TileOperand(const Kernels& kernels, const Matrix& x, const Weight& w, const Parallel& parallel)
    : kernels_(kernels), panels_(std::make_unique<Panels>(kernels, w, x.rows)) {
  parallel(panels_->panels, [&](int64_t begin, int64_t end) {
    panels_->pack(kernels, w, QuantizeRows(kernels, w.scheme, x), begin, end);
  });
}

TileOperand::TileOperand(const Kernels& kernels, const QuantizedRows& x, const Weight& w, const Parallel& parallel)
    : kernels_(kernels), panels_(std::make_unique<Panels>(kernels, w, x.rows)) {
  parallel(panels_->panels, [&](int64_t begin, int64_t end) {
    panels_->pack(kernels, w, StoredRows(x, w.scheme.act_groups(x.cols)), begin, end);
  });
}

TileOperand::~TileOperand() = default;

void TileOperand::multiply(const Weight& w, const float* bias, Output out, const Parallel& parallel) const {
  const Kernels& kernels = kernels_;
  const Panels& x = *panels_;
  const bool x_grouped = w.scheme.act_group_size != 0;
  const int64_t group = w.scheme.acc_group(w.k), block_panels = std::min(kMostPanels, x.panels);
  const int64_t fits = l2_bytes() / kL2PerBlock / (block_panels * kTileRows);  // of the depth, a byte each
  const int64_t depth = std::max(fits / kChunk * kChunk, kChunk);
  const int64_t block_totals = block_panels * kBlock * kTileRows;

  parallel(div_up(w.n, kBlock), [&](int64_t begin, int64_t end) {
    const TileState state(kernels, group);
    WeightBlock block(kernels, w, x.groups);
    Buffer<float> totals((depth < w.k ? end - begin : 1) * block_totals);
    Store store(kernels, w, bias, out, x.rows);
    for (int64_t first = 0; first < x.panels; first += block_panels) {
      const int64_t last = std::min(first + block_panels, x.panels);
      for (int64_t k_begin = 0; k_begin < w.k; k_begin += depth) {
        const int64_t k_end = std::min(k_begin + depth, w.k);
        for (int64_t b = begin; b < end; ++b) {
          const int64_t n0 = b * kBlock;
          float* const block_total = &totals[depth < w.k ? (b - begin) * block_totals : 0];
          if (k_begin == 0) std::fill_n(block_total, block_totals, 0.0f);
          block.load_scales(n0);
          for (int64_t k0 = k_begin; k0 < k_end; k0 += kChunk) {
            block.load_chunk(n0, k0, k_begin, k_end);
            const int64_t g0 = k0 / group;
            kernels.dot_tile_grouped({
                .groups = div_up(std::min(kChunk, w.k - k0), group),
                .group = group,
                .w = block.integers(),
                .stride = WeightBlock::kStride,
                .panels = last - first,
                .x = &x.data[(first * x.units + k0 / kernels.unit) * kTileRows],
                .x_stride = x.units * kTileRows,
                .w_scales = block.scales() != nullptr ? block.scales() + g0 : nullptr,
                .row_groups = x.groups,
                .x_scales = x_grouped ? &x.group_scales[(first * x.groups + g0) * kTileRows] : nullptr,
                .x_scales_stride = x.groups * kTileRows,
                .totals = block_total,
            });
          }
          if (k_end == w.k) store(x.row_scales.get(), n0, first, last, block_total);
        }
      }
    }
  });
}

}  // namespace qk
