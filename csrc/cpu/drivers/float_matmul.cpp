// The blocked float matrix driver: x [M, depth] times the dequantized weight, packed panel by panel, for the a16
// schemes (depth = k) and for the gradient with respect to x (depth = n). Neither the weight nor x is converted as a
// whole.
//
// NOTE [parts]. x is packed in parts of at most kMostPacked units: blocks of rows, for each of which the weight is
// packed anew, and, where x is deeper than that allows, ranges of the depth, between which the sums wait in memory. The
// sum of a result is formed in the same order whatever the parts are.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/minima.h"
#include "cpu/drivers/rows.h"
#include "cpu/drivers/split.h"

namespace qk {
namespace {

// A packed block of the weight is kBlockUnits units deep (a multiple of every group size) and kPanels panels wide. It
// stays in L2, and the panel in use in L1, while up to kBlockRows rows of A of the same depth, also in L2, stream by.
// Several panels make the segments of a stored row long enough to be read at speed when depth runs over the rows.
constexpr int64_t kBlockUnits = 256;
constexpr int64_t kPanels = 4;
constexpr int64_t kBlockRows = 384;
constexpr int64_t kMostPacked = int64_t{8} << 20;  // 32 MB
// A part has at least so many rows, for which packing the weight does not count, and at most so many, whose sums of one
// block of the weight a thread holds.
constexpr int64_t kLeastRows = 2 * kBlockRows, kMostRows = 24 * kBlockRows;
// Rows to be transposed together lie a line further apart than their length, so as not to share the same sets of L1.
constexpr int64_t kLineUnits = 16;

// The two formats of panels: how rows become 32-bit units, and the tile that multiplies them.

// Float32: the weight is dequantized.
class Float32 {
 public:
  static constexpr int64_t kUnit = 1;      // depth of a unit
  static constexpr bool kOfCodes = false;  // forward panels hold the integers of the weight, to which minima are added

  static int mr(const Kernels& kernels) { return kernels.tiles.mr_float; }
  static int64_t depth_step(const Kernels&) { return 1; }
  static auto interleave_a(const Kernels& kernels) { return kernels.panels.interleave; }

  Float32(const Kernels& kernels, const Weight& w, bool) : kernels_(kernels), w_(w) {}

  // The units of columns [k0, k0 + count) of row m of x, in place or in scratch.
  static const uint32_t* x_row(const Kernels& kernels, const Matrix& x, int64_t m, int64_t k0, int64_t count,
                               uint32_t* scratch) {
    const Matrix part = {x.at(m, k0), x.dtype, 1, count};
    return reinterpret_cast<const uint32_t*>(float_row(kernels, part, 0, reinterpret_cast<float*>(scratch)));
  }

  // Depth along a stored row: the units of `count` columns from k0 on of weight row n. `scratch` holds count integers.
  void along(int64_t n, int64_t k0, int64_t count, int8_t* scratch, uint32_t* units) const {
    dequantize_row(kernels_, w_, n, k0, count, scratch, reinterpret_cast<float*>(units));
  }

  // Depth across rows: unit i holds the products of scales[r] and q[r][i] for kUnit rows, plus minima[r] if there are
  // any.
  void across(const int8_t* const* q, const float* scales, const float* minima, int64_t count, uint32_t* units) const {
    auto* const values = reinterpret_cast<float*>(units);
    if (minima != nullptr) {
      kernels_.elementwise.dequantize_min(q[0], count, scales[0], minima[0], values);
    } else {
      kernels_.elementwise.dequantize(q[0], count, scales[0], values);
    }
  }

  // Called before `multiply` for a block of this depth and the columns from c0 on.
  void begin_block(int64_t, int64_t, int64_t) {}

  // tile += A * B^T for panel p of the block.
  void multiply(int64_t, int64_t units, const uint32_t* a, const uint32_t* b, float* tile) const {
    kernels_.tiles.float_tile(units, reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), tile);
  }

 private:
  const Kernels& kernels_;
  const Weight& w_;
};

// Bfloat16, see NOTE [bf16].
class Bfloat16 {
 public:
  static constexpr int64_t kUnit = 2;
  static constexpr bool kOfCodes = true;

  static int mr(const Kernels& kernels) { return kernels.bf16->mr; }
  static int64_t depth_step(const Kernels& kernels) { return kernels.bf16->depth_step; }
  static auto interleave_a(const Kernels& kernels) {
    return kernels.bf16->interleave_a != nullptr ? kernels.bf16->interleave_a : kernels.panels.interleave;
  }

  Bfloat16(const Kernels& kernels, const Weight& w, bool grad_input)
      : kernels_(kernels),
        w_(w),
        grad_input_(grad_input),
        scales_(kPanels * kMaxGroups * kernels.tiles.nr),
        sources_(kernels.tiles.nr) {
    std::fill_n(scales_.get(), kPanels * kMaxGroups * kernels.tiles.nr, 1.0f);
  }

  static const uint32_t* x_row(const Kernels&, const Matrix& x, int64_t m, int64_t k0, int64_t count,
                               uint32_t* scratch) {
    scratch[count / 2] = 0;  // an odd row ends in half a unit
    if (count > 0) std::memcpy(scratch, x.at(m, k0), count * size_of(x.dtype));
    return scratch;
  }

  void along(int64_t n, int64_t k0, int64_t count, int8_t* scratch, uint32_t* units) const {
    kernels_.bf16->encode(integer_row(kernels_, w_, n, k0, count, scratch), count, units);
  }

  void across(const int8_t* const* q, const float* scales, const float* minima, int64_t count, uint32_t* units) const {
    if (minima != nullptr) {
      kernels_.bf16->encode_pair_min(q, scales, minima, count, units);
    } else {
      kernels_.bf16->encode_pair(q, scales, count, units);
    }
  }

  // Collects the scales of the groups in the block; those of the gradient are in its panels and stay 1 here.
  void begin_block(int64_t d0, int64_t count, int64_t c0) {
    if (grad_input_) return;
    const int64_t first = d0 / w_.group, groups = div_up(d0 + count, w_.group) - first;
    for (int64_t p = 0; p < kPanels; ++p) {
      for (int64_t j = 0; j < kernels_.tiles.nr; ++j) {
        const int64_t n = std::min(c0 + p * kernels_.tiles.nr + j, w_.n - 1);
        sources_[j] = reinterpret_cast<const uint32_t*>(w_.scales + n * w_.groups + first);
      }
      float* scales = &scales_[p * kMaxGroups * kernels_.tiles.nr];
      kernels_.panels.interleave(sources_.data(), kernels_.tiles.nr, groups, reinterpret_cast<uint32_t*>(scales));
    }
  }

  void multiply(int64_t p, int64_t units, const uint32_t* a, const uint32_t* b, float* tile) const {
    const int64_t group = grad_input_ || w_.groups == 1 ? units : std::min(w_.group / kUnit, units);
    const float* scales = &scales_[p * kMaxGroups * kernels_.tiles.nr];
    for (int64_t u = 0; u < units; u += group, scales += kernels_.tiles.nr) {
      kernels_.bf16->tile(std::min(group, units - u), a + u * kernels_.bf16->mr, b + u * kernels_.tiles.nr, scales,
                          tile);
    }
  }

 private:
  static constexpr int64_t kMaxGroups = kBlockUnits * kUnit / kMinGroup;

  const Kernels& kernels_;
  const Weight& w_;
  bool grad_input_;
  Buffer<float> scales_;  // [kPanels, kMaxGroups, nr]
  std::vector<const uint32_t*> sources_;
};

// A packed block of the weight: panels [kPanels, kBlockUnits, nr], and scratch to make them.
template <class Format>
class FloatWeightBlock {
 public:
  FloatWeightBlock(const Kernels& kernels, const Weight& w, bool grad_input)
      : kernels_(kernels),
        w_(w),
        grad_input_(grad_input),
        format_(kernels, w, grad_input),
        panels_(kPanels * kBlockUnits * kernels.tiles.nr),
        integers_(Format::kUnit * std::max(kBlockUnits, kPanels * kernels.tiles.nr)),
        encoded_(kernels.tiles.nr * kRowUnits),
        rows_(kernels.tiles.nr) {}

  // Packs `count` steps of depth from d0 on, for the columns from c0 on; columns past the end are zero.
  void pack(int64_t d0, int64_t count, int64_t c0) {
    format_.begin_block(d0, count, c0);
    if (grad_input_) {
      pack_across(d0, count, c0);
    } else {
      for (int64_t p = 0; p < kPanels; ++p) pack_along(d0, count, c0 + p * kernels_.tiles.nr, panel(p));
    }
  }

  // tile += A * B^T for panel p.
  void multiply(int64_t p, int64_t units, const uint32_t* a, float* tile) {
    format_.multiply(p, units, a, panel(p), tile);
  }

 private:
  static constexpr int64_t kRowUnits = kBlockUnits + kLineUnits;

  uint32_t* panel(int64_t p) { return &panels_[p * kBlockUnits * kernels_.tiles.nr]; }

  // Units past the end of the depth are zero, see NOTE [tile registers].
  int64_t padded(int64_t units) const { return round_up(units, Format::depth_step(kernels_)); }

  void pack_along(int64_t d0, int64_t count, int64_t n0, uint32_t* panel) {
    const int64_t used = div_up(count, Format::kUnit), units = padded(used);
    for (int64_t j = 0; j < kernels_.tiles.nr; ++j) {
      uint32_t* row = &encoded_[j * kRowUnits];
      rows_[j] = row;
      const bool valid = n0 + j < w_.n;
      if (valid) format_.along(n0 + j, d0, count, integers_.get(), row);
      std::fill(row + (valid ? used : 0), row + units, 0u);
    }
    kernels_.panels.interleave(rows_.data(), kernels_.tiles.nr, units, panel);
  }

  void pack_across(int64_t d0, int64_t count, int64_t k0) {
    constexpr int64_t kUnit = Format::kUnit;
    const int64_t nr = kernels_.tiles.nr, width = kPanels * nr, cols = std::min(width, w_.k - k0);
    const int64_t first_group = k0 / w_.group, first_end = (first_group + 1) * w_.group - k0;
    const int64_t used = div_up(count, kUnit);
    if (cols < width || padded(used) > used) std::fill_n(panels_.get(), kBlockUnits * width, 0u);
    for (int64_t d = 0; d < count; d += kUnit) {
      const int8_t* q[kUnit];
      const float *scales[kUnit], *minima[kUnit];
      for (int64_t r = 0; r < kUnit; ++r) {
        const int64_t n = std::min(d0 + d + r, w_.n - 1);
        q[r] = integer_row(kernels_, w_, n, k0, cols, &integers_[r * width]);
        scales[r] = w_.scales + n * w_.groups + first_group;
        if (w_.minima != nullptr) minima[r] = w_.minima + n * w_.groups + first_group;
      }
      // Segments end where a panel or a group does.
      int64_t p = 0, g = 0, panel_end = nr, group_end = first_end;
      for (int64_t c = 0, end; c < cols; c = end) {
        end = std::min({cols, panel_end, group_end});
        const int8_t* columns[kUnit];
        float scale[kUnit], minimum[kUnit];
        for (int64_t r = 0; r < kUnit; ++r) {
          columns[r] = q[r] + c;
          const bool valid = d + r < count;  // else past the last row
          scale[r] = valid ? scales[r][g] : 0.0f;
          minimum[r] = valid && w_.minima != nullptr ? minima[r][g] : 0.0f;
        }
        format_.across(columns, scale, w_.minima != nullptr ? minimum : nullptr, end - c,
                       panel(p) + d / kUnit * nr + c - (panel_end - nr));
        if (end == panel_end) ++p, panel_end += nr;
        if (end == group_end) ++g, group_end += w_.group;
      }
    }
  }

  const Kernels& kernels_;
  const Weight& w_;
  bool grad_input_;
  Format format_;
  Buffer<uint32_t> panels_;
  Buffer<int8_t> integers_;
  Buffer<uint32_t> encoded_;  // [nr, kRowUnits]: rows to be transposed
  std::vector<const uint32_t*> rows_;
};

// Packs columns [k0, k0 + depth) of panels of x into [blocks, panels, kBlockUnits, mr].
template <class Format>
void pack_a(const Kernels& kernels, const Matrix& x, int64_t k0, int64_t depth, int64_t begin, int64_t end,
            uint32_t* packed) {
  const int64_t mr = Format::mr(kernels), panels = div_up(x.rows, mr), used = div_up(depth, Format::kUnit);
  const int64_t units = round_up(used, Format::depth_step(kernels));
  Buffer<uint32_t> encoded(mr * (units + kLineUnits));
  std::vector<const uint32_t*> rows(mr);
  const auto interleave = Format::interleave_a(kernels);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t i = 0; i < mr; ++i) {
      uint32_t* scratch = &encoded[i * (units + kLineUnits)];
      const int64_t m = panel * mr + i;
      std::fill(scratch + (m < x.rows ? used : 0), scratch + units, 0u);
      rows[i] = m < x.rows ? Format::x_row(kernels, x, m, k0, depth, scratch) : scratch;
    }
    for (int64_t u = 0; u < units; u += kBlockUnits) {
      const int64_t count = std::min(kBlockUnits, units - u);
      interleave(rows.data(), mr, count, packed + (u * panels + panel * count) * mr);
      for (const uint32_t*& row : rows) row += count;
    }
  }
}

// The product of the rows of x, which are a block of them: NOTE [parts].
template <class Format>
void multiply_rows(const Kernels& kernels, const Matrix& x, const Weight& w, bool grad_input, const float* bias,
                   Output out, const Parallel& parallel) {
  const int mr = Format::mr(kernels), nr = kernels.tiles.nr;
  const int64_t units = round_up(div_up(x.cols, Format::kUnit), Format::depth_step(kernels)),
                panels = div_up(x.rows, mr), row_panels = kBlockRows / mr;
  const int64_t cols = grad_input ? w.k : w.n, width = kPanels * nr;
  const Split split(panels, div_up(cols, width), parallel.num_threads);
  const int64_t fits = kMostPacked / (panels * mr) / kBlockUnits * kBlockUnits;
  const int64_t part_units = std::clamp<int64_t>(units, 1, std::max(fits, kBlockUnits));
  const bool one_part = part_units >= units;

  XSums x_sums(kernels, w, x.rows, Format::kOfCodes && !grad_input);
  if (x_sums.any()) {
    parallel(x.rows, [&](int64_t begin, int64_t end) {
      Buffer<float> floats(x.cols);
      for (int64_t m = begin; m < end; ++m) x_sums.set(m, float_row(kernels, x, m, floats.get()));
    });
  }
  Buffer<uint32_t> a(panels * mr * part_units);
  Buffer<float> totals(one_part ? 0 : div_up(cols, width) * panels * mr * width);
  for (int64_t begin_units = 0; begin_units == 0 || begin_units < units; begin_units += part_units) {
    const int64_t end_units = std::min(begin_units + part_units, units), k0 = begin_units * Format::kUnit;
    const int64_t depth = std::min(end_units * Format::kUnit, x.cols) - k0;
    parallel(panels, [&](int64_t begin, int64_t end) { pack_a<Format>(kernels, x, k0, depth, begin, end, a.get()); });

    parallel(split.tasks(), [&](int64_t begin, int64_t end) {
      const TileState state(kernels, Format::kUnit * kGroupStep);
      FloatWeightBlock<Format> b(kernels, w, grad_input);
      Buffer<float> tiles(one_part ? panels * mr * width : 0), ones(std::max(mr, nr)), bias_panel(nr);
      std::fill_n(ones.get(), std::max(mr, nr), 1.0f);
      MinimaTile minima(kernels, x_sums, mr);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c0 = split.column(task) * width;
        const int64_t first = split.row_begin(task), last = split.row_end(task);
        const int64_t used = std::min(kPanels, div_up(cols - c0, nr));
        float* const sums = one_part ? tiles.get() : &totals[split.column(task) * panels * mr * width];
        const auto tile = [&](int64_t p, int64_t panel) { return sums + (p * panels + panel) * mr * nr; };

        for (int64_t p = 0; p < used && begin_units == 0; ++p) std::fill(tile(p, first), tile(p, last), 0.0f);
        for (int64_t u = begin_units; u < end_units; u += kBlockUnits) {
          const int64_t count = std::min(kBlockUnits, end_units - u), d0 = u * Format::kUnit, at = u - begin_units;
          b.pack(d0, std::min(count * Format::kUnit, x.cols - d0), c0);
          for (int64_t block = first; block < last; block += row_panels) {
            for (int64_t p = 0; p < used; ++p) {
              for (int64_t panel = block; panel < std::min(block + row_panels, last); ++panel) {
                b.multiply(p, count, &a[(at * panels + panel * count) * mr], tile(p, panel));
              }
            }
          }
        }
        for (int64_t p = 0; p < used && end_units == units; ++p) {
          const int64_t column = c0 + p * nr, valid = std::min<int64_t>(nr, cols - column);
          if (bias != nullptr) std::copy_n(bias + column, valid, bias_panel.get());
          for (int64_t panel = first; panel < last; ++panel) {
            const int64_t m0 = panel * mr, m_valid = std::min<int64_t>(mr, x.rows - m0);
            kernels.tiles.store_float(tile(p, panel), {
                                                          .row_scales = ones.get(),
                                                          .col_scales = ones.get(),
                                                          .bias = bias != nullptr ? bias_panel.get() : nullptr,
                                                          .minima = minima(w, column, m0, m_valid),
                                                          .rows = static_cast<int>(m_valid),
                                                          .cols = static_cast<int>(valid),
                                                          .out = out.at(m0, column, cols),
                                                          .stride = out.row_stride(cols),
                                                          .dtype = out.dtype,
                                                      });
          }
        }
      }
    });
  }
}

template <class Format>
void matmul(const Kernels& kernels, const Matrix& x, const Weight& w, bool grad_input, const float* bias, Output out,
            const Parallel& parallel) {
  const int64_t units = std::max<int64_t>(div_up(x.cols, Format::kUnit), 1), cols = grad_input ? w.k : w.n;
  const int64_t most = std::clamp(kMostPacked / units / kBlockRows * kBlockRows, kLeastRows, kMostRows);
  const int64_t step = round_up(div_up(x.rows, div_up(x.rows, most)), Format::mr(kernels));
  for (int64_t m = 0; m < x.rows; m += step) {
    const Matrix rows = {x.row(m), x.dtype, std::min(step, x.rows - m), x.cols};
    const Output to = {.data = out.at(m, 0, cols), .dtype = out.dtype, .stride = out.stride};
    multiply_rows<Format>(kernels, rows, w, grad_input, bias, to, parallel);
  }
}

void matmul(const Kernels& kernels, const Matrix& x, const Weight& w, bool grad_input, const float* bias, Output out,
            const Parallel& parallel) {
  // Tile registers may be deeper than the smallest groups, whose sums are scaled apart.
  const auto whole_groups = [&] {
    return w.groups == 1 || w.group % (kernels.bf16->depth_step * Bfloat16::kUnit) == 0;
  };
  const bool bf16 = x.dtype == DType::bfloat16 && kernels.bf16 != nullptr && (grad_input || whole_groups());
  (bf16 ? matmul<Bfloat16> : matmul<Float32>)(kernels, x, w, grad_input, bias, out, parallel);
  if (!bf16 || grad_input || w.minima == nullptr) return;
  // Inf times a code and Inf times a minimum may cancel where Inf times their sum does not: such rows once more.
  constexpr uint32_t kInf = 0x7f800000;
  Buffer<float> scratch(x.cols);
  for (int64_t m = 0; m < x.rows; ++m) {
    const Matrix row = {x.row(m), x.dtype, 1, x.cols};
    if (absmax_bits(kernels, row, scratch.get()) < kInf) continue;
    matmul<Float32>(kernels, row, w, false, bias, {.data = out.at(m, 0, w.n), .dtype = out.dtype}, parallel);
  }
}

// The rows of x are packed block by block, so nothing is kept of them.
class FloatMatmulOperand : public LinearOperand {
 public:
  FloatMatmulOperand(const Kernels& kernels, const LinearInput& input, const Weight&, const Parallel&)
      : kernels_(kernels), x_(input.x) {}

  void multiply(const Weight& w, const float* bias, const Output& out, const Parallel& parallel) const override {
    matmul(kernels_, x_, w, false, bias, out, parallel);
  }

 private:
  const Kernels& kernels_;
  Matrix x_;
};

}  // namespace

const LinearDriver kFloatMatmul = {
    .name = "float_matmul",
    .reason = "many rows of x: it pays to make float panels of the weight, a block of it at a time",
    .accepts = [](const Kernels&, const Scheme& scheme, int64_t) { return !scheme.int_activations(); },
    .prepare = prepare<FloatMatmulOperand>,
};

void float_matmul_grad_input(const Kernels& kernels, const Matrix& grad_out, const Weight& w, const Output& out,
                             const Parallel& parallel) {
  matmul(kernels, grad_out, w, true, nullptr, out, parallel);
}

}  // namespace qk
