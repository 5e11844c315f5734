// Few rows of x on CPUs with tile registers: tiles are loaded straight from the stored int8 weight, each byte of which
// is read once from memory, or from a few unpacked rows of an int4 weight; nothing is packed. Bound by memory
// bandwidth.
#include <algorithm>
#include <cstring>

#include "cpu/buffer.h"
#include "cpu/drivers/activations.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/minima.h"
#include "cpu/drivers/rows.h"

namespace qk {
namespace {

// Fewer rows of x are faster one by one, and for more it pays to pack the weight.
constexpr int64_t kMinRows = 3;
constexpr int64_t kMaxPanels = 4;
constexpr int64_t kPanelsAtOnce = 2;

// Rows of x in panels, quantized.
class TileDotOperand : public LinearOperand {
 public:
  TileDotOperand(const Kernels& kernels, const LinearInput& input, const Weight& w, const Parallel&)
      : kernels_(kernels),
        rows_(input.x.rows),
        units_(round_up(div_up(w.k, kernels.panels.unit), kernels.panels.depth_step)),
        panels_(div_up(rows_, kTileRows)),
        data_(panels_ * units_ * kTileRows),
        scales_(rows_),
        x_sums_(kernels, w, rows_) {
    IntRows read(kernels, input, w.k);
    Buffer<uint32_t> rows(kTileRows * units_);
    const uint32_t* sources[kTileRows];
    for (int64_t panel = 0; panel < panels_; ++panel) {
      std::fill_n(rows.get(), kTileRows * units_, 0u);
      for (int64_t i = 0, m = panel * kTileRows; i < kTileRows; ++i, ++m) {
        sources[i] = &rows[i * units_];
        if (m >= rows_) continue;
        const int8_t* q = read(m, &scales_[m]);
        x_sums_.set(m, q, &scales_[m]);
        std::memcpy(&rows[i * units_], q, w.k);
      }
      kernels.panels.interleave(sources, kTileRows, units_, &data_[panel * units_ * kTileRows]);
    }
  }

  void multiply(const Weight& w, const float* bias, const Output& out, const Parallel& parallel) const override;

 private:
  const Kernels& kernels_;
  int64_t rows_, units_, panels_;
  Buffer<uint32_t> data_;  // [panels, units, kTileRows]
  Buffer<float> scales_;   // [M]
  XSums x_sums_;
};

void TileDotOperand::multiply(const Weight& w, const float* bias, const Output& out, const Parallel& parallel) const {
  const Kernels& kernels = kernels_;
  constexpr int kBlockRows = 2 * kTileRows;  // rows of the weight
  const int64_t bytes = units_ * kernels.panels.unit;
  // Whole tiles may reach beyond the end of a row, where they meet zeros, but not beyond the end of the weight.
  const auto is_direct = [&](int64_t n0) {
    return w.scheme.weight->in_place() && (n0 + kBlockRows - 1) * w.row_bytes + bytes <= w.n * w.row_bytes;
  };

  parallel(div_up(w.n, kBlockRows), [&](int64_t begin, int64_t end) {
    const TileState state(kernels, bytes);
    MinimaTile minima(kernels, x_sums_, kTileRows);
    Buffer<int8_t> copy(kBlockRows * bytes);
    Buffer<int32_t> sums(panels_ * kBlockRows * kTileRows);
    Buffer<uint32_t> tile(kTileRows * kBlockRows);
    Buffer<float> scales(kBlockRows), bias_block(kBlockRows);
    const uint32_t* sources[kBlockRows];
    for (int64_t n0 = begin * kBlockRows; n0 < std::min(end * kBlockRows, w.n); n0 += kBlockRows) {
      const int64_t valid = std::min<int64_t>(kBlockRows, w.n - n0);
      const auto* rows = reinterpret_cast<const int8_t*>(w.row(n0));
      int64_t stride = w.row_bytes;
      if (!is_direct(n0)) {
        std::memset(copy.get(), 0, kBlockRows * bytes);
        for (int64_t j = 0; j < valid; ++j) {
          int8_t* row = &copy[j * bytes];
          const int8_t* stored = integer_row(kernels, w, n0 + j, 0, w.k, row);
          if (stored != row) std::memcpy(row, stored, w.k);
        }
        rows = copy.get();
        stride = bytes;
      }
      for (int64_t panel = 0; panel < panels_; panel += kPanelsAtOnce) {
        const auto panels = static_cast<int>(std::min(kPanelsAtOnce, panels_ - panel));
        kernels.tile_registers->dot_tile(units_, rows, stride, &data_[panel * units_ * kTileRows], panels,
                                         &sums[panel * kBlockRows * kTileRows]);
      }
      std::fill_n(scales.get(), kBlockRows, 1.0f);
      std::copy_n(w.scales + n0, valid, scales.get());
      if (bias != nullptr) std::copy_n(bias + n0, valid, bias_block.get());
      for (int64_t panel = 0; panel < panels_; ++panel) {
        const int64_t m0 = panel * kTileRows, m_valid = std::min<int64_t>(kTileRows, rows_ - m0);
        for (int j = 0; j < kBlockRows; ++j) {
          sources[j] = reinterpret_cast<const uint32_t*>(&sums[(panel * kBlockRows + j) * kTileRows]);
        }
        kernels.panels.interleave(sources, kBlockRows, kTileRows, tile.get());
        kernels.tiles.store_int(reinterpret_cast<const int32_t*>(tile.get()),
                                {
                                    .row_scales = &scales_[m0],
                                    .col_scales = scales.get(),
                                    .bias = bias != nullptr ? bias_block.get() : nullptr,
                                    .minima = minima(w, n0, m0, m_valid),
                                    .rows = static_cast<int>(m_valid),
                                    .cols = static_cast<int>(valid),
                                    .out = out.at(m0, n0, w.n),
                                    .stride = out.row_stride(w.n),
                                    .dtype = out.dtype,
                                });
      }
    }
  });
}

}  // namespace

const LinearDriver kTileDot = {
    .name = "tile_dot",
    .reason = "3 to 64 rows of x and no groups: tiles are loaded from the weight as it is stored, which is read once",
    .accepts =
        [](const Kernels& kernels, const Scheme& scheme, int64_t m) {
          return kernels.tile_registers != nullptr && scheme.int_activations() && !scheme.grouped() && m >= kMinRows &&
                 m <= kMaxPanels * kTileRows;
        },
    .prepare = prepare<TileDotOperand>,
};

}  // namespace qk
